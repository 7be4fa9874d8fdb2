"""Export to torchtitan: what is written, what is refused, and what torchtitan's own code says to it."""

from __future__ import annotations

import ast
import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from moeplan.costmodels.counts import parameter_count
from moeplan.costmodels.model_catalog import load_model
from moeplan.costmodels.stages import chunk_letters
from moeplan.errors import ExportError, FileError, LayoutError, MoeplanError, SchemaError
from moeplan.exporters.demands import broken_demands
from moeplan.exporters.reading.torchtitan import read_fields, read_recipe
from moeplan.exporters.torchtitan import FACTS, TorchTitan, chunk_modules, fields, recipe, registry
from moeplan.exporters.torchtitan_demands import DEMANDS, titan_models
from moeplan.exporters.write import check_reading, export
from moeplan.planner.plan import Plan, price_plan
from tests.exporters import judges
from tests.exporters.cases import layout_of, problem_of, unpriced
from tests.exporters.random_targets import COUNT, changed, exported, refused_plans, taken_plans

TARGET = TorchTitan()


def plan_of(model: str = "qwen3-30b-a3b", world: int = 16, problem: Mapping[str, Any] | None = None, **layout: Any) -> Plan:
    """A plan that torchtitan runs, but for what is changed."""
    case = problem_of(model, f"h100x{world}", **{"batch": 64, "seq_len": 4096, **(problem or {})})
    if "moe_schedule" in layout:  # no plan for Megatron has one
        case = dataclasses.replace(case, target="research")
    if case.model.mtp and "mtp" not in layout:
        case = dataclasses.replace(case, model=dataclasses.replace(case.model, mtp=()))
    layout.pop("mtp", None)
    usual = {"ep": 8 if case.model.moe else 1, "sharding": "fsdp"}
    return unpriced(case, layout_of(case.model, world, **{**usual, **layout}))


def test_a_recipe_with_everything() -> None:
    plan = plan_of(world=64, tp=2, pp=2, vpp=2, dispatcher="deepep", recompute=("full",), tp_overlap=True)
    found = read_recipe(recipe(plan, "0.3.0"), "recipe", "plan")
    assert found["training.local_batch_size"] == 4 and found["parallelism.pipeline_parallel_microbatch_size"] == 1
    assert found["parallelism.pipeline_parallel_schedule"] == "Interleaved1F1B"
    assert found["parallelism.data_parallel_shard_degree"] == 16 and found["parallelism.expert_parallel_degree"] == 8
    assert found["model_registry.moe_comm_backend"] == "deepep" and found["model_registry.module"] == "qwen3"
    assert found["activation_checkpoint"] == "FullAC" and found["compile.enable_async_tensor_parallel"] is True


def test_modules_follow_the_split() -> None:
    plan = plan_of("deepseek-v3", 64, pp=4, vpp=2, stages="Et*4|(t*8|)*6t*9L", problem={"batch": 64})
    parts = chunk_modules(plan)
    assert parts[0] == ["tok_embeddings", "layers.0", "layers.1", "layers.2", "layers.3"]
    assert parts[-1] == [f"layers.{i}" for i in range(52, 61)] + ["norm", "lm_head"] and len(parts) == 8


# Demands that torchtitan's own code enforces: rule, what breaks it, what to replace in a recipe that breaks nothing (none: the
# plan itself is written, past the check), a part of its words.
FLAVOR, EXPERTS, BACKEND = "flavor='30B-A3B'", "expert_parallel_degree=", "moe_comm_backend='standard'"
REJECTED: list[tuple[str, dict[str, Any], tuple[str, str] | None, str]] = [
    ("model", {"model": "mixtral-8x7b"}, (FLAVOR, "flavor='8x7B'"), "KeyError: '8x7B'"),
    ("positions", {"model": "deepseek-v2-lite", "problem": {"seq_len": 32768}}, None, "exceeds attention RoPE maximum"),
    ("expert-tensor", {"etp": 2}, (EXPERTS, f"expert_tensor_parallel_degree=2, {EXPERTS}"), "unexpected keyword argument"),
    ("key-heads", {"tp": 8, "ep": 2}, None, "must divide n_kv_heads"),
    ("dispatcher", {"dispatcher": "allgather"}, (BACKEND, "moe_comm_backend='allgather'"), "allgather"),
    ("dispatcher", {"dispatcher": "hybridep", "ep": 1}, None, "requires expert parallelism"),
    ("cuda-graphs", {"cuda_graphs": ("attn",)}, None, "CUDA graphs support only"),
    ("cuda-graphs", {"cuda_graphs": ("full_iteration",)}, None, "CUDA graphs support only"),
    ("cuda-graphs", {"model": "qwen3-8b", "pp": 2, "cuda_graphs": ("full_iteration",)}, None, "do not support pipeline"),
    ("prediction-layers", {"model": "deepseek-v3", "mtp": 1, "cp": 2}, None, "MTP does not support context parallelism"),
    ("prediction-layers", {"model": "deepseek-v3", "mtp": 1, "pp": 2, "stages": "Et*30|t*31mL"}, None, "MTP"),
    ("tied-pipeline", {"model": "qwen3-4b", "pp": 2}, None, "Weight tying is not supported with Pipeline Parallel"),
]

# Demands that it does not: rule, what breaks it, why the job would die or be another one than was priced.
SILENT: list[tuple[str, dict[str, Any], str]] = [
    ("sharding", {"sharding": "optimizer"}, "there is no ZeRO 1: FSDP gathers weights layer by layer, which is another step"),
    ("sharding", {"model": "qwen3-8b", "sharding": "ddp", "cp": 2}, "weights are sharded over the ranks of cp all the same"),
    ("sharding", {"sharding": "ddp", "ep": 1, "tp": 2}, "experts are sharded over the ranks of tp all the same"),
    ("gradient-overlap", {"dp_overlap": False}, "FSDP overlaps always: a shorter step, with buffers that were not counted"),
    ("ep-overlap-shared-overlap", {"ep_overlap": True}, "no field asks for it: a longer step"),
    ("moe-schedule", {"moe_schedule": "s1"}, "no field asks for it: another step"),
    ("recompute", {"recompute": ("moe_act",)}, "whole layers would be recomputed: a longer step"),
    ("recompute-layers", {"recompute": ("full",), "recompute_layers": "2"}, "all layers would be recomputed: a longer step"),
    ("precision", {"problem": {"precision": "fp8-cs"}}, "training is in bf16: more time and memory"),
    ("precision", {"problem": {"gradient_bytes": 2}}, "gradients are reduced in fp32: twice the bytes"),
    (
        "capacity",
        {"problem": {"capacity_factor": 1.25}},
        "no token is dropped: a crowded expert takes more memory than was counted",
    ),
    (
        "offload",
        {"model": "qwen3-8b", "sharding": "optimizer", "optimizer_offload": 1.0},
        "states stay on the device: out of memory",
    ),
]
REFUSED = [(rule, change) for rule, change, *_ in (*REJECTED, *SILENT)]


@pytest.mark.parametrize(("rule", "change"), REFUSED, ids=[f"{i}-{row[0]}" for i, row in enumerate(REFUSED)])
def test_refused(rule: str, change: dict[str, Any]) -> None:
    with pytest.raises(ExportError, match=rf"torchtitan 0\.3\.0 cannot run this plan: .*\(rule {rule}: "):
        TARGET.check(plan_of(**change), "0.3.0")


def test_every_demand_has_rows_in_one_of_the_lists() -> None:
    lists = [{row[0] for row in REJECTED}, {row[0] for row in SILENT}]
    assert sorted(d.name for d in DEMANDS) == sorted(name for rules in lists for name in rules)


def test_a_cut_model_is_another_one() -> None:
    plan = plan_of()
    model = dataclasses.replace(plan.problem.model.cut(4), name=plan.problem.model.name)
    with pytest.raises(ExportError, match="rule model: "):
        TARGET.check(dataclasses.replace(plan, problem=dataclasses.replace(plan.problem, model=model)), "0.3.0")


def test_versions_and_facts() -> None:
    assert TARGET.version == judges.VERSIONS["torchtitan"]
    with pytest.raises(MoeplanError, match=r"torchtitan 0\.2\.0 is not a version"):
        TARGET.check(plan_of(), "0.2.0")
    written = {f[0] for p in (plan_of("deepseek-v3", mtp=1), plan_of(pp=2, dispatcher="deepep")) for f in fields(p)}
    assert written == set(FACTS.flags)


@pytest.mark.parametrize("pp", [1, 2])
def test_whole_export(tmp_path: Path, pp: int) -> None:
    case = problem_of("qwen3-30b-a3b", "h100x16", 64, 4096)
    plan = price_plan(case, layout_of(case.model, 16, ep=4, pp=pp, sharding="fsdp"))
    names = {p.name for p in export(plan, tmp_path / "out", exporter=TARGET)}
    assert {"moeplan_recipe.py", "torchtitan.args", "run_torchrun.sh", "README.md"} <= names
    assert '"$here/moeplan_recipe.py"' in (tmp_path / "out" / "run_torchrun.sh").read_text()
    ast.parse((tmp_path / "out" / "moeplan_recipe.py").read_text())


@pytest.mark.parametrize(
    ("was", "becomes", "difference"),
    [
        ("expert_parallel_degree=8", "expert_parallel_degree=4", "ep 4 for 8"),
        ("seq_len=4096", "seq_len=2048", "seq_len 2048 for 4096"),
        ("activation_checkpoint=None", "activation_checkpoint=FullAC.Config()", "recompute"),
        ("flavor='30B-A3B'", "flavor='235B-A22B'", ""),
    ],
)
def test_a_changed_file_is_noticed(tmp_path: Path, was: str, becomes: str, difference: str) -> None:
    plan = plan_of()
    directory = changed(TARGET, plan, tmp_path, "moeplan_recipe.py", lambda text: text.replace(was, becomes))
    if not difference:
        assert TARGET.read(directory).model != plan.problem.model
        return
    with pytest.raises(ExportError, match=difference):
        check_reading(plan, TARGET.read(directory))


# Recipes that others wrote.

FOREIGN = """
from torchtitan.models.deepseek_v3 import model_registry

def deepseek_v3_671b() -> Trainer.Config:
    model_spec = model_registry("671B", attn_backend="flex")
    config = Trainer.Config(
        model_spec=model_spec,
        training=TrainingConfig(local_batch_size=4, seq_len=4096, steps=10000),
        parallelism=ParallelismConfig(tensor_parallel_degree=8, expert_parallel_degree=1),
        activation_checkpoint=SelectiveAC.Config(),
    )
    config.parallelism.expert_parallel_degree = 32
    return config
"""


def test_a_foreign_recipe() -> None:
    remarks: list[str] = []
    found = read_recipe(FOREIGN, "here")
    model, workload, layout = read_fields(found, 256, remarks, where="here")
    assert (model.name, model.mtp, workload.global_batch, workload.seq_len) == ("deepseek-v3", (), 128, 4096)
    assert (layout.tp, layout.ep, layout.dp, layout.micro_batch, layout.sharding) == (8, 32, 32, 4, "fsdp")
    assert layout.cuda_graphs == ("full_iteration",) and layout.dispatcher == "alltoall" and layout.sequence_parallel
    assert remarks == ["SelectiveAC is priced without recompute"]


FAULTS = [
    ("def f(:", None, SchemaError, "is no Python module"),
    ("x = 1", None, FileError, "0 functions that return a Trainer.Config"),
    (FOREIGN, None, FileError, "the rest of the GPUs"),
    (FOREIGN, 12, LayoutError, r"is not the 12 GPUs"),
    (FOREIGN.replace("= 32", "= 3"), 256, LayoutError, "expert_parallel_degree 3 does not divide"),
    (FOREIGN.replace('"671B"', '"9B"'), 256, FileError, "model '9B' of torchtitan.models.deepseek_v3 is not known"),
    (FOREIGN.replace("seq_len=4096", "seq_len='4096'"), 256, SchemaError, "training.seq_len is '4096'"),
]


@pytest.mark.parametrize(("text", "world", "error", "words"), FAULTS, ids=range(len(FAULTS)))
def test_recipes_that_cannot_be_read(text: str, world: int | None, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        read_fields(read_recipe(text, "here"), world, [], where="here")


# torchtitan's own code.


@functools.cache
def plans() -> list[Plan]:
    """Plans that the target takes: random ones, and some that have every feature."""
    return [
        *taken_plans(TARGET, list(titan_models())),
        plan_of("deepseek-v3", mtp=1),
        plan_of("qwen3-8b", cuda_graphs=("full_iteration",)),
        plan_of("llama3.1-8b", tp=4, tp_overlap=True),
        plan_of("moonlight-16b-a3b", world=16, tp=2, pp=2, vpp=2, stages="Et*6|t*7|t*7|t*7L", dispatcher="hybridep"),
    ]


@functools.cache
def refused() -> list[Plan]:
    """Refused plans of the set that can be written all the same."""
    return refused_plans(DEMANDS, "model", "dispatcher")


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """torchtitan's words on all cases of this file, said once."""
    work = tmp_path_factory.mktemp("torchtitan")
    judged = {
        "taken": plans(),
        "refused": refused(),
        "silent": [plan_of(**change) for _, change, _ in SILENT],
        "rejected": [plan_of(**change if by_hand is None else {}) for _, change, by_hand, _ in REJECTED],
    }
    parts = exported("recipe", TARGET, judged, work)
    for (_, _, by_hand, _), case in zip(REJECTED, parts["rejected"], strict=True):
        path = Path(case["directory"]) / "moeplan_recipe.py"
        assert by_hand is None or by_hand[0] in path.read_text()
        path.write_text(path.read_text().replace(*by_hand) if by_hand else path.read_text())
    taken = parts["taken"]
    taken[:8] = [{**case, "words": []} for case in taken[:8]]
    parts["spoiled"] = [{**taken[0], "world": 7}, {**taken[0], "words": ["--parallelism.expert_parallel", "2"]}]
    parts["counts"] = [
        *(
            {"kind": "count", "module": known.module, "registry": {"flavor": known.flavor, "attn_backend": "flex"}}
            for known in titan_models().values()
        ),
        {"kind": "count", "module": "deepseek_v3", "registry": registry(plan_of("deepseek-v3", mtp=1))},
    ]
    return judges.verdicts_of_parts("torchtitan", parts, work, "torchtitan")


def test_torchtitan_accepts_what_is_not_refused(verdicts: dict[str, list[dict[str, Any]]]) -> None:
    assert len(plans()) > COUNT
    for plan, verdict in zip(plans(), verdicts["taken"], strict=True):
        x, model = plan.layout, plan.problem.model
        assert verdict["accepted"], f"{model.name} {x.degrees()}: {verdict['message']}"
        assert verdict["degrees"] == [x.tp, x.cp, x.pp, x.dp, x.ep] and verdict["layers"] == len(model.layers)
        steps = plan.problem.workload.global_batch // (x.micro_batch * x.dp)
        assert verdict["accumulation"] == (1 if x.pp > 1 else steps)
        assert verdict["recompute"] == bool(x.recompute)
        if x.pp > 1:
            letters = chunk_letters(model, x.pp, x.vpp, x.stages)
            assert verdict["stages"] == [[c.count("t") for c in letters[rank :: x.pp]] for rank in range(x.pp)]
    assert {plan.layout.ep > 1 for plan in plans()} == {plan.layout.pp > 1 for plan in plans()} == {True, False}
    assert {plan.layout.sharding for plan in plans()} == {"fsdp", "ddp"}


def test_refused_plans_of_the_set(verdicts: dict[str, list[dict[str, Any]]]) -> None:
    enforced = {row[0] for row in REJECTED}
    for plan, verdict in zip(refused(), verdicts["refused"], strict=True):
        broken = {demand.name for demand in broken_demands(DEMANDS, plan)}
        assert verdict["accepted"] or broken & enforced, f"{plan.layout.degrees()}, {broken}: {verdict}"
    assert {verdict["accepted"] for verdict in verdicts["refused"]} == {True, False}


def test_demands_that_torchtitan_enforces_and_does_not(verdicts: dict[str, list[dict[str, Any]]]) -> None:
    for (rule, change, _, words), verdict in zip(REJECTED, verdicts["rejected"], strict=True):
        assert not verdict["accepted"] and words in verdict["message"], f"{rule}, {change}: {verdict}"
    for (rule, change, _), verdict in zip(SILENT, verdicts["silent"], strict=True):
        assert verdict["accepted"], f"{rule}, {change}: {verdict}"


def test_torchtitan_refuses_another_size_and_unknown_fields(verdicts: dict[str, list[dict[str, Any]]]) -> None:
    size, field = verdicts["spoiled"]
    assert not size["accepted"] and "WORLD_SIZE(7)" in size["message"]
    assert not field["accepted"]


def test_models_hold_the_published_parameters(verdicts: dict[str, list[dict[str, Any]]]) -> None:
    for name, verdict in zip(titan_models(), verdicts["counts"][:-1], strict=True):
        assert verdict["accepted"], f"{name}: {verdict['message']}"
        model = dataclasses.replace(load_model(name), mtp=())
        assert verdict["parameters"] == parameter_count(model).total, name
    assert verdicts["counts"][-1]["parameters"] > parameter_count(load_model("deepseek-v3")).total
