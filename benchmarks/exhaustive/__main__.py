"""Exhaustive and certified search side by side: printed, written to docs/exhaustive.md; exit code 1 where they differ."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from benchmarks.accuracy.report import Section, markdown, show
from benchmarks.exhaustive.questions import PIPELINED, QUESTIONS
from benchmarks.exhaustive.sections import chapters
from benchmarks.exhaustive.study import Comparison, study
from moeplan.errors import MoeplanError
from moeplan.records import save_text

PAGE = Path(__file__).parents[2] / "docs" / "exhaustive.md"
COMMAND = "python -m benchmarks.exhaustive"


def page(known: Sequence[Comparison]) -> str:
    """The text of docs/exhaustive.md."""
    head = (
        f"Written by `{COMMAND}` (`make exhaustive`); do not edit.",
        "`solve` beside a search that leaves nothing out ([search](search.md)): every layout, with every set of "
        "recomputed modules and whole layers in every number of layers of a chunk, under every split that the certified search "
        "is to look at, each checked against the rules and the memory of the devices and priced pass by pass. No optimizer "
        "states are offloaded.",
    )
    return markdown("Exhaustive search", [Section(title="", text=head), *chapters(known)])


def main(arguments: Sequence[str] | None = None) -> int:
    """Search in both ways, print, write the page; 1 where the optimum is missed or the page cannot be written."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--page", type=Path, default=PAGE, help="where to write the page")
    options = parser.parse_args(arguments)
    known = study([*QUESTIONS, *PIPELINED], options.jobs)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 128)
    try:
        for section in chapters(known):
            show(console, section)
        save_text(options.page, page(known), "page")
    except MoeplanError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    missed = [c for c in known if not c.same]
    for c in missed:
        print(f"missed: the optimum of {c.question.name()}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
