"""Plans beside published layouts: printed, written to docs/quality.md; exit code 1 where a published layout is not reached."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from benchmarks.accuracy.report import Section, markdown, show
from benchmarks.accuracy.rows import TABLE, published_rows
from benchmarks.quality.sections import chapters, ids
from benchmarks.quality.study import Study, distinct, study
from moeplan.errors import MoeplanError
from moeplan.records import read_text, save_text

PAGE = Path(__file__).parents[2] / "docs" / "quality.md"
REMARKS = Path(__file__).parent / "remarks.md"
"""What no program can write: which of the gains are believable."""
COMMAND = "python -m benchmarks.quality"


def page(known: Study, remarks: str) -> str:
    """The text of docs/quality.md."""
    head = (
        f"Written by `{COMMAND}` (`make quality`); do not edit.",
        "The plans of `solve` beside the layouts of published training runs of models with experts "
        "([benchmarks/accuracy](../benchmarks/accuracy/README.md) says where they come from).",
    )
    return markdown("Quality of plans", [Section(title="", text=head), *chapters(known)]) + "\n" + remarks


def main(arguments: Sequence[str] | None = None) -> int:
    """Solve, compare, print, write the page; 1 where a published layout is not reached or a file cannot be read."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("--runs", type=Path, default=TABLE, help="another table of runs: compared and printed, nothing else")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--page", type=Path, default=PAGE, help="where to write the page; only with the shipped table")
    options = parser.parse_args(arguments)
    try:
        known = study(published_rows(options.runs), options.jobs)
        console = Console(highlight=False, width=None if sys.stdout.isatty() else 128)
        for section in chapters(known):
            show(console, section)
        if options.runs == TABLE:
            save_text(options.page, page(known, read_text(REMARKS, "remarks")), "page")
    except MoeplanError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    missed = [g for g in distinct(known.comparisons) if g[0].worse]
    for group in missed:
        print(f"not reached: the published layout of {ids(group)}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
