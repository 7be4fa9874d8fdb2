"""Reading undoes writing: models of the catalog and random layouts; and what people write in other ways."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from moeplan.costmodels.counts import parameter_count
from moeplan.costmodels.model_catalog import load_model, model_names
from moeplan.costmodels.stages import chunk_letters
from moeplan.errors import ExportError, LayoutError, MoeplanError, SchemaError
from moeplan.exporters.megatron_layout import layout_sections
from moeplan.exporters.megatron_model import model_arguments
from moeplan.exporters.reading.flags import catalog, numbers_of, split_words
from moeplan.exporters.reading.imported import Imported, read_file
from moeplan.exporters.reading.megatron_architecture import read_model
from tests import megatron
from tests.exporters.cases import unpriced
from tests.exporters.cases import words as words_of
from tests.exporters.random_layouts import random_case

DENSE = (
    "--num-layers 24 --hidden-size 2048 --num-attention-heads 16 --seq-length 4096 --max-position-embeddings 4096 "
    "--micro-batch-size 1 --global-batch-size 64 --vocab-size 32000 --swiglu --disable-bias-linear --bf16"
)
EXPERTS = DENSE + " --num-experts 16 --moe-ffn-hidden-size 1024 --moe-grouped-gemm"


def read(tmp_path: Path, flags: str, gpus: int = 64) -> Imported:
    (tmp_path / "run.args").write_text(flags)
    return read_file(tmp_path / "run.args", gpus=gpus)


@pytest.mark.parametrize("name", model_names())
def test_models_of_the_catalog_are_recognised(name: str) -> None:
    model = load_model(name)
    length = min(4096, model.max_positions or 4096)
    try:
        flags = [word for flag in model_arguments(model, length) for word in flag]
    except ExportError:
        return
    found = read_model(split_words(flags), length, "x")
    assert model_arguments(found.model, length) == model_arguments(model, length)
    assert dataclasses.replace(found.model, name="", source="", config={}, remarks=()) == dataclasses.replace(
        load_model(found.model.name), name="", source="", config={}, remarks=()
    )
    assert parameter_count(found.model) == parameter_count(model)
    assert found.remarks == []


@pytest.mark.parametrize("seed", range(120))
def test_random_plans_come_back(seed: int, tmp_path: Path) -> None:
    problem, layout = random_case(seed)
    words = words_of(layout_sections(unpriced(problem, layout)))
    try:
        chunks = chunk_letters(problem.model, layout.pp, layout.vpp, layout.stages)
    except LayoutError:
        pytest.skip("a split that nobody can read")
    (tmp_path / "run.args").write_text("\n".join(f"'{w}'" if not w.startswith("--") else w for w in words))
    imported = read_file(tmp_path / "run.args", gpus=layout.world)
    if layout.stages and len(chunks) != layout.pp * layout.vpp:
        return  # Megatron takes the virtual stages from the split
    expected = dataclasses.replace(layout, stages="", sequence_parallel=layout.sequence_parallel and layout.tp > 1)
    if problem.model.moe is None:
        expected = dataclasses.replace(expected, etp=1, edp=layout.edp * layout.etp)
    assert dataclasses.replace(imported.layout, stages="") == expected
    assert chunk_letters(imported.model, layout.pp, layout.vpp, imported.layout.stages) == chunks
    assert imported.workload == dataclasses.replace(problem.workload, era=imported.workload.era)
    assert parameter_count(imported.model) == parameter_count(problem.model)
    assert not imported.unknown and not imported.flags.stray


def test_the_catalog_of_flags_is_that_of_the_parser() -> None:
    theirs = {f: a for f, a in megatron.known_flags().items() if f not in ("-h", "--help")}
    known = catalog()
    assert set(known.takes) - set(known.gone) == set(theirs)
    assert not set(known.gone) & set(theirs) and set(known.idle) <= set(theirs)
    for flag, action in theirs.items():
        assert known.takes[flag] == {0: "switch", None: "value"}.get(action.nargs, "list"), flag
    for name, flag in {**known.dumped, **known.dumped_false}.items():
        assert theirs[flag].dest == name
    stores = {f: a.dest for f, a in theirs.items() if a.const is False and type(a).__name__ == "_StoreFalseAction"}
    assert set(stores.values()) == set(known.dumped_false)


DEFAULTS = {
    "--moe-token-dispatcher-type": "moe_token_dispatcher_type", "--moe-router-topk": "moe_router_topk",
    "--moe-router-score-function": "moe_router_score_function", "--context-parallel-size": "context_parallel_size",
    "--normalization": "normalization", "--position-embedding-type": "position_embedding_type",
    "--expert-model-parallel-size": "expert_model_parallel_size", "--tensor-model-parallel-size": "tensor_model_parallel_size",
    "--pipeline-model-parallel-size": "pipeline_model_parallel_size",
}  # fmt: skip


def test_defaults_are_those_of_the_parser(tmp_path: Path) -> None:
    imported = read(tmp_path, EXPERTS)
    actions = megatron.known_flags()
    for flag in DEFAULTS:
        assert imported.defaults[flag] == str(actions[flag].default), flag
    assert imported.defaults["--ffn-hidden-size"] == str(int(4 * 2048 * 2 / 3 / 64) * 64)
    assert imported.layout.dispatcher == "allgather" and imported.layout.etp == 1


BLOCK = "--recompute-granularity full --recompute-method block --recompute-num-layers"
LAYOUTS: list[tuple[str, str, dict[str, Any]]] = [  # flags besides those of a model, how they are read
    (EXPERTS, "--tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 4", {"etp": 2, "ep": 4}),
    (DENSE, "--pipeline-model-parallel-size 4 --num-layers-per-virtual-pipeline-stage 2", {"pp": 4, "vpp": 3, "stages": ""}),
    (DENSE, "--pipeline-model-parallel-size 4 --decoder-first-pipeline-num-layers 3", {"stages": "Et*3|t*7|t*7|t*7L"}),
    (
        DENSE, "--pipeline-model-parallel-size 4 --decoder-first-pipeline-num-layers 4 --decoder-last-pipeline-num-layers 8 "
        "--num-virtual-stages-per-pipeline-rank 2", {"vpp": 2, "stages": "Ett|t*3|t*3|t*4|tt|t*3|t*3|t*4L"},
    ),
    (
        DENSE.replace("24", "22", 1), "--pipeline-model-parallel-size 4 --account-for-embedding-in-pipeline-split "
        "--account-for-loss-in-pipeline-split", {"stages": "Et*5|t*6|t*6|t*5L"},
    ),
    (DENSE, "--recompute-activations", {"recompute": ("core_attn",)}),
    (DENSE, "--recompute-granularity selective --recompute-modules layernorm mlp", {"recompute": ("layernorm", "mlp")}),
    (DENSE, f"{BLOCK} 24", {"recompute": ("full",), "recompute_layers": ""}),
    (DENSE, f"{BLOCK} 23", {"recompute": ("full",), "recompute_layers": "23"}),
    (DENSE, f"{BLOCK} 0", {"recompute": (), "recompute_layers": ""}),
    (DENSE, f"--pipeline-model-parallel-size 4 {BLOCK} 5", {"recompute": ("full",), "recompute_layers": "5"}),
    (DENSE, f"--pipeline-model-parallel-size 4 {BLOCK} 7", {"recompute": ("full",), "recompute_layers": ""}),
    (
        DENSE, f"--pipeline-model-parallel-size 4 --decoder-first-pipeline-num-layers 3 {BLOCK} 6",
        {"stages": "Et*3|t*7|t*7|t*7L", "recompute_layers": "6"},
    ),
    (EXPERTS, f"--mtp-num-layers 1 {BLOCK} 999", {"recompute": ("full",), "recompute_layers": "24"}),
    (EXPERTS, "--expert-model-parallel-size 8 --moe-token-dispatcher-type flex", {"dispatcher": "deepep"}),
    (EXPERTS, "--moe-token-dispatcher-type flex --moe-flex-dispatcher-backend hybridep", {"dispatcher": "hybridep"}),
    (EXPERTS, "--moe-token-dispatcher-type alltoall_seq", {"dispatcher": "alltoall"}),
    (EXPERTS, "--tensor-model-parallel-size 2 --expert-model-parallel-size 4 --moe-extended-tp", {"ep": 1, "etp": 8}),
    (DENSE, "--use-megatron-fsdp --data-parallel-sharding-strategy optim_grads_params", {"sharding": "fsdp"}),
    (DENSE, "--use-custom-fsdp", {"sharding": "fsdp"}),
    (DENSE, "--use-torch-fsdp2", {"sharding": "fsdp"}),
    (DENSE, "--external-cuda-graph --cuda-graph-scope attn", {"cuda_graphs": ("attn",)}),
    (DENSE, "--cuda-graph-impl local", {"cuda_graphs": ("attn", "mlp")}),
    (DENSE, "--cuda-graph-impl full_iteration", {"cuda_graphs": ("full_iteration",)}),
    (DENSE, "--optimizer-cpu-offload --use-distributed-optimizer", {"optimizer_offload": 1.0}),
    (DENSE, "--sequence-parallel", {"sequence_parallel": False}),
]  # fmt: skip


@pytest.mark.parametrize(("model", "flags", "expected"), LAYOUTS)
def test_other_ways_to_say_it(model: str, flags: str, expected: dict[str, Any], tmp_path: Path) -> None:
    layout = read(tmp_path, f"{model} {flags}").layout
    assert {name: getattr(layout, name) for name in expected} == expected


WORKLOADS: list[tuple[str, dict[str, Any], str]] = [  # flags, what they mean, a part of the remark
    ("--fp8-format hybrid", {"precision": "fp8-delayed-bf16-weights"}, ""),
    ("--fp8-format e4m3 --fp8-recipe mxfp8", {"precision": "fp8-mx-bf16-weights"}, ""),
    ("--fp8-format e4m3 --fp8-recipe mxfp8 --fp8-param-gather", {"precision": "fp8-mx"}, ""),
    ("--fp8-hybrid --fp8-param-gather", {"precision": "fp8-delayed"}, ""),
    ("--fp8-recipe tensorwise", {"precision": "bf16"}, ""),
    ("--fp4-format e2m1", {"precision": "nvfp4"}, ""),
    ("--grad-reduce-in-bf16", {"gradient_bytes": 2}, ""),
    ("--use-precision-aware-optimizer --exp-avg-dtype bf16 --exp-avg-sq-dtype bf16", {"moment_bytes": 2}, ""),
    ("--use-precision-aware-optimizer --exp-avg-dtype fp8 --exp-avg-sq-dtype bf16", {"moment_bytes": 2}, "in bf16 and fp8"),
    ("--optimizer muon", {}, "--optimizer muon is priced as Adam"),
    ("--step-batch-size-schedule '0:64 1000:256'", {"global_batch": 256}, "its last size, 256"),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "expected", "said"), WORKLOADS)
def test_workloads(flags: str, expected: dict[str, Any], said: str, tmp_path: Path) -> None:
    imported = read(tmp_path, f"{DENSE} {flags}")
    workload = {"precision": imported.workload.precision.name, "gradient_bytes": imported.workload.gradient_bytes,
                "moment_bytes": imported.workload.moment_bytes, "global_batch": imported.workload.global_batch}  # fmt: skip
    assert expected.items() <= workload.items()
    assert said in " ".join(imported.remarks)


REFUSED = [  # flags, error
    (DENSE + " --tensor-model-parallel-size 3", LayoutError, "tp*cp*pp = 3*1*1 = 3 does not divide the 64 GPUs"),
    (EXPERTS + " --expert-model-parallel-size 16 --pipeline-model-parallel-size 8", LayoutError, "etp*ep*pp = 1*16*8 = 128"),
    (DENSE + " --tensor-parallel-num-weight-shards 4", LayoutError, "cannot be priced"),
    (DENSE.replace("--hidden-size 2048", ""), MoeplanError, "no --hidden-size"),
    (DENSE.replace("--vocab-size 32000", ""), MoeplanError, "how large the vocabulary is"),
    (DENSE.replace("--seq-length 4096", ""), MoeplanError, "no --seq-length"),
    (DENSE + " --num-layers 0", MoeplanError, "--num-layers 0: a whole number of at least 1 is needed"),
    (DENSE + " --num-layers 99999999999", MoeplanError, "--num-layers 99999999999 is more than the 10000 that can be read"),
    (EXPERTS + " --mtp-num-layers 999999999", MoeplanError, "--mtp-num-layers 999999999 is more than the 10000"),
    (DENSE + " --num-virtual-stages-per-pipeline-rank 999999999", LayoutError, "pp*vpp = 1*999999999 chunks are more than"),
    (DENSE + " --num-attention-heads 0", MoeplanError, "--num-attention-heads 0: a whole number of at least 1"),
    (DENSE + " --seq-length 0", MoeplanError, "--seq-length 0: a whole number of at least 1 is needed"),
    (DENSE + " --micro-batch-size 0", MoeplanError, "--micro-batch-size 0: a whole number of at least 1 is needed"),
    (DENSE + " --ffn-hidden-size -1", MoeplanError, "--ffn-hidden-size -1: a whole number of at least 0 is needed"),
    (DENSE + " --tensor-model-parallel-size", MoeplanError, "--tensor-model-parallel-size has no value"),
    (DENSE + " --num-layers many", MoeplanError, "--num-layers many: a whole number is needed"),
    (EXPERTS + " --moe-layer-freq ([0]*3+[1]*4)", MoeplanError, "is no list of the 24 layers"),
    (DENSE + " --experimental-attention-variant kda", MoeplanError, "cannot be priced"),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "kind", "said"), REFUSED)
def test_what_cannot_be_read_is_refused(flags: str, kind: type[Exception], said: str, tmp_path: Path) -> None:
    with pytest.raises(SchemaError if kind is LayoutError else kind) as caught:
        read(tmp_path, flags)
    assert said in str(caught.value)


FAULTS = [  # flags, fault
    ("--pipeline-model-parallel-size 4 --decoder-first-pipeline-num-layers 5", "24 layers cannot be split over 4 stages"),
    ("--pipeline-model-parallel-size 4 --num-layers-per-virtual-pipeline-stage 5", "are not a multiple of 4 stages of 5"),
    (
        "--pipeline-model-parallel-size 4 --pipeline-model-parallel-layout Et*12|t*12L",
        "its 2 chunks are not a multiple of the 4",
    ),
]


@pytest.mark.parametrize(("flags", "fault"), FAULTS)
def test_splits_that_megatron_refuses_are_read_with_the_fault(flags: str, fault: str, tmp_path: Path) -> None:
    imported = read(tmp_path, f"{DENSE} {flags}")
    assert len(imported.faults) == 1 and fault in imported.faults[0]
    more = "--lr 1e-4 --train-iters 1 --mock-data --tokenizer-type NullTokenizer"
    assert not megatron.accept(f"{DENSE} {flags} {more}".split(), world=64).accepted


def test_groups_of_experts_limit_nothing_without_a_number_of_them(tmp_path: Path) -> None:
    moe = read(tmp_path, f"{EXPERTS} --moe-router-num-groups 4").model.moe
    assert moe is not None and moe.groups == 0
    both = read(tmp_path, f"{EXPERTS} --moe-router-num-groups 4 --moe-router-group-topk 2").model.moe
    assert both is not None and (both.groups, both.group_topk) == (4, 2)


def test_split_of_words() -> None:
    flags = split_words(
        ["stray", "--bf16", "lost", "--lr=3", "--recompute-modules", "a", "b", "--own", "-1", "x", "--num-layers", "7", "8"]
    )
    assert [str(g) for g in flags.given] == ["--bf16", "--lr 3", "--recompute-modules a b", "--own -1 x", "--num-layers 7"]
    assert flags.stray == ["stray", "lost", "8"]


@pytest.mark.parametrize(
    "text", ["([0]*3+[1]*9)", "[1]*12", "([1]*3+[0]*1)*3", "[0,1]*6", "[0]+[1]*11", "([0]*2+([1]*3+[0])*2+[1]*2)"]
)
def test_lists_of_layers_mean_what_megatron_makes_of_them(text: str) -> None:
    assert numbers_of(text, 12, None) == eval(text)


@pytest.mark.parametrize("text", ["[0]*13", "[0", "0]*3", "__import__('os')", "[0]*99999999", "[1]*(2)", "", "([0]*12"])
def test_other_texts_are_no_lists(text: str) -> None:
    assert numbers_of(text, 12, None) is None
