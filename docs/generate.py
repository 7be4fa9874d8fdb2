"""Write the pages that follow from the code: `python docs/generate.py`. A test compares them with the files.

docs/cli.md from the help texts of the commands, docs/rules.md from the rules, docs/solve.svg from the README's example.
"""

from __future__ import annotations

import io
import re
from pathlib import Path

import click

from moeplan.cli import cli

DOCS = Path(__file__).parent


def cli_page() -> str:
    """The command reference."""
    out = ["# Command reference", "", "Generated from `--help` by `make docs`.", "", "```", _help([]), "```"]
    for path in _paths(cli, []):
        out += ["", f"## moeplan {' '.join(path)}", "", "```", _help(path), "```"]
    return "\n".join(out) + "\n"


def _paths(group: click.Group, above: list[str]) -> list[list[str]]:
    """Every command below a group, with the groups above it, in their order."""
    out = []
    for name in group.list_commands(click.Context(group)):
        command = group.get_command(click.Context(group), name)
        out += [[*above, name], *(_paths(command, [*above, name]) if isinstance(command, click.Group) else [])]
    return out


def _help(path: list[str]) -> str:
    width = {"terminal_width": 110, "max_content_width": 110}
    context = click.Context(cli, info_name="moeplan", **{**cli.context_settings, **width})
    command: click.Command = cli
    for name in path:
        assert isinstance(command, click.Group)
        found = command.get_command(context, name)
        assert found is not None
        command, context = found, click.Context(found, info_name=name, parent=context, **width)
    return command.get_help(context)


def rules_page() -> str:
    """The table of rules."""
    from moeplan.planner.constraints import LEVELS, RULES

    out = [
        "# Rules",
        "",
        "What a layout must meet, in the order in which a search applies it. The rules are those of megatron-core 0.19.2",
        "(argument checks, configuration classes, process groups, and what a running step asserts); the ones marked *(ours)*",
        "are stricter on purpose. `solve` counts what each one refuses, `export` names the one that a plan breaks.",
        "Generated from `moeplan/planner/constraints.py` by `make docs`.",
    ]
    for level in LEVELS:
        out += ["", f"## {level.capitalize()}", "", "| rule | demands |", "|---|---|"]
        out += [f"| `{r.name}` | {r.demands.replace('(ours)', '*(ours)*')} |" for r in RULES if r.level == level]
    return "\n".join(out) + "\n"


def picture() -> str:
    """The README's example as an SVG picture of a terminal."""
    from rich.console import Console
    from rich.text import Text

    from moeplan.cli.options import make_problem
    from moeplan.cli.render import certificate_lines, memory_table, solution_table, tie_lines, time_bars
    from moeplan.cli.render_baselines import baselines_table
    from moeplan.planner.baselines import with_baselines
    from moeplan.planner.solve import solve

    problem = make_problem(
        model_ref="deepseek-v3", cluster_ref="h100x256", global_batch=2048, seq_len=4096, precision="fp8-cs", era="latest",
        gradients="fp32", moments="fp32", imbalance=1.0, no_mtp=False, memory_limit=None, price_per_gpu_hour=0.0,
    )  # fmt: skip
    solution = solve(problem)
    console = Console(record=True, width=122, file=io.StringIO(), force_terminal=True, highlight=False)
    example = "moeplan solve --model deepseek-v3 --cluster h100x256 --global-batch 2048 --seq-len 4096 --precision fp8-cs"
    console.print(Text("$ " + example, style="bold"))
    console.print()
    best = with_baselines(solution.plans[0])
    for block in (solution_table(solution), baselines_table(best), time_bars(best.time), memory_table(best)):
        console.print(block)
        console.print()
    assert best.certificate is not None
    for line in certificate_lines(best.certificate):
        console.print(line)
    for line in tie_lines(best):
        console.print(line)
    svg = console.export_svg(title="moeplan")
    # The picture stands alone: no fonts from elsewhere.
    return re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)


PAGES = {"cli.md": cli_page, "rules.md": rules_page}
"""Pages whose text is determined by the code."""


def main() -> None:
    """Write all pages."""
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), encoding="utf-8")
    (DOCS / "solve.svg").write_text(picture(), encoding="utf-8")


if __name__ == "__main__":
    main()
