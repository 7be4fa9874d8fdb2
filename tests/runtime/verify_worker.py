"""`moeplan verify` with a fault: one rank's combine brings back a little more than was sent."""

from __future__ import annotations

import os
import sys

from moeplan.cli import main
from moeplan.runtime import moe_passage, moe_tasks

RIGHT = moe_tasks.combine


def faulty(passage: moe_passage.Passage, i: int) -> float:
    """The combine, and a fault on rank 2."""
    amount = RIGHT(passage, i)
    if os.environ["RANK"] == "2":
        passage.back[i].add_(1e-3)
    return amount


if __name__ == "__main__":
    for way in moe_tasks.WAYS.values():
        for kind, work in way.tasks.items():
            if work is RIGHT:
                way.tasks[kind] = faulty  # type: ignore[index]
    sys.argv = ["moeplan", "verify", *sys.argv[1:]]
    sys.exit(main())
