"""Small models, clusters and profiles that tests share.

The `plain` profile has round rates and no fixed times, so that a price can be worked out on paper; nominal profiles have
everything that a catalog device has.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import strategies as st

from moeplan.costmodels.layout import DISPATCHERS, GRAPH_SCOPES, RECOMPUTE_MODULES, SHARDINGS, Layout
from moeplan.costmodels.model import Attention, LatentAttention, Layer, Mlp, Model, Moe
from moeplan.costmodels.stages import balanced_split
from moeplan.costmodels.workload import Workload, load_era, load_precision
from moeplan.profiles.curves import AttentionCurve, CollectiveCurve, DispatchCurve, GemmCurve, GroupedGemmCurve
from moeplan.profiles.hardware import Cluster, Device, Link, load_cluster
from moeplan.profiles.nominal import nominal
from moeplan.profiles.profile import Profile

ATTENTION = Attention(heads=8, kv_heads=4, head_dim=16, v_head_dim=16)
LATENT = LatentAttention(heads=8, q_rank=32, kv_rank=16, nope_dim=16, rope_dim=8, v_dim=16)
MLP = Mlp(width=256)
MOE = Moe(experts=8, topk=2, width=64, shared_width=64)
DENSE_LAYER, MOE_LAYER = Layer(blocks=(ATTENTION, MLP)), Layer(blocks=(ATTENTION, MOE))
LATENT_LAYER = Layer(blocks=(LATENT, MOE))

TINY_DENSE = Model(name="tiny-dense", hidden=128, vocab=1000, layers=(DENSE_LAYER,) * 8)
TINY_MOE = Model(name="tiny-moe", hidden=128, vocab=1000, layers=(DENSE_LAYER,) + (MOE_LAYER,) * 7)
TINY_LATENT = Model(
    name="tiny-latent",
    hidden=128,
    vocab=1000,
    layers=(Layer(blocks=(LATENT, MLP)),) + (LATENT_LAYER,) * 7,
    mtp=(LATENT_LAYER,),
)

_FITTED: dict[str, Any] = {"error": 0.0, "error_p90": 0.0, "samples": 0, "valid": {}, "source": "round numbers"}


def _plain() -> Profile:
    device = Device(
        name="plain",
        vendor="nvidia",
        memory_bytes=80e9,
        memory_bytes_per_s=1e12,
        peak_flop_per_s={"bf16": 1e15},
        processors=100,
        capability="9.0",
        host="x86",
    )
    cluster = Cluster(
        name="plainx16",
        device=device,
        gpus=16,
        gpus_per_node=8,
        domain_gpus=8,
        scale_up=Link(name="up", bytes_per_s=400e9),
        scale_out=Link(name="out", bytes_per_s=50e9, latency_s=1e-6),
        nics_per_node=8,
        pcie=Link(name="pcie", bytes_per_s=25e9),
    )
    gemm = {"launch_s": 0.0, "flop_per_s": 1e15, "bytes_per_s": 1e30, "sharpness": 1.0, **_FITTED}
    attention = AttentionCurve(launch_s=0.0, flop_per_s=0.5e15, bytes_per_s=1e30, backward_ratio=3.0, **_FITTED)
    # Ring law without latency at 100 GB/s: (n - 1) / n bytes / rate, twice that for an all-reduce.
    sizes = (1.0, 1e12)
    rings = {
        op: {
            n: CollectiveCurve(times_s=tuple(way * (n - 1) / n * b / 100e9 for b in sizes), sizes_bytes=sizes, **_FITTED)
            for n in (2, 4, 8)
        }
        for op, way in (("all_gather", 1), ("reduce_scatter", 1), ("all_reduce", 2), ("all_to_all", 1))
    }
    dispatches = {
        f"{library}-{phase}{reach}": DispatchCurve(latency_s=0.0, bytes_per_s=rate, **_FITTED)
        for library in ("deepep", "hybridep")
        for phase in ("dispatch", "combine")
        for reach, rate in (("", 100e9), ("-scale-out", 20e9))
    }
    return Profile(
        cluster=cluster,
        name="plain",
        stream_bytes_per_s=1e12,
        gemms={"bf16": GemmCurve(**gemm)},
        grouped={f"bf16{way}": GroupedGemmCurve(group_s=0.0, **gemm) for way in ("", "-dgrad", "-wgrad")},
        attentions={"64": attention, "128": attention, "192/128": attention},
        collectives=rings,
        dispatches=dispatches,
    )


PLAIN = _plain()
NODE, TWO_NODES = nominal(load_cluster("h100x8")), nominal(load_cluster("h100x16"))


def workload_of(**changes: Any) -> Workload:
    """A small bf16 workload of sequences of 256 tokens."""
    values: dict[str, Any] = {
        "seq_len": 256,
        "global_batch": 64,
        "precision": load_precision("bf16"),
        "era": load_era("latest"),
    }
    return Workload(**values | changes)


@st.composite
def layouts_of(draw: st.DrawFn, model: Model, world: int = 16, **fixed: Any) -> Layout:
    """Any layout of a tiny model over `world` ranks (a power of two); fields in `fixed` are as given."""

    def power(name: str, most: int) -> int:
        """A power of two up to `most`, which is one."""
        given = fixed.get(name)
        return given if given is not None else 2 ** draw(st.integers(0, most.bit_length() - 1), label=name)

    has_experts = model.moe is not None
    pp = power("pp", min(world, 8))
    tp = power("tp", min(world // pp, 8))
    cp = power("cp", world // (pp * tp))
    stage = world // pp
    etp = power("etp", min(stage, 8)) if has_experts else 1
    ep = power("ep", min(stage // etp, 8)) if has_experts else 1
    vpp = power("vpp", 8 // pp) if pp > 1 else 1
    values: dict[str, Any] = {
        "sequence_parallel": tp > 1 and (has_experts or draw(st.booleans(), label="sequence_parallel")),
        "sharding": draw(st.sampled_from(SHARDINGS), label="sharding"),
        "recompute": tuple(draw(st.sets(st.sampled_from(RECOMPUTE_MODULES), max_size=3), label="recompute")),
        "dispatcher": draw(st.sampled_from(DISPATCHERS[1:]), label="dispatcher") if has_experts else "none",
        "cuda_graphs": tuple(draw(st.sets(st.sampled_from(GRAPH_SCOPES), max_size=2), label="cuda_graphs")),
        "optimizer_offload": draw(st.sampled_from([0.0, 0.0, 0.5]), label="optimizer_offload"),
        "stages": draw(st.sampled_from(["", balanced_split(model, 256, pp * vpp)]), label="stages"),
        "micro_batch": power("micro_batch", 4),
    }
    values |= {name: draw(st.booleans(), label=name) for name in ("ep_overlap", "shared_overlap", "tp_overlap", "dp_overlap")}
    if has_experts:
        values["moe_schedule"] = draw(st.sampled_from(["", "", "s1", "fsmoe 2/4", "tutel 4/1", "best"]), label="moe_schedule")
    degrees = {"tp": tp, "cp": cp, "pp": pp, "vpp": vpp, "ep": ep, "etp": etp}
    rest = {"dp": stage // (tp * cp), "edp": stage // (etp * ep)} if has_experts else {"dp": stage // (tp * cp), "edp": stage}
    return Layout(**values | fixed | degrees | rest)


_OTHERS: dict[str, Any] = {
    "micro_batch": 8,
    "sharding": "fsdp",
    "recompute": ("moe_act",),
    "dispatcher": "hybridep",
    "cuda_graphs": ("full_iteration",),
}


@st.composite
def neighbours_of(draw: st.DrawFn, model: Model) -> list[Layout]:
    """A layout and others that differ from it in one field each: what one price has to do with another shows between them."""
    first = draw(layouts_of(model, optimizer_offload=0.0))
    base = dataclasses.replace(first, dp=8 * first.dp, edp=8 * first.edp)
    rows = [base]
    for name in ("tp", "cp", "dp"):
        rows.append(dataclasses.replace(base, **{name: 2 * getattr(base, name), "edp": 2 * base.edp}))
    for name in ("ep", "etp") if model.moe else ():
        rows.append(dataclasses.replace(base, **{name: 2 * getattr(base, name), "edp": base.edp // 2}))
    rows += [dataclasses.replace(base, pp=pp, vpp=1, stages="") for pp in (2, 4) if pp != base.pp]
    if base.pp > 1:
        rows += [dataclasses.replace(base, vpp=vpp, stages="") for vpp in (1, 2, 3) if vpp != base.vpp]
    rows.append(dataclasses.replace(base, stages=balanced_split(model, 256, base.pp * base.vpp) if not base.stages else ""))
    for name in ("sequence_parallel", "ep_overlap", "shared_overlap", "tp_overlap", "dp_overlap"):
        rows.append(dataclasses.replace(base, **{name: not getattr(base, name)}))
    rows += [dataclasses.replace(base, **{name: value}) for name, value in _OTHERS.items() if model.moe or name != "dispatcher"]
    # One offload makes every row its own, so that most sets are without.
    if draw(st.integers(0, 3), label="offload") == 3:
        rows.append(dataclasses.replace(base, optimizer_offload=0.25))
    return draw(st.permutations(rows))


@pytest.fixture(scope="session")
def tiny_dense() -> Model:
    """Eight layers of attention and a gated MLP."""
    return TINY_DENSE


@pytest.fixture(scope="session")
def tiny_moe() -> Model:
    """One dense layer, then seven with eight experts and a shared one."""
    return TINY_MOE


@pytest.fixture(scope="session")
def tiny_latent() -> Model:
    """The same with latent attention and a prediction layer."""
    return TINY_LATENT


@pytest.fixture(scope="session")
def plain() -> Profile:
    """Sixteen devices of round rates in two domains."""
    return PLAIN


@pytest.fixture(scope="session")
def node() -> Profile:
    """Nominal profile of 8 H100."""
    return NODE


@pytest.fixture(scope="session")
def two_nodes() -> Profile:
    """Nominal profile of 16 H100."""
    return TWO_NODES


@pytest.fixture(scope="session")
def workload() -> Workload:
    """64 sequences of 256 tokens in bf16 with the newest software."""
    return workload_of()
