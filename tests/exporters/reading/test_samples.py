"""Scripts as people write them: read as bash runs them and as Megatron understands them, and exported again."""

from __future__ import annotations

import functools
import shlex
from pathlib import Path
from typing import Any

import pytest

from moeplan.costmodels.counts import parameter_count
from moeplan.costmodels.stages import chunk_letters
from moeplan.exporters.megatron_layout import layout_sections
from moeplan.exporters.reading.imported import Imported, read_file
from moeplan.profiles.hardware import load_cluster
from tests import megatron
from tests.exporters.cases import unpriced
from tests.exporters.cases import words as words_of
from tests.exporters.reading.judges import SAMPLES, namespace, recorded

ROWS: list[tuple[str, dict[str, Any], str, dict[str, Any]]] = [  # file, how it is read, model, what the layout says
    ("mixtral_8x7b.sh", {}, "mixtral-8x7b", {"pp": 4, "dp": 2, "ep": 2, "dispatcher": "alltoall"}),
    ("mixtral_8x7b.sh", {"settings": {"NNODES": "4"}}, "mixtral-8x7b", {"pp": 4, "dp": 8, "ep": 2, "edp": 4}),
    (
        "gpt3_175b.sbatch", {}, "gpt-3-175b",
        {"tp": 8, "pp": 8, "vpp": 2, "dp": 2, "sequence_parallel": True, "recompute": ("core_attn",)},
    ),
    (
        "deepseek_v3.slurm", {}, "deepseek-v3",
        {"pp": 8, "vpp": 4, "dp": 32, "ep": 32, "stages": "Et*3|(tt|)*29m|L", "dispatcher": "deepep",
         "recompute": ("moe_act", "layernorm", "mla_up_proj")},
    ),
    ("llama3_8b_mi300.sh", {}, "llama3-8b", {"tp": 8, "micro_batch": 2}),
    (
        "llama3_8b_mi300.sh", {"settings": {"NNODES": "2"}, "positional": ["--tp", "4", "--mbs", "1"]}, "llama3-8b",
        {"tp": 4, "dp": 4, "micro_batch": 1},
    ),
    (
        "qwen3_moe.sh", {"positional": ["4", "256"]}, "qwen3-30b-a3b",
        {"tp": 2, "pp": 2, "dp": 8, "ep": 8, "etp": 2, "stages": "Et*26|t*22L", "dispatcher": "allgather",
         "recompute": ("full",)},
    ),
    (
        "nemotron_hybrid.sh", {}, "nemotron-3-nano-30b-a3b",
        {"tp": 2, "pp": 2, "dp": 8, "ep": 8, "edp": 2, "stages": "Et*27|t*25L"},
    ),
    (
        "model_config.yaml", {"settings": {"EP": "8"}, "gpus": 32}, "model_config",
        {"pp": 4, "vpp": 3, "dp": 8, "ep": 8, "edp": 1, "shared_overlap": True},
    ),
    (
        "llama4_scout.args", {"gpus": 128}, "llama-4-scout-46l-proxy",
        {"tp": 4, "cp": 2, "pp": 2, "dp": 8, "ep": 16, "etp": 4, "edp": 1, "stages": ""},
    ),
]  # fmt: skip
NAMES = [f"{row[0]}-{i}" for i, row in enumerate(ROWS)]
TURNED_DOWN = {"llama3_8b_mi300.sh": "--no-async-tensor-model-parallel-allreduce"}
"""Samples with a flag that the parser no longer has."""


@functools.cache
def read(place: int) -> Imported:
    name, how, _, _ = ROWS[place]
    return read_file(SAMPLES / name, **how)


def command_line(imported: Imported) -> list[str]:
    """The flags of a sample that the parser knows, paths that are not known filled in."""
    gone = TURNED_DOWN.get(Path(imported.path).name)
    given = [g for g in imported.flags.given if g.flag != gone]
    return [word for g in given for word in (g.flag, *(v.replace("\ue000", "").replace("\ue001", "") for v in g.values))]


@pytest.mark.parametrize("place", range(len(ROWS)), ids=NAMES)
def test_model_and_layout(place: int) -> None:
    imported, (_, _, model, layout) = read(place), ROWS[place]
    assert imported.model.name == model
    assert {name: getattr(imported.layout, name) for name in layout} == layout
    gone = TURNED_DOWN.get(Path(imported.path).name)
    assert [g.flag for g in imported.unknown] == ([gone] if gone else [])


@pytest.mark.parametrize("place", [i for i, row in enumerate(ROWS) if not row[0].endswith((".yaml", ".args"))])
def test_bash_starts_the_same_words(place: int, tmp_path: Path) -> None:
    name, how, _, _ = ROWS[place]
    slurm = {"SLURM_NNODES": "32", "SLURM_GPUS_PER_NODE": "8", "SLURM_JOB_NODELIST": "n[1-32]", "DATASET": "/data/set"}
    started = recorded(SAMPLES / name, tmp_path, how.get("positional", ()), **{**slurm, **how.get("settings", {})})
    ours = [w for g in read(place).flags.given for w in (g.flag, *g.values)]
    # 1. flags with an equals sign are one word for bash; 2. values that nothing sets are none
    theirs = [part for word in started for part in (word.split("=", 1) if word.startswith("--") else [word])]
    unset = [w for w in ours if "\ue000" in w]
    assert len(unset) <= 8
    folder = str(tmp_path)
    assert [w for w in ours if w not in unset] == [
        w.replace(folder, ".") for w in theirs if not w.startswith(("/tensorboard", "/data/"))
    ]


@pytest.mark.parametrize("place", range(len(ROWS)), ids=NAMES)
def test_megatron_understands_the_same(place: int) -> None:
    imported = read(place)
    x, workload, model = imported.layout, imported.workload, imported.model
    words, one = command_line(imported), {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    args, _ = namespace(words, imported.world, one)
    experts = model.moe is not None
    theirs = {
        "tp": args.tensor_model_parallel_size, "cp": args.context_parallel_size, "pp": args.pipeline_model_parallel_size,
        "vpp": args.virtual_pipeline_model_parallel_size or 1, "dp": args.data_parallel_size,
        "ep": args.expert_model_parallel_size, "etp": args.expert_tensor_parallel_size if experts else 1,
        "micro_batch": args.micro_batch_size, "sequence_parallel": args.sequence_parallel,
        "dp_overlap": args.overlap_grad_reduce, "tp_overlap": args.tp_comm_overlap,
        "ep_overlap": args.overlap_moe_expert_parallel_comm, "shared_overlap": args.moe_shared_expert_overlap,
    }  # fmt: skip
    assert theirs == {name: getattr(x, name) for name in theirs}
    assert args.use_distributed_optimizer == (x.sharding == "optimizer")
    assert (args.seq_length, args.global_batch_size) == (workload.seq_len, workload.global_batch)
    assert (args.num_layers, args.hidden_size) == (len(model.layers), model.hidden)
    assert (args.fp8 is not None) == workload.precision.name.startswith("fp8")
    assert args.accumulate_allreduce_grads_in_fp32 == (workload.gradient_bytes == 4)
    verdict = megatron.accept(words, world=imported.world, environment=one)
    chunks = chunk_letters(model, x.pp, x.vpp, x.stages)
    ours = tuple(tuple(c.count("t") for c in chunks[rank :: x.pp]) for rank in range(x.pp))
    assert verdict.accepted, verdict
    assert (verdict.layers, verdict.microbatches) == (ours, workload.global_batch // (x.micro_batch * x.dp))


@pytest.mark.parametrize("place", range(len(ROWS)), ids=NAMES)
def test_exported_again_it_is_the_same(place: int, tmp_path: Path) -> None:
    imported = read(place)
    sections = layout_sections(unpriced(imported.problem(load_cluster(f"h100x{imported.world}")), imported.layout))
    (tmp_path / "again.args").write_text(shlex.join(words_of(sections)))
    again = read_file(tmp_path / "again.args", gpus=imported.world)
    assert (again.layout, again.workload) == (imported.layout, imported.workload)
    assert parameter_count(again.model) == parameter_count(imported.model)


@pytest.mark.parametrize("place", range(len(ROWS)), ids=NAMES)
def test_a_log_says_the_same_as_the_script(place: int, tmp_path: Path) -> None:
    imported = read(place)
    _, dump = namespace(command_line(imported), imported.world, {"CUDA_DEVICE_MAX_CONNECTIONS": "1"})
    (tmp_path / "train.log").write_text(f"using world size: {imported.world}\n{dump}> building train ...\n")
    logged = read_file(tmp_path / "train.log", add=["--vocab-size", str(imported.model.vocab)])
    assert logged.kind == "log" and logged.world == imported.world
    assert (logged.layout, logged.workload) == (imported.layout, imported.workload)
    assert parameter_count(logged.model) == parameter_count(imported.model)
