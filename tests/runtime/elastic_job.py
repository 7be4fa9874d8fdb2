"""Worker of the elastic run in the tests: the trainer of the package, which waits where the test changes the world.

Arguments are the trainer's. Rank 0 waits after LOSS steps of four workers until its node is killed, and from REGROWTH steps of
three on, after each, until it is told to end. So no timing decides at which step the world changes.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from moeplan.runtime.elastic_record import Started, Step
from moeplan.runtime.elastic_train import Notice, main

LOSS, REGROWTH, STEPS = 6, 10, 14


def after_step(started: Started, step: Step, notice: Notice) -> None:
    directory = Path(sys.argv[sys.argv.index("-d") + 1])
    (directory / "agent-of-rank-0").write_text(str(os.getppid()))
    # Three that begin alone, where the fourth was late, wait for it too.
    waits = step.step == LOSS if started.workers == 4 else step.step == 1 or step.step >= REGROWTH
    if waits:
        (directory / f"waits-{started.workers}-{step.step}").touch()
        while not notice.given:
            time.sleep(0.02)


if __name__ == "__main__":
    sys.exit(main(after_step=after_step))
