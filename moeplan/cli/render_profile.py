"""What people see of a profile: where it comes from, its curves in human units, links, and plots.

One table for each kind of curve, with the parameters of its form; narrow terminals leave out the measured range first, then
what else tells least. A rate in a table is a constant of the fit, a rate in a plot what a call of that size reaches.
"""

from __future__ import annotations

import datetime
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from moeplan.cli.plot_terminal import HEIGHT, plot, rate_label, work_label
from moeplan.cli.profile_views import FAMILIES, View, line_of, panels
from moeplan.profiles.curves import CollectiveCurve, Curve
from moeplan.profiles.origin import Origin
from moeplan.profiles.profile import Profile
from moeplan.units import GB, TERA, format_count, format_seconds

PANEL = 38
"""Columns of a small plot, at least."""
NOT_IN_THIS_RUN = "not measured in this run"
"""How the note of a curve begins that a measured profile took over from the nominal one."""
MOST_PANELS = 4
"""Small plots side by side."""
POOR = 0.4
"""A 90th percentile of the error from which on a curve that was measured is remarked."""
WORST = 12
"""Samples listed of one curve, the worst first."""
_SIZE_NAMES = {"message_bytes": "message", "link_bytes": "sent", "io_bytes": "in and out", "bytes": "moved"}
_MORE = {"quantize_s": "cast ps", "result_s": "result ps", "group_s": "ns/group", "token_s": "ns/token"}
"""Parameters with a column where a curve of the table has them, and its heading."""
_RANKS = {"sharp": 4}


def heading(profile: Profile, now: datetime.datetime) -> Iterator[Text]:
    """What was measured, when, and what became of it since."""
    cluster = profile.cluster
    links = f"{cluster.gpus} x {cluster.device.name}, {cluster.gpus_per_node} a node"
    yield Text(f"profile '{profile.name}' of {cluster.name}: {links}", style="bold")
    run = profile.measured_on
    if run is None:
        yield Text("nominal: from public measurements, none was taken on this machine")
    else:
        verb = "imported" if run.backend == "import" else "measured"
        ranks = f"{_counted(run.ranks, 'rank')} of {_counted(run.nodes, 'node')}"
        where = "" if run.backend == "import" else f" on {ranks}, {run.backend}"
        yield Text(f"{verb} {age(run.when, now)}: {run.device}{where}; {run.software}; {run.samples} samples")
    for runs in profile.calibrated_on:
        better = f"mean error {runs.error_before:.1%} before, {runs.error_after:.1%} after"
        yield Text(f"calibrated on {len(runs.rows)} training runs: {better}")
    known = [o for o in profile.origins.values() if o.measured]
    public = sum(_taken_over(o, profile) for o in known)
    parts = [f"{len(known) - public} measured"] if run is not None else []
    parts += [f"{public} public, from measurements of others on this device"] if public else []
    rest = len(profile.origins) - len(known)
    parts += [f"{rest} ≈ from a relative or by rule"] if rest else []
    yield Text(f"{len(profile.origins)} curves: {'; '.join(parts)}")


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" + "s" * (count != 1)


def age(when: str, now: datetime.datetime) -> str:
    """A day and how long ago that is."""
    try:
        then = datetime.datetime.fromisoformat(when)
    except ValueError:
        return when
    then = then if then.tzinfo else then.replace(tzinfo=now.tzinfo)
    days = (now - then).days
    ago = "today" if days <= 0 else "1 day ago" if days == 1 else f"{days} days ago"
    return f"{then:%Y-%m-%d %H:%M} ({ago})"


def curve_tables(shown: Sequence[View], width: int, profile: Profile) -> Iterator[Table]:
    """Parameters and errors of all curves, a table for each kind."""
    for family, title in FAMILIES.items():
        some = [view for view in shown if view.family == family and not view.name.endswith(" backward")]
        if some:
            yield _curve_table(title, some, width, profile)


@dataclass(frozen=True, slots=True)
class _Column:
    name: str
    cells: Sequence[str | Text]
    rank: int = 0
    """Columns of the highest rank are left out first; those of rank 0 stay."""
    left: bool = False

    @property
    def width(self) -> int:
        return max(len(cell) for cell in (self.name, *self.cells))


def _curve_table(title: str, shown: Sequence[View], width: int, profile: Profile) -> Table:
    curves = [view.curve for view in shown]
    parameters = [
        _Column(name, [read(curve) for curve in curves], _RANKS.get(name, 3 if name in _MORE.values() else 0))
        for name, read in parameter_columns(shown).items()
    ]
    columns = [
        _Column("", [view.name.partition("/")[2] for view in shown], left=True),
        *parameters,
        _Column("error", [_error(curve.error) for curve in curves]),
        _Column("p90", [f"{curve.error_p90:.1%}" for curve in curves], 2),
        _Column("samples", [format_count(curve.samples) for curve in curves], 1),
        _Column("measured range", [valid_range(curve) for curve in curves], 5, left=True),
        _Column("from", [Text(*origin_of(view, profile)) for view in shown], left=True),
    ]
    while sum(c.width + 2 for c in columns) - 2 > width and any(c.rank for c in columns):
        columns.remove(max(columns, key=lambda c: c.rank))
    table = Table(title=title, title_style="bold", title_justify="left", box=None, pad_edge=False, header_style="dim")
    for column in columns:
        table.add_column(column.name, justify="left" if column.left else "right", no_wrap=True, overflow="ellipsis")
    for cells in zip(*(column.cells for column in columns), strict=True):
        table.add_row(*cells)
    return table


def parameter_columns(shown: Sequence[View]) -> Mapping[str, Callable[[Any], str]]:
    """Headings of columns and what stands in them for a curve, for all forms in a table."""
    first = shown[0].curve
    if hasattr(first, "times_s"):
        bus = {id(view.curve): view.factor for view in shown}
        return {
            "smallest": lambda c: f"{work_label(c.sizes_bytes[0], True)} in {format_seconds(c.times_s[0])}",
            "largest": lambda c: f"{work_label(c.sizes_bytes[-1], True)} at {_bus_rate(c, bus[id(c)])} GB/s",
        }
    start = "latency_s" if hasattr(first, "latency_s") else "launch_s"
    out: dict[str, Callable[[Any], str]] = {start[:-2]: lambda c: format_seconds(getattr(c, start))}
    if hasattr(first, "flop_per_s"):
        out["TFLOP/s"] = lambda c: f"{c.flop_per_s / TERA:,.0f}" if c.flop_per_s >= 10 * TERA else f"{c.flop_per_s / TERA:.2g}"
    out["GB/s"] = lambda c: f"{c.bytes_per_s / GB:,.0f}" if c.bytes_per_s >= 10 * GB else f"{c.bytes_per_s / GB:.2g}"
    if hasattr(first, "sharpness"):
        out["sharp"] = lambda c: f"{c.sharpness:.1f}"
    if hasattr(first, "backward_ratio"):
        out["backward"] = lambda c: f"x{c.backward_ratio:.2f}"
    if hasattr(first, "fused"):
        out["kernel"] = lambda c: "fused" if c.fused else "several"
    for name, heading in _MORE.items():
        if any(getattr(view.curve, name, 0.0) for view in shown):
            out[heading] = functools.partial(_small, name, 1e-12 if name in ("quantize_s", "result_s") else 1e-9)
    return out


def _bus_rate(curve: CollectiveCurve, factor: float) -> str:
    return rate_label(factor * curve.sizes_bytes[-1] / curve.times_s[-1] / GB)


def _small(name: str, unit: float, curve: Any) -> str:
    value = getattr(curve, name, 0.0) / unit
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value else "-"


def valid_range(curve: Curve) -> str:
    """Measured sizes, from and to."""
    parts = []
    for name, (low, high) in curve.valid.items():
        label = _SIZE_NAMES.get(name, name)
        in_bytes = name.endswith("bytes")
        low_text, high_text = ((work_label(v, in_bytes) if v >= 1e6 or in_bytes else f"{v:.0f}") for v in (low, high))
        parts.append(f"{label} {low_text}" if low == high else f"{label} {low_text}-{high_text}")
    return ", ".join(parts)


def _error(error: float) -> Text:
    return Text(f"{error:.1%}", style="green" if error < 0.08 else "yellow" if error < 0.2 else "red")


def origin_of(view: View, profile: Profile) -> tuple[str, str]:
    """Where a curve comes from, short, and its colour."""
    origin = view.origin
    if origin is None:
        return view.curve.source, "dim"
    if origin.measured:
        return ("public" if _taken_over(origin, profile) else "measured"), "green"
    same = origin.device.lower() == profile.cluster.device.name.lower()
    return "≈ by rule" if same else f"≈ {origin.device}", "yellow"


def _taken_over(origin: Origin, profile: Profile) -> bool:
    """Whether a curve was measured by others on this kind of device, not in the run of the profile."""
    return profile.measured_on is None or origin.note.startswith(NOT_IN_THIS_RUN)


def link_lines(profile: Profile) -> Iterator[tuple[str, str]]:
    """Names and values of rates of memory and links, and of the single factors."""
    cluster = profile.cluster
    yield "device memory", f"{profile.stream_bytes_per_s / GB:,.0f} GB/s streaming"
    up = cluster.scale_up
    digits = 0 if up.bytes_per_s >= 10 * GB else 2
    sent = f"a send attains {profile.scale_up_bytes_per_s / GB:,.{digits}f} ({profile.send_share:.0%})"
    yield f"scale-up, {cluster.domain_gpus} GPUs", f"{up.name}, {up.bytes_per_s / GB:,.{digits}f} GB/s; {sent}"
    ring, mixed = profile.scale_out_bytes_per_s / GB, profile.all_to_all_bytes_per_s / GB
    shares = f"rings attain {ring:,.1f} ({profile.ring_share:.0%}), all-to-all {mixed:,.1f} ({profile.all_to_all_share:.0%})"
    raw = f"{cluster.scale_out_bytes_per_s_per_gpu / GB:,.1f} GB/s a GPU"
    yield "scale-out", f"{raw}; {shares}; hop {format_seconds(profile.scale_out_latency_s)}"
    if profile.host_copies:
        named = {"host_to_device": "to the device", "device_to_host": "to the host"}
        copies = [f"{named.get(k, k)} {v / GB:.1f} GB/s" for k, v in profile.host_copies.items()]
        yield "host copies", ", ".join(copies)
    yield "overlap loss", f"{profile.overlap_loss:.2f} of what perfect overlap would hide"
    if profile.sustained:
        shares = ", ".join(f"{kind} {share:.0%}" for kind, share in profile.sustained.items())
        yield "sustained in a step", shares
    yield "factors", f"host time x{profile.host:.2f}, exposed communication x{profile.exposed:.2f}"


def links_table(profile: Profile) -> Table:
    """Memory, links and factors."""
    table = Table(title="memory, links, factors", title_style="bold", title_justify="left", box=None, pad_edge=False)
    table.show_header = False
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    for name, value in link_lines(profile):
        table.add_row(name, value)
    return table


def remarks(profile: Profile, shown: Sequence[View]) -> Iterator[str]:
    """What a reader should know about a profile."""
    told = profile.measured_on.remarks if profile.measured_on is not None else ()
    outliers = [text for text in told if text.startswith("outlier") or text.endswith("further remarks")]
    yield from (text for text in told if text not in outliers)
    if outliers:
        yield "some samples are far off their curve; --curve NAME lists the worst"
    measured = [view for view in shown if view.origin is not None and origin_of(view, profile)[0] == "measured"]
    poor = [view.name for view in measured if view.curve.error_p90 >= POOR and not view.name.endswith(" backward")]
    if poor:
        more = f" and {len(poor) - 4} more" if len(poor) > 4 else ""
        yield f"a tenth of the sizes is off by {POOR:.0%} or more: {', '.join(poor[:4])}{more}"


def chosen_panels(shown: Sequence[View]) -> list[list[View]]:
    """The plots that are shown when no curve is named: those with samples, else the ones that say most."""
    every = panels(shown)
    sampled = [some for some in every.values() if any(view.samples for view in some)]
    usual = [v for k, v in every.items() if not k.startswith(("grouped GEMM, fp8", "grouped GEMM, nv", "hybridep"))]
    return sampled or usual


def plots(shown: Sequence[list[View]], width: int) -> Iterator[RenderableType]:
    """Small plots, as many side by side as fit."""
    beside = max(1, min(MOST_PANELS, (width + 2) // (PANEL + 2)))
    each = (width - 2 * (beside - 1)) // beside
    for at in range(0, len(shown), beside):
        grid = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
        some = shown[at : at + beside]
        for _ in some:
            grid.add_column(width=each)
        grid.add_row(*(Text("\n").join(plot(views, each)) for views in some))
        yield grid
        yield Text()


def curve_in_full(view: View, width: int) -> Iterator[RenderableType]:
    """One curve: formula, parameters, plot, residuals."""
    curve: Any = view.curve
    yield Text(view.name, style="bold")
    yield Text(" ".join((type(curve).__doc__ or "").split()), style="dim")
    yield Text()
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, read in parameter_columns([view]).items():
        table.add_row(name, read(curve))
    table.add_row("error", f"{curve.error:.1%} median, {curve.error_p90:.1%} at the 90th percentile")
    table.add_row("samples", str(curve.samples))
    table.add_row("measured range", valid_range(curve))
    if view.origin is not None:
        table.add_row("from", f"{view.origin.device}{'' if view.origin.measured else ', not measured on this device'}")
        table.add_row("", view.origin.note)
    elif curve.source:
        table.add_row("from", curve.source)
    if line_of(view):
        table.add_row("line drawn for", line_of(view))
    yield table
    yield Text()
    yield from plot([view], min(width, 100), 2 * HEIGHT)
    yield Text()
    yield from _residuals(view)


def _residuals(view: View) -> Iterator[RenderableType]:
    off = view.residuals
    if not len(off):
        yield Text("residuals were not kept with this curve", style="dim")
        return
    low, middle, high = np.quantile(off, (0.1, 0.5, 0.9))
    yield Text(f"curve over measured: median {middle:+.1%}, 80 % of samples within {low:+.1%} and {high:+.1%}")
    edges = np.array([-np.inf, -0.5, -0.2, -0.1, -0.05, 0.05, 0.1, 0.2, 0.5, np.inf])
    names = ["below -50 %", *(f"{a:+.0%} to {b:+.0%}" for a, b in zip(edges[1:-2], edges[2:-1], strict=True)), "above +50 %"]
    counts = np.histogram(off, edges)[0]
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(justify="right")
    table.add_column()
    for name, count in zip(names, counts.tolist(), strict=True):
        if count:
            table.add_row(name, str(count), Text("█" * max(1, round(40 * count / counts.max())), style="blue"))
    yield table
    if view.samples:
        yield Text()
        yield _worst(view)


def _worst(view: View) -> Table:
    order = np.argsort(-np.abs(np.log1p(view.residuals)))[:WORST]
    table = Table(title="samples by their distance", title_justify="left", box=None, pad_edge=False, header_style="dim")
    ran = {sample.how for sample in view.samples}
    table.add_column("size", overflow="fold", min_width=24)
    for name in ("measured", "spread", "curve", "off"):
        table.add_column(name, justify="right", no_wrap=True)
    if len(ran) > 1:
        table.add_column("ran", overflow="fold")
    for i in order.tolist():
        sample = view.samples[i]
        spread = f"{sample.spread:.1%}" if sample.spread else "-"
        times = [format_seconds(float(t)) for t in (view.measured_s[i], view.curve_s[i])]
        cells = [shape_of(sample.sizes), times[0], spread, times[1], f"{view.residuals[i]:+.1%}"]
        table.add_row(*cells, *([sample.how] if len(ran) > 1 else []))
    return table


def shape_of(sizes: Mapping[str, float]) -> str:
    """The sizes of a sample in words."""
    parts = []
    for name, value in sizes.items():
        label = _SIZE_NAMES.get(name, name.replace("_", " "))
        in_bytes = name.endswith("bytes")
        parts.append(f"{label} {work_label(value, in_bytes) if in_bytes or value >= 1e6 else f'{value:g}'}")
    return " ".join(parts)
