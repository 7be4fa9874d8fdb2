"""Writing an export: every file is read back and compared with the plan before a directory appears, whole or not at all.

An export replaces nothing but a whole older export, and that only when it is told to; it never mixes two.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moeplan.costmodels.counts import parameter_count
from moeplan.costmodels.layout import Layout
from moeplan.costmodels.stages import chunk_letters
from moeplan.errors import ExportError, FileError, MoeplanError, UsageError, nearest_hint
from moeplan.exporters.base import Exporter, Job, Reading, read_arguments
from moeplan.exporters.launchers.base import RUN_NODE, Launcher, Size, option_values
from moeplan.exporters.launchers.kubernetes import embedded
from moeplan.exporters.launchers.launchers import LAUNCHERS, USUAL, launcher
from moeplan.exporters.megatron import Megatron
from moeplan.exporters.neutral import PLAN, load_export, plan_data, plan_text
from moeplan.exporters.preflight import PREFLIGHT, preflight_text
from moeplan.exporters.readme import README, readme_text
from moeplan.planner.plan import Plan

MEGATRON = Megatron()
_PLAIN = r"[^\s'\"`\\(){};|&<>]+"
"""What a variable of a job may be set to."""
_WORKLOAD = ("seq_len", "global_batch", "precision", "gradient_bytes", "moment_bytes", "capacity_factor")
"""What files say of a workload; its era and how its tokens are routed they do not."""


def export(
    plan: Plan,
    directory: Path,
    *,
    exporter: Exporter = MEGATRON,
    version: str = "",
    launchers: Sequence[str] | None = None,
    settings: Mapping[str, str] | None = None,
    force: bool = False,
) -> list[Path]:
    """Write the files of a plan into a new directory, all or none; returns their paths.

    `version`: of the framework, empty for the exporter's own. `launchers`: names, None for the usual ones. `settings`: options
    of launchers and variables of the job. `force`: replace an older export.
    """
    texts = compose(plan, exporter, version or exporter.version, launchers, settings or {})
    write_directory(texts, directory, lambda staging: check_reading(plan, exporter.read(staging)), force=force)
    return [directory / name for name in texts]


def write_directory(
    texts: Mapping[str, str],
    directory: Path,
    check: Callable[[Path], object],
    *,
    force: bool,
    listing: str = PLAN,
    load: Callable[[Path], Mapping[str, Any]] = load_export,
) -> None:
    """Write files into a new directory, all or none, once `check` has read them back from another place.

    `listing`: the file that names all files of an export, as `load` reads it; `force` replaces a directory with no others.
    """
    _check_place(directory, force, listing, load)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    except OSError as error:
        raise FileError(f"cannot write to '{directory}': {error.strerror}", hint="choose a writable directory") from None
    try:
        for name, text in texts.items():
            (staging / name).write_text(text, encoding="utf-8")
            (staging / name).chmod(0o755 if text.startswith("#!") else 0o644)
        staging.chmod(0o755)
        check(staging)
        _put(staging, directory)
    except BaseException as error:  # an interrupt must not leave the staging directory behind either
        shutil.rmtree(staging, ignore_errors=True)
        if isinstance(error, OSError):
            raise FileError(f"cannot write to '{directory}': {error.strerror}", hint="choose a writable directory") from None
        raise


def compose(
    plan: Plan, exporter: Exporter, version: str, names: Sequence[str] | None, settings: Mapping[str, str]
) -> dict[str, str]:
    """The texts of an export by name; each launch file is taken apart again and must start the plan's ranks."""
    exporter.check(plan, version)
    job = exporter.job(plan, version)
    chosen = _chosen(exporter, job, names)
    check_settings(job, chosen, settings)
    job = job and with_settings(job, settings)
    texts = exporter.files(plan, version)
    node_files = {*texts, RUN_NODE, PREFLIGHT, PLAN}
    listed = [*texts, *(known.file for known in chosen), PREFLIGHT, PLAN, README]
    data = plan_data(plan, exporter.name, version, job, listed)
    texts |= {PREFLIGHT: preflight_text(), PLAN: plan_text(data)}
    if job is not None:
        _check_arguments(job, texts)
        for known in chosen:
            given = {name: text for name, text in texts.items() if name in node_files}
            texts[known.file] = known.text(job, option_values(known, job, settings), given)
            check_launch(known, job, texts[known.file], given)
    texts[README] = readme_text(plan, exporter, version, job, chosen)
    return {name: texts[name] for name in listed}


def check_launch(known: Launcher, job: Job, text: str, files: Mapping[str, str]) -> None:
    """Read a launch file back: the ranks that it starts, and the files that it carries."""
    size = known.size(text)
    if size != Size(job.nodes, job.per_node):
        raise ExportError(f"{known.file} starts {size} processes, the plan has {Size(job.nodes, job.per_node)}")
    if known.file.endswith("job.yaml") and dict(embedded(text)) != dict(files):
        raise ExportError(f"{known.file} does not carry the files of the export as they are")


def check_reading(plan: Plan, found: Reading) -> None:
    """Compare what the written files say with the plan."""
    planned = Reading(model=plan.problem.model, workload=plan.problem.workload, layout=plan.layout, world=plan.layout.world)
    differences = [
        f"{name} {getattr(one, name)} for {getattr(other, name)}"
        for one, other, names in (
            (_written(found), _written(planned), [field.name for field in dataclasses.fields(Layout)]),
            (found.workload, planned.workload, _WORKLOAD),
        )
        for name in names
        if getattr(one, name) != getattr(other, name)
    ]
    if found.world != planned.world:
        differences.append(f"{found.world} GPUs for {planned.world}")
    counts = [(len(r.model.layers), len(r.model.mtp), parameter_count(r.model).total) for r in (found, planned)]
    if counts[0] != counts[1]:
        differences.append("{} layers, {} prediction layers and {} parameters for {}, {} and {}".format(*counts[0], *counts[1]))
    if differences:
        raise ExportError(
            f"the files say something else than the plan: {', '.join(differences)}", hint="please report this plan"
        )


def _written(reading: Reading) -> Layout:
    """A layout with its split as chunks, however it was given, and without sequence shards where there is nothing to shard."""
    x, model = reading.layout, reading.model
    chunks = "|".join(chunk_letters(model, x.pp, x.vpp, x.stages))
    return dataclasses.replace(x, stages=chunks, sequence_parallel=x.sequence_parallel and x.tp > 1)


def _chosen(exporter: Exporter, job: Job | None, names: Sequence[str] | None) -> list[Launcher]:
    """Launchers in the order that their files need, with those that others start."""
    if job is None:
        if names:
            raise UsageError(f"{exporter.title} runs nothing, so that there is nothing to launch", hint="leave --launcher out")
        return []
    known = [launcher(name) for name in dict.fromkeys(USUAL if names is None else names)]
    if any(one.needs_node_script for one in known):
        known = [launcher("torchrun"), *(one for one in known if one.name != "torchrun")]
    return known


def check_settings(job: Job | None, chosen: Sequence[Launcher], settings: Mapping[str, str]) -> None:
    """Refuse settings that nothing takes."""
    variables = {v.name for v in job.variables} if job else set()
    options = {option.name for known in chosen for option in known.options}
    for name, value in settings.items():
        if name not in variables | options:
            others = [known.name for known in LAUNCHERS if name in {option.name for option in known.options}]
            hint = f"--launcher {' or '.join(others)} takes it" if others else nearest_hint(name, variables | options)
            raise UsageError(f"no launcher of this export takes '{name}'", hint=hint if job else "leave --set out")
        if name in variables and not re.fullmatch(_PLAIN, value):
            raise UsageError(f"{name}='{value}' is not a plain path", hint="leave out blanks, quotes and brackets")


def with_settings(job: Job, settings: Mapping[str, str]) -> Job:
    """The job with its variables set."""
    known = tuple(dataclasses.replace(v, default=settings.get(v.name, v.default)) for v in job.variables)
    return dataclasses.replace(job, variables=known)


def _check_arguments(job: Job, texts: Mapping[str, str]) -> None:
    environment, words = read_arguments(texts[job.arguments_file])
    if (environment, words) != (dict(job.environment), job.arguments):
        raise ExportError(f"{job.arguments_file} does not say what the plan does once a shell has read it")


def _check_place(directory: Path, force: bool, listing: str, load: Callable[[Path], Mapping[str, Any]]) -> None:
    """Refuse a directory that holds anything, but for a whole older export that is to be replaced."""
    if os.path.islink(directory):
        raise FileError(f"'{directory}' is a link, not a directory", hint="choose another directory, or that which it names")
    if not os.path.lexists(directory) or (os.path.isdir(directory) and not os.listdir(directory)):
        return
    older = directory / listing
    if not (os.path.isdir(directory) and older.is_file()):
        raise FileError(f"'{directory}' exists and is not an empty directory", hint="choose another directory")
    try:
        listed = {str(name) for name in load(older).get("files", ())}
    except MoeplanError:
        raise FileError(
            f"'{directory}' is not empty, and its {listing} is no export's", hint="choose another directory"
        ) from None
    if not force:
        raise FileError(
            f"'{directory}' exists and is not an empty directory: it holds an older export",
            hint="choose another directory, or replace it with --force",
        )
    if foreign := sorted(set(os.listdir(directory)) - listed):
        raise FileError(
            f"'{directory}' holds {', '.join(repr(name) for name in foreign[:5])}, which no export wrote",
            hint="move it away, --force replaces exports only; or choose a directory of its own",
        )


def _put(staging: Path, directory: Path) -> None:
    """Move a finished export to its place; the older one is there until the new one is."""
    if not directory.is_dir() or not os.listdir(directory):
        os.replace(staging, directory)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    os.replace(directory, aside)
    try:
        os.replace(staging, directory)
    except BaseException:
        os.replace(aside, directory)
        raise
    shutil.rmtree(aside, ignore_errors=True)
