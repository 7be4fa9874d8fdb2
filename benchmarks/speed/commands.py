"""Wall time and peak memory of whole commands, start-up included: `python -m benchmarks.speed.commands`.

Every command runs in a process of its own, one warm-up (it leaves compiled bytecode behind, as an installation does) and then
`--repeat` counted runs; the median is what to quote. Absolute times belong to the machine that they were taken on; `python -c
pass` is listed beside them for scale.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Command:
    """A command with its goal on two cores."""

    name: str
    arguments: tuple[str, ...]
    goal: str


def commands(output: str) -> list[Command]:
    """The commands that are timed."""
    program = (sys.executable, "-m", "moeplan")
    deepseek = ("--model", "deepseek-v3", "--seq-len", "4096", "--precision", "fp8-cs", "-o", output)
    return [
        Command("python -c pass", (sys.executable, "-c", "pass"), "-"),
        Command("moeplan --help", (*program, "--help"), "0.25 s"),
        Command("solve h100x256", (*program, "solve", "--cluster", "h100x256", "--global-batch", "2048", *deepseek), "-"),
        Command(
            "solve h100x2048",
            (*program, "solve", "--cluster", "h100x2048", "--global-batch", "8192", *deepseek),
            "1.5 s, 500 MB",
        ),
        Command(
            "solve h100x131072", (*program, "solve", "--cluster", "h100x131072", "--global-batch", "65536", *deepseek), "10 s"
        ),
        Command("explain", (*program, "explain", output), "-"),
    ]


def measure(command: Command) -> tuple[float, float]:
    """Seconds and peak MB of one run."""
    started = time.perf_counter()
    process = os.posix_spawn(
        command.arguments[0],
        command.arguments,
        {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"},
        file_actions=[(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_WRONLY, 0) for fd in (1, 2)],
    )
    _, status, usage = os.wait4(process, 0)
    seconds = time.perf_counter() - started
    if status:
        raise SystemExit(f"{command.name} failed with status {os.waitstatus_to_exitcode(status)}")
    return seconds, usage.ru_maxrss * 1024 / 1e6


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5)
    repeat = parser.parse_args().repeat
    print(f"{'command':22s} {'median s':>9s} {'min':>7s} {'max':>7s} {'peak MB':>8s}  goal")
    with tempfile.TemporaryDirectory() as directory:
        for command in commands(os.path.join(directory, "plan.yaml")):
            measure(command)
            runs = [measure(command) for _ in range(repeat)]
            times = [seconds for seconds, _ in runs]
            peak = max(megabytes for _, megabytes in runs)
            low, median, high = min(times), statistics.median(times), max(times)
            print(f"{command.name:22s} {median:9.3f} {low:7.3f} {high:7.3f} {peak:8.0f}  {command.goal}", flush=True)


if __name__ == "__main__":
    main()
