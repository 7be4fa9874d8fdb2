"""How a process becomes a rank of a run: device, store, process group, and the order of ranks on nodes.

`join` is the only way to make a `World`. Ranks must stand node by node with equally many on each, as torchrun and srun (with
--distribution=block) place them, since groups of a placement are computed from that. Not for processes that were started
otherwise than by torchrun or srun: those are alone.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import socket
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from moeplan._version import VERSION
from moeplan.errors import DeviceError
from moeplan.profiles.lockstep import TIMEOUT_S, ToldElsewhere, World
from moeplan.profiles.ranks import Rank, this_rank
from moeplan.profiles.samples import Environment

__all__ = ["TIMEOUT_S", "ToldElsewhere", "World", "environment_of", "join"]

DeviceKind = Literal["auto", "cuda", "cpu"]


def join(kind: DeviceKind = "auto", timeout_s: float = TIMEOUT_S, environment: Mapping[str, str] = os.environ) -> World:
    """The world of this process: its device, and the other ranks if a launcher started several."""
    me = this_rank(environment)
    if me.ranks > 1:
        # What the library warns of when a wait is over is said here, once.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        import torch
    except ImportError:
        kind_of = ToldElsewhere if me.rank else DeviceError
        raise kind_of("moeplan profile needs torch, which is not installed", hint="pip install 'moeplan[profile]'") from None
    world = World(me, _store(me, timeout_s, me.rank == 0 and not me.hosted), timeout_s)
    world.listen()
    try:
        _meet(torch, world, kind, me)
    except BaseException:
        world.leave()
        raise
    return world


def _meet(torch: Any, world: World, kind: DeviceKind, me: Rank) -> None:
    """Learn who the others are, and connect with them."""
    if me.ranks == 1:
        world.device = _device(torch, kind, me)
        world.collect("setting up", lambda: _settle(torch, world, {}), _nothing)
        return
    found: list[Any] = []
    world.hosts = world.agree(socket.gethostname())
    world.collect("choice of devices", lambda: found.append(_device(torch, kind, me)), _nothing)
    world.device = found[0]
    facts = world.collect("survey of ranks", lambda: _facts(torch, world, me), _layout)
    world.node, world.nodes, world.per_node = me.rank // facts["per_node"], facts["nodes"], facts["per_node"]
    world.collect("setting up", lambda: _settle(torch, world, facts["shared"]), _nothing)
    world.collect(f"start of {world.library}", lambda: _connect(torch, world, me), _nothing)


def _nothing(_: object) -> None:
    return None


def _device(torch: Any, kind: DeviceKind, me: Rank) -> Any:
    seen = torch.cuda.is_available()
    if kind == "cuda" and not seen:
        raise DeviceError(
            f"--device cuda: torch {torch.__version__} sees no GPU on {socket.gethostname()}",
            hint="look at nvidia-smi or rocm-smi and at the build of torch, or measure the processors with --device cpu",
        )
    if kind == "cpu" or not seen:
        return torch.device("cpu")
    count = torch.cuda.device_count()
    # A launcher that binds GPUs to processes shows each process its own one alone.
    index = 0 if count == 1 else me.local_rank
    if index >= count:
        raise DeviceError(
            f"rank {me.rank} is number {me.local_rank} of its node, which has {count} GPUs", hint="start one rank a GPU"
        )
    return torch.device("cuda", index)


def _store(me: Rank, timeout_s: float, serve: bool) -> Any:
    """A connection to the store that all ranks reach; the launcher or rank 0 serves it."""
    if me.ranks == 1:
        return None
    dist = _distributed()
    limit = datetime.timedelta(seconds=timeout_s)
    try:
        tcp = dist.TCPStore(me.address, me.port, me.ranks, serve, limit, wait_for_workers=False)
    except (RuntimeError, ValueError) as error:
        verb = "open" if serve else "reach"
        reason = str(error).strip().splitlines()[0]
        raise DeviceError(
            f"rank {me.rank} ({socket.gethostname()}) cannot {verb} the store at {me.address}:{me.port}: {reason}",
            hint="MASTER_ADDR and MASTER_PORT say where rank 0 listens",
        ) from None
    return dist.PrefixStore(f"moeplan/{me.attempt}", tcp)


def _distributed() -> Any:
    import torch.distributed

    return torch.distributed


def _facts(torch: Any, world: World, me: Rank) -> dict[str, Any]:
    cuda = world.device.type == "cuda"
    properties: Any = torch.cuda.get_device_properties(world.device) if cuda else None
    return {
        "node": me.node,
        "local_rank": me.local_rank,
        "host": world.hosts[me.rank],
        "device": properties.name if cuda else "cpu",
        "uuid": str(getattr(properties, "uuid", me.rank)),
    }


def _layout(facts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Nodes and ranks of each; refuses ranks that do not stand in order, different devices, and a device used twice."""
    devices, uuids = Counter(f["device"] for f in facts), Counter((f["host"], f["uuid"]) for f in facts)
    if len(devices) > 1:
        told = ", ".join(f"{n} ranks on {name}" for name, n in devices.items())
        raise DeviceError(
            f"the ranks have different devices: {told}", hint="measure equal ones together, by --device cpu for one"
        )
    (_, uuid), times = uuids.most_common(1)[0]
    if times > 1:
        raise DeviceError(f"{times} ranks share one GPU ({uuid})", hint="start one rank a GPU")
    per_node = sum(f["node"] == facts[0]["node"] for f in facts)
    for rank, fact in enumerate(facts):
        leader = facts[rank // per_node * per_node]
        if fact["node"] != leader["node"] or len(facts) % per_node:
            counts = ", ".join(f"{n} on node {node}" for node, n in Counter(f["node"] for f in facts).items())
            raise DeviceError(
                f"ranks do not stand node by node, equally many on each: {counts}; rank {rank} is on node {fact['node']}",
                hint="srun --distribution=block --ntasks-per-node=N",
            )
    return {"nodes": len(facts) // per_node, "per_node": per_node, "shared": dict(Counter(f["host"] for f in facts))}


def _settle(torch: Any, world: World, shared: Mapping[str, int]) -> None:
    """Make the thread of the steps the one that uses the device."""
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
        version = torch.cuda.nccl.version() if torch.distributed.is_nccl_available() else ()
        world.library = "nccl " + ".".join(map(str, version)) if world.ranks > 1 else ""
    else:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // shared.get(world.hosts[world.rank], 1)))
        world.library = "gloo" if world.ranks > 1 else ""


def _connect(torch: Any, world: World, me: Rank) -> None:
    dist = _distributed()
    backend = world.library.split()[0]
    # Later than the step's own limit, at which the library would end the process without a word of ours.
    limit = datetime.timedelta(seconds=world.timeout_s * (2 if backend == "nccl" else 1))
    # A connection of its own: one that waits for a key cannot be asked for another.
    store = dist.PrefixStore("data", _store(me, world.timeout_s, False))
    dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.ranks, timeout=limit)
    dist.all_reduce(torch.zeros(1, device=world.device))


def environment_of(world: World, cluster: str = "") -> Environment:
    """What a world measures with; `cluster` is what the user calls it."""
    import torch

    host_bytes = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    if world.device.type == "cuda":
        found = torch.cuda.get_device_properties(world.device)
        hip = torch.version.hip is not None
        capability = found.gcnArchName.split(":")[0] if hip else f"{found.major}.{found.minor}"
        backend, device, memory = "rocm" if hip else "cuda", found.name, float(found.total_memory)
        processors = found.multi_processor_count
    else:
        backend, device, capability = "cpu", _processor_name(), ""
        memory, processors = host_bytes / world.per_node, torch.get_num_threads()
    return Environment(
        moeplan=VERSION,
        torch=torch.__version__,
        backend=backend,
        communication=world.library,
        device=device,
        memory_bytes=memory,
        processors=processors,
        capability=capability,
        host="grace" if platform.machine() == "aarch64" else "x86",
        host_memory_bytes=host_bytes,
        ranks=world.ranks,
        per_node=world.per_node,
        cluster=cluster,
        when=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    )


def _processor_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    with contextlib.suppress(OSError):
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
