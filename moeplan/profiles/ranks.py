"""Which rank a process is, and which ranks form the groups of a placement; plain numbers, no torch.

`this_rank` reads what torchrun (RANK, WORLD_SIZE, ...) or srun (SLURM_PROCID, ...) puts into the environment; without either
the process is alone. `placement` cuts ranks into groups "RANKS/DOMAINS" that a layout would place so: as many of the ranks of a
scale-up domain as each of DOMAINS neighbouring domains gives, lane by lane, all groups disjoint.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from moeplan.errors import DeviceError, UsageError

_BASE_PORT, _PORTS = 20_000, 20_000
"""Range of ports from which the number of a Slurm step picks one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rank:
    """What a launcher says about one process."""

    rank: int = 0
    ranks: int = 1
    local_rank: int = 0
    """Number among the processes of its node."""
    node: int = 0
    """Number of its node; two agents of torchrun on one host count as two nodes."""
    address: str = ""
    """Host of rank 0; empty: the process is alone."""
    port: int = 0
    hosted: bool = False
    """Whether the launcher runs the store at that port; else rank 0 does."""
    attempt: str = "0"
    """Count of restarts by the launcher, to tell their keys apart."""


def this_rank(environment: Mapping[str, str]) -> Rank:
    """The rank that the environment states."""
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return _of_torchrun(environment)
    # A batch script has SLURM_PROCID as well, but is no step: it is alone.
    if "SLURM_PROCID" in environment and "SLURM_STEP_ID" in environment:
        return _of_srun(environment)
    return Rank()


def _of_torchrun(environment: Mapping[str, str]) -> Rank:
    rank, ranks = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
    local_ranks = _number(environment, "LOCAL_WORLD_SIZE", ranks)
    local_rank = _number(environment, "LOCAL_RANK", rank % local_ranks)
    if ranks > 1 and not environment.get("MASTER_ADDR"):
        raise DeviceError(f"rank {rank} of {ranks}: MASTER_ADDR is not set", hint="start with torchrun, or set it")
    return _checked(
        Rank(
            rank=rank,
            ranks=ranks,
            local_rank=local_rank,
            node=_number(environment, "GROUP_RANK", rank // local_ranks),
            address=environment.get("MASTER_ADDR", ""),
            port=_number(environment, "MASTER_PORT", 29500),
            hosted=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            attempt=environment.get("TORCHELASTIC_RESTART_COUNT", "0"),
        )
    )


def _of_srun(environment: Mapping[str, str]) -> Rank:
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    rank = _number(environment, "SLURM_PROCID")
    ranks = _number(environment, "SLURM_STEP_NUM_TASKS", _number(environment, "SLURM_NTASKS", 1))
    address = environment.get("MASTER_ADDR") or first_host(nodes)
    if ranks > 1 and not address:
        raise DeviceError(f"rank {rank} of {ranks}: Slurm names no nodes", hint="set MASTER_ADDR to the host of rank 0")
    step = 100 * _number(environment, "SLURM_JOB_ID", 0) + _number(environment, "SLURM_STEP_ID", 0)
    return _checked(
        Rank(
            rank=rank,
            ranks=ranks,
            local_rank=_number(environment, "SLURM_LOCALID"),
            node=_number(environment, "SLURM_NODEID", 0),
            address=address,
            port=_number(environment, "MASTER_PORT", _BASE_PORT + step % _PORTS),
        )
    )


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name, "" if default is None else str(default))
    if not text.isdecimal():
        raise DeviceError(f"{name}='{text}' in the environment is not a number", hint="start with torchrun or srun")
    return int(text)


def _checked(rank: Rank) -> Rank:
    if not 0 <= rank.rank < rank.ranks:
        raise DeviceError(f"rank {rank.rank} of {rank.ranks} cannot be", hint="start with torchrun or srun")
    return rank


def first_host(nodes: str) -> str:
    """The first host of a Slurm list: "gpu[003-010,17],login" gives "gpu003"."""
    first = re.split(r",(?![^\[]*\])", nodes)[0]
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first)


def placement(ranks: int, per_domain: int, group: str) -> tuple[tuple[int, ...], ...]:
    """The groups of a placement "RANKS/DOMAINS" that fit into `ranks` ranks, in domains of `per_domain` each."""
    size, domains = _parse(group)
    lane = size // domains
    if lane > per_domain or domains * per_domain > ranks:
        have = f"{ranks // per_domain} domains of {per_domain} ranks"
        raise DeviceError(f"group {group} needs {domains} domains with {lane} ranks each, there are {have}")
    starts = [
        (block, first)
        for block in range(0, ranks - domains * per_domain + 1, domains * per_domain)
        for first in range(0, per_domain - lane + 1, lane)
    ]
    return tuple(
        tuple(block + domain * per_domain + first + i for domain in range(domains) for i in range(lane))
        for block, first in starts
    )


def _parse(group: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", group)
    size, domains = (int(match[1]), int(match[2])) if match else (0, 0)
    if size < 2 or domains < 1 or size % domains:
        raise UsageError(f"group '{group}' is not RANKS/DOMAINS", hint="like 8/1 in a domain, or 16/2 across two")
    return size, domains
