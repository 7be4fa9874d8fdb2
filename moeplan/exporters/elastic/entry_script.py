#!/usr/bin/env python3
"""Start one rank of an elastic job: look the world size up in elastic.json and become the training script with its arguments.

torchrun starts this in place of the training script, which PRETRAIN_SCRIPT names; CHECKPOINTS is the directory that all nodes
save to and load from. A size between two planned ones takes the layout of the lower one. What its surplus ranks do says
`surplus` of elastic.json: reserve (Megatron's in-process restart keeps them warm), idle (they wait here), exit (nobody starts).
Needs nothing but Python 3.9.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

HERE = Path(__file__).resolve().parent
POLL_S = 30.0
"""Seconds between two looks at whether the job has ended; more than ranks start apart, so that no older mark is seen."""

Count = dict[str, Any]
"""One entry of `counts` in elastic.json."""


def fail(reason: str) -> NoReturn:
    """End this rank with a reason."""
    sys.exit(f"elastic: {reason}")


def number(name: str) -> int:
    """A number that torchrun sets."""
    text = os.environ.get(name, "")
    if not text.isdigit():
        fail(f"{name} is not set: start this script with torchrun")
    return int(text)


def chosen(plan: dict[str, Any], world: int) -> Count:
    """The planned count of a world size: that size, or with surplus ranks the largest one below."""
    each = int(plan["gpus_per_node"])
    fits: list[Count] = [count for count in plan["counts"] if count["nodes"] * each <= world]
    if not fits or (plan["surplus"] == "exit" and fits[-1]["nodes"] * each != world):
        planned = ", ".join(f"{count['nodes'] * each} ({count['nodes']} nodes)" for count in plan["counts"])
        fail(f"{world} ranks are not a planned count; planned: {planned}")
    return fits[-1]


def read_arguments(path: Path) -> tuple[dict[str, str], list[str]]:
    """Environment and words of an argument file, as a shell reads them."""
    environment: dict[str, str] = {}
    words: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        found = shlex.split(line, comments=True)
        if found[:1] == ["export"]:
            environment.update((name, value) for name, _, value in (word.partition("=") for word in found[1:]))
        else:
            words += found
    return environment, words


def mark(directory: Path) -> Path:
    """The file that the first rank leaves behind when training has ended well."""
    return directory / f".ended-{re.sub(r'[^A-Za-z0-9._-]', '-', os.environ.get('TORCHELASTIC_RUN_ID', 'job'))}"


def run_marked(command: list[str], ended: Path) -> NoReturn:
    """Run the training script on the first rank, for the surplus ranks to learn of its end."""
    ended.parent.mkdir(parents=True, exist_ok=True)
    ended.unlink(missing_ok=True)
    child = subprocess.Popen(command, preexec_fn=die_with_parent)
    signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    code = child.wait()
    if code == 0:
        ended.touch()
    sys.exit(code if code >= 0 else 128 - code)


def die_with_parent() -> None:
    """Have Linux end this process with the one that started it, which may be killed without being asked."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def wait_for(ended: Path) -> NoReturn:
    """Stay until training has ended; torchrun ends this process sooner where the nodes change."""
    while True:
        time.sleep(POLL_S)
        if ended.exists():
            sys.exit(0)


def main(further: list[str]) -> NoReturn:
    """Become the training script, or wait beside it."""
    plan = json.loads((HERE / "elastic.json").read_text(encoding="utf-8"))
    rank, world, local = number("RANK"), number("WORLD_SIZE"), number("LOCAL_WORLD_SIZE")
    if local != plan["gpus_per_node"]:
        fail(f"{local} ranks on this node, planned are {plan['gpus_per_node']}")
    script, directory = os.environ.get("PRETRAIN_SCRIPT"), os.environ.get("CHECKPOINTS")
    if not script or not directory:
        fail("PRETRAIN_SCRIPT and CHECKPOINTS must be set to the training script and the directory of checkpoints")
    count = chosen(plan, world)
    active = int(count["uses"]) * local
    if rank == 0:
        print(f"elastic: {active} of {world} ranks train, {count['arguments']}", file=sys.stderr, flush=True)
    environment, words = read_arguments(HERE / count["arguments"])
    os.environ.update(environment)
    words += ["--save", directory, "--load", directory]
    if world > active and plan["surplus"] == "reserve":
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "error")  # the store's time-outs are no errors here
        words += ["--inprocess-restart", "--inprocess-active-world-size", str(active)]
    elif rank >= active:
        wait_for(mark(Path(directory)))
    command = [sys.executable, "-u", script, *words, *further]
    if plan["surplus"] != "reserve" and world > active:
        os.environ["WORLD_SIZE"] = str(active)
        if rank == 0:
            run_marked(command, mark(Path(directory)))
    os.execv(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
