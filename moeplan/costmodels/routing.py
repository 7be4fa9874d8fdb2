"""Where the tokens of a mixture-of-experts layer go: rows per rank and bytes per link.

Balanced routing sends each of a rank's tokens to `topk` of the experts, drawn uniformly. A plain all-to-all moves one copy per
chosen expert; a de-duplicating dispatcher moves one copy per node that holds any of them over the network, and one per rank
over NVLink. Expected copies over g equal holders: g (1 - (1 - 1/g)^topk), of which the share 1/g stays at home
(arXiv:2412.19437, section 3.2.2, gives the node limit that this generalises). Group-limited routing (arXiv:2405.04434, section
2.2.2) draws the experts from a few groups of consecutive experts, and with them from fewer nodes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np


def expected_holders(holders: Any, topk: float) -> Any:
    """Expected number of distinct holders, out of `holders` equal ones, that `topk` independent choices hit."""
    return holders * (1.0 - (1.0 - 1.0 / holders) ** topk)


def expected_group_limited_holders(holders: Any, topk: float, groups: int, group_topk: int) -> Any:
    """The same where `group_topk` of `groups` equal groups are drawn first, and the choices fall on those.

    Holders have consecutive experts: one holds several groups, or several share one.
    """
    # Holders that share a group: it is drawn or not, and its choices spread over them.
    shared = np.maximum(holders / groups, 1.0)
    part_of_one = holders * (group_topk / groups) * (1.0 - (1.0 - 1.0 / (group_topk * shared)) ** topk)
    # Holders of several groups: of `own` groups of a holder j are drawn (hypergeometric), and get the share j / group_topk.
    own = np.maximum(groups // np.maximum(holders, 1), 1)
    hit: Any = 0.0
    for j in range(1, group_topk + 1):
        drawn = _choose(own, j) * _choose(groups - own, group_topk - j) / math.comb(groups, group_topk)
        hit = hit + drawn * (1.0 - (1.0 - j / group_topk) ** topk)
    return np.where(holders >= groups, part_of_one, holders * hit)


def _choose(n: Any, k: int) -> Any:
    """Binomial coefficients of whole numbers, 0 where fewer than k are there to choose from."""
    out: Any = 1.0
    for i in range(k):
        out = out * np.maximum(n - i, 0) / (i + 1)
    return out


def expert_rows(tokens: Any, topk: float, etp: Any, imbalance: float = 1.0) -> Any:
    """Rows that one rank's experts process: `tokens` per rank before dispatch, gathered over the etp ranks of an expert."""
    return tokens * topk * etp * imbalance


@dataclass(frozen=True, slots=True)
class LinkCopies:
    """Copies of a token that leave its rank, by the link they cross; numbers or arrays."""

    scale_out: Any
    """Copies over the network, to other NVLink domains."""
    scale_up: Any
    """Copies over NVLink, to other ranks of the domain."""


def all_to_all_copies(topk: float, ranks: Any, local: Any) -> LinkCopies:
    """Copies of a plain all-to-all over `ranks` expert-parallel ranks, `local` of them in one NVLink domain."""
    return LinkCopies(scale_out=topk * (1.0 - local / ranks), scale_up=topk * (local - 1.0) / ranks)


def deduplicated_copies(topk: float, ranks: Any, local: Any, groups: int = 0, group_topk: int = 0) -> LinkCopies:
    """Copies when one goes to each node over the network and one to each rank over NVLink.

    A copy that arrives over the network is forwarded within its node, so NVLink carries all ranks' copies but a rank's own.
    `groups` and `group_topk` limit the routing to groups of experts; 0: it is free.
    """

    def holders(count: Any) -> Any:
        return expected_group_limited_holders(count, topk, groups, group_topk) if groups else expected_holders(count, topk)

    nodes = ranks / local
    over_network = holders(nodes) * (1.0 - 1.0 / nodes)
    over_nvlink = np.where(local > 1, holders(ranks) * (1.0 - 1.0 / local), 0.0)
    return LinkCopies(scale_out=over_network, scale_up=over_nvlink)
