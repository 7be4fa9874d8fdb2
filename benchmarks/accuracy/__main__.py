"""Accuracy on published runs: printed, written to docs/accuracy.md, held to thresholds (exit code 1 where one is missed)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from benchmarks.accuracy import sections
from benchmarks.accuracy.ablations import ABLATIONS
from benchmarks.accuracy.report import Section, markdown, show
from benchmarks.accuracy.rows import TABLE
from benchmarks.accuracy.study import Study, figures, study
from benchmarks.accuracy.thresholds import FILE, Check, checks, load_thresholds
from moeplan.errors import MoeplanError
from moeplan.records import read_text, save_text

PAGE = Path(__file__).parents[2] / "docs" / "accuracy.md"
REMARKS = Path(__file__).parent / "remarks.md"
"""What no program can write: what was tried, what remains."""
COMMAND = "python -m benchmarks.accuracy"


def chapters(known: Study, held: Sequence[Check]) -> list[Section]:
    """All chapters in the order of the page."""
    out = [sections.goals(held)] if held else []
    out += [
        sections.coverage_of_rows(known),
        sections.step_time(known),
        sections.left_out(known),
        sections.memory(known),
        sections.order(known),
        sections.intervals(known),
        sections.fitting_in_memory(known),
        sections.worst_rows(known),
    ]
    return out + ([sections.ablations(known)] if known.effects else [])


def page(parts: Sequence[Section], remarks: str) -> str:
    """The text of docs/accuracy.md."""
    head = (
        f"Written by `{COMMAND}` (`make accuracy`); do not edit.",
        "Predictions beside published, measured training runs. The runs, with their sources and licences, are in "
        "[benchmarks/accuracy](../benchmarks/accuracy/README.md).",
    )
    return markdown("Accuracy", [Section(title="", text=head), *parts]) + "\n" + remarks


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, print, write the page; 1 where a threshold is missed or a file cannot be read."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("--ablations", action=argparse.BooleanOptionalAction, default=True, help="re-price without each effect")
    parser.add_argument("--runs", type=Path, default=TABLE, help="another table of runs: compared and printed, nothing else")
    parser.add_argument("--thresholds", type=Path, default=FILE, help="another file of thresholds")
    parser.add_argument("--page", type=Path, default=PAGE, help="where to write the page; only with the ablations")
    options = parser.parse_args(arguments)
    try:
        return compare(options.runs, options.thresholds, options.page, ablations=options.ablations)
    except MoeplanError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def compare(runs: Path, thresholds: Path, target: Path, *, ablations: bool) -> int:
    """Compare one table of runs; the shipped one is held to the thresholds and gives the page, if it has all chapters."""
    known = study(runs, ABLATIONS if ablations else ())
    shipped = runs == TABLE
    held = checks(figures(known), load_thresholds(thresholds)) if shipped else []
    parts = chapters(known, held)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 128)
    for section in parts:
        show(console, section)
    if shipped and ablations:
        save_text(target, page(parts, read_text(REMARKS, "remarks")), "page")
    missed = [c for c in held if not c.met]
    for check in missed:
        print(f"missed: {check.threshold.figure} is {check.value:.3g}, demanded is {check.threshold.demand}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
