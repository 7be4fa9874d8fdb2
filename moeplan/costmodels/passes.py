"""Forward and backward seconds of what stages hold, apart: layers by kind, the output head, prediction layers.

`step.py` adds both up; a schedule of the pipeline needs them one by one. What recompute repeats belongs to the backward, and so
do two of the three products of every weight. The loss reads its logits forward, and backward writes their gradient in place.
Units: seconds of one micro-batch, [n].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from moeplan.costmodels.activations import rank_tokens, shard
from moeplan.costmodels.constants import STEP
from moeplan.costmodels.counts import mtp_weights
from moeplan.costmodels.kernels import BACKWARD_TRAFFIC, PassTimes, dense_gemm_s
from moeplan.costmodels.layer import dense_passes, routed_passes
from moeplan.costmodels.layout import Layouts
from moeplan.costmodels.megatron_counts import padded_vocab
from moeplan.costmodels.model import Layer, Model
from moeplan.costmodels.workload import Workload
from moeplan.profiles.profile import Profile

LOSS_BACKWARD = 0.4
"""Share of the loss's traffic that is its backward: 4 of 10 bytes per logit, the gradient read, scaled and written."""


@dataclass(frozen=True, slots=True)
class UnitPasses:
    """One thing that stages hold a number of."""

    name: str
    dense: PassTimes
    """On layouts without experts, `layer.without_experts`."""
    routed: PassTimes
    """Routed experts, on folded layouts, `layer.fold`; empty where there are none."""


def unit_passes(model: Model, profile: Profile, workload: Workload, dense: Layouts, routed: Layouts) -> list[UnitPasses]:
    """Layers by kind, then the head, then prediction layers (if the model has any)."""
    given = (model, profile, workload)
    kinds: dict[Layer, tuple[PassTimes, PassTimes]] = {
        kind: (dense_passes(kind, *given, dense), routed_passes(kind, *given, routed))
        for kind in dict.fromkeys((*model.kinds, *model.mtp))
    }
    units = [UnitPasses("layers", *kinds[kind]) for kind in model.kinds]
    head = head_passes(*given, dense)
    units.append(UnitPasses("head", head, PassTimes()))
    if model.mtp:
        depths = [kinds[x] for x in model.mtp]
        parts = projection_passes(*given, dense)
        parts.add("head", sum(head.forward.values()), sum(head.backward.values()))
        parts.merge(_mean([d for d, _ in depths]))
        units.append(UnitPasses("prediction", parts, _mean([r for _, r in depths if r.forward], len(depths))))
    return units


def pass_totals(
    model: Model, profile: Profile, workload: Workload, dense: Layouts, routed: Layouts
) -> list[list[tuple[Any, Any]]]:
    """Forward and backward seconds of every unit, all parts together: on `dense` and on `routed`, [n] each."""
    units = unit_passes(model, profile, workload, dense, routed)

    def total(parts: dict[str, Any], layouts: Layouts) -> Any:
        return np.broadcast_to(sum(parts.values(), 0.0), len(layouts))

    return [
        [(total(getattr(u.dense, way), dense), total(getattr(u.routed, way), routed)) for u in units]
        for way in ("forward", "backward")
    ]


def head_passes(model: Model, profile: Profile, workload: Workload, layouts: Layouts) -> PassTimes:
    """Output projection and loss of one micro-batch; Megatron computes the head in bf16 under every recipe."""
    tokens, vocab = rank_tokens(workload, layouts), padded_vocab(model, layouts.tp) / layouts.tp
    curve, rate = profile.gemm("bf16"), profile.sustained_gemm("bf16")
    hidden = float(model.hidden)
    loss = profile.stream_s(STEP.logit_bytes * tokens * vocab, "cross_entropy")
    out = PassTimes()
    backward = curve.seconds(tokens, hidden, vocab) + curve.seconds(vocab, hidden, tokens)
    out.add("output GEMM", curve.seconds(tokens, vocab, hidden) / rate, backward / rate)
    out.add("loss", (1.0 - LOSS_BACKWARD) * loss, LOSS_BACKWARD * loss)
    return out


def projection_passes(model: Model, profile: Profile, workload: Workload, layouts: Layouts) -> PassTimes:
    """What a prediction layer has before its layer: norms and a projection of 2 x hidden."""
    tokens = rank_tokens(workload, layouts)
    weight = next(w for w in mtp_weights(model) if w.gemm)
    forward, backward = dense_gemm_s(weight, tokens, profile, workload.precision.gemm, layouts)
    norms = profile.stream_s(12.0 * model.hidden * tokens / shard(layouts), "norm")
    out = PassTimes()
    out.add("projection", forward + norms, backward + BACKWARD_TRAFFIC * norms)
    return out


def _mean(depths: list[PassTimes], count: int = 0) -> PassTimes:
    """The mean of prediction layers as one part, "layer"; empty where there is none."""
    out = PassTimes()
    for passes in depths:
        ways: list[Any] = [sum(way.values()) / (count or len(depths)) for way in (passes.forward, passes.backward)]
        out.add("layer", *ways)
    return out
