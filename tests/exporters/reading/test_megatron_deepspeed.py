"""Launch commands of Megatron-DeepSpeed: scripts as people write them, its JSON beside its flags, and our own export."""

from __future__ import annotations

import dataclasses
import json
import random
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from moeplan.costmodels.counts import parameter_count
from moeplan.costmodels.stages import chunk_letters
from moeplan.errors import FileError, LayoutError, ModelError, MoeplanError, SchemaError
from moeplan.exporters.deepspeed import MEGATRON, DeepSpeed
from moeplan.exporters.deepspeed_config import megatron_flags
from moeplan.exporters.lint import lint
from moeplan.exporters.megatron_deepspeed_facts import dialect
from moeplan.exporters.megatron_layout import layout_sections, passed_flags
from moeplan.exporters.reading.flags import catalog
from moeplan.exporters.reading.imported import Imported, plan_text, read_file
from moeplan.exporters.reading.sources import read_launches
from moeplan.planner.plan import Plan, load_plan
from moeplan.profiles.hardware import load_cluster
from tests.exporters.cases import layout_of, problem_of, unpriced, words
from tests.exporters.random_targets import is_taken, write_files
from tests.exporters.reading.judges import SAMPLES, recorded

MOE, DENSE, TEMPLATE = "moe_gpt_1.3b.sh", "dense_pipeline_zero.sh", "ds_config_gpt_TEMPLATE.json"
ROWS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [  # file, how it is read, what the layout says
    (
        MOE, {"gpus": 64},
        {"dp": 64, "ep": 64, "edp": 1, "micro_batch": 8, "sharding": "optimizer", "dispatcher": "alltoall", "dp_overlap": False,
         "recompute": ("full",)},
    ),
    (
        MOE, {"gpus": 128, "settings": {"BATCH_SIZE": "4", "ZERO_STAGE": "0"}},
        {"dp": 128, "edp": 2, "micro_batch": 4, "sharding": "ddp"},
    ),
    (DENSE, {}, {"tp": 4, "pp": 2, "dp": 4, "micro_batch": 2, "sequence_parallel": True, "recompute": ("core_attn",)}),
    (DENSE, {"positional": ["1"], "settings": {"NNODES": "2"}}, {"tp": 1, "pp": 2, "dp": 8, "sequence_parallel": False}),
]  # fmt: skip
PLACES = pytest.mark.parametrize("place", range(len(ROWS)), ids=[f"{row[0]}-{i}" for i, row in enumerate(ROWS)])


def read(place: int) -> Imported:
    name, how, _ = ROWS[place]
    return read_file(SAMPLES / name, **how)


@PLACES
def test_what_a_script_says(place: int) -> None:
    found, wanted = read(place), ROWS[place][2]
    assert found.framework.startswith("Megatron-DeepSpeed") and not found.unknown and not found.faults
    assert {name: getattr(found.layout, name) for name in wanted} == wanted
    assert not any("configuration" in text for text in found.remarks)


def test_the_models() -> None:
    moe, dense = read(0), read(2)
    assert parameter_count(moe.model).total == pytest.approx(52e9, rel=0.02)  # "1.3B+MoE-128" of DeepSpeed-MoE
    assert [layer.is_moe for layer in moe.model.layers] == [False, True] * 12
    assert moe.model.moe is not None and (moe.model.moe.topk, moe.workload.capacity_factor) == (1, 1.25)
    assert dense.model.name == "llama2-13b"
    assert (moe.workload.global_batch, moe.workload.gradient_bytes) == (512, 2)
    assert (dense.workload.global_batch, dense.workload.gradient_bytes) == (256, 4)


@PLACES
def test_bash_starts_the_same_words_and_writes_the_same_configuration(place: int, tmp_path: Path) -> None:
    name, how, _ = ROWS[place]
    for file in (name, TEMPLATE):
        shutil.copy(SAMPLES / file, tmp_path / file)
    settings = {k: v for k, v in how.get("settings", {}).items() if f"{k}=${{{k}" in (SAMPLES / name).read_text()}
    started = recorded(tmp_path / name, tmp_path, how.get("positional", ()), **settings)
    shell, launches = read_launches((SAMPLES / name).read_text(), SAMPLES / name, settings, how.get("positional", ()))
    theirs = [word for word in started if "&>" not in word]
    assert [w.replace(str(tmp_path), ".") for w in theirs] == list(launches[-1].words)
    (written,) = [path for path in tmp_path.glob("ds_*.json") if path.name != TEMPLATE]
    assert shell.files[written.name] == written.read_text()


@PLACES
def test_exported_again_the_degrees_are_the_same(place: int, tmp_path: Path) -> None:
    found = read(place)
    sections = layout_sections(unpriced(found.problem(load_cluster(f"h100x{found.world}")), found.layout))
    (tmp_path / "again.args").write_text(shlex.join(words(sections)))
    again = read_file(tmp_path / "again.args", gpus=found.world)
    assert again.framework.startswith("Megatron-LM")
    assert (again.layout, again.workload) == (found.layout, found.workload)
    assert parameter_count(again.model) == parameter_count(found.model)


def test_flags_of_its_own_do_not_reach_another_framework(tmp_path: Path) -> None:
    found = read(0)
    assert "--data-impl mmap" in map(str, found.passed)
    path = tmp_path / "imported.yaml"
    path.write_text(plan_text(found, load_cluster("h100x64")))
    flags, _ = passed_flags(load_plan(path))
    names = {flag[0] for flag in flags}
    assert {"--lr", "--weight-decay"} <= names and names <= catalog().takes.keys()


@pytest.mark.parametrize("name", ["mixtral_8x7b.sh", DENSE])
def test_tokenizers_are_passed_on(name: str) -> None:
    passed = {g.flag for g in read_file(SAMPLES / name).passed}
    assert {"--tokenizer-type", "--tokenizer-model"} <= passed


# Single flags and the JSON.

BASE = (
    "--deepspeed --num-layers 24 --hidden-size 2048 --num-attention-heads 16 --seq-length 2048 --max-position-embeddings 2048 "
    "--micro-batch-size 4 --global-batch-size 512 --bf16 --no-pipeline-parallel --create-moe-param-group"
)


def command(folder: Path, text: str = "", settings: Any = None, *, gpus: int | None = 64, base: str = BASE) -> Imported:
    """A command line read with the JSON that it names."""
    if settings is not None:
        (folder / "ds.json").write_text(settings if isinstance(settings, str) else json.dumps(settings))
    (folder / "run.args").write_text(f"{base} --deepspeed_config ds.json {text}\n")
    return read_file(folder / "run.args", gpus=gpus)


FLAGS: list[tuple[str, Mapping[str, Any], str]] = [  # flags, what the layout says, words of a remark
    ("--num-experts 1 --moe-expert-parallel-size 8", {"dispatcher": "none", "ep": 1, "edp": 64}, ""),
    ("--num-experts 64 --moe-expert-parallel-size 16", {"ep": 16, "edp": 4}, "4 experts of a rank run one by one"),
    (
        "--num-experts 64 --moe-expert-parallel-size 8 --tensor-model-parallel-size 2 --sequence-parallel",
        {"tp": 2, "dp": 32, "ep": 8, "etp": 1, "edp": 8}, "states over 4 ranks, priced over 8",
    ),
    (
        "--num-experts 64 --moe-expert-parallel-size 8 --tensor-model-parallel-size 2 --enable-expert-tensor-parallelism",
        {"etp": 2, "edp": 4}, "priced with --sequence-parallel only",
    ),
    ("--num-experts 8 --expert-interval 25", {"dispatcher": "none"}, "the model is dense"),
    ("--num-experts 16 --mlp-type residual", {"dispatcher": "alltoall"}, "shared expert of width 8192"),
    ("--zero-stage 0", {"sharding": "ddp"}, ""),
    ("--zero-stage 2", {"sharding": "optimizer"}, "ZeRO 2 is priced as ZeRO 1"),
    ("--zero-stage 3 --remote-device cpu", {"sharding": "fsdp", "dp_overlap": True}, "weights in host memory"),
    ("--cpu-optimizer", {"optimizer_offload": 1.0}, ""),
    ("--checkpoint-activations --checkpoint-num-layers 2", {"recompute": ("full",)}, "units of 2 layers"),
    ("--deepspeed-activation-checkpointing", {"recompute": ()}, "without --checkpoint-activations"),
    ("--recompute-granularity selective --partition-activations", {"recompute": ("core_attn",)}, "activations is not priced"),
    ("--ds-sequence-parallel-size 4", {"cp": 4, "dp": 16}, "priced as context parallelism"),
    ("--use-distributed-optimizer --zero-stage 0", {"sharding": "ddp"}, "no effect under DeepSpeed's engine"),
    ("--num-layers-per-virtual-pipeline-stage 2", {"vpp": 1}, "no effect under DeepSpeed's engine"),
    ("--overlap-grad-reduce", {"dp_overlap": False}, ""),
]  # fmt: skip


@pytest.mark.parametrize(("text", "wanted", "remark"), FLAGS, ids=[row[0] for row in FLAGS])
def test_flags(tmp_path: Path, text: str, wanted: Mapping[str, Any], remark: str) -> None:
    found = command(tmp_path, text)
    assert {name: getattr(found.layout, name) for name in wanted} == wanted
    assert not remark or any(remark in line for line in found.remarks), found.remarks


def test_flags_of_the_model(tmp_path: Path) -> None:
    text = (
        "--num-key-value-heads 4 --rotary-position-embeddings-theta 500000 --use-rotary-position-embeddings --swiglu "
        "--normalization rmsnorm --layernorm-epsilon 1e-6 --tokenizer-type NullTokenizer --vocab-size 31999 "
        "--num-experts 1 1 1 1 1 1 1 1 1 1 32 32 --topk 2 --disable-moe-token-dropping --mlp-type residual"
    )
    found = command(tmp_path, text)
    model, moe = found.model, found.model.moe
    attention = model.layers[0].blocks[0]
    assert (attention.heads, attention.kv_heads) == (16, 4)  # type: ignore[union-attr]
    assert (model.norm, model.norm_eps, model.rope_base, model.vocab, model.tied) == ("rmsnorm", 1e-6, 500000, 32000, True)
    assert [i for i, layer in enumerate(model.layers, 1) if layer.is_moe] == [22, 24]
    assert moe is not None and (moe.topk, moe.width, moe.shared_width, moe.shared_gate) == (2, 5440, 5440, True)
    assert found.workload.capacity_factor == 0 and not found.unknown


def test_defaults_are_its_own(tmp_path: Path) -> None:
    found = command(tmp_path, "--num-experts 64")
    wanted = {
        "--expert-interval": "2",
        "--topk": "1",
        "--moe-train-capacity-factor": "1.0",
        "--tokenizer-type": "GPT2BPETokenizer",
    }
    assert wanted.items() <= found.defaults.items()
    assert not found.defaults.keys() & {"--moe-router-topk", "--moe-token-dispatcher-type", "--expert-tensor-parallel-size"}


def test_flags_that_it_does_not_know(tmp_path: Path) -> None:
    found = command(tmp_path, "--num-experts 64 --expert-model-parallel-size 8 --surprise 1 --train-tokens 3000000")
    assert [str(g) for g in found.unknown] == ["--expert-model-parallel-size 8", "--surprise 1"]
    assert found.layout.ep == 1 and "--train-tokens 3000000" in map(str, found.passed)


CONFIGURATIONS: list[tuple[Any, str, Mapping[str, Any], str]] = [  # JSON, flags, what the layout says, words of a remark
    (
        {"train_batch_size": 256, "zero_optimization": {"stage": 3}, "bf16": {"enabled": True}}, "--zero-stage 1",
        {"sharding": "fsdp"}, "says train_batch_size 256, the command --global-batch-size 512: DeepSpeed takes",
    ),
    ({"train_batch_size": 512, "zero_optimization": {"stage": 0}}, "--zero-stage 1", {"sharding": "ddp"},
     "says ZeRO stage 0, the command --zero-stage 1"),
    ({"train_batch_size": 512}, "", {"sharding": "ddp"}, ""),
    ({"train_micro_batch_size_per_gpu": 2}, "", {"micro_batch": 2},
     "says train_micro_batch_size_per_gpu 2, the command --micro-batch-size 4"),
    ({"train_micro_batch_size_per_gpu": 4, "fp16": {"enabled": True}}, "", {}, "says fp16.enabled true, the command --bf16"),
    ({"train_batch_size": "auto", "zero_optimization": {"stage": "auto"}}, "--zero-stage 3", {"sharding": "fsdp"},
     "'auto' in train_batch_size, zero_optimization is for the Trainer"),
    ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}, "overlap_comm": True}}, "",
     {"optimizer_offload": 1.0, "dp_overlap": True, "micro_batch": 4}, ""),
    ({"zero_optimization": {"stage": 1}}, "--cpu-optimizer", {"optimizer_offload": 0.0}, "offload_optimizer none, the command"),
    ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}, "autotuning": {}}, "", {},
     "not looked at: zero_optimization.zero_hpz_partition_size, autotuning"),
    (None, "--zero-stage 3", {"sharding": "fsdp"}, "'ds.json' is neither beside the file nor written by it"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "text", "wanted", "remark"), CONFIGURATIONS, ids=range(len(CONFIGURATIONS)))
def test_configurations(tmp_path: Path, settings: Any, text: str, wanted: Mapping[str, Any], remark: str) -> None:
    found = command(tmp_path, text, settings)
    assert {name: getattr(found.layout, name) for name in wanted} == wanted
    assert not remark or any(remark in line for line in found.remarks), found.remarks
    batch = settings.get("train_batch_size") if settings else None
    assert found.workload.global_batch == (batch if isinstance(batch, int) else 512)


def test_batch_sizes_say_the_gpus(tmp_path: Path) -> None:
    settings = {"train_batch_size": 512, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 4}
    found = command(tmp_path, "--tensor-model-parallel-size 2", settings, gpus=None)
    assert (found.world, found.layout.dp) == (64, 32) and not found.faults
    wrong = command(tmp_path, "", settings, gpus=64)
    assert wrong.faults == (
        "configuration 'ds.json': train_batch_size 512 is not train_micro_batch_size_per_gpu x gradient_accumulation_steps x dp"
        " = 4 x 4 x 64 = 1024",
    )


def test_values_that_a_variable_leaves_open(tmp_path: Path) -> None:
    settings = '{"train_batch_size": $GB, "zero_optimization": {"stage": 0}}'
    text = f"cat <<EOF > ds.json\n{settings}\nEOF\ndeepspeed --num_gpus 8 p.py {BASE}"
    (tmp_path / "run.sh").write_text(f"{text} --deepspeed_config ds.json\n")
    found = read_file(tmp_path / "run.sh")
    assert (found.workload.global_batch, found.layout.sharding) == (512, "ddp")
    assert any("GB not known without running it; there the flags decide" in line for line in found.remarks)
    assert read_file(tmp_path / "run.sh", settings={"GB": "64"}).workload.global_batch == 64


FAULTS: list[tuple[str, Any, str]] = [
    ("--num-experts 8 --zero-stage 3", None, "ZeRO 3 does not take DeepSpeed's layer of experts"),
    ("--ds-sequence-parallel-size 2 --sequence-parallel", None, "excludes --sequence-parallel"),
]


@pytest.mark.parametrize(("text", "settings", "words_"), FAULTS, ids=[row[0] for row in FAULTS])
def test_what_deepspeed_refuses_is_an_error_of_lint(tmp_path: Path, text: str, settings: Any, words_: str) -> None:
    found = command(tmp_path, text, settings)
    assert any(words_ in fault for fault in found.faults)
    assert any(f.severity == "error" and f.rule == "framework" and words_ in f.message for f in lint(found))


def test_pipelines_and_groups_of_experts(tmp_path: Path) -> None:
    base = BASE.replace("--no-pipeline-parallel", "").replace("--create-moe-param-group", "")
    assert command(tmp_path, "--zero-stage 2", base=base).faults == (
        "ZeRO 2 excludes DeepSpeed's pipeline engine, which runs without --no-pipeline-parallel",
    )
    assert command(tmp_path, "--num-experts 8", base=base).faults == ("experts with ZeRO 1 need --create-moe-param-group",)


@pytest.mark.parametrize(
    ("layers", "pp", "sizes"), [(26, 4, (7, 7, 6, 6)), (30, 4, (8, 8, 7, 7)), (27, 8, (4, 4, 4, 3, 3, 3, 3, 3))]
)
def test_stages_are_those_of_deepspeed(tmp_path: Path, layers: int, pp: int, sizes: tuple[int, ...]) -> None:
    """Sizes are those of deepspeed 0.19.8, `partition_balanced` over the transformer layers."""
    base = BASE.replace("--no-pipeline-parallel", "").replace("--num-layers 24", f"--num-layers {layers}")
    found = command(tmp_path, f"--pipeline-model-parallel-size {pp}", base=base)
    chunks = chunk_letters(found.model, pp, 1, found.layout.stages)
    assert tuple(chunk.count("t") for chunk in chunks) == sizes


REFUSED: list[tuple[str, Any, type[MoeplanError], str]] = [
    ("--num-experts 64 --moe-expert-parallel-size 48", None, LayoutError, "48: it does not divide the 64 data-parallel ranks"),
    ("--num-experts 8 16", None, ModelError, "2 numbers for 12 layers with experts"),
    ("--num-experts 8 8 8 8 8 8 8 8 8 8 16 16", None, ModelError, "layers with 8 and 16 experts in one model cannot be priced"),
    ("--num-experts x", None, ModelError, "whole numbers of at least 1"),
    ("--num-experts 8 --expert-interval 0", None, ModelError, "at least 1"),
    ("--num-experts 8 --mlp-type wide", None, ModelError, "--mlp-type wide cannot be priced"),
    ("--num-experts-switch 8", None, ModelError, "SwitchMLP"),
    ("--pipeline-model-parallel-size 2", None, LayoutError, "2 with --no-pipeline-parallel"),
    ("--zero-stage 7", None, LayoutError, "--zero-stage 7: ZeRO has the stages 0, 1, 2, 3"),
    ("", {"zero_optimization": {"stage": 4}}, SchemaError, "ZeRO stage 4 is none of"),
    ("", {"zero_optimization": 3}, SchemaError, "expected a JSON object"),
    ("", {"train_batch_size": "many"}, SchemaError, "not a whole number"),
    ("", '{"train_batch_size": 1,', SchemaError, "'ds.json' is not JSON"),
    ("", "[1]", SchemaError, "expected a JSON object"),
    ("--tensor-model-parallel-size 3", None, SchemaError, "does not divide the 64 GPUs"),
    ("--micro-batch-size $MB", None, FileError, "MB .for --micro-batch-size"),
]


@pytest.mark.parametrize(("text", "settings", "kind", "message"), REFUSED, ids=range(len(REFUSED)))
def test_what_cannot_be_read(tmp_path: Path, text: str, settings: Any, kind: type[MoeplanError], message: str) -> None:
    with pytest.raises(kind, match=message):
        command(tmp_path, text, settings)


def test_a_hostfile_hides_the_gpus() -> None:
    with pytest.raises(FileError, match="--hostfile .for the number of nodes") as found:
        read_file(SAMPLES / MOE)
    assert "--gpus N" in str(found.value.hint)


def test_its_logs_are_refused(tmp_path: Path) -> None:
    rows = "".join(f"  argument_{i} .... {i}\n" for i in range(20))
    (tmp_path / "log").write_text(
        f"-------- arguments --------\n{rows}  deepspeed_config .... ds.json\n-------- end of arguments --------\n"
    )
    with pytest.raises(FileError, match="dump is one of Megatron-DeepSpeed"):
        read_file(tmp_path / "log")


def test_the_facts_do_not_contradict_each_other() -> None:
    facts = dialect()
    assert set(facts.renamed) <= set(facts.kinds) and set(facts.renamed.values()) <= set(catalog().takes)
    assert set(facts.same) <= set(catalog().takes) and not set(facts.same) & set(facts.renamed)
    assert set(facts.signs) <= set(facts.kinds) and not set(facts.signs) & set(catalog().takes)


# Our own export.


def plan_of(seed: int) -> Plan:
    """A plan that the older layer of experts can run."""
    rng = random.Random(seed)
    world, micro = rng.choice((8, 16, 64, 256)), rng.choice((1, 2, 4))
    name = rng.choice(("mixtral-8x7b", "mixtral-8x22b"))
    case = problem_of(
        name, f"h100x{world}", micro * world * rng.choice((1, 2, 8)),
        rng.choice((1024, 4096, 32768)), gradient_bytes=rng.choice((2, 4)),
    )  # fmt: skip
    layout = layout_of(
        case.model, world, ep=rng.choice((1, 2, 4, 8)), micro_batch=micro, dp_overlap=False,
        recompute=rng.choice(((), ("full",))), optimizer_offload=rng.choice((0.0, 1.0)) * (name == "mixtral-8x7b"),
    )  # fmt: skip
    return unpriced(case, layout)


@pytest.mark.parametrize("seed", range(24))
def test_exported_flags_come_back(tmp_path: Path, seed: int) -> None:
    plan, target = plan_of(seed), DeepSpeed()
    assert is_taken(target, plan) and megatron_flags(plan)
    folder = write_files(target, plan, tmp_path / "out")
    found = read_file(folder / MEGATRON)
    assert (found.layout, found.workload, found.model) == (plan.layout, plan.problem.workload, plan.problem.model)
    assert not found.unknown and not found.faults
    said = json.loads((folder / "megatron_deepspeed.json").read_text())
    assert not said.keys() & {"expert_parallel", "optimizer", "tensor_parallel"}


def test_models_that_its_flags_cannot_say() -> None:
    case = problem_of("qwen3-30b-a3b", "h100x16", 64, 4096)  # norms of queries and keys
    assert megatron_flags(unpriced(case, layout_of(case.model, 16, ep=8, dp_overlap=False))) is None
    mixtral = plan_of(0)
    model = dataclasses.replace(mixtral.problem.model, norm_bias=False, norm="layernorm")
    assert megatron_flags(dataclasses.replace(mixtral, problem=dataclasses.replace(mixtral.problem, model=model))) is None


def test_files_that_are_copied_and_edited(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text('{"train_batch_size": SIZE}')
    text = f"cp t.json ds.json\nsed -i 's/SIZE/128/' ds.json\ndeepspeed --num_gpus 8 p.py {BASE} --deepspeed_config ./ds.json\n"
    (tmp_path / "run.sh").write_text(text)
    assert read_file(tmp_path / "run.sh").workload.global_batch == 128
