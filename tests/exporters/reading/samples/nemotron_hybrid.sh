#!/bin/bash
# A Mamba hybrid, as megatron's own examples start them: one string of options, torchrun over variables of the cluster
export CUDA_DEVICE_MAX_CONNECTIONS=1
MODEL_SCALE=${1:-nano}
if test "$MODEL_SCALE" = "nano"; then
    PATTERN="MEMEM*EMEMEM*EMEMEM*EMEMEM*|EMEMEM*EMEMEMEM*EMEMEMEME"
else
    PATTERN=""
fi
OPTIONS="--hybrid-layer-pattern ${PATTERN} --hidden-size 2688 --num-attention-heads 32 --kv-channels 128 \
  --group-query-attention --num-query-groups 2 --mamba-num-heads 64 --mamba-head-dim 64 --mamba-state-dim 128 \
  --mamba-num-groups 8 --position-embedding-type none --max-position-embeddings 8192 --seq-length 8192 \
  --ffn-hidden-size 1856 --squared-relu --num-experts 128 --moe-router-topk 6 --moe-ffn-hidden-size 1856 \
  --moe-shared-expert-intermediate-size 3712 --moe-router-score-function sigmoid --moe-router-dtype fp32 \
  --moe-router-enable-expert-bias --moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 0.0001 \
  --moe-router-topk-scaling-factor 2.5 --moe-grouped-gemm --moe-permute-fusion --moe-token-dispatcher-type alltoall \
  --disable-bias-linear --normalization RMSNorm --untie-embeddings-and-output-weights --vocab-size 131072 \
  --hidden-dropout 0.0 --attention-dropout 0.0 --tokenizer-type NullTokenizer --mock-data \
  --micro-batch-size 1 --global-batch-size 128 --lr 1e-4 --train-iters 20 --bf16 --spec megatron.core.models.hybrid x"
PARALLEL="--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --expert-model-parallel-size 8 \
  --expert-tensor-parallel-size 1 --sequence-parallel --use-distributed-optimizer --overlap-grad-reduce"
python -m torch.distributed.run --nproc-per-node=8 --nnodes=${NNODES:=4} --node-rank ${NODE_RANK:-0} \
    pretrain_hybrid.py ${OPTIONS/ --spec megatron.core.models.hybrid x/} $PARALLEL "${@:2}" > train.log 2>&1 &
wait
