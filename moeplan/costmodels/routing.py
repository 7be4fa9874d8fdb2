"""Where the tokens of a mixture-of-experts layer go: rows per rank and bytes per link.

Balanced routing sends each of a rank's tokens to `topk` of the experts, drawn uniformly. A plain all-to-all moves one copy per
chosen expert; a de-duplicating dispatcher moves one copy per node that holds any of them over the network, and one per rank
over NVLink. Expected copies over g equal holders: g (1 - (1 - 1/g)^topk), of which the share 1/g stays at home
(arXiv:2412.19437, section 3.2.2, gives the node limit that this generalises).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


def expected_holders(holders: Any, topk: float) -> Any:
    """Expected number of distinct holders, out of `holders` equal ones, that `topk` independent choices hit."""
    return holders * (1.0 - (1.0 - 1.0 / holders) ** topk)


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


def deduplicated_copies(topk: float, ranks: Any, local: Any) -> LinkCopies:
    """Copies when one goes to each node over the network and one to each rank over NVLink.

    A copy that arrives over the network is forwarded within its node, so NVLink carries all ranks' copies but a rank's own.
    """
    nodes = ranks / local
    over_network = expected_holders(nodes, topk) * (1.0 - 1.0 / nodes)
    over_nvlink = np.where(local > 1, expected_holders(ranks, topk) * (1.0 - 1.0 / local), 0.0)
    return LinkCopies(scale_out=over_network, scale_up=over_nvlink)
