"""`moeplan sweep`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moeplan.cli import NO_PLAN_FITS
from moeplan.cli.options import Count, check_writable, json_option, print_json, remark
from moeplan.errors import FileError, UsageError

if TYPE_CHECKING:
    from moeplan.planner.sweeps.store import Row, Store
    from moeplan.planner.sweeps.sweep import Sweep

MANY = 10_000
"""Points from which on a sweep is confirmed with --yes."""


@click.command()
@click.argument("sweep_file", metavar="SWEEP", type=click.Path(path_type=Path))
@click.option("--db", type=click.Path(path_type=Path), metavar="FILE.sqlite",
              help="Database of the answers, gone on with if it exists.  [default: SWEEP.sqlite beside the file]")  # fmt: skip
@click.option("--jobs", type=Count(1024), metavar="N", help="Processes that solve.  [default: one a core]")
@click.option("--scheduler", metavar="ADDRESS", help="Solve on the workers of this Dask scheduler, like tcp://10.0.0.1:8786.")
@click.option("--csv", type=click.Path(path_type=Path), metavar="FILE", help="Write the table as CSV.")
@click.option("--parquet", type=click.Path(path_type=Path), metavar="FILE", help="Write the table as Parquet (needs pyarrow).")
@click.option("--html", type=click.Path(path_type=Path), metavar="FILE", help="Write a web page with plots over every axis.")
@click.option("--show", is_flag=True, help="Solve nothing, show what is done.")
@click.option("--yes", is_flag=True, help=f"Solve more than {MANY:,} points.")
@json_option
def sweep(
    sweep_file: Path,
    db: Path | None,
    jobs: int | None,
    scheduler: str | None,
    csv: Path | None,
    parquet: Path | None,
    html: Path | None,
    show: bool,
    yes: bool,
    as_json: bool,
) -> int:
    """Solve a question over a grid of sizes, devices and workloads.

    \b
    Examples:
      moeplan sweep capacity.yaml --html capacity.html --csv capacity.csv
      moeplan sweep capacity.yaml --scheduler tcp://10.0.0.1:8786

    The file has the question (options of `moeplan solve`) and axes (lists or ranges of further options); every point of their
    product is solved. Answers go into a database as they come: the same command goes on after a kill, and shows the table at
    once when all is done. Several of them may work on one database. Points without a plan say why. Exit code 3: none has one.
    """
    if jobs is not None and scheduler is not None:
        raise UsageError("--jobs counts processes of this machine, --scheduler takes those of a cluster; give one of them")
    base = db or sweep_file.with_suffix(".sqlite")
    _check_outputs(sweep_file, base, {"table": csv, "Parquet table": parquet, "page": html})
    from moeplan.planner.sweeps.store import Store
    from moeplan.planner.sweeps.sweep import load_sweep

    asked = load_sweep(sweep_file)
    if show and not base.exists():
        raise FileError(f"database '{base}' does not exist: nothing is solved yet", hint="leave --show out to solve")
    if asked.product > MANY and not (yes or base.exists()):
        raise UsageError(f"the axes of '{sweep_file}' make {asked.product:,} points", hint="give --yes to solve them all")
    check_writable(base, "database")
    store = Store(base)
    try:
        store.begin(asked)
        if not show:
            _work(asked, store, jobs, scheduler)
        rows = store.rows()
    finally:
        store.close()
    _save(asked, rows, csv, parquet, html)
    return _show(asked, rows, as_json)


def _check_outputs(sweep_file: Path, base: Path, outputs: dict[str, Path | None]) -> None:
    """Refuse outputs that cannot be written, before work is spent on them."""
    taken = {sweep_file.resolve(): "the sweep file"}
    for what, path in (("database", base), *outputs.items()):
        if path is None:
            continue
        if path.resolve() in taken:
            raise UsageError(f"the {what} '{path}' is {taken[path.resolve()]}, which would be lost", hint="choose another file")
        taken[path.resolve()] = f"the {what} too"
        check_writable(path, what)
    if outputs["Parquet table"] is not None:
        from moeplan.cli.sweep_files import need_pyarrow

        need_pyarrow()


def _work(asked: Sweep, store: Store, jobs: int | None, scheduler: str | None) -> None:
    """Solve what is left; the database is sound whenever this ends."""
    from moeplan.cli.render_sweep import SweepBar
    from moeplan.planner.sweeps.run import run

    before = store.counts()
    if before.done == before.total:
        return
    if before.done:
        remark(f"{before.done:,} of {before.total:,} points are solved, going on with the rest")
    engine = _engine(jobs, scheduler, before.total - before.done)
    said: dict[str, None] = {}
    bar = SweepBar(enabled=sys.stderr.isatty())
    try:
        with bar:
            run(asked, store, engine, bar.stand, lambda text: said.setdefault(text))
    except KeyboardInterrupt:
        now = store.counts()
        click.echo(f"{now.done:,} of {now.total:,} points are solved; the same command goes on with the rest", err=True)
        raise
    finally:
        engine.close()
        for text in said:
            remark(text)


def _engine(jobs: int | None, scheduler: str | None, points: int) -> Any:
    if scheduler is not None:
        from moeplan.planner.sweeps.dask_engine import DaskEngine

        return DaskEngine(scheduler)
    from moeplan.planner.sweeps.engine import LocalEngine

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return LocalEngine(min(jobs or cores, points))


def _save(asked: Sweep, rows: Sequence[Row], csv: Path | None, parquet: Path | None, html: Path | None) -> None:
    if csv is not None:
        from moeplan.cli.sweep_files import save_csv

        save_csv(csv, asked, rows)
    if parquet is not None:
        from moeplan.cli.sweep_files import save_parquet

        save_parquet(parquet, asked, rows)
    if html is not None:
        from moeplan.cli.sweep_page import sweep_page
        from moeplan.records import save_text

        save_text(html, sweep_page(asked, rows), "page")


def _show(asked: Sweep, rows: Sequence[Row], as_json: bool) -> int:
    """Print the table; the exit code."""
    from moeplan.cli.render_sweep import bests, command, summary_lines, sweep_data, sweep_table

    best = bests(asked, rows)
    if as_json:
        print_json(sweep_data(asked, rows))
    else:
        from moeplan.cli.render import console

        out = console()
        out.print(sweep_table(asked, rows, out.width))
        out.print()
        for line in summary_lines(asked, rows):
            out.print(line)
    if not best:
        unsolved = any(row.answer is None for row in rows)
        click.echo("no point has a plan yet" if unsolved else "no point has a plan", err=True)
        return 0 if unsolved else NO_PLAN_FITS
    if asks := command(asked, best[0].point):
        click.echo(f"for the plan of most tokens/s/GPU: {asks} -o plan.yaml", err=True)
    return 0
