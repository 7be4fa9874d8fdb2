"""Starting several ranks of a worker script on this machine, as torchrun would, without its agent."""

import functools
import json
import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
LIMIT_S = 120.0


@dataclass(frozen=True)
class Ended:
    """What the ranks left behind, in their order."""

    codes: list[int]
    errs: list[str]
    said: list[dict[str, Any]]
    """What each wrote into its file; empty where it wrote none."""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def environment(rank: int, ranks: int, nodes: int, port: int, launcher: str) -> dict[str, str]:
    """What torchrun or srun sets for a rank."""
    per_node = ranks // nodes
    here: dict[str, object] = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1, "PYTHONPATH": ROOT}
    if launcher == "srun":
        here |= {
            "SLURM_PROCID": rank, "SLURM_NTASKS": ranks, "SLURM_LOCALID": rank % per_node, "SLURM_NODEID": rank // per_node,
            "SLURM_STEP_ID": 0,
        }  # fmt: skip
    else:
        here |= {
            "RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank % per_node, "LOCAL_WORLD_SIZE": per_node,
            "GROUP_RANK": rank // per_node,
        }  # fmt: skip
    return {**os.environ, **{name: str(value) for name, value in here.items()}}


def start(name: str, folder: Path, ranks: int, nodes: int, launcher: str) -> list[subprocess.Popen[str]]:
    """Start all ranks of a scene."""
    port = free_port()
    command = [sys.executable, str(ROOT / "tests/profiles/rank_worker.py"), name, str(folder)]
    how: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return [subprocess.Popen(command, env=environment(rank, ranks, nodes, port, launcher), **how) for rank in range(ranks)]


def ended(processes: list[subprocess.Popen[str]], folder: Path) -> Ended:
    """Wait for all ranks; none may outlive the limit."""
    try:
        errs = [process.communicate(timeout=LIMIT_S)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    files = [folder / f"rank{rank}.json" for rank in range(len(processes))]
    said = [json.loads(f.read_text()) if f.exists() else {} for f in files]
    return Ended([p.returncode for p in processes], errs, said)


@functools.cache
def scene(name: str, ranks: int, nodes: int = 1, launcher: str = "torchrun") -> Ended:
    """What the ranks of `rank_worker.py` leave behind, played once in a test session."""
    with tempfile.TemporaryDirectory() as folder:
        return ended(start(name, Path(folder), ranks, nodes, launcher), Path(folder))
