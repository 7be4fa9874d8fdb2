"""Findings about launch scripts, held against what Megatron itself says to the same arguments."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from moeplan.exporters.lint import Finding, lint
from moeplan.exporters.lint_errors import ERRORS
from moeplan.exporters.lint_rules import CHANGES, SLOW
from moeplan.exporters.reading.imported import read_file
from moeplan.profiles.hardware import load_cluster
from tests import megatron
from tests.exporters.reading.judges import SAMPLES, namespace

COMMON = (
    "--num-layers 8 --hidden-size 1024 --ffn-hidden-size 4096 --num-attention-heads 16 --seq-length 2048 "
    "--max-position-embeddings 2048 --position-embedding-type rope --micro-batch-size 1 --global-batch-size 64 "
    "--vocab-size 32000 --swiglu --normalization RMSNorm --disable-bias-linear --bf16 --use-distributed-optimizer "
    "--overlap-grad-reduce "
    "--overlap-param-gather --accumulate-allreduce-grads-in-fp32 --cross-entropy-loss-fusion --hidden-dropout 0.0 "
    "--attention-dropout 0.0 --lr 1e-4 --train-iters 10 --eval-interval 1000 --mock-data --tokenizer-type NullTokenizer"
)
EXPERTS = (
    COMMON + " --num-experts 16 --moe-router-topk 2 --moe-ffn-hidden-size 1024 --expert-model-parallel-size 4 "
    "--expert-tensor-parallel-size 1 --moe-grouped-gemm --moe-permute-fusion --moe-token-dispatcher-type alltoall"
)
WORLD = 8
ONE = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}


def found(tmp_path: Path, flags: str, cluster: str | None = None, environment: dict[str, str] = ONE) -> list[Finding]:
    lines = [f"export {name}={value}" for name, value in environment.items()]
    (tmp_path / "run.args").write_text("\n".join([*lines, flags]))
    return lint(read_file(tmp_path / "run.args", gpus=WORLD), None if cluster is None else load_cluster(cluster))


def rules(findings: list[Finding], severity: str) -> list[str]:
    return [f.rule for f in findings if f.severity == severity]


def verdict(flags: str, environment: dict[str, str] = ONE) -> megatron.Verdict:
    return megatron.accept(shlex.split(flags), world=WORLD, environment=environment, build=True)


@pytest.mark.parametrize("flags", [COMMON, EXPERTS], ids=["dense", "experts"])
def test_nothing_is_wrong_with_what_says_everything(flags: str, tmp_path: Path) -> None:
    assert verdict(flags).accepted
    assert found(tmp_path, flags) == []


BROKEN: list[tuple[str, str, str, str]] = [  # rule, flags of the model, what breaks it, what mends it
    ("one-virtual-flag", COMMON, "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 2 "
     "--num-virtual-stages-per-pipeline-rank 2", ""),
    ("virtual-uneven", COMMON, "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 2 "
     "--decoder-first-pipeline-num-layers 4", ""),
    ("uneven-account", COMMON, "--pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 5 "
     "--account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split", ""),
    ("layout-alone", COMMON, "--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Et*4|t*4L "
     "--decoder-first-pipeline-num-layers 4", ""),
    ("p2p-stages", COMMON, "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2 "
     "--no-overlap-p2p-communication", ""),
    ("fsdp-checkpoint", COMMON, "--ckpt-format fsdp_dtensor", "--ckpt-format torch_dist"),
    ("fsdp-connections", COMMON, "--use-megatron-fsdp --ckpt-format fsdp_dtensor", ""),
    ("capacity-padding", EXPERTS, "--moe-pad-expert-input-to-capacity", "--moe-expert-capacity-factor 1.0"),
    ("recompute-method", COMMON, "--recompute-granularity full", "--recompute-method uniform --recompute-num-layers 1"),
    ("recompute-method", COMMON, "--recompute-granularity selective --recompute-num-layers 1", ""),
    ("graph-nan", COMMON, "--cuda-graph-impl full_iteration", "--no-check-for-nan-in-loss-and-grad"),
    ("fp8-gather", COMMON, "--fp8-param-gather", "--fp8-format hybrid"),
    ("one-quantization", COMMON, "--fp8-format hybrid --fp4-format e2m1", ""),
    ("one-precision", COMMON, "--fp16", ""),
    ("gather-overlap", COMMON.replace("--use-distributed-optimizer", ""), "", "--use-distributed-optimizer"),
    ("gather-overlap", COMMON.replace("--overlap-grad-reduce", ""), "", "--overlap-grad-reduce"),
    ("offload-precision", COMMON, "--optimizer-cpu-offload", "--use-precision-aware-optimizer"),
    ("moment-types", COMMON, "--exp-avg-dtype bf16", "--use-precision-aware-optimizer"),
    ("deepep-flex", EXPERTS, "--moe-enable-deepep", "--moe-token-dispatcher-type flex"),
    ("delay-wgrad", EXPERTS, "--delay-wgrad-compute", "--overlap-moe-expert-parallel-comm"),
    ("expert-bias-score", EXPERTS, "--moe-router-enable-expert-bias", "--moe-router-score-function sigmoid"),
    ("one-expert-softmax", EXPERTS, "--moe-router-topk 1", "--moe-router-pre-softmax"),
    ("latent-groups", COMMON, "--multi-latent-attention --kv-lora-rank 64 --qk-layernorm --group-query-attention", ""),
    ("positions", COMMON, "--max-position-embeddings 1024", "--max-position-embeddings 2048"),
    ("batch-schedule", COMMON, "--step-batch-size-schedule 0:64", ""),
    ("cross-entropy", COMMON, "--cross-entropy-fusion-impl te", "--cross-entropy-fusion-impl native"),
    ("one-data-source", COMMON, "--data-path /data/text", ""),
    ("biased-experts", EXPERTS.replace("--disable-bias-linear", ""), "", "--no-bias-dropout-fusion"),
    ("biased-shared-experts", EXPERTS.replace("--disable-bias-linear", "--no-bias-dropout-fusion"),
     "--moe-shared-expert-intermediate-size 1024", "--disable-bias-linear"),
    ("quantization-padding", EXPERTS, "--moe-router-padding-for-quantization", ""),
    ("distributed-activations", COMMON, "--distribute-saved-activations", ""),
    ("moe-sequence-parallel", EXPERTS, "--tensor-model-parallel-size 2", "--sequence-parallel"),
    ("deepep-group", EXPERTS, "--expert-model-parallel-size 1 --moe-token-dispatcher-type flex",
     "--moe-token-dispatcher-type alltoall"),
    ("global-batch", COMMON, "--global-batch-size 60", "--global-batch-size 64"),
    ("pipeline-split", COMMON, "--num-layers 9 --pipeline-model-parallel-size 2", "--num-layers 8"),
    ("flag-value", COMMON, "--normalization BatchNorm", ""),
    ("flag-value", COMMON, "--lr", ""),
    ("flag-gone", COMMON, "--use-legacy-models", ""),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "model", "breaks", "mends"), BROKEN)
def test_megatron_refuses_what_is_an_error(rule: str, model: str, breaks: str, mends: str, tmp_path: Path) -> None:
    flags = f"{model} {breaks}"
    errors = [f for f in found(tmp_path, flags) if f.severity == "error"]
    assert rule in [f.rule for f in errors] and all(f.fix for f in errors)
    theirs = verdict(flags)
    assert not theirs.accepted
    if mends:
        assert verdict(f"{flags} {mends}").accepted, verdict(f"{flags} {mends}")
        assert rules(found(tmp_path, f"{flags} {mends}"), "error") == []


STOPPED: list[tuple[str, str, str]] = [  # rule, flags, what makes up for it
    ("eval-interval", COMMON.replace("--eval-interval 1000", ""), "--eval-interval 1000"),
    ("eval-interval", COMMON.replace("--eval-interval 1000", "--eval-iters 0"), "--full-validation"),
    ("eval-interval", COMMON + " --eval-interval 0", "--skip-train"),
    ("run-length", COMMON.replace("--train-iters 10", ""), "--train-samples 640"),
    ("learning-rate", COMMON.replace("--lr 1e-4", ""), "--lr 1e-4"),
    ("learning-rate", COMMON.replace("--lr 1e-4", ""), "--skip-train"),
]


@pytest.mark.parametrize(("rule", "flags", "mends"), STOPPED)
def test_a_run_that_stops_once_its_model_is_built(rule: str, flags: str, mends: str, tmp_path: Path) -> None:
    assert rules(found(tmp_path, flags), "error") == [rule]
    assert verdict(flags).accepted and megatron.start(shlex.split(flags), WORLD)
    assert rules(found(tmp_path, f"{flags} {mends}"), "error") == []
    assert megatron.start(shlex.split(f"{flags} {mends}"), WORLD) == ""


def test_every_row_of_errors_was_held_against_megatron() -> None:
    assert {check.rule for check in ERRORS} <= {row[0] for row in (*BROKEN, *STOPPED)} | {"device-connections"}


def test_fp8_with_weights_in_bf16_needs_no_sharded_optimizer(tmp_path: Path) -> None:
    flags = COMMON.replace("--use-distributed-optimizer", "").replace("--overlap-param-gather", "") + " --fp8-format hybrid"
    assert rules(found(tmp_path, flags), "error") == [] and verdict(flags).accepted
    assert "quantized-ddp" in rules(found(tmp_path, f"{flags} --fp8-param-gather"), "error")
    assert not verdict(f"{flags} --fp8-param-gather").accepted


def test_the_environment_that_tensor_parallelism_needs(tmp_path: Path) -> None:
    flags = COMMON + " --tensor-model-parallel-size 2"
    other = {"NCCL_DEBUG": "WARN"}
    assert rules(found(tmp_path, flags, environment=other), "error") == ["device-connections"]
    assert not verdict(flags, other).accepted and verdict(flags).accepted
    assert rules(found(tmp_path, flags, "b200x8", other), "error") == []
    assert rules(found(tmp_path, flags, environment={}), "error") == []  # a file of arguments alone says no environment


CHANGED: list[tuple[str, str, str, str, object]] = [  # rule, flags, what is added, an attribute and what Megatron makes of it
    ("sequence-parallel-off", COMMON, "--sequence-parallel", "sequence_parallel", False),
    ("async-save-off", COMMON, "--async-save", "async_save", False),
    (
        "fp32-gradients", COMMON.replace("--accumulate-allreduce-grads-in-fp32", ""), "",
        "accumulate_allreduce_grads_in_fp32", True,
    ),
    ("feed-forward-default", COMMON.replace("--ffn-hidden-size 4096", ""), "", "ffn_hidden_size", 2688),
    ("expert-width-default", EXPERTS.replace("--moe-ffn-hidden-size 1024", ""), "", "moe_ffn_hidden_size", 4096),
    ("p2p-overlap-off", COMMON, "--pipeline-model-parallel-size 2", "overlap_p2p_comm", False),
    ("global-batch-default", COMMON.replace("--global-batch-size 64", ""), "", "global_batch_size", 8),
    ("backend-ignored", EXPERTS, "--moe-flex-dispatcher-backend hybridep", "moe_token_dispatcher_type", "alltoall"),
    ("offload-ignored", COMMON, "--optimizer-offload-fraction 0.5", "optimizer_cpu_offload", False),
    ("fp8-ignored", COMMON, "--fp8-recipe tensorwise", "fp8", None),
    ("dropout-on", COMMON.replace("--hidden-dropout 0.0", ""), "", "hidden_dropout", 0.1),
    (
        "learned-positions", COMMON.replace("--position-embedding-type rope", ""), "",
        "position_embedding_type", "learned_absolute",
    ),
    ("query-groups-ignored", COMMON, "--num-query-groups 4", "group_query_attention", False),
    ("latent-ignored", COMMON, "--kv-lora-rank 64", "multi_latent_attention", False),
    ("experts-ignored", COMMON, "--moe-router-topk 4", "num_experts", None),
    ("ramp-up-ignored", COMMON, "--rampup-batch-size 8 8 100", "global_batch_size", 64),
    ("flag-idle", COMMON, "--use-dist-ckpt", "ckpt_format", "torch_dist"),
    ("flag-twice", COMMON, "--lr 2e-4", "lr", 2e-4),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "model", "added", "attribute", "value"), CHANGED)
def test_silent_changes_are_what_megatron_does(
    rule: str, model: str, added: str, attribute: str, value: object, tmp_path: Path
) -> None:
    flags = f"{model} {added}"
    findings = found(tmp_path, flags)
    assert rule in rules(findings, "change") and rules(findings, "error") == []
    args, _ = namespace(shlex.split(flags), WORLD, ONE)
    assert getattr(args, attribute) == value


def test_fsdp_turns_the_distributed_optimizer_on(tmp_path: Path) -> None:
    flags = COMMON.replace("--use-distributed-optimizer", "--use-megatron-fsdp --ckpt-format fsdp_dtensor")
    eight = {"CUDA_DEVICE_MAX_CONNECTIONS": "8"}
    assert "fsdp-optimizer" in rules(found(tmp_path, flags, environment=eight), "change")
    args, _ = namespace(shlex.split(flags), WORLD, eight)
    assert args.use_distributed_optimizer is True


def test_the_pattern_of_a_hybrid_counts(tmp_path: Path) -> None:
    flags = COMMON.replace("--num-layers 8", "--num-layers 9 --hybrid-layer-pattern M-M*M-M-").replace("--swiglu", "")
    assert "pattern-layers" in rules(found(tmp_path, flags), "change")
    args, _ = namespace(shlex.split(flags), WORLD, ONE)
    assert args.num_layers == 8


def test_every_change_was_held_against_megatron() -> None:
    held = {row[0] for row in CHANGED} | {"fsdp-optimizer", "pattern-layers"}
    assert {check.rule for check in CHANGES} <= held


COSTLY: list[tuple[str, str]] = [  # rule, flags
    ("dispatcher", EXPERTS.replace("--moe-token-dispatcher-type alltoall", "")),
    (
        "expert-tensor-size",
        EXPERTS.replace("--expert-tensor-parallel-size 1", "--tensor-model-parallel-size 2 --sequence-parallel"),
    ),
    ("grouped-gemm", EXPERTS.replace("--moe-grouped-gemm", "")),
    ("permute-fusion", EXPERTS.replace("--moe-permute-fusion", "")),
    ("cross-entropy-fusion", COMMON.replace("--cross-entropy-loss-fusion", "")),
    ("gradient-overlap", COMMON.replace("--overlap-grad-reduce --overlap-param-gather", "")),
    ("optimizer-shards", COMMON.replace("--use-distributed-optimizer", "").replace("--overlap-param-gather", "")),
    ("full-precision", COMMON.replace("--bf16", "")),
    ("local-layers", COMMON + " --transformer-impl local"),
    ("unfused-attention", COMMON + " --attention-backend unfused"),
    ("fusion-off", COMMON + " --no-masked-softmax-fusion"),
    ("overlap-connections", EXPERTS + " --overlap-moe-expert-parallel-comm"),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "flags"), COSTLY)
def test_defaults_that_cost_time(rule: str, flags: str, tmp_path: Path) -> None:
    findings = found(tmp_path, flags)
    assert rule in rules(findings, "slow") and rules(findings, "error") == []
    assert all(f.saves is None and f.fix for f in findings)


def test_every_slow_row_is_met() -> None:
    assert {check.rule for check in SLOW} <= {row[0] for row in COSTLY}


def test_what_a_fix_saves_is_what_estimate_says(tmp_path: Path) -> None:
    flags = EXPERTS.replace("--moe-token-dispatcher-type alltoall", "") + " --expert-model-parallel-size 8"
    findings = {f.rule: f for f in found(tmp_path, flags, "h100x8") if f.saves is not None}
    assert findings["dispatcher"].saves is not None and findings["dispatcher"].saves > 0.05
    from moeplan.planner.plan import price_plan

    def step_s(words: str) -> float:
        (tmp_path / "run.args").write_text(words)
        imported = read_file(tmp_path / "run.args", gpus=WORLD)
        return price_plan(imported.problem(load_cluster("h100x8")), imported.layout).step_s

    for finding in findings.values():
        assert finding.saves == pytest.approx(1 - step_s(f"{flags} {finding.fix}") / step_s(flags), abs=1e-9), finding.rule


def test_unknown_flags_of_a_program_of_ones_own_are_no_errors(tmp_path: Path) -> None:
    script = "torchrun --nproc-per-node 8 {} " + COMMON + " --moe-grouped-gem"
    for program, severity in (("pretrain_gpt.py", "error"), ("train_ours.py", "change")):
        (tmp_path / "run.sh").write_text(script.format(program))
        unknown = [f for f in lint(read_file(tmp_path / "run.sh")) if f.rule == "flag-unknown"]
        assert [(f.severity, f.fix, f.line) for f in unknown] == [(severity, "--moe-grouped-gemm?", 1)]


@pytest.mark.parametrize(
    ("name", "how", "errors"),
    [
        ("mixtral_8x7b.sh", {}, []),
        ("deepseek_v3.slurm", {}, ["eval-interval"]),
        ("gpt3_175b.sbatch", {}, []),
        ("llama3_8b_mi300.sh", {}, ["eval-interval", "flag-gone"]),
        ("qwen3_moe.sh", {"positional": ["4", "256"]}, ["eval-interval"]),
    ],
)
def test_samples(name: str, how: dict[str, list[str]], errors: list[str]) -> None:
    assert rules(lint(read_file(SAMPLES / name, **how)), "error") == errors  # type: ignore[arg-type]


def test_findings_name_the_line_of_the_script() -> None:
    findings = {f.rule: f for f in lint(read_file(SAMPLES / "mixtral_8x7b.sh"))}
    text = (SAMPLES / "mixtral_8x7b.sh").read_text().splitlines()
    assert "--sequence-parallel" in text[findings["sequence-parallel-off"].line - 1]
    assert "--use-mcore-models" in text[findings["flag-idle"].line - 1]
