"""Models and problems small enough that every layout of theirs can be priced one by one."""

from typing import Any

from moeplan.costmodels.model import Attention, LatentAttention, Layer, Mlp, Model, Moe
from moeplan.costmodels.workload import Workload, load_era, load_precision
from moeplan.planner.problem import Condition, Problem, parse_condition
from moeplan.profiles.hardware import load_cluster
from moeplan.profiles.nominal import nominal

GQA = Attention(heads=8, kv_heads=4, head_dim=128, v_head_dim=128)
MLA = LatentAttention(heads=8, q_rank=256, kv_rank=128, nope_dim=128, rope_dim=64, v_dim=128)
MLP = Mlp(width=4096)
MOE = Moe(experts=8, topk=2, width=1024)
SHARED = Moe(experts=4, topk=2, width=2048, shared_width=2048)
DENSE_LAYER, MOE_LAYER = Layer(blocks=(GQA, MLP)), Layer(blocks=(GQA, MOE))

DENSE = Model(name="tiny-dense", hidden=1024, vocab=32000, layers=(DENSE_LAYER,) * 4)
"""Layers that divide over two and four stages."""
ODD = Model(name="tiny-odd", hidden=1024, vocab=96000, layers=(DENSE_LAYER,) * 3)
"""Three layers and a heavy head: no even split over two stages, and no equal one over three."""
MIXED = Model(name="tiny-mixed", hidden=1024, vocab=32000, layers=(DENSE_LAYER, *(MOE_LAYER,) * 3))
"""A dense layer, then experts."""
WIDE = Model(
    name="tiny-wide",
    hidden=1024,
    vocab=32000,
    layers=(Layer(blocks=(GQA, Moe(experts=4, topk=1, width=32768))),) * 2,
)
"""Experts that take longer than their exchange, so that chunks overlap."""
LATENT = Model(
    name="tiny-latent",
    hidden=1024,
    vocab=64000,
    layers=(Layer(blocks=(MLA, MLP)), *(Layer(blocks=(MLA, SHARED)),) * 2),
    mtp=(Layer(blocks=(MLA, SHARED)),),
)
"""Latent attention, shared experts and a prediction layer: every module that recompute knows."""


def problem(
    model: Model,
    cluster: str = "h100x4",
    *,
    batch: int = 4,
    seq: int = 4096,
    precision: str = "bf16",
    era: str = "deepep-2025",
    pins: str = "",
    forbid: str = "",
    **more: Any,
) -> Problem:
    """A problem; `pins` and `forbid` are conditions as a user writes them, with spaces between."""
    workload = {k: more.pop(k) for k in ("imbalance", "capacity_factor", "gradient_bytes", "moment_bytes") if k in more}
    return Problem(
        model=model,
        profile=nominal(load_cluster(cluster)),
        workload=Workload(seq_len=seq, global_batch=batch, precision=load_precision(precision), era=load_era(era), **workload),
        pins=_conditions(pins),
        forbidden=_conditions(forbid),
        **more,
    )


def _conditions(text: str) -> tuple[Condition, ...]:
    return tuple(parse_condition(c) for c in text.split())
