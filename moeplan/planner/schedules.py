"""How the MoE layers of a plan run, and what every other schedule would bring.

A plan's layout says it (dispatcher, overlap flags, `moe_schedule`); here it stands by layer group, with what it leaves exposed.
Alternatives are the same layout with another schedule, each priced as a whole step, whether the target runs it or not: a
schedule that it does not run is shown as what would be gained, and never put into a plan.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from moeplan.costmodels.layer import fold, launch_s, layer_time, routed_launches
from moeplan.costmodels.layout import Layout, Layouts
from moeplan.costmodels.model import Layer
from moeplan.costmodels.moe_choice import BEST, IDEAL, NAMES, MoeChoice
from moeplan.costmodels.price import Pricing
from moeplan.costmodels.scheduled import RoutedLayer, moe_blocks, resolved
from moeplan.planner.constraints import violations
from moeplan.planner.problem import Problem

PLAIN = MoeChoice("fsmoe", 1, 1)
"""One chunk each way: dispatch, experts, combine, one after the other."""
ONE_SHARD = ("fsmoe",)
"""What differs where every expert is whole: two streams are three then, and S1 is a plain all-to-all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerGroup:
    """Decoder layers with the same MoE block."""

    layers: str
    """Their places, like "3-60"."""
    count: int
    runs: str
    """Schedule in words: "deepep, 1F1B overlap", "alltoall, fsmoe 2/4"."""
    exposed_s: float
    """Exchange of a micro-batch that one layer leaves exposed, forward and backward."""
    plain_s: float
    """The same without overlap."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Alternative:
    """The layout of a plan with another schedule of its MoE layers."""

    name: str
    runs_on: tuple[str, ...]
    """Targets that execute it."""
    layout: Layout
    exposed_s: float
    """Exchange of a micro-batch that a layer leaves exposed, forward and backward, mean of all MoE layers."""
    step_s: float
    broken: str = ""
    """The rule that forbids it to this plan; empty: none."""
    chosen: bool = False
    """Whether it is what the plan does."""


def with_schedule(problem: Problem, layout: Layout) -> Layout:
    """The layout with "best" replaced by the quickest schedule of each kind of MoE block."""
    if layout.moe_schedule != BEST:
        return layout
    return dataclasses.replace(layout, moe_schedule=_quickest(problem, plainly(layout), NAMES))


def _quickest(problem: Problem, plain: Layout, names: Sequence[str]) -> str:
    """Text of the quickest of the named schedules for every kind of MoE block; empty where that is the plain one."""
    folded = fold(Layouts.of([plain]))
    launch = launch_s(problem.profile, problem.workload)
    choices = []
    for block in moe_blocks(problem.model):
        question = RoutedLayer(block, problem.model, problem.profile, problem.workload, folded)
        choices.append(resolved(question, launch * routed_launches(block, problem.workload, folded), names))
    if all(choice == PLAIN for choice in choices):
        return ""
    texts = [str(choice) for choice in choices]
    return texts[0] if len(set(texts)) == 1 else "; ".join(texts)


def described(layout: Layout) -> str:
    """How MoE layers run under a layout, in words."""
    how: list[str] = [layout.dispatcher]
    how += ["1F1B overlap"] * layout.ep_overlap + ["shared-expert overlap"] * layout.shared_overlap
    return ", ".join([*how, layout.moe_schedule] if layout.moe_schedule else how)


def layer_groups(problem: Problem, layout: Layout) -> list[LayerGroup]:
    """The MoE layers of a model by block, with what the layout leaves exposed of their exchange."""
    model = problem.model
    out = []
    for place, block in enumerate(moe_blocks(model)):
        held = [i for i, layer in enumerate(model.layers) if block in layer.blocks]
        if not held:
            continue
        layer = model.layers[held[0]]
        names = layout.moe_schedule.split("; ")
        runs = dataclasses.replace(layout, moe_schedule=names[place] if place < len(names) else names[-1])
        mine, plain = (_exposed_s(problem, layer, x) for x in (layout, plainly(layout)))
        out.append(LayerGroup(layers=_ranges(held), count=len(held), runs=described(runs), exposed_s=mine, plain_s=plain))
    return out


def plainly(layout: Layout) -> Layout:
    """The same layout without overlap in its MoE layers."""
    return dataclasses.replace(layout, ep_overlap=False, shared_overlap=False, moe_schedule="")


def alternatives(problem: Problem, layout: Layout) -> list[Alternative]:
    """The layout under every schedule of its MoE layers, plain first; empty for what has no exchange among experts."""
    model = problem.model
    if not moe_blocks(model) or layout.ep * layout.etp == 1 or layout.dispatcher in ("none", "allgather"):
        return []
    plain = plainly(layout)
    tries: list[tuple[str, tuple[str, ...], Layout]] = [("plain", ("megatron",), plain)]
    if any(block.shared_width for block in moe_blocks(model)):
        tries.append(("shared-expert overlap", ("megatron",), dataclasses.replace(plain, shared_overlap=True)))
    tries.append(("1F1B overlap", ("megatron",), dataclasses.replace(plain, ep_overlap=True)))
    for name in NAMES if layout.etp > 1 else ONE_SHARD:
        text = _quickest(problem, plain, (name,)) or str(PLAIN)
        tries.append((text, (), dataclasses.replace(plain, moe_schedule=text)))
    tries.append(("comet (ideal)", (), dataclasses.replace(plain, moe_schedule=IDEAL)))
    layouts = [x for _, _, x in tries]
    times = Pricing(model, problem.profile, problem.workload, Layouts.of(layouts), exact=True).step_seconds()
    free = dataclasses.replace(problem, target="research")
    out = []
    for (name, runs_on, x), step_s in zip(tries, times.tolist(), strict=True):
        broken = violations(free, x)
        out.append(
            Alternative(
                name=name,
                runs_on=runs_on,
                layout=x,
                exposed_s=_mean_exposed_s(problem, x),
                step_s=step_s,
                broken=broken[0].reason if broken else "",
                chosen=x == layout,
            )
        )
    return out


def _exposed_s(problem: Problem, layer: Layer, layout: Layout) -> float:
    """Exchange of a micro-batch that one layer leaves exposed, forward and backward."""
    parts = layer_time(layer, problem.model, problem.profile, problem.workload, Layouts.of([layout]))
    return float(parts["expert all-to-all"][0])


def _mean_exposed_s(problem: Problem, layout: Layout) -> float:
    """The same, mean of all MoE layers."""
    model = problem.model
    counts = {kind: model.layers.count(kind) for kind in model.kinds if kind.is_moe}
    return sum(n * _exposed_s(problem, kind, layout) for kind, n in counts.items()) / max(1, sum(counts.values()))


def _ranges(places: Sequence[int]) -> str:
    """Places as text, runs as ranges: "3-60", "0-5,7"."""
    runs: list[list[int]] = []
    for place in places:
        if runs and runs[-1][1] == place - 1:
            runs[-1][1] = place
        else:
            runs.append([place, place])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
