"""How one plan's layout differs from another's, in words: "EP 64 instead of 32", "recompute off on stages 0-3".

Fields that follow from others (data parallelism, sequence parallelism, shared experts on a stream of their own) go unsaid.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from moeplan.costmodels.layout import Layout
from moeplan.costmodels.recompute import recomputed_layers
from moeplan.costmodels.stages import chunk_letters
from moeplan.planner.plan import Plan

DEGREES = ("tp", "cp", "pp", "vpp", "ep", "etp")
"""Degrees that others follow from."""
FEW = 2
"""Up to so many degrees are named one by one; beyond that all of them are said at once."""
_SWITCHES = {
    "ep_overlap": "expert overlap", "tp_overlap": "tensor overlap", "dp_overlap": "gradient overlap",
}  # fmt: skip
_VALUES = {
    "micro_batch": "micro-batch", "dispatcher": "dispatcher", "moe_schedule": "MoE schedule", "sharding": "sharding",
    "cuda_graphs": "CUDA graphs over", "optimizer_offload": "offloaded share of the optimizer",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Difference:
    """One respect in which a layout differs from another."""

    now: str
    """What it has: "EP 64"."""
    was: str = ""
    """What the other has in its place: "32"; empty where the new says it all."""

    def __str__(self) -> str:
        return f"{self.now} instead of {self.was}" if self.was else self.now


def differences(before: Plan, after: Plan) -> tuple[Difference, ...]:
    """What is different in `after`, degrees first; empty where the layouts are the same."""
    return tuple(_differences(before, after))


def _differences(before: Plan, after: Plan) -> Iterator[Difference]:
    old, new = before.layout, after.layout
    degrees = [name for name in DEGREES if getattr(old, name) != getattr(new, name)]
    if len(degrees) > FEW:
        yield Difference(new.degrees(), old.degrees())
    else:
        yield from (Difference(f"{name.upper()} {getattr(new, name)}", str(getattr(old, name))) for name in degrees)
    yield from _recompute(before, after)
    for name, said in _VALUES.items():
        was, now = getattr(old, name), getattr(new, name)
        if was != now:
            yield Difference(f"{said} {_shown(now)}", _shown(was))
    for name, said in _SWITCHES.items():
        if getattr(old, name) != getattr(new, name):
            yield Difference(f"{said} {'on' if getattr(new, name) else 'off'}")
    if _chunks(before) != _chunks(after) and not degrees:
        yield Difference("another split of the layers")


def _recompute(before: Plan, after: Plan) -> Iterator[Difference]:
    """What is recomputed, and by which layers."""
    old, new = before.layout.recompute, after.layout.recompute
    was, now = recomputing(before), recomputing(after)
    if (old, was) == (new, now) or not sum(was) + sum(now):
        return
    if not sum(now):
        yield Difference("recompute off")
    elif not sum(was):
        yield Difference(f"recompute {' + '.join(new)}{_share(after, now)}")
    elif old != new:
        yield _sets(old, new)
    elif len(was) == len(now) and (off := [i for i, (a, b) in enumerate(zip(was, now, strict=True)) if a and not b]):
        yield Difference(f"recompute off on stage{'s' if len(off) > 1 else ''} {_runs(off)}")
    elif sum(was) != sum(now):
        yield Difference(f"recompute in {sum(now)} layers", str(sum(was)))
    elif len(was) == len(now):
        yield Difference("recompute on other stages")


def _sets(old: Sequence[str], new: Sequence[str]) -> Difference:
    """Another set of recomputed modules."""
    if set(new) < set(old):
        return Difference(f"no recompute of {' and '.join(n for n in old if n not in new)}")
    if set(old) < set(new):
        return Difference(f"recompute of {' and '.join(n for n in new if n not in old)} too")
    return Difference(f"recompute {' + '.join(new)}", " + ".join(old))


def recomputing(plan: Plan) -> list[int]:
    """Layers of each pipeline stage that recompute something."""
    x = plan.layout
    if not x.recompute:
        return [0] * x.pp
    layers = recomputed_layers(x.recompute_layers, [text.count("t") for text in _chunks(plan)])
    return [sum(layers[stage :: x.pp]) for stage in range(x.pp)]


def _share(plan: Plan, layers: Sequence[int]) -> str:
    whole = len(plan.problem.model.layers)
    return "" if sum(layers) == whole else f" in {sum(layers)} of {whole} layers"


def _chunks(plan: Plan) -> Sequence[str]:
    x: Layout = plan.layout
    return chunk_letters(plan.problem.model, x.pp, x.vpp, x.stages)


def _runs(places: Sequence[int]) -> str:
    """Numbers with runs joined: "0-3, 7"."""
    out = []
    for _, run in groupby(enumerate(places), key=lambda pair: pair[1] - pair[0]):
        members = [place for _, place in run]
        out.append(f"{members[0]}-{members[-1]}" if len(members) > 1 else f"{members[0]}")
    return ", ".join(out)


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return " + ".join(value) or "nothing"
    return f"{value:g}" if isinstance(value, (int, float)) else value or "none"
