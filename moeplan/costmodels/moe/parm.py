"""Schedules of Parm: the baseline, S1 and S2, and which of them is quickest.

Parm (INFOCOM 2024, arXiv 2407.00599). The abstract and summaries name the schedules; their message sizes and the time of
S2's overlapped exchange are derived (a simulation of all ranks with real tokens agrees), not copied from the paper's tables.

- Baseline: gather among ESP, all-to-all among EP, experts, all-reduce among ESP, all-to-all. All `mp_ranks` copies of a token
  travel and are computed.
- Replicated baseline: gates the copies apart, without the gather. What DeepSpeed ran (before pull request 5626) with
  mp_ranks = esp_ranks; not defined elsewhere. Ratios "over DeepSpeed-MoE" must say which of the two baselines they mean.
- S1: keep 1 / mp_ranks of the tokens before the gate; one all-to-all over all ranks each way; gather the tokens at the end.
- S2: keep 1 / mp_ranks of the slots after the gate; the last all-to-all overlaps with the gather of the slots (SAA).

Backward moves the same bytes and computes twice the FLOP. Units: bytes, FLOP, seconds; numbers or arrays. With dropping, S1
drops by slice and the others by the whole batch: outputs are equal only when nothing is dropped. S1 needs the tokens
divisible by mp_ranks, S2 the slots of an expert (`padded_slots`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moeplan.costmodels.moe.base import AlphaBeta, MoeSize


@dataclass(frozen=True, kw_only=True, slots=True)
class Messages:
    """What one rank moves and computes in one direction; a collective of one rank keeps its size and costs nothing."""

    exchange_bytes: Any
    """Each of the two all-to-alls."""
    esp_gather_bytes: Any = 0.0
    """Gathered size, before the first all-to-all."""
    esp_reduce_bytes: Any = 0.0
    """All-reduce of the partial sums of the shards of an expert."""
    mp_gather_bytes: Any = 0.0
    """Gathered size, after the last all-to-all (S1) or during it (S2)."""
    expert_flop: Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Lines:
    """Fitted times, each over bytes (experts: over FLOP)."""

    exchange: AlphaBeta
    """All-to-all among the ep_ranks: the baselines."""
    fused_exchange: AlphaBeta
    """All-to-all among all ranks: S1 and S2. A fit of its own, as its start-up is longer."""
    esp_gather: AlphaBeta
    esp_reduce: AlphaBeta
    mp_gather: AlphaBeta
    experts: AlphaBeta


def baseline(size: MoeSize) -> Messages:
    """Parm's default schedule, forward: each token enters its experts mp_ranks times."""
    return Messages(
        exchange_bytes=size.slot_bytes * size.esp_ranks,
        esp_gather_bytes=size.token_bytes * size.esp_ranks,
        esp_reduce_bytes=size.slot_bytes * size.esp_ranks,
        # esp_ranks copies of the slots meet 1 / esp_ranks of each expert.
        expert_flop=size.expert_flop,
    )


def replicated_baseline(size: MoeSize) -> Messages:
    """DeepSpeed's schedule for mp_ranks = esp_ranks, forward: the copies of a token are gated and sent apart."""
    return Messages(
        exchange_bytes=size.slot_bytes,
        esp_reduce_bytes=size.slot_bytes,
        expert_flop=size.expert_flop / size.esp_ranks,
    )


def s1(size: MoeSize) -> Messages:
    """S1, forward: the pause of tensor parallelism begins before the gate."""
    return Messages(
        exchange_bytes=size.slot_bytes * size.esp_ranks / size.mp_ranks,
        mp_gather_bytes=size.token_bytes,
        expert_flop=size.expert_flop / size.mp_ranks,
    )


def s2(size: MoeSize) -> Messages:
    """S2, forward: the pause begins after the gate, so slots are gathered and not tokens."""
    return replace(s1(size), mp_gather_bytes=size.slot_bytes)


def backward(forward: Messages) -> Messages:
    """The same schedule backward: conjugate collectives of the same size, gradients of inputs and of weights."""
    return replace(forward, expert_flop=2.0 * forward.expert_flop)


def padded_slots(slots: Any, mp_ranks: Any) -> Any:
    """Slots of an expert, padded so that mp_ranks divides them, as S2 needs."""
    return np.ceil(slots / np.asarray(mp_ranks)) * mp_ranks


def saa_s(exchange_s: Any, gather_s: Any, phases: Any, shared: Any = 0.0) -> Any:
    """Seconds of an all-to-all in `phases` phases, each gathered while the next one is on the wire (SAA).

    A two-stage flow shop: (A + G) / p + (1 - 1/p) max(A, G). `shared`, 0 to 1, is the part of the shorter one that is not
    hidden because both use one link; no worse than one after the other.
    """
    shorter, longer = np.minimum(exchange_s, gather_s), np.maximum(exchange_s, gather_s)
    return np.minimum(longer + shorter / phases + shared * shorter, exchange_s + gather_s)


def replicated_baseline_exchange_s(moved: Messages, size: MoeSize, lines: Lines) -> Any:
    """Seconds of communication of the replicated baseline, one direction: all-to-all, all-reduce, all-to-all."""
    reduce_s = lines.esp_reduce.among_s(moved.esp_reduce_bytes, size.esp_ranks)
    return 2.0 * lines.exchange.among_s(moved.exchange_bytes, size.ep_ranks) + reduce_s


def baseline_exchange_s(moved: Messages, size: MoeSize, lines: Lines) -> Any:
    """Seconds of communication of the baseline, one direction: the gather among ESP, then the same chain."""
    gather_s = lines.esp_gather.among_s(moved.esp_gather_bytes, size.esp_ranks)
    return gather_s + replicated_baseline_exchange_s(moved, size, lines)


def s1_exchange_s(moved: Messages, size: MoeSize, lines: Lines) -> Any:
    """Seconds of communication of S1, one direction: two all-to-alls and the gather, one after the other."""
    exchange_s = lines.fused_exchange.among_s(moved.exchange_bytes, size.all_ranks)
    return 2.0 * exchange_s + lines.mp_gather.among_s(moved.mp_gather_bytes, size.mp_ranks)


def s2_exchange_s(moved: Messages, size: MoeSize, lines: Lines, shared: Any = 0.0) -> Any:
    """Seconds of communication of S2, one direction: an all-to-all, and one that overlaps with the gather in P phases."""
    exchange_s = lines.fused_exchange.among_s(moved.exchange_bytes, size.all_ranks)
    gather_s = lines.mp_gather.among_s(moved.mp_gather_bytes, size.mp_ranks)
    return exchange_s + saa_s(exchange_s, gather_s, size.all_ranks, shared)


def replicated_baseline_s(moved: Messages, size: MoeSize, lines: Lines) -> Any:
    """Seconds of the replicated baseline with its experts, one direction."""
    return replicated_baseline_exchange_s(moved, size, lines) + lines.experts.time_s(moved.expert_flop)


def baseline_s(moved: Messages, size: MoeSize, lines: Lines) -> Any:
    """Seconds of the baseline with its experts, one direction."""
    return baseline_exchange_s(moved, size, lines) + lines.experts.time_s(moved.expert_flop)


def s1_s(moved: Messages, size: MoeSize, lines: Lines) -> Any:
    """Seconds of S1 with its experts, one direction."""
    return s1_exchange_s(moved, size, lines) + lines.experts.time_s(moved.expert_flop)


def s2_s(moved: Messages, size: MoeSize, lines: Lines, shared: Any = 0.0, gate_s: Any = 0.0) -> Any:
    """Seconds of S2 with its experts, one direction, and what its gate over all tokens takes more than that of S1.

    `gate_s` is the gate over all tokens of a tensor-parallel group; it matters with very many experts.
    """
    repeated_s = (1.0 - 1.0 / size.mp_ranks) * gate_s
    return s2_exchange_s(moved, size, lines, shared) + lines.experts.time_s(moved.expert_flop) + repeated_s


def s1_is_quicker(exchange_s: Any, token_gather_s: Any, slot_gather_s: Any, phases: Any) -> Any:
    """Whether S1 takes less time than S2, from the times of one all-to-all and of the two gathers.

    With A, G1, Gk and p phases: G1 < Gk / p where A >= Gk, else A + G1 < Gk + A / p. Independent links.
    """
    hidden = token_gather_s < slot_gather_s / phases
    exposed = exchange_s + token_gather_s < slot_gather_s + exchange_s / phases
    return np.where(np.asarray(exchange_s) >= slot_gather_s, hidden, exposed)


def s1_is_quicker_at_large_size(lines: Lines, size: MoeSize) -> Any:
    """The same with messages so large that start-ups and single phases vanish, and the all-to-all shorter than the gather.

    beta_gather (1 - 1 / kf) > beta_exchange esp_ranks / mp_ranks, with kf = slot_bytes / token_bytes.
    """
    spared = lines.mp_gather.unit_s * (1.0 - size.token_bytes / size.slot_bytes)
    return spared > lines.fused_exchange.unit_s * size.esp_ranks / size.mp_ranks
