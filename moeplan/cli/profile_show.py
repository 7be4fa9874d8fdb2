"""`moeplan profile show`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moeplan.cli.options import check_writable, json_option, load_machine, print_json, remark
from moeplan.errors import UnknownNameError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moeplan.cli.profile_views import View
    from moeplan.profiles.profile import Profile
    from moeplan.profiles.samples import Sample


@click.command()
@click.argument("profile_file", required=False, metavar="[FILE]", type=click.Path(path_type=Path))
@click.option("--cluster", "cluster_ref", metavar="CLUSTER", help="Show the nominal profile of this cluster, not a file.")
@click.option("--curve", "name", metavar="NAME", help="Show one curve in full, like gemm/bf16 or 'all_reduce of 8'.")
@click.option("--html", "page", type=click.Path(path_type=Path), metavar="FILE", help="Write a web page of all curves.")
@json_option
def show(profile_file: Path | None, cluster_ref: str | None, name: str | None, page: Path | None, as_json: bool) -> int:
    """Show the curves of a profile beside its samples.

    \b
    Examples:
      moeplan profile show profile.yaml
      moeplan profile show profile.yaml --curve gemm/bf16
      moeplan profile show profile.yaml --html profile.html
      moeplan profile show --cluster h200x64

    Samples are read from the file of samples beside the profile (profile.samples.jsonl); without it the curves are shown alone.
    A plot has the rate over the size of a call, both logarithmic: lines are curves, bullets are samples, bold ones on a line.
    """
    if (profile_file is None) == (cluster_ref is None):
        raise UsageError("give either a profile file or --cluster", hint="moeplan profile show profile.yaml")
    if page is not None:
        check_writable(page, "page")
    from moeplan.cli.profile_views import views

    profile = load_machine(cluster_ref, profile_file)
    shown = views(profile, _samples(profile_file, profile))
    chosen = shown if name is None else _named(shown, name)
    if as_json:
        print_json(profile_data(profile, chosen, points=name is not None))
    elif page is None or name is not None:
        _print(profile, chosen, in_full=name is not None)
    if page is not None:
        from moeplan.cli.profile_page import profile_page
        from moeplan.records import save_text

        save_text(page, profile_page(profile, chosen), "page")
        click.echo(f"page written to {page}", err=True)
    return 0


def _samples(profile_file: Path | None, profile: Profile) -> Sequence[Sample]:
    """The samples beside a profile file, if they are those that it was made from."""
    from moeplan.profiles.samples import load_samples, samples_path
    from moeplan.records import sha256_of

    if profile_file is None or not samples_path(profile_file).is_file():
        return ()
    path, run = samples_path(profile_file), profile.measured_on
    if run is None:
        remark(f"{path} is not used: the profile does not say that it was measured")
        return ()
    if run.samples_sha256 and run.samples_sha256 != sha256_of(path, "samples"):
        remark(f"{path} has changed since the profile was made from it")
    return load_samples(path)[1]


def _named(shown: Sequence[View], name: str) -> list[View]:
    from moeplan.cli.profile_views import matching

    found = matching(shown, name)
    if not found:
        raise UnknownNameError("curve", name, [view.name for view in shown])
    return found


def _print(profile: Profile, shown: Sequence[View], *, in_full: bool) -> None:
    import datetime

    from rich.console import Group

    from moeplan.cli import render_profile as parts
    from moeplan.cli.render import console

    out = console()
    if in_full:
        for view in shown:
            out.print(Group(*parts.curve_in_full(view, out.width)))
            out.print()
        return
    for line in parts.heading(profile, datetime.datetime.now(datetime.UTC)):
        out.print(line)
    out.print()
    for table in (*parts.curve_tables(shown, out.width, profile), parts.links_table(profile)):
        out.print(table)
        out.print()
    for plot in parts.plots(parts.chosen_panels(shown), out.width):
        out.print(plot)
    for text in parts.remarks(profile, shown):
        remark(text)


def profile_data(profile: Profile, shown: Sequence[View], *, points: bool) -> dict[str, Any]:
    """What `--json` prints of a profile; `points` adds the samples of its curves."""
    from moeplan.profiles.profile_file import cluster_data
    from moeplan.records import plain

    names = ("stream_bytes_per_s", "scale_up_bytes_per_s", "scale_out_bytes_per_s", "all_to_all_bytes_per_s")
    factors = ("scale_out_latency_s", "host_copies", "overlap_loss", "sustained", "host", "exposed")
    return {
        "name": profile.name,
        "cluster": cluster_data(profile.cluster),
        "measured_on": None if profile.measured_on is None else plain(profile.measured_on),
        "calibrated_on": plain(profile.calibrated_on),
        **{name: plain(getattr(profile, name)) for name in (*names, *factors)},
        "curves": [_curve_data(view, points) for view in shown],
    }


def _curve_data(view: View, points: bool) -> dict[str, Any]:
    from moeplan.records import plain

    data = {key: value for key, value in plain(view.curve).items() if key != "residuals"}
    out = {
        "name": view.name,
        "form": type(view.curve).__name__,
        **data,
        "origin": None if view.origin is None else {k: getattr(view.origin, k) for k in ("device", "measured", "note")},
        "samples_at_hand": len(view.samples),
    }
    if points:
        out["points"] = [
            {"sizes": dict(s.sizes), "measured_s": s.seconds, "spread": s.spread, "curve_s": float(t), "how": s.how}
            for s, t in zip(view.samples, view.curve_s, strict=True)
        ]
    return out
