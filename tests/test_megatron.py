"""The judge itself: it says yes and no at the stages that Megatron's sources name, and leaves nothing behind."""

import os
import random
import sys
import warnings

import pytest

from moeplan.exporters.megatron_model import model_arguments
from tests import megatron
from tests.megatron_models import MODELS, launch_arguments

QWEN, LLAMA, DEEPSEEK = (MODELS[name] for name in ("qwen3-30b-a3b", "llama3-8b", "deepseek-v3"))
ONE = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}

ROWS = [  # model, world, flags, stage that refuses it ("" if accepted), a part of the message
    (QWEN, 8, "", "", ""),
    (QWEN, 8, "--no-such-flag 1", "parse", "unrecognized arguments"),
    (QWEN, 8, "--tensor-model-parallel-size 3", "validate", "not divisible by total_model_size"),
    (QWEN, 12, "--expert-model-parallel-size 8 --global-batch-size 48", "groups", "expert_tensor_model_pipeline_parallel"),
    (QWEN, 6, "--expert-model-parallel-size 3 --global-batch-size 48", "validate", "Number of experts"),
    (QWEN, 8, "--tensor-model-parallel-size 8 --sequence-parallel --expert-tensor-parallel-size 1", "", ""),
    (QWEN, 8, "--tensor-model-parallel-size 2", "step", "sequence parallelism"),
    (LLAMA, 8, "--tensor-model-parallel-size 2", "", ""),
    (QWEN, 8, "--global-batch-size 60", "validate", "eval_global_batch_size"),
    (QWEN, 8, "--seq-length 4100 --context-parallel-size 4", "validate", "multiple of 2 * context-parallel-size"),
    (QWEN, 8, "--seq-length 4098 --tensor-model-parallel-size 4 --sequence-parallel", "step", "not divisible by TP x CP"),
    (QWEN, 8, "--pipeline-model-parallel-size 4 --num-virtual-stages-per-pipeline-rank 5", "layers", "divisible by vp_size"),
    (QWEN, 8, "--pipeline-model-parallel-size 4 --num-virtual-stages-per-pipeline-rank 2 --global-batch-size 6", "step", "M=3"),
    (
        QWEN,
        8,
        "--pipeline-model-parallel-size 4 --num-virtual-stages-per-pipeline-rank 2 --global-batch-size 12",
        "step",
        "2 micro",
    ),
    (QWEN, 8, "--num-virtual-stages-per-pipeline-rank 2", "validate", "should be greater than 1"),
    (DEEPSEEK, 256, "--pipeline-model-parallel-size 8 --pipeline-model-parallel-layout Et*3|(tt|)*29m|L", "", ""),
    (DEEPSEEK, 8, "--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Et*30|t*31L", "config", "mtp"),
    (QWEN, 8, "--recompute-granularity full", "config", "recompute_method"),
    (LLAMA, 8, "--recompute-granularity selective --recompute-modules moe_act", "config", "moe_grouped_gemm"),
    (QWEN, 8, "--moe-token-dispatcher-type flex", "step", "deepep"),
    (QWEN, 8, "--overlap-moe-expert-parallel-comm", "config", "expert model parallelism"),
    (QWEN, 8, "--fp8-param-gather", "config", "fp8_param"),
    (QWEN, 8, "--optimizer-cpu-offload", "validate", "precision-aware"),
    (QWEN, 8, "--main-grads-dtype bf16", "config", "main_grads_dtype"),
    (QWEN, 8, "--use-megatron-fsdp --ckpt-format fsdp_dtensor", "validate", "CUDA_DEVICE_MAX_CONNECTIONS"),
]


@pytest.mark.parametrize(("model", "world", "flags", "stage", "message"), ROWS)
def test_verdicts(model: object, world: int, flags: str, stage: str, message: str) -> None:
    verdict = megatron.accept(launch_arguments(model_arguments(model), flags), world=world, environment=ONE)  # type: ignore[arg-type]
    assert (verdict.accepted, verdict.stage) == (not stage, stage), verdict
    assert message in verdict.message


def test_what_is_assumed_of_the_machine() -> None:
    arguments = launch_arguments(model_arguments(QWEN), "--tensor-model-parallel-size 2 --sequence-parallel")
    assert not megatron.accept(arguments, world=8).accepted
    assert megatron.accept(arguments, world=8, capability=(10, 0)).accepted
    assert "compute capability" in megatron.accept(arguments, world=8, environment=ONE, capability=(7, 5)).message
    fp8 = [*arguments, *"--fp8-format hybrid --fp8-recipe tensorwise".split()]
    assert megatron.accept(fp8, world=8, environment=ONE).accepted
    assert "transformer-engine" in megatron.accept(fp8, world=8, environment=ONE, te_version="1.10.0").message


def test_building_finds_what_the_parser_does_not() -> None:
    arguments = launch_arguments(model_arguments(QWEN.cut(2)), "--expert-tensor-parallel-size 5 --global-batch-size 5")
    assert megatron.accept(arguments, world=5).accepted
    assert megatron.accept(arguments, world=5, build=True).stage == "build"


@pytest.mark.parametrize("name", ["llama3-8b", "mixtral-8x7b", "qwen2-57b-a14b", "glm-4.5-air", "nemotron-4-15b", "gpt-3-175b"])
@pytest.mark.parametrize("tp", [1, 4])
def test_stand_ins_hold_what_megatrons_own_layers_hold(name: str, tp: int) -> None:
    model = MODELS[name].cut(4)
    flags = f"--pipeline-model-parallel-size 2 --tensor-model-parallel-size {tp} --expert-tensor-parallel-size {tp}"
    arguments = launch_arguments(model_arguments(model, 4096), flags)
    own = [*arguments, "--transformer-impl", "local", "--no-persist-layer-norm"]
    assert megatron.build_counts(arguments, 8, environment=ONE) == megatron.build_counts(own, 8, environment=ONE)


def test_nothing_is_left_behind() -> None:
    import torch
    import torch.distributed as dist

    before = (dict(os.environ), torch.cuda.current_device, sys.argv[:], sys.excepthook, warnings.filters[:])
    arguments = launch_arguments(model_arguments(QWEN.cut(4)), "--pipeline-model-parallel-size 2 --bf16")
    verdicts = []
    for flags in ("", "--tensor-model-parallel-size 3", "--no-such-flag", "--num-virtual-stages-per-pipeline-rank 2") * 2:
        verdicts.append(megatron.accept([*arguments, *flags.split()], world=4, build=True))
        assert not dist.is_initialized()
    assert verdicts[:4] == verdicts[4:]
    assert before == (dict(os.environ), torch.cuda.current_device, sys.argv[:], sys.excepthook, warnings.filters[:])
    assert not [name for name in sys.modules if name.split(".")[0] in ("transformer_engine", "triton", "deep_ep")]


def test_order_of_cases_does_not_matter() -> None:
    cases = [(launch_arguments(model_arguments(m), flags), world) for m, world, flags, _, _ in ROWS]
    first = [megatron.accept(arguments, world=world, environment=ONE) for arguments, world in cases]
    order = list(range(len(cases))) * 2
    random.Random(1).shuffle(order)
    for i in order:
        assert megatron.accept(cases[i][0], world=cases[i][1], environment=ONE) == first[i]
