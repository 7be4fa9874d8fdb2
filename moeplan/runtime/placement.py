"""Where the ranks of an MoE layer stand, and their process groups.

world = replicas x ep x esp ranks; rank = (replica * ep + e) * esp + s holds shard s of the experts of place e. Tensor-parallel
groups are consecutive runs of mp ranks, which hold the same tokens; mp divides ep x esp and may be less or more than esp.
Every axis has process groups of its own, so that lanes that use different axes never share a communicator.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from moeplan.costmodels.layout import Layout
from moeplan.costmodels.moe.base import check_groups
from moeplan.errors import DeviceError, LayoutError
from moeplan.runtime.groups import rank_groups

AXES = {"ep": "ep", "esp": "etp", "mp": "tp", "all": "tp_ep", "copies": "edp", "dense": "dp"}
"""Axes of a layer and their names in `groups.py`; "all" are the ranks of a replica, "copies" those that hold the same weights,
"dense" those of the same place in their tensor-parallel groups. "owners" is one more: one rank of an expert's shards for each
tensor-parallel group among them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """Sizes of the groups of one MoE layer."""

    ep: int = 1
    """Groups that share the experts."""
    esp: int = 1
    """Ranks among which every expert is cut."""
    mp: int = 1
    """Ranks that hold the same tokens."""
    replicas: int = 1
    """Copies of all experts."""

    def __post_init__(self) -> None:
        check_groups(self.ep * self.esp, self.mp, self.ep, self.esp)
        if self.replicas < 1:
            raise LayoutError(f"replicas = {self.replicas} is not a number of copies", hint="give a whole number from 1")

    @property
    def ranks(self) -> int:
        """Ranks of one replica."""
        return self.ep * self.esp

    @property
    def world(self) -> int:
        """All ranks."""
        return self.replicas * self.ranks

    def at(self, rank: int) -> tuple[int, int, int]:
        """Replica, place among the ep groups, and shard of a rank."""
        return rank // self.ranks, rank % self.ranks // self.esp, rank % self.esp

    def groups(self) -> dict[str, list[list[int]]]:
        """The groups of every axis, as lists of ranks."""
        layout = Layout(tp=self.mp, dp=self.world // self.mp, etp=self.esp, ep=self.ep, edp=self.replicas)
        named = rank_groups(layout)
        groups = {axis: named[name] for axis, name in AXES.items()}
        step = math.gcd(self.mp, self.esp)
        groups["owners"] = [group[i::step] for group in groups["esp"] for i in range(step)]
        return groups


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerRanks:
    """A placement with its process groups, as one rank sees it."""

    placement: Placement
    rank: int
    members: Mapping[str, list[int]]
    """Ranks of this rank's group of every axis."""
    groups: Mapping[str, Any]
    """Process group of every axis; None where the rank is alone."""

    def size(self, axis: str) -> int:
        """Ranks of the group."""
        return len(self.members[axis])

    def place(self, axis: str) -> int:
        """Place of this rank in its group."""
        return self.members[axis].index(self.rank)

    def leave(self) -> None:
        """Destroy the process groups of this rank; all ranks must call it."""
        import torch.distributed as dist

        for group in self.groups.values():
            if group is not None:
                dist.destroy_process_group(group)


def join(placement: Placement, timeout_s: float = 600.0, stages: int = 1) -> LayerRanks:
    """Make the process groups; all ranks of torch.distributed must call it, a single process needs none.

    With several pipeline stages each has the placement on ranks of its own, one stage after the other.
    """
    import torch.distributed as dist

    ranks, world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1, stages * placement.world
    if ranks != world:
        raise DeviceError(
            f"the placement has {world} ranks, but {ranks} run",
            hint=f"start {world} processes, as by torchrun --nproc-per-node {world}",
        )
    rank = dist.get_rank() if ranks > 1 else 0
    members: dict[str, list[int]] = {}
    groups: dict[str, Any] = {}
    for axis, lists in placement.groups().items():
        for each in [[first + r for r in group] for first in range(0, world, placement.world) for group in lists]:
            # Every rank makes every group, in the same order.
            group = dist.new_group(each, timeout=timedelta(seconds=timeout_s)) if len(each) > 1 else None
            if rank in each:
                members[axis], groups[axis] = each, group
    return LayerRanks(placement=placement, rank=rank, members=members, groups=groups)
