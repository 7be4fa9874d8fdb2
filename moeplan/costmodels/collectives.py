"""Time of communication, from the bytes that cross each link.

A group of `ranks` that stand `stride` apart in the rank order has `local` ranks in each scale-up (NVLink) domain. Inside a
domain the measured curve of the profile applies. Across domains a ring sends (domains - 1) / domains of the buffer through
the NICs of the local ranks, while the scale-up links carry the intra-domain ring; the slower of the two counts, plus a hop
latency per domain (NVIDIA/nccl-tests:doc/PERFORMANCE.md gives the bandwidth terms). All-to-alls count bytes per link. Where a
profile holds a measurement of just this group across domains, that counts instead.
Bytes are per rank and follow nccl-tests: the gathered buffer of an all-gather, the input of a reduce-scatter, the whole send
buffer of an all-to-all. Units: bytes in, seconds out; numbers or arrays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from moeplan.profiles.profile import Profile


@dataclass(frozen=True, slots=True)
class Group:
    """Ranks that communicate; numbers or arrays."""

    ranks: Any
    local: Any
    """Ranks of the group in one scale-up domain; divides `ranks` up to rounding."""

    @property
    def domains(self) -> Any:
        """Scale-up domains that the group spans."""
        return self.ranks / self.local


def group(profile: Profile, ranks: Any, stride: Any) -> Group:
    """The group of `ranks` ranks that stand `stride` apart in the rank order."""
    reachable = np.maximum(profile.cluster.domain_gpus // np.asarray(stride), 1)
    return Group(ranks=ranks, local=np.minimum(ranks, reachable))


def all_gather_s(profile: Profile, total_bytes: Any, where: Group) -> Any:
    """Seconds until every rank of the group holds `total_bytes`."""
    return _ring_s(profile, "all_gather", total_bytes, where)


def reduce_scatter_s(profile: Profile, total_bytes: Any, where: Group) -> Any:
    """Seconds until each rank holds its share of the sum of `total_bytes`."""
    return _ring_s(profile, "reduce_scatter", total_bytes, where)


def all_reduce_s(profile: Profile, total_bytes: Any, where: Group) -> Any:
    """Seconds until every rank holds the sum of `total_bytes`: one ring there and one back, or in-switch in one domain."""
    inside = profile.collective_s("all_reduce", total_bytes, where.local)
    both = reduce_scatter_s(profile, total_bytes, where) + all_gather_s(profile, total_bytes, where)
    across = profile.across_s("all_reduce", total_bytes, where.ranks, where.domains, both)
    return np.where(where.domains > 1, across, inside)


def _ring_s(profile: Profile, op: str, total_bytes: Any, where: Group) -> Any:
    inside = profile.collective_s(op, total_bytes, where.local)
    crossing = total_bytes * (1.0 - 1.0 / where.domains) / where.local
    outside = crossing / profile.scale_out_bytes_per_s + profile.scale_out_latency_s * np.maximum(where.domains - 1, 0)
    across = profile.across_s(op, total_bytes, where.ranks, where.domains, np.maximum(inside, outside))
    return np.where(where.domains > 1, across, inside)


def all_to_all_s(profile: Profile, scale_out_bytes: Any, scale_up_bytes: Any, where: Group) -> Any:
    """Seconds of a plain all-to-all, given what leaves a rank over each link; both links work at once."""
    # The curve counts the whole buffer, of which 1 / local stays at home.
    buffer = scale_up_bytes * where.local / np.maximum(where.local - 1.0, 1.0)
    inside = profile.collective_s("all_to_all", buffer, where.local)
    outside = scale_out_bytes / profile.all_to_all_bytes_per_s + profile.scale_out_latency_s * np.maximum(where.domains - 1, 0)
    sent = scale_out_bytes + scale_up_bytes
    whole = sent * where.ranks / np.maximum(where.ranks - 1.0, 1.0)
    across = profile.across_s("all_to_all", whole, where.ranks, where.domains, np.maximum(inside, outside))
    return np.where(where.domains > 1, across, inside)


def send_s(profile: Profile, message_bytes: Any, *, inside: bool) -> Any:
    """Seconds to send `message_bytes` to one rank, inside a scale-up domain or across."""
    rate = profile.scale_up_bytes_per_s if inside else profile.scale_out_bytes_per_s
    return profile.scale_out_latency_s + message_bytes / rate
