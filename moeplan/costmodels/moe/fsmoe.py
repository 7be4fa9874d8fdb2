"""FSMoE: one MoE layer in r chunks on three streams, and its two-stream ancestors.

FSMoE (ASPLOS 2025, arXiv 2501.10714), section 4. Of each chunk: all-to-all (a), gather among ESP (g), experts (e),
reduce-scatter (s), all-to-all (a). Streams are first in, first out: inter-node D1..Dr, R, C1..Cr; intra-node G1..Gr, S1..Sr;
compute E1..Er, where R is a part of the gradient all-reduce (backward only). `three_stream_s` is the exact makespan for any
g and s. The paper's four cases (`paper_s`) assume g = s and are a lower bound elsewhere, so they serve for comparison only;
its twelve conditions say no more than a maximum. Two streams (PipeMoE, INFOCOM 2023; Tutel) merge all communication.

Backward computes twice: alpha and beta of the experts double, not also the FLOP (the paper's "twice" for all three would
quadruple). The paper solves for r with SLSQP and rounds; here r is enumerated. Units: bytes, FLOP, seconds; numbers or arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moeplan.costmodels.moe.base import AlphaBeta, MoeSize

DEGREES = (1, 2, 4, 8)
"""Numbers of chunks that the published solver allows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Volumes:
    """What one rank moves and computes in one direction, all chunks together."""

    exchange_bytes: Any
    """Each of the two all-to-alls among EP."""
    gather_bytes: Any
    """Gathered size among ESP; the reduce-scatter sums as much."""
    mp_gather_bytes: Any
    """Gathered tokens around attention; no part of the schedule."""
    expert_flop: Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Lines:
    """Fitted times of one direction, over bytes (experts: over FLOP)."""

    exchange: AlphaBeta
    gather: AlphaBeta
    experts: AlphaBeta
    scatter: AlphaBeta


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """Seconds of the parts of one chunk; numbers or arrays."""

    exchange_s: Any
    gather_s: Any
    expert_s: Any
    scatter_s: Any


def volumes(size: MoeSize) -> Volumes:
    """Bytes and FLOP of a rank in FSMoE's layout, forward: the nodes exchange 1 / esp_ranks of what S1 sends."""
    return Volumes(
        exchange_bytes=size.slot_bytes / size.mp_ranks,
        gather_bytes=size.slot_bytes * size.esp_ranks / size.mp_ranks,
        mp_gather_bytes=size.token_bytes,
        expert_flop=size.expert_flop / size.mp_ranks,
    )


def backward(forward: Lines) -> Lines:
    """The fitted times backward: gradients of inputs and of weights; communication is the same (section 4.4)."""
    experts = AlphaBeta(startup_s=2.0 * forward.experts.startup_s, unit_s=2.0 * forward.experts.unit_s)
    return replace(forward, experts=experts)


def chunk(work: Volumes, lines: Lines, degree: Any, size: MoeSize) -> Chunk:
    """Seconds of one of `degree` chunks; a group of one rank takes no time."""
    return Chunk(
        exchange_s=lines.exchange.among_s(work.exchange_bytes / degree, size.ep_ranks),
        gather_s=lines.gather.among_s(work.gather_bytes / degree, size.esp_ranks),
        expert_s=lines.experts.time_s(work.expert_flop / degree),
        scatter_s=lines.scatter.among_s(work.gather_bytes / degree, size.esp_ranks),
    )


def serial_s(degree: Any, part: Chunk, gradient_s: Any = 0.0) -> Any:
    """Seconds of `degree` chunks with nothing overlapped."""
    return degree * (2.0 * part.exchange_s + part.gather_s + part.expert_s + part.scatter_s) + gradient_s


def three_stream_s(degree: Any, part: Chunk, gradient_s: Any = 0.0) -> Any:
    """Exact seconds on three streams, with `gradient_s` of all-reduce between the last dispatch and the first combine.

    The longest of: one chunk and the slowest part of the others; the intra-node stream; the inter-node stream.
    """
    a, g, e, s = part.exchange_s, part.gather_s, part.expert_s, part.scatter_s
    slowest = np.maximum(np.maximum(a, g), np.maximum(e, s))
    path = 2.0 * a + g + e + s + (degree - 1) * slowest
    intra = 2.0 * a + g + s + (degree - 1) * (np.maximum(a, g) + np.maximum(a, s))
    return np.maximum(np.maximum(path, intra), inter_node_s(degree, part) + gradient_s)


def two_stream_s(degree: Any, part: Chunk, gradient_s: Any = 0.0) -> Any:
    """Exact seconds on two streams, all communication in one: D1 G1 .. Dr Gr, R, S1 C1 .. Sr Cr (PipeMoE, Tutel)."""
    there, back = part.exchange_s + part.gather_s, part.scatter_s + part.exchange_s
    path = there + part.expert_s + back + (degree - 1) * np.maximum(np.maximum(there, back), part.expert_s)
    return np.maximum(path, degree * (there + back) + gradient_s)


def inter_node_s(degree: Any, part: Chunk) -> Any:
    """Seconds that the all-to-alls of all chunks keep the inter-node stream busy."""
    return 2.0 * degree * part.exchange_s


def window_s(degree: Any, part: Chunk) -> Any:
    """Seconds of gradient all-reduce that fit in the three-stream schedule without lengthening it."""
    return three_stream_s(degree, part) - inter_node_s(degree, part)


def _paper_cases_s(degree: Any, part: Chunk, gradient_s: Any) -> tuple[Any, Any, Any]:
    """Bounds of the paper: inter-node (1), experts (2), and all-to-all (3) or intra-node (4) as a > g or not."""
    a, both = part.exchange_s, part.gather_s + part.scatter_s
    third = np.where(np.asarray(a) > part.gather_s, 2.0 * degree * a + both, 2.0 * a + degree * both)
    return 2.0 * degree * a + gradient_s, 2.0 * a + both + degree * part.expert_s, third


def paper_s(degree: Any, part: Chunk, gradient_s: Any = 0.0) -> Any:
    """Seconds by the paper's four cases (section 4.2); exact where gather_s = scatter_s, never above the makespan."""
    first, second, third = _paper_cases_s(degree, part, gradient_s)
    return np.maximum(np.maximum(first, second), third)


def paper_case(degree: Any, part: Chunk, gradient_s: Any = 0.0) -> Any:
    """Which of the paper's cases holds: 1 inter-node, 2 experts, 3 all-to-all, 4 intra-node bound."""
    first, second, third = _paper_cases_s(degree, part, gradient_s)
    rest = np.where(second > third, 2, np.where(np.asarray(part.exchange_s) > part.gather_s, 3, 4))
    return np.where(first > np.maximum(second, third), 1, rest)


def best_degree(
    work: Volumes,
    lines: Lines,
    size: MoeSize,
    *,
    gradient_s: Any = 0.0,
    degrees: Sequence[int] = DEGREES,
    schedule_s: Callable[[Any, Chunk, Any], Any] = three_stream_s,
) -> tuple[Any, Any]:
    """The number of chunks that takes least, and its seconds; the smaller number where two take the same.

    Forward: no `gradient_s`. Backward: `lines` of `backward`, and the gradient all-reduce put into this layer.
    """
    # [degrees, any shape]
    times = [schedule_s(r, chunk(work, lines, r, size), gradient_s) for r in degrees]
    all_s = np.stack(np.broadcast_arrays(*times))
    return np.asarray(degrees)[np.argmin(all_s, axis=0)], np.min(all_s, axis=0)


def exposed_gradient_s(gradient_s: Any, dense_s: Any = 0.0) -> Any:
    """Seconds of a gradient all-reduce that `dense_s` of dense backward does not hide; Tutel hides nothing (0)."""
    return np.maximum(gradient_s - dense_s, 0.0)


def imperfect_s(overlapped_s: Any, alone_s: Any, kappa: Any) -> Any:
    """Seconds between perfect overlap (kappa 0) and none (kappa 1, `alone_s`); kappa is measured, about 0.3 to 0.4."""
    return overlapped_s + kappa * (alone_s - overlapped_s)
