"""`moeplan import`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from moeplan.cli.options import COUNT, check_writable, json_option, print_json, remark
from moeplan.errors import UsageError

if TYPE_CHECKING:
    from moeplan.exporters.reading.imported import Imported
    from moeplan.profiles.hardware import Cluster

F = TypeVar("F", bound=Callable[..., Any])

_SOURCE = [
    click.argument("file", type=click.Path(path_type=Path)),
    click.argument("arguments", nargs=-1, metavar="[-- ARGUMENTS]"),
    click.option("--cluster", "cluster_ref", metavar="CLUSTER", help="Shorthand (h100x256), catalog name or a YAML file."),
    click.option("--gpus", type=COUNT, metavar="N", help="GPUs of the run, where the file does not say them."),
    click.option("--device", metavar="NAME", help="Device of the catalog, like h100; with the GPUs it makes the cluster."),
    click.option("--set", "settings", multiple=True, metavar="VAR=VALUE", help="A variable that the script does not set."),
    click.option("--add", default="", metavar="FLAGS", help="Further arguments of Megatron, which stand last."),
    click.option("--era", default="latest", show_default=True, help="Software features that exist, as for estimate."),
]


def source_options(function: F) -> F:
    """Add the file to read, and what it does not say."""
    for option in reversed(_SOURCE):
        function = option(function)
    return function


@click.command("import")
@source_options
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write a plan file.")
@json_option
def import_(output: Path | None, as_json: bool, **source: Any) -> int:
    """Read a launch script that is in use today.

    \b
    Examples:
      moeplan import train.sh --cluster h100x64 -o imported.yaml
      moeplan estimate imported.yaml
      moeplan import train.slurm --set MODEL_SIZE=8x7b --device h100
      moeplan import run.sh --json -- 8 mixtral

    Reads launch scripts of Megatron-LM (bash; nothing in them is run), argument files, directories that export wrote, YAML
    files with MODEL_ARGS, and the argument dump in a log. Shows model, workload and layout, what was not understood and what
    was assumed. A layout that breaks a rule of Megatron is read all the same; `moeplan lint` says what is wrong with it. Words
    behind "--" are the arguments of the script, $1 and so on.
    """
    if output is not None:
        check_writable(output, "plan file")
    imported, cluster = read_source(**source)
    if output is not None and cluster is None:
        raise UsageError(
            f"a plan is for a cluster, which '{imported.path}' does not name", hint="add --device h100, or --cluster"
        )
    for text in imported.remarks:
        remark(text)
    if as_json:
        print_json({**imported.to_data(), "cluster": None if cluster is None else cluster.name})
    else:
        from moeplan.cli.render import console
        from moeplan.cli.render_lint import imported_lines

        out = console()
        for line in imported_lines(imported, cluster):
            out.print(line)
    _say_broken(imported, cluster)
    if output is not None and cluster is not None:
        from moeplan.exporters.reading.imported import plan_text
        from moeplan.records import save_text

        save_text(output, plan_text(imported, cluster), "plan file")
        click.echo(f"written to {output}; `moeplan estimate {output}` prices it", err=True)
    return 0


def read_source(
    *,
    file: Path,
    arguments: tuple[str, ...],
    cluster_ref: str | None,
    gpus: int | None,
    device: str | None,
    settings: tuple[str, ...],
    add: str,
    era: str,
) -> tuple[Imported, Cluster | None]:
    """The run that a file describes, and the cluster if one is named."""
    import shlex

    from moeplan.exporters.reading.imported import read_file
    from moeplan.profiles.hardware import load_cluster

    if cluster_ref is not None and (device is not None or gpus is not None):
        raise UsageError("--cluster says the devices and their number", hint="leave out --device and --gpus")
    variables = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not name.isidentifier():
            raise UsageError(f"--set {setting}: write it like --set NNODES=4")
        variables[name] = value
    try:
        more = shlex.split(add)
    except ValueError as error:
        raise UsageError(f"--add {add}: {str(error).lower()}") from None
    cluster = None if cluster_ref is None else load_cluster(cluster_ref)
    imported = read_file(
        file,
        settings=variables,
        positional=arguments,
        add=more,
        gpus=gpus,
        otherwise_gpus=None if cluster is None else cluster.gpus,
        era=era,
    )
    if device is not None:
        cluster = load_cluster(f"{device}x{imported.world}")
    if cluster is not None and cluster.gpus != imported.world:
        raise UsageError(
            f"'{file}' starts {imported.world} processes, {cluster.name} has {cluster.gpus} GPUs",
            hint="name the cluster of the run, or give --device and --gpus",
        )
    return imported, cluster


def _say_broken(imported: Imported, cluster: Cluster | None) -> None:
    """Remarks on rules that the layout breaks."""
    for fault in imported.faults:
        remark(f"{imported.framework.split(' ')[0]} refuses it: {fault}")
    from moeplan.exporters.lint import broken_rules

    for violation in broken_rules(imported, cluster):
        remark(f"breaks rule {violation.rule}: {violation}")
