"""Start the ranks of a tiny MoE's training: what `moeplan tune` launches in its tests.

`python train_tiny_moe.py plan.yaml` loads torch once and forks the ranks, each into a session of its own as torchrun does;
under torchrun it is one of them. tiny_moe.py trains. When a rank fails it ends the others, and has its exit code.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import threading
from pathlib import Path

import yaml


def fork_ranks(options: argparse.Namespace) -> int:
    """Run all ranks as children of this process; the exit code of the first that fails, after which the others are ended."""
    world = int(yaml.safe_load(options.plan.read_text())["layout"]["world"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    children = []
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            os.setsid()  # as torchrun does
            code = 1
            try:
                from tiny_moe import train

                train(options, rank)
                code = 0
            except BaseException:
                sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        children.append(pid)
    failed = 0
    for _ in range(world):
        pid, status = os.wait()
        children.remove(pid)
        code = os.waitstatus_to_exitcode(status)
        if code and not failed:
            failed = code
            for other in children:
                os.kill(other, 9)
    return failed if failed >= 0 else 128 - failed


def main() -> int:
    """Parse, then train as one rank of torchrun or as all ranks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("plan", type=Path, nargs="?")
    parser.add_argument("--plan-file", dest="plan", type=Path)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--memory-mib", type=int, default=0)
    parser.add_argument("--hang-with", default="")
    options, _ = parser.parse_known_args()
    loaded = threading.Event()
    speaker = threading.Thread(target=speak, args=(loaded,))
    speaker.start()
    from tiny_moe import train  # loads torch

    loaded.set()
    speaker.join()
    if "RANK" not in os.environ:
        return fork_ranks(options)
    train(options, int(os.environ["RANK"]))
    return 0


def speak(loaded: threading.Event) -> None:
    """Say every second that libraries are being loaded: silence is what a hang is told by."""
    while not loaded.wait(1.0):
        print("loading", flush=True)


if __name__ == "__main__":
    sys.exit(main())
