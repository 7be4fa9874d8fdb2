"""What tasks do with the rows of one direction, and which schedules consist of such tasks.

A function is the work of one kind in one chunk, and returns its amount as `LayerSchedule.amounts` counts it: bytes that a rank
holds (rows that pad uneven parts count), FLOP of experts. Kinds as in `costmodels/moe/base.py`; forward and backward are alike.
A task does what only it waits for: M adds up the slots of each token before it gathers tokens, C the partial sums of shards.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeplan.costmodels.moe.base import LayerSchedule
from moeplan.costmodels.moe.schedules import find_schedule
from moeplan.errors import ScheduleError
from moeplan.runtime import wire
from moeplan.runtime.moe_passage import Passage, Way


def size_of(tensor: Tensor) -> float:
    """Bytes of a tensor."""
    return float(tensor.numel() * tensor.element_size())


def dispatch(passage: Passage, i: int) -> float:
    """D: slots to the ranks of the same lane that have their experts."""
    chunk, rows = passage.chunks[i], passage.sent[i]
    arrive = chunk.arrive[passage.lane].tolist()
    count = passage.padded[i] if passage.way.arrival == "shards" else sum(arrive)
    out = rows.new_empty(count, rows.shape[1])
    wire.exchange(passage.ranks, "ep", rows, chunk.send.tolist(), arrive, out[: sum(arrive)])
    passage.arrived[i] = out
    return size_of(rows)


def gather_shards(passage: Passage, i: int) -> float:
    """G: what arrived in the lanes of all shards."""
    passage.arrived[i] = wire.gather(passage.ranks, "esp", passage.arrived[i])
    return size_of(passage.arrived[i])


def gather_tokens(passage: Passage, i: int) -> float:
    """G: the tokens of all groups that share the shards, then a row for each of their slots."""
    values = wire.padded_rows(passage.values, passage.load.routing.padded)
    passage.values = wire.gather(passage.ranks, passage.way.owners, values)
    passage.order()
    return size_of(passage.values)


def compute(passage: Passage, i: int) -> float:
    """E: the local experts on what arrived."""
    rows = passage.rows[i]
    made, flop = passage.load.experts(i, passage.arrived[i], rows)
    passage.made[i] = made.index_select(0, rows.back)
    return flop


def scatter(passage: Passage, i: int) -> float:
    """S: partial sums added up over the shards, those of a lane to its rank."""
    own = passage.own(i)
    passage.summed[i] = wire.scatter(passage.ranks, "esp", passage.made[i])[: own.stop - own.start]
    return size_of(passage.made[i])


def reduce(passage: Passage, i: int) -> float:
    """A: partial sums added up over the shards, all to all of them."""
    passage.summed[i] = wire.reduce(passage.ranks, "esp", passage.made[i])[passage.own(i)]
    return size_of(passage.made[i])


def combine(passage: Passage, i: int) -> float:
    """C: sums back along the lane."""
    chunk, rows = passage.chunks[i], passage.summed[i]
    passage.back[i] = rows.new_empty(int(chunk.send.sum()), rows.shape[1])
    wire.exchange(passage.ranks, "ep", rows, chunk.arrive[passage.lane].tolist(), chunk.send.tolist(), passage.back[i])
    return size_of(rows)


def dispatch_to_all(passage: Passage, i: int) -> float:
    """D: slots to every shard of their experts."""
    chunk, rows = passage.chunks[i], passage.sent[i]
    esp = passage.ranks.placement.esp
    if esp > 1:
        rows = rows.index_select(0, passage.copied[i])
    passage.arrived[i] = rows.new_empty(int(chunk.arrive.sum()), rows.shape[1])
    wire.exchange(passage.ranks, "all", rows, chunk.send.repeat(esp).tolist(), chunk.arrive.tolist(), passage.arrived[i])
    return size_of(rows)


def combine_from_all(passage: Passage, i: int) -> float:
    """C: partial sums back from every shard, added up."""
    chunk, rows, index = passage.chunks[i], passage.made[i], passage.copies[i]
    esp = passage.ranks.placement.esp
    out = rows.new_empty(index.numel(), rows.shape[1])
    wire.exchange(passage.ranks, "all", rows, chunk.arrive.tolist(), chunk.send.repeat(esp).tolist(), out)
    passage.back[i] = out.index_select(0, index.ravel()).view(*index.shape, rows.shape[1]).sum(dim=0) if esp > 1 else out
    return size_of(rows)


def combine_phase(passage: Passage, i: int) -> float:
    """C of S2: partial sums of one phase back from the shards at a distance, added up."""
    phase, esp = passage.phases[i], passage.ranks.placement.esp
    start = sum(len(before.order) for before in passage.phases[:i])
    rows = passage.made[0][start : start + len(phase.order)]
    out = rows.new_empty(int(phase.receive.sum()), rows.shape[1])
    wire.exchange(passage.ranks, "all", rows, phase.send.tolist(), phase.receive.tolist(), out)
    passage.back[i] = out.view(esp, len(out) // esp, out.shape[1]).sum(dim=0) if esp > 1 else out
    return size_of(rows)


def gather_phase(passage: Passage, i: int) -> float:
    """M of S2: the slots of one phase, from all tensor-parallel ranks."""
    out = passage.gathered[passage.phase_at(i)]
    wire.gather(passage.ranks, "mp", wire.padded_rows(passage.back[i], passage.phases[i].padded), out)
    return size_of(out)


def close_slots(passage: Passage, i: int) -> float:
    """M: the slots that each tensor-parallel rank has."""
    wire.gather(passage.ranks, "mp", wire.padded_rows(passage.back[0], passage.slots_padded()), passage.gathered)
    return size_of(passage.gathered)


def close_tokens(passage: Passage, i: int) -> float:
    """M: the tokens that each tensor-parallel rank has."""
    slices = passage.slices()
    gathered = wire.gather(passage.ranks, "mp", wire.padded_rows(passage.collected(), max(slices)))
    parts = zip(torch.split(gathered, max(slices)), slices, strict=True) if gathered.shape[0] else ()
    passage.tokens = torch.cat([part[:count] for part, count in parts]) if min(slices) < max(slices) else gathered
    return size_of(gathered)


_LANE = {"D": dispatch, "G": gather_shards, "E": compute, "C": combine}
_WHOLE = {"G": gather_tokens, "D": dispatch, "E": compute, "A": reduce, "C": combine}
_THROUGH_SHARDS = Way(split="tokens", arrival="shards", closing="tokens", tasks={**_LANE, "S": scatter, "M": close_tokens})
WAYS = {
    "baseline": Way(split="none", arrival="lane", closing="none", tasks=_WHOLE, owners="esp"),
    "replicated-baseline": Way(split="none", arrival="lane", closing="none", tasks=_WHOLE),
    "deepspeed": Way(split="slots", arrival="shards", closing="slots", tasks={**_LANE, "A": reduce, "M": close_slots}),
    "s1": Way(
        split="tokens",
        arrival="all",
        closing="tokens",
        tasks={"D": dispatch_to_all, "E": compute, "C": combine_from_all, "M": close_tokens},
    ),
    "s2": Way(
        split="slots",
        arrival="all",
        closing="phases",
        tasks={"D": dispatch_to_all, "E": compute, "C": combine_phase, "M": gather_phase},
    ),
    "hierarchical": _THROUGH_SHARDS,
    "tutel": _THROUGH_SHARDS,
    "tutel-improved": _THROUGH_SHARDS,
    "pipemoe": _THROUGH_SHARDS,
    "fsmoe-no-iio": _THROUGH_SHARDS,
    "fsmoe": _THROUGH_SHARDS,
}
"""How each schedule that can be executed moves rows."""


def executable(name: str) -> tuple[LayerSchedule, Way]:
    """A schedule that can be executed, and how it moves rows; refuses others."""
    schedule = find_schedule(name)
    if name not in WAYS:
        raise ScheduleError(f"schedule '{name}' cannot be executed", hint=f"these can: {', '.join(WAYS)}")
    return schedule, WAYS[name]
