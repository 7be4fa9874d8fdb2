"""Schedules of an MoE layer beside their papers: printed, and written to docs/schedules.md."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from benchmarks.accuracy.report import Section, markdown, show
from benchmarks.schedules import sections
from moeplan.errors import MoeplanError
from moeplan.records import read_text, save_text

PAGE = Path(__file__).parents[2] / "docs" / "schedules.md"
REMARKS = Path(__file__).parent / "remarks.md"
"""What no program can write."""
COMMAND = "python -m benchmarks.schedules"


def chapters() -> list[Section]:
    """All chapters in the order of the page."""
    return [
        sections.schedules(),
        sections.constants(),
        sections.breakdown(),
        sections.layers(),
        sections.real_models(),
        sections.gradients(),
        sections.parm(),
        sections.pipemoe(),
    ]


def page(parts: Sequence[Section]) -> str:
    """The text of docs/schedules.md."""
    head = (
        f"Written by `{COMMAND}` (`make schedules`); do not edit.",
        "How an MoE layer can run, and the model of it beside the numbers that its papers published.",
    )
    return markdown("Schedules of an MoE layer", [Section(title="", text=head), *parts]) + "\n" + read_text(REMARKS, "remarks")


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, print, write the page; 1 where a file cannot be read or written."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("--page", type=Path, default=PAGE, help="where to write the page")
    options = parser.parse_args(arguments)
    try:
        parts = chapters()
        console = Console(highlight=False, width=None if sys.stdout.isatty() else 128)
        for section in parts:
            show(console, section)
        save_text(options.page, page(parts), "page")
    except MoeplanError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
