"""Each rule refuses what it says, says why with the numbers, and reads only what is settled at its level."""

import dataclasses
import random
from typing import Any

import numpy as np
import pytest

from moeplan.costmodels.layout import DISPATCHERS, GRAPH_SCOPES, RECOMPUTE_MODULES, SHARDINGS, Layout, Layouts
from moeplan.costmodels.model import Attention, Layer, LinearAttention, Mamba, Model, Moe
from moeplan.costmodels.model_catalog import load_model
from moeplan.planner.constraints import LEVELS, RULES, violations
from moeplan.planner.problem import Problem
from tests.planner import tiny

BIASED = Model(
    name="tiny-biased",
    hidden=1024,
    vocab=32000,
    layers=(
        Layer(
            blocks=(
                Attention(heads=8, kv_heads=4, head_dim=128, v_head_dim=128, qkv_bias=True, window=128),
                Moe(experts=8, topk=2, width=1024, bias=True),
            )
        ),
    )
    * 4,
)
HYBRID = Model(
    name="tiny-hybrid",
    hidden=1024,
    vocab=32000,
    layers=(Layer(blocks=(Mamba(version=2, inner=2048, state=64, heads=32, groups=8),)), Layer(blocks=(tiny.MLP,))) * 2,
)
LINEAR = Model(
    name="tiny-linear",
    hidden=1024,
    vocab=32000,
    layers=(Layer(blocks=(LinearAttention(variant="gdn", key_heads=4, value_heads=8, key_dim=128, value_dim=128), tiny.MLP)),)
    * 4,
)
TWO_DEPTHS = dataclasses.replace(tiny.LATENT, name="tiny-two-depths", mtp=tiny.LATENT.mtp * 2)


def moe(**more: Any) -> Problem:
    return tiny.problem(tiny.MIXED, "h100x8", batch=32, **more)


def latent(**more: Any) -> Problem:
    return tiny.problem(tiny.LATENT, "h100x8", batch=32, **more)


def dense(**more: Any) -> Problem:
    return tiny.problem(tiny.DENSE, "h100x8", batch=32, **more)


def layout(dispatcher: Any = "alltoall", **fields: Any) -> Layout:
    """A layout of eight ranks: dp and edp take what the other degrees leave."""
    stage = 8 // fields.get("pp", 1)
    fields.setdefault("dp", stage // (fields.get("tp", 1) * fields.get("cp", 1)))
    fields.setdefault("edp", stage // (fields.get("etp", 1) * fields.get("ep", 1)))
    fields.setdefault("sequence_parallel", fields.get("tp", 1) > 1)
    return Layout(dispatcher=dispatcher, **fields)


OVERLAP = {"ep": 8, "ep_overlap": True}
RESEARCH = dataclasses.replace(moe(), target="research")

ROWS: list[tuple[str, Problem, Layout, str]] = [  # rule, problem, layout that breaks it, part of the reason
    ("world-size", moe(), layout(dp=4, edp=4), "1*1*4*1 = 4 is not the 8 GPUs"),
    ("attention-heads", tiny.problem(tiny.MIXED, "h100x3"), Layout(tp=3, edp=3, dispatcher="alltoall"), "tp=3"),
    ("query-groups", tiny.problem(tiny.MIXED, "h100x6"), Layout(tp=6, edp=6, dispatcher="alltoall"), "4 query groups"),
    ("state-heads", tiny.problem(LINEAR, "h100x8"), layout("none", tp=8), "tp*cp = 8*1"),
    ("state-heads", tiny.problem(HYBRID, "h100x3"), Layout(tp=3, edp=3), "tp*cp = 3*1"),
    ("feed-forward-width", tiny.problem(tiny.DENSE, "h100x3"), Layout(tp=3, edp=3), "(4096)"),
    ("feed-forward-width", tiny.problem(tiny.MIXED, "h100x3"), Layout(dp=3, etp=3, dispatcher="alltoall"), "etp=3"),
    ("experts", tiny.problem(tiny.MIXED, "h100x3"), Layout(dp=3, ep=3, dispatcher="alltoall"), "ep=3, etp=1"),
    ("experts", dense(), layout("none", ep=2), "no experts"),
    ("expert-bias", tiny.problem(BIASED, "h100x8"), layout(etp=2), "etp=2"),
    (
        "context-chunks",
        tiny.problem(tiny.DENSE, "h100x8", seq=4100),
        layout("none", cp=8),
        "not a multiple of 2*cp = 16",
    ),
    ("rotary-table", tiny.problem(tiny.LATENT, "h100x3", seq=6144), Layout(cp=3, edp=3, dispatcher="alltoall"), "2*cp = 6"),
    ("context-heads", tiny.problem(BIASED, "h100x8"), layout(cp=8), "cp=8"),
    ("sequence-shards", tiny.problem(tiny.DENSE, "h100x8", seq=4100), layout("none", tp=8), "tp*cp = 8*1 = 8"),
    ("moe-sequence-parallel", moe(), layout(tp=2, sequence_parallel=False), "tp=2 without sequence parallelism"),
    ("quantized-ddp", moe(precision="fp8-cs"), layout(sharding="ddp"), "fp8-cs"),
    ("moments-ddp", moe(moment_bytes=2), layout(sharding="ddp"), "moments of 2 bytes"),
    ("offload-sharding", moe(), layout(sharding="fsdp", optimizer_offload=0.5), "offload 0.5 with sharding 'fsdp'"),
    (
        "offload-host",
        tiny.problem(load_model("deepseek-v3"), "h100x8"),
        layout(optimizer_offload=1.0),
        "GiB of host memory a node",
    ),
    ("offload-quantized", moe(precision="fp8-cs"), layout(optimizer_offload=1.0), "offload 1 with quantised weights of fp8-cs"),
    ("virtual-stages", moe(), layout(vpp=2), "vpp=2 with pp=1"),
    ("pipeline-chunks", moe(), layout(pp=2, vpp=4), "2*4 = 8 chunks for 4 layers"),
    ("pipeline-split", tiny.problem(tiny.ODD, "h100x8"), layout("none", pp=2), "2*1 = 2 chunks do not divide the 3 layers"),
    ("pipeline-split", moe(), layout(pp=2, stages="Ett|tL"), "it places 3 decoder layers, the model has 4"),
    ("global-batch", moe(), layout(micro_batch=3), "32 is not a multiple of micro_batch*dp = 3*8 = 24"),
    ("interleaving", moe(), layout(pp=2, vpp=2, micro_batch=8), "1 micro-batches are not a multiple of pp=2 with vpp=2"),
    ("interleaving", tiny.problem(tiny.MIXED, "h100x8", batch=12), layout(pp=2, vpp=2), "3 micro-batches"),
    ("graph-era", moe(era="te-2024"), layout(cuda_graphs=("attn",)), "attn do not exist in era te-2024"),
    ("graph-scopes", moe(), layout(cuda_graphs=("moe_preprocess",)), "moe_preprocess"),
    ("graph-scopes", dense(era="latest"), layout("none", cuda_graphs=("attn", "full_iteration")), "attn+full_iteration"),
    ("tensor-overlap", dense(), layout("none", tp_overlap=True), "tp=1, sequence_parallel=False"),
    ("dispatcher-model", moe(), layout("none"), "'none' for a model with experts"),
    ("dispatcher-model", dense(), layout("alltoall"), "'alltoall' for a model without experts"),
    ("dispatcher-era", moe(era="te-2024"), layout("deepep", ep=8), "'deepep' does not exist in era te-2024"),
    ("dispatcher-device", tiny.problem(tiny.MIXED, "mi300xx8", batch=32), layout("deepep", ep=8), "MI300X"),
    ("dispatcher-device", tiny.problem(tiny.MIXED, "gb200x8", batch=32), layout("deepep", ep=8), "not run on GB200"),
    ("dispatcher-link", tiny.problem(tiny.MIXED, "a100-pciex8", batch=32), layout("deepep", ep=8), "needs NVLink, A100-PCIex8"),
    (
        "dispatcher-link",
        tiny.problem(tiny.MIXED, "l40sx8", batch=32, era="latest"),
        layout("hybridep", ep=8),
        "L40Sx8 has pcie4",
    ),
    ("deepep-domain", tiny.problem(tiny.MIXED, "gh200x8", batch=32), layout("deepep", ep=8), "etp*ep = 1*8 over domains of 1"),
    ("deepep-group", moe(), layout("deepep"), "etp*ep = 1*1"),
    (
        "graph-capacity",
        moe(capacity_factor=1.0),
        layout(cuda_graphs=("moe_router", "moe_preprocess")),
        "capacity factor 1",
    ),
    ("overlap-experts", moe(), layout(ep_overlap=True), "ep=1"),
    ("overlap-experts", moe(), layout("allgather", **OVERLAP), "'allgather'"),
    ("overlap-pipeline", moe(), layout(pp=2, ep=4, ep_overlap=True), "pp=2 and vpp=1"),
    ("overlap-prediction", tiny.problem(TWO_DEPTHS, "h100x8", batch=32), layout(ep=4, ep_overlap=True), "2 prediction layers"),
    ("overlap-fsdp", moe(), layout(sharding="fsdp", cuda_graphs=("attn",), **OVERLAP), "over attn"),
    ("overlap-bias", tiny.problem(BIASED, "h100x8", batch=32), layout(cuda_graphs=("attn",), **OVERLAP), "tiny-biased"),
    ("overlap-era", moe(era="te-2024"), layout(**OVERLAP), "te-2024"),
    ("overlap-graphs", moe(), layout(cuda_graphs=("mlp",), **OVERLAP), "mlp"),
    ("shared-overlap", moe(), layout(ep=8, shared_overlap=True), "tiny-mixed has no shared experts"),
    ("shared-overlap", latent(), layout("allgather", ep=4, shared_overlap=True), "'allgather'"),
    ("shared-overlap", latent(), layout(ep=4, shared_overlap=True, ep_overlap=True), "ep_overlap=True"),
    ("shared-era", latent(era="te-2024"), layout(ep=4, shared_overlap=True), "te-2024"),
    ("shared-recompute", latent(), layout(ep=4, shared_overlap=True, recompute=("shared_experts",)), "of shared_experts"),
    ("schedule-target", moe(), layout(ep=8, moe_schedule="fsmoe 2/4"), "'fsmoe 2/4' is nothing that Megatron runs"),
    ("schedule-experts", RESEARCH, layout("allgather", ep=8, moe_schedule="s1"), "'allgather'"),
    ("schedule-experts", RESEARCH, layout(moe_schedule="s1", **OVERLAP), "ep_overlap=True"),
    ("schedule-kinds", RESEARCH, layout(ep=8, moe_schedule="s1; s1"), "names 2 schedules, tiny-mixed has 1 kinds"),
    ("overlap-recompute", moe(), layout(recompute=("moe",), **OVERLAP), "recompute of moe"),
    ("recompute-full", moe(), layout(recompute=("full", "mlp")), "'full' stands alone"),
    ("recompute-layers", moe(), layout(recompute_layers="2"), "'2': nothing is recomputed"),
    ("recompute-layers", moe(), layout(recompute=("moe",), recompute_layers="2"), "Megatron recomputes moe in all layers"),
    ("recompute-layers", moe(), layout(recompute=("full",), recompute_layers="0"), "a number of at least 1"),
    ("recompute-layers", moe(), layout(recompute=("full",), recompute_layers="4"), "4 leaves out no layer of a chunk"),
    ("recompute-layers", moe(), layout(pp=2, recompute=("full",), recompute_layers="2"), "the largest has 2"),
    ("recompute-layers", moe(), layout(pp=2, recompute=("full",), recompute_layers="1|0"), "one number for all chunks"),
    ("recompute-layers", latent(), layout(recompute=("full",), recompute_layers="5"), "5 leaves out no layer"),
    ("recompute-layers", RESEARCH, layout(pp=2, recompute=("moe",), recompute_layers="1|0|1"), "it is of 3 chunks, pp*vpp = 2"),
    ("recompute-layers", RESEARCH, layout(pp=2, recompute=("moe",), recompute_layers="1|3"), "3 layers of chunk 1 recompute"),
    ("recompute-blocks", moe(), layout(recompute=("mla_up_proj",)), "tiny-mixed lacks"),
    ("recompute-delayed", moe(precision="fp8-delayed"), layout(recompute=("moe_act",)), "fp8-delayed"),
    ("recompute-graphs", moe(), layout(recompute=("full",), cuda_graphs=("attn",)), "full with CUDA graphs over attn"),
]


@pytest.mark.parametrize(("rule", "problem", "broken", "reason"), ROWS, ids=[row[0] for row in ROWS])
def test_each_rule_refuses_and_says_why(rule: str, problem: Problem, broken: Layout, reason: str) -> None:
    found = {v.rule: v for v in violations(problem, broken)}
    assert rule in found, list(found)
    assert reason in found[rule].reason
    assert str(found[rule]).startswith(found[rule].reason)


def test_every_rule_has_a_row() -> None:
    assert {rule.name for rule in RULES} == {row[0] for row in ROWS}


def test_a_plain_layout_breaks_nothing() -> None:
    assert violations(moe(), layout(tp=2, ep=4, pp=2)) == []
    assert violations(dense(), layout("none", tp=2, cp=2, tp_overlap=True)) == []


def test_names_are_distinct_and_levels_in_order() -> None:
    assert len({rule.name for rule in RULES}) == len(RULES)
    places = [LEVELS.index(rule.level) for rule in RULES]
    assert places == sorted(places)


def random_layouts(count: int, seed: int) -> list[Layout]:
    """Layouts of eight ranks with anything in the other fields."""
    pick, out = random.Random(seed), []
    while len(out) < count:
        tp, cp, pp, ep, etp = (pick.choice((1, 1, 2, 4)) for _ in range(5))
        if 8 % (tp * cp * pp) or (8 // pp) % (ep * etp):
            continue
        out.append(
            layout(
                pick.choice(DISPATCHERS), tp=tp, cp=cp, pp=pp, ep=ep, etp=etp,
                vpp=pick.choice((1, 1, 2, 3)),
                micro_batch=pick.choice((1, 2, 3)),
                sequence_parallel=pick.random() < 0.5,
                sharding=pick.choice(SHARDINGS),
                recompute=tuple(pick.sample(RECOMPUTE_MODULES, pick.choice((0, 0, 1, 2)))),
                ep_overlap=pick.random() < 0.3,
                shared_overlap=pick.random() < 0.3,
                moe_schedule=pick.choice(("", "", "s1", "fsmoe 2/4", "s1; fsmoe 1/2")),
                tp_overlap=pick.random() < 0.3,
                dp_overlap=pick.random() < 0.5,
                cuda_graphs=tuple(pick.sample(GRAPH_SCOPES, pick.choice((0, 0, 1, 2)))),
                optimizer_offload=pick.choice((0.0, 0.0, 0.5)),
                stages=pick.choice(("", "", "Ett|ttL", "Et|t|t|tL", "E|tttt|L")),
            )
        )  # fmt: skip
    return out


PROBLEMS = [moe(), dense(era="latest"), moe(precision="fp8-delayed", era="te-2024"), tiny.problem(tiny.LATENT, "h100x8")]


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: f"{p.model.name}-{p.workload.era.name}")
def test_one_by_one_and_all_at_once_agree(problem: Problem) -> None:
    layouts = random_layouts(300, 1)
    together = {rule.name: rule.broken(problem, Layouts.of(layouts)) for rule in RULES}
    for i, one in enumerate(layouts):
        assert {v.rule for v in violations(problem, one)} == {name for name, broken in together.items() if broken[i]}
    assert sum(any(b[i] for b in together.values()) for i in range(len(layouts))) > 50


OF_LEVEL = {
    "degrees": (
        "tp", "cp", "pp", "dp", "ep", "etp", "edp", "sharding", "sequence_parallel", "dp_overlap", "cuda_graphs",
        "optimizer_offload",
    ),
    "chunks": ("vpp", "stages", "split"),
    "batch": ("micro_batch",),
    "features": ("dispatcher", "ep_overlap", "shared_overlap", "schedule", "schedules", "tp_overlap"),
    "recompute": ("recompute", "recompute_count"),
}  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_rule_reads_only_what_is_settled(rule: Any) -> None:
    # What later levels settle is exchanged between layouts; the verdict must not move.
    settled = {f for level in LEVELS[: LEVELS.index(rule.level) + 1] for f in OF_LEVEL[level]}
    rows = Layouts.of(random_layouts(300, 2))
    order = np.random.default_rng(0).permutation(len(rows))
    later = {f.name for f in dataclasses.fields(Layouts)} - settled - {"stages", "schedules", "recompute_counts"}
    if "split" in later:
        later.discard("split")
        rows = rows.with_columns(split=rows.split * 0 + rows.stages.index(""))
    moved = rows.with_columns(**{name: getattr(rows, name)[order] for name in later})
    for problem in PROBLEMS:
        np.testing.assert_array_equal(rule.broken(problem, rows), rule.broken(problem, moved))


def test_no_rule_is_broken_by_what_is_not_recomputed() -> None:
    for rule in (r for r in RULES if r.level == "recompute"):
        plain = Layouts.of([dataclasses.replace(x, recompute=()) for x in random_layouts(200, 3)])
        assert not any(rule.broken(problem, plain).any() for problem in PROBLEMS)
