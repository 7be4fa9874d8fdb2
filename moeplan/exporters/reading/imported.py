"""What was read from a launch script: model, workload and layout, and all that was not understood or had to be assumed.

`read_file` reads one; `plan_data` makes a plan file of it. A layout that breaks a rule of Megatron is read all the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moeplan._version import VERSION
from moeplan.costmodels.layout import Layout
from moeplan.costmodels.model import Model
from moeplan.costmodels.workload import Workload
from moeplan.errors import FileError, MoeplanError
from moeplan.exporters.neutral import export_of
from moeplan.exporters.reading import megatron_deepspeed
from moeplan.exporters.reading.dialect import Spoken
from moeplan.exporters.reading.flags import Flags, Given, catalog, split_words
from moeplan.exporters.reading.megatron_architecture import read_model
from moeplan.exporters.reading.megatron_layout import read_global_batch, read_layout, read_sequence, read_workload
from moeplan.exporters.reading.sources import Source, read_source
from moeplan.exporters.reading.words import shown
from moeplan.planner.plan import SCHEMA
from moeplan.planner.plan_data import cluster_data, layout_data, located, model_data, workload_data
from moeplan.planner.problem import Problem
from moeplan.profiles.hardware import Cluster
from moeplan.profiles.nominal import nominal
from moeplan.records import dump_yaml


@dataclass(frozen=True, kw_only=True, slots=True)
class Imported:
    """A training run as its launch script describes it."""

    path: str
    kind: str
    """What kind of file it is: "launch script", "argument file", "export", "log", "YAML file"; of other frameworks than
    Megatron-LM "configuration", "recipe" or "overrides"."""
    framework: str
    """Whose arguments these are, with the version that they were read for."""
    program: str
    """The script or module that is started; empty where the file does not say."""
    model: Model
    workload: Workload
    layout: Layout
    flags: Flags
    """All flags as they were given."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables of the run that libraries read."""
    remarks: tuple[str, ...] = ()
    """What was assumed or is priced as something else."""
    faults: tuple[str, ...] = ()
    """What the framework refuses and the layout cannot say: it was read without."""

    @property
    def world(self) -> int:
        """GPUs of the run."""
        return self.layout.world

    @property
    def defaults(self) -> Mapping[str, str]:
        """Defaults of the framework that the reading rests on, by flag."""
        return self.flags.defaults

    @property
    def unknown(self) -> list[Given]:
        """Flags that the framework's parser does not know and that were not understood otherwise."""
        return [g for g in self.flags.last.values() if not self.flags.knows(g.flag) and g.flag not in self.flags.asked]

    @property
    def passed(self) -> list[Given]:
        """Flags that the parser knows and that change neither model nor layout."""
        if self.kind == "log":
            return []
        return [g for g in self.flags.last.values() if self.flags.knows(g.flag) and g.flag not in self.flags.asked]

    def problem(self, cluster: Cluster) -> Problem:
        """The question whose answer the layout is meant to be."""
        return Problem(model=self.model, profile=nominal(cluster), workload=self.workload, extend_positions=True)

    def to_data(self) -> dict[str, Any]:
        """All of it as plain data."""
        return {
            "file": self.path,
            "kind": self.kind,
            "framework": self.framework,
            "program": self.program,
            "gpus": self.world,
            "model": model_data(self.model),
            "workload": workload_data(self.workload),
            "layout": layout_data(self.layout),
            "environment": dict(self.environment),
            "unknown": [str(g) for g in self.unknown],
            "passed_through": [str(g) for g in self.passed],
            "defaults": dict(self.defaults),
            "remarks": list(self.remarks),
            "faults": list(self.faults),
        }


def read_file(
    path: Path,
    *,
    settings: Mapping[str, str] | None = None,
    positional: Sequence[str] = (),
    add: Sequence[str] = (),
    gpus: int | None = None,
    otherwise_gpus: int | None = None,
    era: str = "latest",
) -> Imported:
    """The run that a file describes.

    `settings` are variables and `positional` the arguments of a script; `add` are further arguments for Megatron, which stand
    last. `gpus` overrides the count that the file gives, `otherwise_gpus` serves where it gives none.
    """
    from moeplan.exporters.reading.frameworks import read_other  # which makes what stands in this module

    path = export_of(path)
    found = read_other(path, settings=settings or {}, positional=positional, add=add, gpus=gpus or otherwise_gpus, era=era)
    if found is not None:
        return found
    source = read_source(path, settings or {}, positional)
    if not source.flags.given:
        raise FileError(f"'{path}' holds no arguments of Megatron-LM")
    more = split_words(add)
    flags = Flags([*source.flags.given, *more.given], [*source.flags.stray, *more.stray], source.flags.dropped)
    remarks = [*source.remarks, *_repeated(flags)]
    world = _world(source, path, gpus, otherwise_gpus, remarks)
    faults: list[str] = []
    framework = f"Megatron-LM {catalog().version}"
    try:
        if megatron_deepspeed.speaks(flags):
            framework = megatron_deepspeed.FRAMEWORK
            flags = Spoken(flags.given, flags.stray, flags.dropped)
            world = megatron_deepspeed.translate(flags, world, source.files, path.parent, remarks, faults)
        model, workload, layout = _read(flags, world or 1, path.stem, era, remarks, faults)
    except MoeplanError:
        _refuse_unresolved(flags, source, path, needs_world=world is None)
        raise
    _refuse_unresolved(flags, source, path, needs_world=world is None)
    for name in flags.dropped:
        how = f"give argument {name} behind --" if name.isdigit() else f"--set {name}=..."
        remarks.append(f"${{{name}}} is not set and taken as empty ({how})")
    if flags.stray:
        remarks.append(f"words that belong to no flag: {' '.join(map(shown, flags.stray[:8]))}")
    return Imported(
        path=str(path),
        kind=source.kind,
        framework=framework,
        program=source.program,
        model=model,
        workload=workload,
        layout=layout,
        flags=flags,
        environment=source.environment,
        remarks=tuple(dict.fromkeys(remarks)),
        faults=tuple(faults),
    )


def _read(
    flags: Flags, world: int, name: str, era: str, remarks: list[str], faults: list[str]
) -> tuple[Model, Workload, Layout]:
    with located("its arguments"):
        seq_len = read_sequence(flags)
        found = read_model(flags, seq_len, name)
        remarks += found.remarks
        layout = read_layout(flags, found.model, world, remarks, faults)
        workload = read_workload(flags, seq_len, read_global_batch(flags, layout.dp, remarks), era, remarks)
        return found.model, workload, layout


def _repeated(flags: Flags) -> list[str]:
    """Remarks on flags that were given with several values: the last one counts, as in Megatron."""
    out = []
    for g in flags.given:
        last = flags.last[g.flag]
        if last.values != g.values:
            lines = f" (line {g.line}, then {last.line})" if g.line and last.line else ""
            out.append(f"{g} is overridden by {last}{lines}")
    return out


def _world(source: Source, path: Path, gpus: int | None, otherwise: int | None, remarks: list[str]) -> int | None:
    """GPUs of the run; None where nothing says them."""
    if gpus is None:
        return source.world or otherwise
    if source.world not in (None, gpus):
        remarks.append(f"the file starts {source.world} processes; --gpus {gpus} is taken")
    return gpus


def _refuse_unresolved(flags: Flags, source: Source, path: Path, *, needs_world: bool) -> None:
    """An error that lists the variables that would be needed and nothing sets."""
    missing = {**flags.unresolved}
    if needs_world:
        missing = {**source.unknown, **missing}
    if missing:
        listed = "; ".join(f"{name} (for {what})" for name, what in missing.items())
        hint = "set them with --set NAME=VALUE" + (", the number of GPUs with --gpus N" if needs_world else "")
        raise FileError(f"'{path}': not known without running it: {listed}", hint=hint)
    if needs_world:
        raise FileError(f"'{path}' does not say on how many GPUs it runs", hint="say it with --gpus N")


def plan_data(imported: Imported, cluster: Cluster) -> dict[str, Any]:
    """A plan file's data: question and layout, unpriced, with where they came from."""
    data = {
        "schema": SCHEMA,
        "moeplan": VERSION,
        "model": model_data(imported.model),
        "cluster": cluster_data(cluster),
        "workload": workload_data(imported.workload),
        "layout": layout_data(imported.layout),
        "provenance": {
            "imported": {
                "file": imported.path,
                "framework": imported.framework,
                "environment": dict(imported.environment),
                "unknown": [str(g) for g in imported.unknown],
                "passed_through": [str(g) for g in imported.passed],
            }
        },
    }
    if imported.remarks:
        data["remarks"] = list(imported.remarks)
    return data


def plan_text(imported: Imported, cluster: Cluster) -> str:
    """Text of the plan file."""
    return dump_yaml(plan_data(imported, cluster))
