"""State that moves when a job changes its layout, and state that is lost when nodes die.

    moved = min over one-to-one placements of new nodes on old ones of  sum over ranks of need - have
Ranks take any device of their node, so that a group within a node stays together; an old node may stay unused, and a new one
has nothing. What a rank takes from a neighbour of its own node counts as moved. Lost is what no surviving rank holds.
    seconds >= max(most that a node receives / nic, moved / (nodes * nic))
Units: bytes, seconds. Of equally good placements one is taken, another may spread what arrives more evenly. Not valid for moves
through storage.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from moeplan.costmodels.layout import Layout
from moeplan.costmodels.model import Model
from moeplan.costmodels.workload import Workload
from moeplan.errors import ProblemError
from moeplan.planner.elastic.assignment import best_inside, best_outside
from moeplan.planner.elastic.holdings import Holdings, Ints, Spread, holdings
from moeplan.planner.elastic.overlap import check_same, node_gains, rank_overlap
from moeplan.profiles.hardware import Cluster

SLOWNESS = 3.0
"""Seconds of a real re-sharding over the bound of the fabric: an assumption, implementations lie between about 2 and 4."""
_ROUNDING = 1e-12
"""Shares of a rank's state below this are rounding."""


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Movement:
    """The cheapest way from one layout to another."""

    need_bytes: float
    """State of all new ranks, copies included."""
    moved_bytes: float
    """What of it is not on the device already."""
    received_bytes: float
    """Most that a node receives."""
    nodes: int
    """Nodes of the new layout."""
    placement: Ints
    """The old rank whose device each new rank takes; -1: a device that held nothing. [new ranks]"""


def movement(old: Holdings, new: Holdings, *, alive: Sequence[bool] | None = None) -> Movement:
    """Bytes to move from `old` to `new` under the best placement; `alive`: the old nodes that are left, all by default."""
    check_same(old, new)
    if alive is not None and len(alive) != old.nodes:
        raise ProblemError(f"{len(alive)} nodes are alive or dead, the layout has {old.nodes}")
    survivors = np.arange(old.nodes) if alive is None else np.flatnonzero(alive)
    placement = np.full(new.nodes * new.node_gpus, -1)
    have = np.zeros(len(placement))
    if len(survivors):
        # 1. nodes on nodes: [survivors] -> new node
        into = best_outside(node_gains(old, new)[survivors])
        hosts, guests = survivors[into >= 0], into[into >= 0]
        # 2. ranks on devices of their node: [nodes, devices, ranks]
        ranks = np.arange(old.node_gpus)
        at = (hosts[:, None] * old.node_gpus + ranks)[:, :, None]
        to = guests[:, None] * old.node_gpus + ranks
        shared = rank_overlap(old, new, at, to[:, None])
        takes = best_inside(shared)
        filled = np.take_along_axis(to, takes, axis=1)
        have[filled] = np.take_along_axis(shared, takes[:, :, None], axis=2)[:, :, 0]
        placement[filled] = np.where(at < old.world, at, -1)[:, :, 0]
    need = new.rank_bytes()
    missing = np.pad(need - have[: new.world], (0, len(have) - new.world))
    missing[: new.world] *= missing[: new.world] > _ROUNDING * need
    return Movement(
        need_bytes=float(need.sum()),
        moved_bytes=float(missing.sum()),
        received_bytes=float(missing.reshape(new.nodes, -1).sum(axis=1).max()),
        nodes=new.nodes,
        placement=placement[: new.world],
    )


def least_move_seconds(moved: Movement, cluster: Cluster) -> float:
    """What the fabric needs at least: the busiest node's network, or all of them together."""
    nic_bytes_per_s = cluster.scale_out_bytes_per_s_per_gpu * cluster.gpus_per_node
    return max(moved.received_bytes, moved.moved_bytes / moved.nodes) / nic_bytes_per_s


def move_seconds(moved: Movement, cluster: Cluster, *, slowness: float = SLOWNESS) -> float:
    """Seconds that a movement takes over the networks of its nodes, `slowness` times the least."""
    return slowness * least_move_seconds(moved, cluster)


def lost_bytes(held: Holdings, dead_nodes: Collection[int]) -> float:
    """Bytes of state that no rank outside `dead_nodes` holds; each share counts once."""
    rank = np.arange(held.world)
    alive = ~np.isin(rank // held.node_gpus, list(dead_nodes)).reshape(held.stages, held.positions)
    total = 0.0
    for spread, stages, size_bytes in _groups(held):
        kept = np.zeros(spread.experts * spread.parts, np.bool_)
        np.logical_or.at(kept, np.broadcast_to(spread.cell, (len(stages), held.positions)), alive[stages])
        total += size_bytes * float(spread.cell_shares()[~kept].sum())
    return total


def fewest_holders(held: Holdings) -> int:
    """Nodes on which every piece of state lies at least; one failure less loses nothing, whichever nodes fail."""
    rank = np.arange(held.world).reshape(held.stages, held.positions)
    fewest = held.nodes
    for spread, stages, _ in _groups(held):
        holders = np.unique(spread.cell * held.nodes + rank[stages] // held.node_gpus) // held.nodes
        count = np.bincount(holders, minlength=spread.experts * spread.parts)
        fewest = min(fewest, int(count[spread.cell_shares() > 0].min()))
    return fewest


def _groups(held: Holdings) -> Iterator[tuple[Spread, Ints, float]]:
    """Slots that the same stages hold, spread by spread: those stages, and the bytes of the slots."""
    stages, group = np.unique(held.present, axis=1, return_inverse=True)
    for spread in held.spreads:
        for g, size in enumerate(np.bincount(group.reshape(-1), spread.sizes)):
            if size_bytes := float(size * spread.bytes_each):
                yield spread, np.flatnonzero(stages[:, g]), size_bytes


def instances_needed(model: Model, workload: Workload, layout: Layout, failures: int, node_gpus: int) -> int | None:
    """Fewest optimizer replicas with which any `failures` nodes may fail and nothing is lost; None: no number is enough."""
    replicas = math.gcd(layout.dp * layout.cp, layout.edp) if model.moe else layout.dp * layout.cp
    for instances in (d for d in range(1, replicas + 1) if replicas % d == 0):
        held = holdings(model, workload, layout, instances=instances, node_gpus=node_gpus)
        if fewest_holders(held) > failures:
            return instances
    return None
