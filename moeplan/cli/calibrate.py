"""`moeplan calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moeplan.cli.options import check_writable, json_option, load_machine, print_json, progress_bar, remark
from moeplan.errors import UsageError

if TYPE_CHECKING:
    from moeplan.profiles.profile import Profile


@click.command()
@click.argument("profile_file", required=False, metavar="[PROFILE]", type=click.Path(path_type=Path))
@click.option(
    "--cluster", "cluster_ref", metavar="CLUSTER", help="Start from the nominal profile of this cluster, not from a file."
)
@click.option(
    "--runs", type=click.Path(path_type=Path), metavar="FILE.csv", required=True,
    help="Table of training runs with the column measured_step_s, or of MoE layers from `moeplan verify`.",
)  # fmt: skip
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the profile to this file, corrected or as it was.")
@json_option
def calibrate(profile_file: Path | None, cluster_ref: str | None, runs: Path, output: Path | None, as_json: bool) -> int:
    """Correct the profile of a machine by runs that were measured on it.

    \b
    Examples:
      moeplan calibrate --cluster h100x64 --runs measured.csv -o ours.yaml
      moeplan calibrate ours.yaml --runs more.csv -o better.yaml
      moeplan solve --profile ours.yaml --model deepseek-v3 --global-batch 2048 --seq-len 4096 -o plan.yaml

    The table has the columns of `moeplan estimate --runs` (docs/runs.md) and measured_step_s, the seconds of a step; one run
    will do. At most five factors are corrected: what a step sustains of GEMM and attention rates, host time per launch, exposed
    communication. Rates of links and memory stay. A correction that does not predict layouts better that it has not seen is
    dropped: the profile is then written as it was, and the report says so. A table of `moeplan verify` corrects the share of
    overlap that is lost, kappa, from the ratios between schedules of a layer.
    """
    if (profile_file is None) == (cluster_ref is None):
        raise UsageError(
            "give either a profile file or --cluster to start from",
            hint="moeplan calibrate --cluster h100x64 --runs measured.csv",
        )
    if output is not None:
        check_writable(output, "profile")
        if output.exists() and runs.exists() and output.samefile(runs):
            raise UsageError(f"-o {output} is the run table itself, which would be lost", hint="choose another file")
    from moeplan.planner.calibration import calibrate as calibrated
    from moeplan.planner.estimate import read_table
    from moeplan.planner.layers.runs import is_layer_table
    from moeplan.records import sha256_of

    profile = load_machine(cluster_ref, profile_file)
    if is_layer_table(runs):
        return _overlap(profile, runs, output, as_json=as_json)
    rows = read_table(runs)
    with progress_bar("pricing runs") as progress:
        result = calibrated(profile, rows, table_sha256=sha256_of(runs, "run table"), progress=progress)
    if output is not None:
        result.profile.save(output)
    if as_json:
        print_json(_data(result))
    else:
        from moeplan.cli.render import console
        from moeplan.cli.render_calibration import errors_table, factors_table

        out = console()
        for part in (factors_table(result), errors_table(result)):
            out.print(part)
            out.print()
        out.print(result.verdict, style="bold green" if result.accepted else "bold yellow")
        for text in result.remarks:
            remark(text)
    if output is not None:
        _say_written(output, accepted=result.accepted)
    return 0


def _overlap(profile: Profile, runs: Path, output: Path | None, *, as_json: bool) -> int:
    """Correct the share of overlap that is lost by runs of MoE layers."""
    from moeplan.planner.layers.runs import read_layer_runs
    from moeplan.planner.overlap_calibration import calibrate_overlap
    from moeplan.records import plain, sha256_of

    result = calibrate_overlap(profile, read_layer_runs(runs), table_sha256=sha256_of(runs, "run table"))
    if output is not None:
        result.profile.save(output)
    if as_json:
        names = ("accepted", "verdict", "before", "after", "error_before", "error_after", "rows")
        print_json({name: plain(getattr(result, name)) for name in names})
    else:
        from moeplan.cli.render import console
        from moeplan.cli.render_calibration import overlap_table

        console().print(overlap_table(result))
        console().print(result.verdict, style="bold green" if result.accepted else "bold yellow")
    if output is not None:
        _say_written(output, accepted=result.accepted)
    return 0


def _say_written(output: Path, *, accepted: bool) -> None:
    how = "corrected" if accepted else "unchanged"
    click.echo(f"profile written to {output}, {how}; use it with --profile {output}", err=True)


def _data(result: Any) -> dict[str, Any]:
    from moeplan.records import plain

    return {
        "accepted": result.accepted,
        "verdict": result.verdict,
        "factors": [plain(c) for c in result.corrections],
        "groups": result.groups,
        "error_before": plain(result.before),
        "error_after": plain(result.after),
        "error_left_out": None if result.left_out is None else plain(result.left_out),
        "rows": [plain(r) for r in result.rows],
        "remarks": list(result.remarks),
    }
