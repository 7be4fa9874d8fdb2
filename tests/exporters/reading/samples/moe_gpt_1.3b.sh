#!/bin/bash
# A GPT of 1.3 B parameters with 128 experts in every second layer: Megatron-DeepSpeed, ZeRO as the template has it.
DIR=`pwd`
SEQ_LEN=2048
MODEL_SIZE=1.3
NUM_LAYERS=24
HIDDEN_SIZE=2048
NUM_ATTN_HEADS=16
GLOBAL_BATCH_SIZE=512

## Micro batch of a GPU
BATCH_SIZE=${BATCH_SIZE:-8}
MP_SIZE=1
## Pipelines do not go with experts: keep 1
PP_SIZE=1
NUM_GPUS=64

## EP_SIZE 1 is a dense model
EP_SIZE=128
if [[ $EP_SIZE -gt $NUM_GPUS ]]; then
    EP_PARALLEL_SIZE=$NUM_GPUS
else
    EP_PARALLEL_SIZE=$EP_SIZE
fi
LR=1.2e-4
MLC=0.01
MOE_TRAIN_CAP_FACTOR=1.25
MOE_DROP_TOKEN="true"
# MOE_DROP_TOKEN="false"
ACTIVATION_CHECKPOINT="true"
ZERO_STAGE=1

NAME="gpt-${MODEL_SIZE}B-lr-${LR}-bs-${GLOBAL_BATCH_SIZE}-gpus-${NUM_GPUS}"
if [[ $EP_SIZE -gt 1 ]]; then
    NAME="${NAME}-ep-${EP_SIZE}-mlc-${MLC}-cap-${MOE_TRAIN_CAP_FACTOR}"
fi
current_time=$(date "+%Y.%m.%d-%H.%M.%S")
OUTPUT=${OUTPUT:-output}
mkdir -p "${OUTPUT}/log"

data_options=" \
         --vocab-file gpt2-vocab.json \
         --merge-file gpt2-merges.txt \
         --data-path /data/pile_text_document \
         --data-impl mmap"

megatron_options=" \
        --override-opt_param-scheduler \
        --adam-beta1 0.9 \
        --adam-beta2 0.95 \
        --tensor-model-parallel-size ${MP_SIZE} \
        --moe-expert-parallel-size ${EP_PARALLEL_SIZE} \
        --num-experts ${EP_SIZE} \
        --moe-loss-coeff ${MLC} \
        --moe-train-capacity-factor ${MOE_TRAIN_CAP_FACTOR} \
        --moe-eval-capacity-factor 1.0 \
        --moe-min-capacity 4 \
        --init-method-std 0.014 \
        --lr-decay-tokens 300000000000 \
        --micro-batch-size ${BATCH_SIZE} \
        --global-batch-size ${GLOBAL_BATCH_SIZE} \
        --num-layers ${NUM_LAYERS} \
        --hidden-size ${HIDDEN_SIZE} \
        --num-attention-heads ${NUM_ATTN_HEADS} \
        --seq-length ${SEQ_LEN} \
        --max-position-embeddings ${SEQ_LEN} \
        --train-tokens 300000000000 \
        --train-iters 300000 \
        --lr ${LR} \
        --lr-decay-style cosine \
        --split 98,2,0 \
        --log-interval 10 \
        --eval-interval 100 \
        --eval-iters 10 \
        --weight-decay 0.1 \
        --clip-grad 1.0 \
        --hysteresis 2 \
        --num-workers 0 \
        --bf16 \
        --log-timers-to-tensorboard"

if [ "${ACTIVATION_CHECKPOINT}" = "true" ]; then
megatron_options="${megatron_options} \
        --checkpoint-activations"
fi
if [[ $EP_SIZE -gt 1 ]]; then
megatron_options="${megatron_options} \
        --create-moe-param-group"
fi
if [ "${MOE_DROP_TOKEN}" = "false" ]; then
megatron_options="${megatron_options} \
        --disable-moe-token-dropping"
fi

template_json="ds_config_gpt_TEMPLATE.json"
config_json="ds_config_${NAME}.json"
sed "s/CONFIG_BATCH_SIZE/${GLOBAL_BATCH_SIZE}/" ${template_json} \
    | sed "s/CONFIG_MBSIZE/${BATCH_SIZE}/" \
    | sed "s/LOG_INTERVAL/10/" \
    | sed "s/ZERO_STAGE/${ZERO_STAGE}/" \
    | sed "s/PRESCALE_GRAD/true/" \
    | sed -e "s/CONFIG_FP16_ENABLED/false/" -e "s/CONFIG_BF16_ENABLED/true/" \
      > ${config_json}

deepspeed_options=" \
            --deepspeed \
            --deepspeed_config ${config_json} \
            --pipeline-model-parallel-size ${PP_SIZE}"
if [[ $EP_SIZE -gt 1 ]]; then
deepspeed_options="${deepspeed_options} \
        --no-pipeline-parallel"
fi
if [ "${ACTIVATION_CHECKPOINT}" = "true" ]; then
deepspeed_options="${deepspeed_options} \
        --deepspeed-activation-checkpointing"
fi

run_cmd="deepspeed --hostfile /job/hostfile ${DIR}/pretrain_gpt.py ${megatron_options} ${data_options} ${deepspeed_options} &> ${OUTPUT}/log/${NAME}_${current_time}.log"
echo ${run_cmd}
eval ${run_cmd}
