"""Algorithms of one all-to-all: what crosses which link, and how long that takes.

P ranks in N nodes of g, x bytes on each rank, times alpha + beta x of the links inside a node (i) and between nodes (n). Flat:
fitted as a whole, or alpha_n + beta_n x (P-g)/P where the network is the bottleneck. 1DH (Hetu), to a leader and back, leaders
exchange: 2 (alpha_i + beta_i (g-1) x) + alpha_n' + beta_n' g x (N-1)/N. 2DH (Tutel), inside, then between with messages g times
larger: alpha_i + beta_i x (g-1)/g + alpha_n + beta_n x (N-1)/N. Pipe-A2A (ScheMoE), both links at once: max(alpha_i + beta_i x
(g-1)/P, alpha_n + beta_n x (P-g)/P). Their structure is public, the formulas are derived; local transposes are free. Units:
bytes, seconds; numbers or arrays. Not valid for uneven nodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from moeplan.costmodels.moe.base import AlphaBeta

ALGORITHMS = ("flat", "1dh", "2dh", "pipe-a2a")
"""Algorithms that `exchange_times` prices, in its order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkLines:
    """Fitted times of the links, over bytes of one rank."""

    flat: AlphaBeta
    """A whole all-to-all of all ranks, over the bytes of a rank, its own share included."""
    intra: AlphaBeta
    """Inside a node."""
    inter: AlphaBeta
    """Between nodes, all ranks of a node sharing its network."""
    leader: AlphaBeta
    """Between nodes, one rank of a node having its network alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Traffic:
    """What the busiest rank sends, by link; numbers or arrays."""

    intra_messages: Any
    intra_bytes: Any
    inter_messages: Any
    inter_bytes: Any


def direct_traffic(rank_bytes: Any, ranks: Any, node_ranks: Any) -> Traffic:
    """Flat and Pipe-A2A: a message to every rank."""
    far = ranks - node_ranks
    return Traffic(
        intra_messages=node_ranks - 1,
        intra_bytes=rank_bytes * (node_ranks - 1) / ranks,
        inter_messages=far,
        inter_bytes=rank_bytes * far / ranks,
    )


def leader_traffic(rank_bytes: Any, ranks: Any, node_ranks: Any) -> Traffic:
    """1DH: all buffers of a node pass its leader, twice."""
    nodes = ranks / node_ranks
    return Traffic(
        intra_messages=2 * (node_ranks - 1),
        intra_bytes=2.0 * (node_ranks - 1) * rank_bytes,
        inter_messages=nodes - 1,
        inter_bytes=node_ranks * rank_bytes * (nodes - 1) / nodes,
    )


def two_level_traffic(rank_bytes: Any, ranks: Any, node_ranks: Any) -> Traffic:
    """2DH: inside, all slots for one rank of each node are brought together; then one message to every other node."""
    nodes = ranks / node_ranks
    return Traffic(
        intra_messages=node_ranks - 1,
        intra_bytes=rank_bytes * (node_ranks - 1) / node_ranks,
        inter_messages=nodes - 1,
        inter_bytes=rank_bytes * (nodes - 1) / nodes,
    )


def split_flat_s(rank_bytes: Any, ranks: Any, node_ranks: Any, links: LinkLines) -> Any:
    """A flat all-to-all by its traffic between nodes; by that inside where there is one node."""
    sent = direct_traffic(rank_bytes, ranks, node_ranks)
    inside = links.intra.among_s(sent.intra_bytes, node_ranks)
    return np.where(np.asarray(ranks) > node_ranks, links.inter.time_s(sent.inter_bytes), inside)


def one_level_s(rank_bytes: Any, ranks: Any, node_ranks: Any, links: LinkLines) -> Any:
    """1DH."""
    sent = leader_traffic(rank_bytes, ranks, node_ranks)
    inside = 2.0 * links.intra.among_s(sent.intra_bytes / 2.0, node_ranks)
    return inside + links.leader.among_s(sent.inter_bytes, ranks / node_ranks)


def two_level_s(rank_bytes: Any, ranks: Any, node_ranks: Any, links: LinkLines) -> Any:
    """2DH."""
    sent = two_level_traffic(rank_bytes, ranks, node_ranks)
    return links.intra.among_s(sent.intra_bytes, node_ranks) + links.inter.among_s(sent.inter_bytes, ranks / node_ranks)


def pipelined_s(rank_bytes: Any, ranks: Any, node_ranks: Any, links: LinkLines) -> Any:
    """Pipe-A2A."""
    sent = direct_traffic(rank_bytes, ranks, node_ranks)
    inside = links.intra.among_s(sent.intra_bytes, node_ranks)
    return np.maximum(inside, links.inter.among_s(sent.inter_bytes, ranks / node_ranks))


def exchange_times(rank_bytes: Any, ranks: Any, node_ranks: Any, links: LinkLines) -> Any:
    """Seconds of every algorithm, [ALGORITHMS, ...]."""
    times = [links.flat.among_s(rank_bytes, ranks)]
    times += [f(rank_bytes, ranks, node_ranks, links) for f in (one_level_s, two_level_s, pipelined_s)]
    return np.stack(np.broadcast_arrays(*times))


def best_exchange(rank_bytes: Any, ranks: Any, node_ranks: Any, links: LinkLines) -> tuple[Any, Any]:
    """Index into ALGORITHMS of the quickest, and its seconds."""
    times = exchange_times(rank_bytes, ranks, node_ranks, links)
    return np.argmin(times, axis=0), np.min(times, axis=0)
