#!/bin/bash
###############################################################################
# A script in the style of the ROCm fork: long lists of variables, a log at the end
###############################################################################

while [[ $# -gt 0 ]]; do
  case "$1" in
    --tp) TP="$2"; shift 2 ;;
    --mbs) MBS="$2"; shift 2 ;;
    *) shift ;;
  esac
done

export GPU_MAX_HW_QUEUES=2
export TORCH_NCCL_HIGH_PRIORITY=1
export CUDA_DEVICE_MAX_CONNECTIONS=1
export NVTE_CK_USES_BWD_V3=1

TEE_OUTPUT="${TEE_OUTPUT:-1}"
NO_TRAINING="${NO_TRAINING:-0}" # NO_TRAINING=1: for computing metrics only
TIME_STAMP=$(date +"%Y-%m-%d_%H-%M-%S")
EXP_NAME="${EXP_NAME:-perf}"

TP="${TP:-8}"
PP="${PP:-1}"
CP="${CP:-1}"
MBS="${MBS:-2}"
BS="${BS:-$((MBS * 64))}"
SEQ_LENGTH="${SEQ_LENGTH:-8192}"
TOTAL_ITERS="${TOTAL_ITERS:-50}"
SEQ_PARALLEL="${SEQ_PARALLEL:-1}"
OPTIMIZER="${OPTIMIZER:-adam}"
FSDP="${FSDP:-0}"
RECOMPUTE="${RECOMPUTE:-0}"
TE_FP8="${TE_FP8:-0}"
MODEL_SIZE="${MODEL_SIZE:-8}"

NNODES="${NNODES:-1}"
NODE_RANK="${NODE_RANK:-0}"
GPUS_PER_NODE=`echo "scale=0; 16 / 2" | bc`
WORLD_SIZE=$(expr $GPUS_PER_NODE \* $NNODES)
DP=$((WORLD_SIZE / (TP * PP * CP)))

if [ "$MODEL_SIZE" -eq 8 ]; then
  HIDDEN_SIZE=4096; FFN_HIDDEN_SIZE=14336; NUM_LAYERS=32; NUM_HEADS=32
elif [ "$MODEL_SIZE" -eq 70 ]; then
  HIDDEN_SIZE=8192; FFN_HIDDEN_SIZE=28672; NUM_LAYERS=80; NUM_HEADS=64
else
  echo "Model size not supported"
  exit 1
fi
NUM_GROUPS=8

GPT_ARGS="
    --tensor-model-parallel-size ${TP}
    --pipeline-model-parallel-size ${PP}
    --context-parallel-size ${CP}
    --num-layers ${NUM_LAYERS}
    --hidden-size ${HIDDEN_SIZE}
    --ffn-hidden-size ${FFN_HIDDEN_SIZE}
    --num-attention-heads ${NUM_HEADS}
    --group-query-attention --num-query-groups ${NUM_GROUPS}
    --seq-length ${SEQ_LENGTH}
    --max-position-embeddings 8192
    --untie-embeddings-and-output-weights
    --disable-bias-linear
    --swiglu
    --use-rotary-position-embeddings
    --rotary-base 500000
    --normalization RMSNorm
    --attention-dropout 0
    --hidden-dropout 0
    --micro-batch-size ${MBS}
    --global-batch-size ${BS}
    --lr 1e-4
    --train-iters ${TOTAL_ITERS}
    --bf16
"
DATA_ARGS="--tokenizer-type HuggingFaceTokenizer --tokenizer-model meta-llama/Meta-Llama-3-8B --mock-data"
EXTRA_ARGS="--no-async-tensor-model-parallel-allreduce --distributed-backend nccl"
[ "$SEQ_PARALLEL" = 1 ] && EXTRA_ARGS="$EXTRA_ARGS --sequence-parallel"
if [ "$FSDP" -eq 1 ]; then
  EXTRA_ARGS="$EXTRA_ARGS --use-torch-fsdp2"
else
  EXTRA_ARGS="$EXTRA_ARGS --use-distributed-optimizer --overlap-param-gather --overlap-grad-reduce"
fi
if [ "$RECOMPUTE" -eq 1 ]; then
  EXTRA_ARGS="$EXTRA_ARGS --recompute-num-layers ${NUM_LAYERS} --recompute-granularity full --recompute-method block"
fi
if [ "$TE_FP8" -eq 1 ]; then
  EXTRA_ARGS="$EXTRA_ARGS --fp8-format hybrid --fp8-margin 0 --fp8-amax-compute-algo max"
fi

DISTRIBUTED_ARGS="--nproc_per_node $GPUS_PER_NODE --nnodes $NNODES --node_rank $NODE_RANK
  --master_addr ${MASTER_ADDR:-localhost} --master_port ${MASTER_PORT:-29500}"

run_cmd="
    torchrun $DISTRIBUTED_ARGS pretrain_gpt.py \
        $GPT_ARGS \
        $DATA_ARGS \
        $EXTRA_ARGS \
        $MY_ARGS
"
if [ "$TEE_OUTPUT" -eq 0 ]; then
  run_cmd="$run_cmd >& log.txt"
else
  run_cmd="$run_cmd |& tee log.txt"
fi
if [ "$NO_TRAINING" -eq 0 ]; then
  eval $run_cmd
fi
echo "time per iteration: $(grep -oP 'elapsed time per iteration \(ms\): \K[\d.]+' log.txt | tail -1)"
