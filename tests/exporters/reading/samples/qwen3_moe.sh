#!/bin/bash
# Azure style: an environment file beside the script, mpirun, one process a GPU, positional arguments.
set -e
HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" &> /dev/null && pwd)"
source "${HERE}/cluster.env"

if [ $# -lt 2 ]; then
    echo "usage: $0 <nodes> <global batch> [more flags]"
    exit 1
fi
NODES=$1; shift
BATCH=$1; shift

declare -a FLAGS
FLAGS=(--num-layers 48 --hidden-size 2048 --ffn-hidden-size 6144 --num-attention-heads 32 --kv-channels 128)
FLAGS+=(--group-query-attention --num-query-groups 4 --qk-layernorm)   # 32 heads over 4 groups
FLAGS+=(--num-experts 128 --moe-router-topk 8 --moe-ffn-hidden-size 768 --moe-layer-freq 1)
FLAGS+=(--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.001 --moe-grouped-gemm)
FLAGS+=(--position-embedding-type=rope --rotary-base=1000000 --normalization=RMSNorm --norm-epsilon=1e-6)
FLAGS+=(--swiglu --disable-bias-linear --untie-embeddings-and-output-weights --vocab-size 151936)
FLAGS+=(--attention-dropout 0.0 --hidden-dropout 0.0 --seq-length 4096 --max-position-embeddings 40960)
FLAGS+=(--tokenizer-type NullTokenizer --mock-data --lr 1e-4 --train-iters 100)
FLAGS+=("--micro-batch-size" "1" "--global-batch-size" "$BATCH" "--bf16")
for pair in tensor:2 pipeline:2 expert:8; do
    FLAGS+=("--${pair%%:*}-model-parallel-size" "${pair##*:}")
done
FLAGS+=(--decoder-last-pipeline-num-layers 22 --sequence-parallel --use-distributed-optimizer)
FLAGS+=(--recompute-granularity full --recompute-method uniform --recompute-num-layers 1)

mpirun --allow-run-as-root -np $((NODES * GPUS_PER_NODE)) --hostfile /job/hostfile \
    -x CUDA_DEVICE_MAX_CONNECTIONS=1 -x NCCL_DEBUG=WARN \
    bash -c 'export RANK=$OMPI_COMM_WORLD_RANK; python3 pretrain_gpt.py "$@"' launch "${FLAGS[@]}" "$@"
