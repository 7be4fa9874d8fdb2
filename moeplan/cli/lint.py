"""`moeplan lint`."""

from __future__ import annotations

import dataclasses
from typing import Any

import click

from moeplan.cli.import_ import read_source, source_options
from moeplan.cli.options import json_option, print_json, remark


@click.command()
@source_options
@json_option
def lint(as_json: bool, **source: Any) -> int:
    """Find what a launch script breaks, and what it leaves on the table.

    \b
    Examples:
      moeplan lint train.sh --cluster h100x64
      moeplan lint train.slurm --set MODEL_SIZE=8x7b --device h100 --json

    Lists every rule that Megatron would refuse the script by, every change that it would make without a word, and every choice
    and default that costs time, with the fix and, where the cluster is named, the share of the step that the fix saves by
    itself. Reads what `moeplan import` reads. Exits with 1 if there are errors.
    """
    from moeplan.cli.render_lint import findings_table
    from moeplan.exporters import lint as linting

    imported, cluster = read_source(**source)
    found = linting.lint(imported, cluster)
    counts = {severity: sum(f.severity == severity for f in found) for severity in ("error", "change", "slow")}
    if as_json:
        findings = [dataclasses.asdict(f) for f in found]
        print_json({"file": imported.path, "framework": imported.framework, "counts": counts, "findings": findings})
    else:
        from moeplan.cli.render import console

        framework = imported.framework.split(" ")[0]
        if framework != "Megatron-LM":
            remark(f"only the layout is judged, by the rules of Megatron-LM; the flags of {framework} are not")
        for text in imported.remarks:
            remark(text)
        out = console()
        if found:
            out.print(findings_table(found))
        out.print(
            f"{imported.path}: {counts['error']} errors, {counts['change']} silent changes, {counts['slow']} that cost time"
        )
    return 1 if counts["error"] else 0
