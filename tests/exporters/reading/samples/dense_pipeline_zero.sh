#!/usr/bin/env bash
# Llama 2 13B on four nodes: tensor and pipeline parallelism, ZeRO below them.
set -euo pipefail

NNODES=${NNODES:-4}
GPUS_PER_NODE=8
TP=${1:-4}
PP=2
MICRO_BATCH=2
GLOBAL_BATCH=256
ZERO_STAGE=1
DS_CONFIG=ds_zero${ZERO_STAGE}.json

if (( PP > 1 )) && (( ZERO_STAGE > 1 )); then
  echo "pipelines take ZeRO 1 at most" >&2
  exit 1
fi

cat <<EOT > $DS_CONFIG
{
  "train_batch_size" : $GLOBAL_BATCH,
  "train_micro_batch_size_per_gpu": $MICRO_BATCH,
  "steps_per_print": 1,
  "zero_optimization": {
    "stage": $ZERO_STAGE
  },
  "bf16": {
    "enabled": true
  },
  "data_types": {"grad_accum_dtype": "fp32"}
}
EOT

MODEL=(
  --num-layers 40 --hidden-size 5120 --num-attention-heads 40
  --ffn-hidden-size 13824      # two thirds of 4 h
  --seq-length 4096 --max-position-embeddings 4096
  --use-rotary-position-embeddings --swiglu --normalization rmsnorm --layernorm-epsilon 1e-5
  --disable-bias-linear --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
)
DEGREES=(--tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP")
if [ "$TP" -gt 1 ]; then
  DEGREES+=(--sequence-parallel)
fi

ENGINE=" --deepspeed --deepspeed_config=$DS_CONFIG --zero-stage=$ZERO_STAGE "
# ENGINE="--deepspeed-activation-checkpointing ${ENGINE}"

deepspeed --num_nodes "$NNODES" --num_gpus "$GPUS_PER_NODE" pretrain_gpt.py \
  "${MODEL[@]}" "${DEGREES[@]}" \
  --micro-batch-size $MICRO_BATCH --global-batch-size $GLOBAL_BATCH \
  --train-iters 1000 --lr 3e-4 --lr-decay-style cosine --min-lr 3e-5 --weight-decay 0.1 --clip-grad 1 \
  --tokenizer-type GPTSentencePieceTokenizer --tokenizer-model ./tokenizer.model --data-path data/llama_text_document \
  --split 949,50,1 --log-interval 1 --eval-interval 1000 --eval-iters 10 --bf16 --recompute-activations \
  --distributed-backend nccl $ENGINE
