"""Sections of text and tables, shown on a terminal and written as Markdown."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table as RichTable

WIDTH = 128
"""Columns of text on the page."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Rows of text under a header; the first column is a name, the others are figures unless `wide` names them as text."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    wide: tuple[str, ...] = ()
    """Columns of text, aligned to the left."""

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.columns) for row in self.rows), (
            f"a row of the table on {self.columns} is too long or short"
        )

    def is_text(self, column: str) -> bool:
        """Whether a column holds text."""
        return column in (self.columns[0], *self.wide)


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """One chapter of the page."""

    title: str
    text: tuple[str, ...] = ()
    """Paragraphs before the tables."""
    tables: tuple[Table, ...] = ()


def markdown_table(table: Table) -> str:
    """The table in Markdown."""
    header, *rows = (f"| {' | '.join(map(_escaped, line))} |" for line in (table.columns, *table.rows))
    rule = "|".join("---" if table.is_text(c) else "---:" for c in table.columns)
    return "\n".join([header, f"|{rule}|", *rows])


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|")


def markdown(title: str, sections: Sequence[Section]) -> str:
    """A whole page."""
    blocks = [f"# {title}"]
    for section in sections:
        if section.title:
            blocks.append(f"## {section.title}")
        blocks += [_wrapped(paragraph) for paragraph in section.text]
        blocks += [markdown_table(table) for table in section.tables]
    return "\n\n".join(blocks) + "\n"


def _wrapped(paragraph: str) -> str:
    """A paragraph or list in lines of the page's width; a list item's further lines are indented."""
    lines = []
    for line in paragraph.split("\n"):
        indent = "  " if line.startswith("- ") else ""
        lines += textwrap.wrap(line, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines)


def show(console: Console, section: Section, *, text: bool = False) -> None:
    """Print a section, with its paragraphs if `text`."""
    console.print(f"\n[bold]{section.title}[/bold]")
    for paragraph in section.text if text else ():
        console.print(Markdown(paragraph))
    for table in section.tables:
        shown = RichTable(header_style="bold")
        for column in table.columns:
            shown.add_column(column, justify="left" if table.is_text(column) else "right", overflow="fold")
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown)
