"""`moeplan profile import`."""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moeplan.cli.options import check_writable, json_option, load_machine, print_json, remark
from moeplan.errors import UsageError

if TYPE_CHECKING:
    from moeplan.profiles.hardware import Cluster
    from moeplan.profiles.profile import Profile
    from moeplan.profiles.samples import Environment, Sample


@click.command("import")
@click.argument("files", nargs=-1, metavar="[FILE]...", type=click.Path(path_type=Path))
@click.option("--from", "source", type=click.Choice(["aiconfigurator", "nccl-tests"]), required=True, help="What is imported.")
@click.option(
    "--cluster", "cluster_ref", metavar="CLUSTER", help="What was measured; nominal is what the import does not hold."
)
@click.option(
    "--profile", "profile_file", type=click.Path(path_type=Path), metavar="FILE",
    help="nccl-tests: replace the collectives of this profile, not of the nominal one.",
)  # fmt: skip
@click.option(
    "--framework", type=click.Choice(["trtllm", "vllm", "sglang"]),
    help="aiconfigurator: take all kernels from this framework; default: for each the one that is nearest to training.",
)  # fmt: skip
@click.option("--version", metavar="V", help="aiconfigurator: take this version of the framework; default: the newest.")
@click.option("--op", metavar="NAME", help="nccl-tests: which test it was, like all_reduce, if the output does not say.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Write the profile to this file.")
@json_option
def import_(source: str, files: tuple[Path, ...], output: Path, as_json: bool, **options: Any) -> int:
    """Make a profile from the measurements of others.

    \b
    Examples:
      moeplan profile import --from aiconfigurator --cluster h200x64 -o profile.yaml
      moeplan profile import --from nccl-tests --cluster h100x16 all_reduce.txt alltoall.txt -o profile.yaml
      moeplan profile import --from nccl-tests --profile profile.yaml sweep.log -o better.yaml

    aiconfigurator: NVIDIA's measured tables of the package aiconfigurator-core, or those of a folder "systems" that is given as
    FILE. They hold forward passes of GEMM and attention and NCCL within a node; everything else is nominal and marked as such.

    nccl-tests: what all_reduce_perf, all_gather_perf, reduce_scatter_perf, alltoall_perf and sendrecv_perf print, with lines
    that name ranks and hosts, up to 512 MiB at best. Other curves stay what they were.
    """
    _check_options(source, files, options)
    check_writable(output, "profile")
    if any(path.exists() and output.exists() and path.samefile(output) for path in files):
        raise UsageError(f"-o {output} is an input itself, which would be lost", hint="choose another file")
    if source == "aiconfigurator":
        profile, environment, samples = _tables(files, **options)
    else:
        profile, environment, samples = _collectives(files, **options)
    _save(profile, environment, samples, output)
    _report(profile, samples, as_json)
    click.echo(f"profile written to {output}; use it with --profile {output}", err=True)
    return 0


def _check_options(source: str, files: Sequence[Path], options: dict[str, Any]) -> None:
    """Refuse options of the other source, and ones that are missing."""
    other = {"aiconfigurator": ("profile_file", "op"), "nccl-tests": ("framework", "version")}[source]
    for name in other:
        if options[name] is not None:
            raise UsageError(f"--{name.removesuffix('_file')} means nothing to --from {source}", hint="leave it out")
    if source == "nccl-tests" and not files:
        raise UsageError("--from nccl-tests needs its output", hint="name one or more files")
    if source == "aiconfigurator" and len(files) > 1:
        raise UsageError(f"--from aiconfigurator takes one folder, {len(files)} are given")
    if (options["cluster_ref"] is None) == (options["profile_file"] is None):
        which = "--cluster" if source == "aiconfigurator" else "either --cluster or --profile"
        raise UsageError(f"--from {source} needs {which}", hint="write it like --cluster h200x64")


def _tables(
    files: Sequence[Path], cluster_ref: str, framework: str | None, version: str | None, **_: Any
) -> tuple[Profile, Environment, Sequence[Sample]]:
    from moeplan.profiles.hardware import load_cluster
    from moeplan.profiles.imports.aiconfigurator import read_tables
    from moeplan.profiles.measured import measured_profile

    cluster = load_cluster(cluster_ref)
    root = files[0] if files else None
    tables = read_tables(cluster, root=root, framework=framework or "", version=version or "")
    environment = _environment(cluster, cluster_ref, tables.device, tables.software)
    return measured_profile(tables.samples, environment, cluster, remarks=tables.remarks), environment, tables.samples


def _collectives(
    files: Sequence[Path], cluster_ref: str | None, profile_file: Path | None, op: str | None, **_: Any
) -> tuple[Profile, Environment, Sequence[Sample]]:
    import dataclasses

    from moeplan.profiles.imports.nccl_tests import collective_samples, read_runs, with_collectives
    from moeplan.profiles.samples import load_samples, samples_path

    base = load_machine(cluster_ref, profile_file)
    runs = [run for path in files for run in read_runs(path, op or "")]
    samples: list[Sample] = collective_samples(runs, base.cluster)
    device = runs[0].members[0][3]
    profile = with_collectives(base, samples, device)
    software = "nccl-tests" + "".join(f", {name}" for name in dict.fromkeys(run.library for run in runs) if name)
    environment = _environment(base.cluster, base.cluster.name, device or base.cluster.device.name, software)
    kept: list[Sample] = []
    if base.measured_on is not None and profile_file is not None and samples_path(profile_file).is_file():
        environment, old = load_samples(samples_path(profile_file))
        replaced = {(sample.op, sample.group) for sample in samples}
        kept = [sample for sample in old if (sample.op, sample.group) not in replaced]
    samples = [*kept, *samples]
    assert profile.measured_on is not None
    run = dataclasses.replace(profile.measured_on, samples=len(samples))
    if base.measured_on is None:
        run = dataclasses.replace(run, when=environment.when, device=environment.device, software=software)
    return dataclasses.replace(profile, measured_on=run), environment, samples


def _environment(cluster: Cluster, name: str, device: str, software: str) -> Environment:
    from moeplan._version import VERSION
    from moeplan.profiles.samples import Environment

    return Environment(
        moeplan=VERSION,
        torch="",
        backend="import",
        communication=software,
        device=device,
        memory_bytes=cluster.device.memory_bytes,
        processors=cluster.device.processors,
        capability=cluster.device.capability,
        host=cluster.device.host,
        per_node=cluster.gpus_per_node,
        cluster=name,
        when=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def _save(profile: Profile, environment: Environment, samples: Sequence[Sample], output: Path) -> None:
    """Write the profile and its samples beside it."""
    import dataclasses

    from moeplan.profiles.imports import samples_text
    from moeplan.profiles.samples import samples_path
    from moeplan.records import save_text

    text = samples_text(environment, samples)
    assert profile.measured_on is not None
    run = dataclasses.replace(profile.measured_on, samples_sha256=hashlib.sha256(text.encode()).hexdigest())
    dataclasses.replace(profile, name=output.stem, measured_on=run).save(output)
    if output.suffix:  # not /dev/stdout or a pipe
        save_text(samples_path(output), text, "samples")


def _report(profile: Profile, samples: Sequence[Sample], as_json: bool) -> None:
    """The curves that came from the import."""
    from moeplan.cli.profile_views import views

    shown = [view for view in views(profile, samples) if view.samples]
    if as_json:
        from moeplan.cli.profile_show import profile_data

        print_json(profile_data(profile, shown, points=False))
        return
    from moeplan.cli.render import console
    from moeplan.cli.render_profile import curve_tables, remarks

    out = console()
    for table in curve_tables(shown, out.width, profile):
        out.print(table)
        out.print()
    for text in remarks(profile, shown):
        remark(text)
