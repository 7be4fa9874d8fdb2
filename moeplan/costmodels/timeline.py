"""One training step of one layout as a timeline: every pass of every micro-batch on every pipeline rank, and what frames them.

The same numbers as the price of a plan (`price.py`), with sends between ranks, memory and whatever else has a time and a
place; ranks may be slower than others (`slow`) and experts fuller than others (`load_spread`). Each rank
begins with what is exposed of its parameter gather and ends with what is exposed of its gradient reduction; then all wait for
the norm of the gradients, and update. Bytes of a rank rise when a forward pass begins and fall when its backward ends.
Equal stages take exactly the price's time as long as a send is shorter than about two thirds of a pass. Units: seconds,
bytes. Exposed shares are those of the price, so that a fuller expert or a slower rank hides no more than an equal one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeplan.costmodels.breakdown import Breakdown
from moeplan.costmodels.collectives import Group
from moeplan.costmodels.constants import OVERLAP, STEP
from moeplan.costmodels.layout import Layout, Layouts
from moeplan.costmodels.memory import StageParameters, micro_batches, rank_parameters, state_bytes, unit_parameters
from moeplan.costmodels.model import Model
from moeplan.costmodels.peak import head_bytes
from moeplan.costmodels.pipeline.contents import Contents, Floats, contents
from moeplan.costmodels.pipeline.interleaved import Interleaved
from moeplan.costmodels.pipeline.one_f_one_b import OneForwardOneBackward
from moeplan.costmodels.pipeline.run import Passes, run
from moeplan.costmodels.price import Pricing
from moeplan.costmodels.stages import all_ranks
from moeplan.costmodels.step import data_parallel_exposed_s, data_parallel_times, dense_group, expert_group, send_times
from moeplan.costmodels.workload import Workload
from moeplan.errors import LayoutError, UsageError
from moeplan.profiles.profile import Profile

FORWARD, BACKWARD = 0, 1
"""Codes of the kinds of passes here, places in `pipeline.action.KINDS`."""
MOST_PASSES = 4_000_000
"""Passes of a step that are simulated at most."""
_MOMENTS = ("activations", "logits and loss", "working set", "optimizer step")
"""Parts of a rank's peak that come and go in a step; the others stand from its first to its last second."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Frame:
    """What ranks do once a step, before and after their passes, [ranks] each."""

    gather_s: Floats
    """Parameter gather that overlap leaves exposed."""
    gather_busy_s: Floats
    """All of it."""
    scatter_s: Floats
    """Gradient reduction that overlap leaves exposed."""
    scatter_busy_s: Floats
    optimizer_s: Floats
    every_batch_s: float
    """Exposed in each micro-batch instead, where FSDP gathers and scatters in every one."""
    across: bool
    """Whether the exchange leaves the scale-up domain."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldBytes:
    """What ranks hold and when."""

    base: Floats
    """From first to last, [ranks]."""
    saved: Floats
    """From the forward pass of a chunk to the end of its backward, for every micro-batch, [ranks, chunks]."""
    moment: Floats
    """During a backward pass beside it, [ranks, chunks]."""
    update: Floats
    """During the update beside `base`, [ranks]."""


@dataclass(frozen=True, kw_only=True, eq=False)
class StepTimeline:
    """A simulated step."""

    schedule: str
    """Name of the pipeline schedule."""
    batches: int
    """Micro-batches of a data-parallel rank."""
    passes: Passes
    frame: Frame
    held: HeldBytes
    contents: Contents
    factors: Floats
    """By which a rank's seconds are longer than the plan says, [ranks]."""
    loads: Floats
    """Rows of the fullest expert rank over the mean, [ranks, chunks, micro-batches]."""
    send_s: float
    """Seconds of one send between stages."""
    send_inside: bool
    """Whether sends stay in a scale-up domain."""
    priced: Breakdown
    """Price of the step by part, as in a plan."""

    @property
    def ranks(self) -> int:
        """Pipeline ranks."""
        return len(self.factors)

    @functools.cached_property
    def ends_s(self) -> Floats:
        """When each rank has reduced its gradients, [ranks]."""
        last = np.array([self.passes.end_s[self.passes.of_rank(r)].max() for r in range(self.ranks)])
        return last + self.frame.scatter_s

    @property
    def update_s(self) -> float:
        """When all ranks begin to update: the norm of the gradients needs those of all."""
        return float(self.ends_s.max())

    @property
    def step_s(self) -> float:
        """Seconds of the step, overhead included."""
        return self.update_s + float(self.frame.optimizer_s.max()) + STEP.overhead_s

    @property
    def priced_s(self) -> float:
        """Seconds that the price says."""
        return float(self.priced.total)

    @functools.cached_property
    def busy_s(self) -> Floats:
        """Seconds in which each rank makes passes, [ranks]."""
        length = self.passes.end_s - self.passes.start_s
        return np.bincount(self.passes.rank, length, self.ranks).astype(np.float64)

    @property
    def idle_s(self) -> Floats:
        """Seconds in which each rank waits for others, [ranks]."""
        frame = self.frame
        return self.step_s - STEP.overhead_s - self.busy_s - frame.gather_s - frame.scatter_s - frame.optimizer_s

    @property
    def bubble_share(self) -> float:
        """Share of all ranks' seconds in which they wait for others."""
        return float(self.idle_s.mean()) / self.step_s

    @property
    def busiest(self) -> int:
        """The rank with the longest passes."""
        return int(np.argmax(self.busy_s))

    @functools.cached_property
    def peak_bytes(self) -> Floats:
        """Highest bytes of each rank, [ranks]."""
        return np.array([self.memory(r)[1].max() for r in range(self.ranks)])

    def memory(self, rank: int) -> tuple[Floats, Floats]:
        """Times, and the bytes that a rank holds from each of them on."""
        here, passes = self.passes.of_rank(rank), self.passes
        chunk, backward = passes.chunk[here], passes.kind[here] == BACKWARD
        saved, moment = self.held.saved[rank][chunk], np.where(backward, self.held.moment[rank][chunk], 0.0)
        # what a pass adds when it begins and takes away when it ends, [passes, 2]
        steps = np.stack([np.where(backward, moment, saved), np.where(backward, -moment - saved, 0.0)], axis=1)
        times = np.stack([passes.start_s[here], passes.end_s[here]], axis=1)
        base, begin, end = self.held.base[rank], self.update_s, self.update_s + self.frame.optimizer_s[rank]
        held = base + np.cumsum(steps.reshape(-1))
        held[-1] = base  # what rounding left of all that was saved
        return (
            np.concatenate([[0.0], times.reshape(-1), [begin, end, self.step_s]]),
            np.concatenate([[base], held, [base + self.held.update[rank], base, base]]),
        )


def step_timeline(
    model: Model,
    profile: Profile,
    workload: Workload,
    layout: Layout,
    *,
    slow: Mapping[int, float] | None = None,
    load_spread: float = 0.0,
    seed: int = 0,
) -> StepTimeline:
    """A step of `layout`.

    `slow`: factors on the passes of single pipeline ranks. `load_spread`: the loads of the expert-parallel ranks are drawn
    log-normal with this standard deviation for every stage and micro-batch, from `seed`; the fullest decides.
    """
    factors = _factors(layout, slow or {}, load_spread)
    layouts = Layouts.of([layout])
    pricing = Pricing(model, profile, workload, layouts, every_rank=True, exact=True)
    batches = _whole_batches(workload, layouts, layout)
    inside = contents(pricing)
    frame, held = _frame(pricing, inside, batches), _held(pricing, inside)
    loads = fullest_loads(layout, batches, load_spread if model.moe else 0.0, seed)
    # 1. seconds of every pass, [2, ranks, chunks, micro-batches]
    seconds = factors[:, None, None] * (inside.dense_s[..., None] + inside.routed_s[..., None] * loads)
    each = np.array([1.0, 2.0]) / 3.0 * frame.every_batch_s
    seconds = seconds + each[:, None, None, None]
    # 2. the pipeline
    schedule = Interleaved() if layout.vpp > 1 else OneForwardOneBackward()
    within = layout.tp * layout.cp * layout.dp < profile.cluster.domain_gpus
    send_s = float(np.ravel(send_times(model, profile, workload, layouts)[0 if within else 1])[0]) if layout.pp > 1 else 0.0
    passes = run(
        schedule.orders(layout.pp, layout.vpp, batches),
        {"F": seconds[FORWARD], "B": seconds[BACKWARD]},
        send_s=send_s,
        exposed=OVERLAP.send_exposed,
        begin_s=frame.gather_s,
    )
    return StepTimeline(
        schedule=schedule.name,
        batches=batches,
        passes=passes,
        frame=frame,
        held=held,
        contents=inside,
        factors=factors,
        loads=loads,
        send_s=send_s,
        send_inside=within,
        priced=pricing.step_cost().time.at(0),
    )


def fullest_loads(layout: Layout, batches: int, spread: float, seed: int) -> Floats:
    """Rows of the fullest expert-parallel rank over the mean, [ranks, chunks, micro-batches]; 1 without spread.

    Rows are conserved: the drawn loads are taken over their mean, so that the factor is never below 1.
    """
    out = np.ones((layout.pp, layout.vpp, batches))
    if spread and layout.ep > 1:
        rng = np.random.default_rng(seed)
        for rank in range(layout.pp):
            loads = rng.lognormal(0.0, spread, (layout.vpp, batches, layout.ep))
            out[rank] = loads.max(axis=-1) / loads.mean(axis=-1)
    return out


def _factors(layout: Layout, slow: Mapping[int, float], load_spread: float) -> Floats:
    """Factors of all ranks; refuses ranks that there are not and numbers that cannot be."""
    out = np.ones(layout.pp)
    for rank, factor in slow.items():
        if not 0 <= rank < layout.pp:
            raise UsageError(f"stage {rank} cannot be slow: the plan has {layout.pp} pipeline stages, 0 to {layout.pp - 1}")
        if not 0.0 < factor < math.inf:
            raise UsageError(f"stage {rank} cannot be {factor:g} times as slow", hint="give a number above 0, like 1.2")
        out[rank] = factor
    if not 0.0 <= load_spread <= 10.0:
        raise UsageError(f"a load spread of {load_spread:g} is not between 0 and 10", hint="0.3 is a moderate imbalance")
    return out


def _whole_batches(workload: Workload, layouts: Layouts, layout: Layout) -> int:
    """Micro-batches of the step; refuses a fraction of one and more passes than are simulated."""
    batches = float(micro_batches(workload, layouts)[0])
    if batches != int(batches):
        size = layout.micro_batch * layout.dp
        raise LayoutError(f"global batch {workload.global_batch} is not a multiple of micro_batch*dp = {size}")
    passes = 2 * int(batches) * layout.pp * layout.vpp
    if passes > MOST_PASSES:
        raise LayoutError(
            f"{int(batches)} micro-batches on {layout.pp} stages of {layout.vpp} chunks are {passes} passes, "
            f"more than the {MOST_PASSES} that are simulated",
            hint="simulate a smaller global batch: the steady state repeats itself",
        )
    return int(batches)


def _parameters(pricing: Pricing) -> StageParameters:
    """Parameters of every rank, [ranks, 1]."""
    layouts = pricing.layouts
    split = layouts.stages[int(layouts.split[0])]
    ranks = all_ranks(pricing.model, int(layouts.pp[0]), int(layouts.vpp[0]), split)
    return rank_parameters(pricing.model, ranks, unit_parameters(pricing.model, layouts))


def _frame(pricing: Pricing, inside: Contents, batches: int) -> Frame:
    """Parameter gather, gradient reduction and update of every rank."""
    profile, layouts, held = pricing.profile, pricing.layouts, _parameters(pricing)
    groups: tuple[Group, Group] = dense_group(profile, layouts), expert_group(profile, layouts)
    dense, expert = (
        data_parallel_times(profile, pricing.workload, layouts, parameters, where)
        for parameters, where in zip((held.dense, held.expert), groups, strict=True)
    )
    gather, scatter = (dense.gather + expert.gather)[:, 0], (dense.scatter + expert.scatter)[:, 0]
    micro_batch_s = (inside.dense_s + inside.routed_s).sum(axis=(0, 2))
    every = bool(layouts.shards_as("fsdp")[0]) and int(layouts.pp[0]) == 1

    def exposed(scatter: Any, gather: Any) -> Any:
        return profile.exposed * data_parallel_exposed_s(
            scatter,
            gather,
            micro_batch_s,
            1 if every else batches,
            overlap=layouts.dp_overlap[0],
            every_batch=every,
            hidden_compute=pricing.workload.era.fsdp_hidden_compute,
        )

    none = np.zeros(len(gather))
    return Frame(
        gather_s=none if every else exposed(none, gather),
        gather_busy_s=none if every else gather,
        scatter_s=none if every else exposed(scatter, none),
        scatter_busy_s=none if every else scatter,
        optimizer_s=(dense.optimizer + expert.optimizer)[:, 0],
        every_batch_s=float(exposed(scatter, gather)[0]) if every else 0.0,
        across=any(bool(np.any((where.domains > 1) & (where.ranks > 1))) for where in groups),
    )


def _held(pricing: Pricing, inside: Contents) -> HeldBytes:
    """What every rank holds and when, from the parts of its peak."""
    parts = {name: np.asarray(value)[:, 0] for name, value in pricing.peak_memory()}
    held = _parameters(pricing)
    states = state_bytes(pricing.model, pricing.profile.cluster.device, pricing.workload, pricing.layouts)
    copies = (counts * each for counts, each in zip((held.dense, held.expert), states.step, strict=False))
    base = np.asarray(sum(value for name, value in parts.items() if name not in _MOMENTS))
    # The working set is that of a layer; in the chunk with the head it stands in the loss, or beside PyTorch's.
    moment = np.repeat(pricing.moment_bytes(), inside.saved_bytes.shape[1], axis=1)
    logits = float(head_bytes(pricing.model, pricing.workload, pricing.layouts)[0])
    working = parts["working set"][-1]
    if pricing.workload.era.framework == "pytorch":
        moment[-1, -1] = working + logits
    else:
        moment[-1, -1] = np.maximum(working + parts["logits and loss"][-1], logits)
    update = np.sum([np.broadcast_to(c, (len(base), 1))[:, 0] for c in copies], axis=0) + np.zeros(len(base))
    return HeldBytes(base=base, saved=inside.saved_bytes, moment=moment, update=update)
