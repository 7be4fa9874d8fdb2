"""One rank of the tests of world, collectives and session: `rank_worker.py SCENE FOLDER`; writes FOLDER/rankN.json."""

import json
import os
import signal
import sys
import time
import types
from pathlib import Path
from typing import Any

from moeplan.errors import MoeplanError
from moeplan.profiles import timing
from moeplan.profiles.cases import Case, UnsupportedCase
from moeplan.profiles.samples import SampleLog, load_samples
from moeplan.profiles.session import measure
from moeplan.profiles.world import ToldElsewhere, World, environment_of, join
from moeplan.records import to_mapping

FOLDER = Path(sys.argv[2])
OPS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "all_to_all_skewed", "send")
SIZES = (65536.0, 262144.0)
KERNELS = [Case(op="gemm", key="bf16", sizes={"m": m, "n": 64, "k": 64}) for m in (64, 128)]
DEEPEP = Case(op="deepep", key="dispatch", sizes={"tokens": 16, "hidden": 32, "topk": 2, "message_bytes": 1024.0}, group="2/1")
SLOW_S = 0.2
timing.WARM_UP_SHARE = timing.LEAST_SHARE = 0.0  # as few repeats as there may be, however slow this machine is


def collectives(*groups: str, ops: tuple[str, ...] = OPS) -> list[Case]:
    return [
        Case(op=op, key="bf16", sizes={"message_bytes": size}, group=group) for group in groups for op in ops for size in SIZES
    ]


def run(world: World, name: str, cases: list[Case], per_domain: int, **how: Any) -> dict[str, Any]:
    """Measure, with a file of samples on rank 0."""
    path = FOLDER / f"{name}.samples.jsonl"
    log = SampleLog(path, environment_of(world)) if world.rank == 0 else None
    outcome = measure(world, cases, log, **{"budget_s": 60.0, "per_domain": per_domain, "precision": 10.0, **how})
    return {
        "samples": [to_mapping(s) for s in outcome.samples],
        "skipped": [[case.op, why] for case, why in outcome.skipped],
        "ended": outcome.ended,
        "left": outcome.left,
        "failure": str(outcome.failure) if outcome.failure else "",
        "elsewhere": isinstance(outcome.failure, ToldElsewhere),
        "remarks": list(outcome.remarks),
        "logged": len(load_samples(path)[1]) if world.rank == 0 else 0,
    }


def fake_deep_ep() -> types.ModuleType:
    """The library's interface as its README shows it, every token to every rank."""
    import torch

    class Config:
        def get_nvl_buffer_size_hint(self, hidden_bytes: int, ranks: int) -> int:
            return hidden_bytes * ranks

        get_rdma_buffer_size_hint = get_nvl_buffer_size_hint

    class Buffer:
        def __init__(self, group: Any, nvl_bytes: int, rdma_bytes: int) -> None:
            self.ranks = group.size()

        @staticmethod
        def get_dispatch_config(ranks: int) -> Config:
            return Config()

        get_combine_config = get_dispatch_config

        def get_dispatch_layout(self, topk_idx: Any, experts: int) -> Any:
            return None, None, None, torch.ones(len(topk_idx), self.ranks, dtype=torch.bool), None

        def dispatch(self, x: Any, **_: Any) -> Any:
            return x, None, None, None, "handle", None

        def combine(self, x: Any, handle: str, topk_weights: Any) -> Any:
            return x, None, None

    return types.SimpleNamespace(Buffer=Buffer, __version__="1.0")  # type: ignore[return-value]


def two(world: World, say: dict[str, Any]) -> None:
    """Two ranks: everything once, a slowed collective, agreement, then a rank that fails."""
    overlaps = [Case(op="overlap", key=f"{op}+gemm", group="2/1") for op in ("all_to_all", "all_gather")]
    others = [DEEPEP, Case(op="barter", key="bf16", group="2/1"), Case(op="overlap", key="all_reduce+norm", group="2/1")]
    say["all"] = run(world, "all", [*KERNELS, *collectives("2/1"), *overlaps, *others], 2)
    sys.modules["deep_ep"] = fake_deep_ep()
    combine = Case(op="deepep", key="combine", sizes=DEEPEP.sizes, group="2/1")
    say["deepep"] = run(world, "deepep", [DEEPEP, combine], 2)

    def slowed(op: str) -> Any:
        return lambda ran, message_bytes: time.sleep(SLOW_S) if ran == op else None

    say["slowed"] = run(world, "slowed", collectives("2/1", ops=("all_gather", "all_to_all")), 2, hook=slowed("all_to_all"))
    slow_scatter = collectives("2/1", ops=("reduce_scatter",))
    say["slow scatter"] = run(world, "slow-scatter", slow_scatter, 2, hook=slowed("reduce_scatter"))
    say["agreed"], say["sum"] = world.agree(10 * world.rank), world.agree(world.rank + 1, sum)

    def cannot() -> None:
        if world.rank == 1:
            raise UnsupportedCase("not this one")

    try:
        world.collect("a case that one rank cannot run", cannot, list)
    except UnsupportedCase as error:
        say["unsupported"] = error.message
    with world.together("a block"):
        say["block"] = True
    with world.together("the last block"):
        if world.rank == 1:
            raise ValueError("no luck\nand more")


def four(world: World, say: dict[str, Any]) -> None:
    """Four ranks on two nodes: groups in and across domains; Ctrl-C on one rank; then a rank dies."""
    say["two domains"] = run(world, "domains", collectives("2/1", "2/2", "4/2", ops=("all_reduce", "all_to_all", "send")), 2)
    say["one domain"] = run(world, "one", collectives("4/1"), 4)
    say["some ranks idle"] = run(world, "idle", collectives("2/1", ops=("all_gather",)), 3)
    if world.rank == 2:
        os.kill(os.getpid(), signal.SIGINT)
    say["stopped"] = run(world, "stopped", collectives("2/1", ops=("all_reduce",)), 2)
    world.asked = False

    def fatal(op: str, message_bytes: int) -> None:
        if op == "all_to_all" and world.rank == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    say["died"] = run(world, "died", collectives("4/2", ops=("all_reduce", "all_to_all")), 2, hook=fatal)
    sys.exit(1)


def hang(world: World, say: dict[str, Any]) -> None:
    """Rank 1 is late for a step."""
    world.timeout_s = 1.0
    if world.rank == 1:
        time.sleep(8.0)
    world.agree(None)


def orphan(world: World, say: dict[str, Any]) -> None:
    """Rank 0 dies, and the store with it."""
    if world.rank == 0:
        time.sleep(1.0)  # the other one has left the last step
        os.kill(os.getpid(), signal.SIGKILL)
    world.agree(None)


def library(world: World, say: dict[str, Any]) -> None:
    """Not reached: the library of the collectives fails on rank 1 while it starts."""


def break_library() -> None:
    import torch.distributed

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("NCCL error: unhandled system error")

    torch.distributed.init_process_group = broken


def main() -> int:
    scene, say, world = globals()[sys.argv[1]], dict[str, Any](), None
    rank = os.environ.get("RANK") or os.environ["SLURM_PROCID"]
    if scene is library and rank == "1":
        break_library()
    try:
        world = join("cpu", timeout_s=60.0)
        say["world"] = [world.rank, world.ranks, world.local_rank, world.node, world.nodes, world.per_node, world.library]
        scene(world, say)
    except MoeplanError as error:
        say["error"], say["elsewhere"] = str(error), isinstance(error, ToldElsewhere)
        return 1
    finally:
        if world is not None:
            world.leave()
        (FOLDER / f"rank{rank}.json").write_text(json.dumps(say))
    return 0


if __name__ == "__main__":
    sys.exit(main())
