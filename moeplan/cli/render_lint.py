"""How an imported run and the findings of lint look on a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from moeplan.costmodels.counts import parameter_count
from moeplan.costmodels.layout import DEGREES
from moeplan.exporters.lint import Finding
from moeplan.exporters.reading.imported import Imported
from moeplan.profiles.hardware import Cluster
from moeplan.units import format_count

_COLOURS = {"error": "red", "change": "yellow", "slow": "cyan"}


def imported_lines(imported: Imported, cluster: Cluster | None) -> Iterator[RenderableType]:
    """Model, workload, layout, and what was not understood or assumed."""
    model, workload, x = imported.model, imported.workload, imported.layout
    count = parameter_count(model)
    table = Table(title=f"{imported.path} ({imported.kind}, {imported.framework})", title_style="bold", title_justify="left",
                  box=None, pad_edge=False, show_header=False)  # fmt: skip
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    experts = f", {model.moe.experts} experts, top {model.moe.topk}" if model.moe is not None else ""
    table.add_row("model", f"{model.name}: {format_count(count.total)} parameters, {len(model.layers)} layers{experts}")
    table.add_row(
        "workload",
        f"{workload.global_batch} sequences of {workload.seq_len} tokens, {workload.precision.name}, gradients of "
        f"{workload.gradient_bytes} and moments of {workload.moment_bytes} bytes",
    )
    table.add_row("GPUs", f"{imported.world}" + (f" of {cluster.name}" if cluster is not None else ", no cluster named"))
    table.add_row("degrees", "  ".join(f"{name} {getattr(x, name)}" for name in DEGREES))
    table.add_row("split", x.stages or "even")
    table.add_row(
        "step",
        f"micro-batch {x.micro_batch}, recompute {x.recompute_text()}, "
        f"CUDA graphs {'+'.join(x.cuda_graphs) or 'none'}, sharding {x.sharding}, dispatcher {x.dispatcher}",
    )
    switches = ("sequence_parallel", "dp_overlap", "tp_overlap", "ep_overlap", "shared_overlap")
    table.add_row("switches", ", ".join(name for name in switches if getattr(x, name)) or "none")
    yield table
    framework = imported.framework.split(" ")[0]
    for title, lines in (
        (f"Flags that {framework} does not know", [str(g) for g in imported.unknown]),
        (f"Defaults of {framework} that this rests on", [f"{flag} {value}" for flag, value in imported.defaults.items()]),
        ("Flags that change nothing here, kept as they stand", [str(g) for g in imported.passed]),
    ):
        if lines:
            yield Text(f"\n{title}", style="bold")
            yield Text("  " + "\n  ".join(_joined(lines)))


def _joined(lines: Sequence[str], width: int = 110) -> list[str]:
    """Short lines put side by side, with commas between."""
    out: list[str] = []
    for line in lines:
        if out and len(out[-1]) + len(line) + 2 <= width:
            out[-1] += f", {line}"
        else:
            out.append(line)
    return out


def findings_table(found: Sequence[Finding]) -> Table:
    """Findings, one a row."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    priced = any(f.saves is not None for f in found)
    table.add_column("line", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("rule", no_wrap=True)
    table.add_column("what", overflow="fold")
    table.add_column("fix", overflow="fold")
    if priced:
        table.add_column("saves", justify="right", no_wrap=True)
    for f in found:
        saves = [f"{f.saves:.1%}" if f.saves is not None else ""] if priced else []
        colour = _COLOURS[f.severity]
        table.add_row(str(f.line or ""), Text(f.severity, style=colour), f.rule, Text(f.message), Text(f.fix), *saves)
    return table
