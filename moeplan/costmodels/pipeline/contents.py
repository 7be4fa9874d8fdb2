"""What the chunks of one layout cost their ranks: seconds of a forward and a backward pass, bytes that a micro-batch leaves.

The same numbers as the closed forms (`price.py`), chunk by chunk instead of rank by rank: over the chunks of a rank, forward
plus backward is its seconds of one micro-batch, and saved bytes are what `peak.py` counts in flight. Units: seconds, bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moeplan.costmodels.layer import fold, without_experts
from moeplan.costmodels.layout import Layouts
from moeplan.costmodels.passes import UnitPasses, unit_passes
from moeplan.costmodels.price import Pricing
from moeplan.costmodels.stages import chunk_layers, chunk_letters, chunk_pieces, chunk_units

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A layer, the head or a prediction layer in a chunk."""

    name: str
    """"layer 3", "head", "prediction 0"."""
    unit: int
    """Place of what it is among the units."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Contents:
    """Chunks of a layout, [ranks, chunks of a rank] each."""

    pieces: tuple[tuple[tuple[Piece, ...], ...], ...]
    """What stands in each chunk, first to last."""
    units: tuple[UnitPasses, ...]
    """Forward and backward seconds of a piece by part, on one layout."""
    dense_s: Floats
    """Seconds without routed experts, [2, ranks, chunks]: forward, backward."""
    routed_s: Floats
    """Seconds of routed experts, [2, ranks, chunks]."""
    saved_bytes: Floats
    """Kept of one micro-batch from its forward to its backward."""


def contents(pricing: Pricing) -> Contents:
    """What stands in the chunks of the one layout that `pricing` is for."""
    model, layouts = pricing.model, pricing.layouts
    pp, vpp, text = int(layouts.pp[0]), int(layouts.vpp[0]), layouts.stages[int(layouts.split[0])]
    split = model, pp, vpp, text, layouts.recompute_counts[int(layouts.recompute_count[0])]
    units = _unit_passes(pricing, layouts)
    if split[-1]:
        units += _unit_passes(pricing, layouts.with_columns(recompute=0 * layouts.recompute))
    pieces = _pieces(chunk_letters(model, pp, vpp, text), chunk_pieces(*split))
    # what one of each unit costs, [2, units]
    seconds = np.array([[_seconds(u, way) for u in units] for way in ("forward", "backward")])
    counts = chunk_units(*split)
    return Contents(
        pieces=tuple(tuple(pieces[r::pp]) for r in range(pp)),
        units=tuple(units),
        dense_s=np.einsum("rcu,wu->wrc", counts, seconds[..., 0]),
        routed_s=np.einsum("rcu,wu->wrc", counts, seconds[..., 1]),
        saved_bytes=chunk_layers(*split) @ pricing.saved_bytes()[:, 0],
    )


def _unit_passes(pricing: Pricing, layouts: Layouts) -> list[UnitPasses]:
    """Seconds of every unit."""
    return unit_passes(pricing.model, pricing.profile, pricing.workload, without_experts(layouts), fold(layouts))


def _pieces(chunks: tuple[str, ...], units: list[list[int]]) -> list[tuple[Piece, ...]]:
    """What stands in each chunk of the model, first to last."""
    layer, depth = 0, 0
    out = []
    for chunk, held in zip(chunks, units, strict=True):
        here = []
        for letter, unit in zip(chunk.replace("E", ""), held, strict=True):
            if letter == "t":
                here.append(Piece(name=f"layer {layer}", unit=unit))
                layer += 1
            elif letter == "L":
                here.append(Piece(name="head", unit=unit))
            else:
                here.append(Piece(name=f"prediction {depth}", unit=unit))
                depth += 1
        out.append(tuple(here))
    return out


def _seconds(unit: UnitPasses, way: str) -> list[float]:
    """Seconds of a unit in one direction without routed experts, and in these."""
    return [sum(_number(s) for s in getattr(part, way).values()) for part in (unit.dense, unit.routed)]


def _number(value: object) -> float:
    """The one element of a number or an array of one layout."""
    return float(np.asarray(value).reshape(-1)[0])


__all__ = ["Contents", "Piece", "contents"]
