"""Writing an elastic plan: each argument file is read back and compared with its plan before the directory appears.

All files or none, as for the export of one plan (`moeplan.exporters.write`).
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path

from moeplan.errors import ExportError, UnknownNameError, UsageError
from moeplan.exporters.base import Job, Reading, Variable, read_arguments
from moeplan.exporters.elastic import arguments
from moeplan.exporters.elastic.data import ELASTIC, elastic_data, elastic_text, load_elastic
from moeplan.exporters.elastic.launch import ENTRY, ElasticPyTorchJob, ElasticSlurm, ElasticTorchrun
from moeplan.exporters.elastic.readme import SURPLUS, readme_text
from moeplan.exporters.elastic.rules import check_elastic, gpus_per_node
from moeplan.exporters.elastic.torchft import TorchFt, groups_of
from moeplan.exporters.launchers.base import RUN_NODE, Launcher, Option, option_values
from moeplan.exporters.megatron import MEGATRON_CORE
from moeplan.exporters.preflight import PREFLIGHT, preflight_text
from moeplan.exporters.reading.imported import read_file
from moeplan.exporters.readme import README
from moeplan.exporters.write import MEGATRON, check_launch, check_reading, check_settings, with_settings, write_directory
from moeplan.planner.elastic.elastic_plan import CountPlan, ElasticPlan

LAUNCHERS = ("torchrun", "slurm", "pytorchjob", "torchft")
"""Launchers that start any number of nodes."""
USUAL = ("torchrun", "slurm")
"""Those that are written where none is named."""
OPTIONS = (
    Option(name="surplus", meaning=f"one of {', '.join(SURPLUS)}", default="idle", pattern="|".join(SURPLUS)),
    Option(name="async_strategy", meaning="mcore or nvrx", default="mcore", pattern="mcore|nvrx"),
    Option(name="local_directory", meaning="an absolute path on every node", default="/tmp/checkpoints", pattern=r"/[\w./-]+"),
)
"""What is decided for the whole export."""
_RESILIENCY = "nvidia-resiliency-ext"


def write_elastic(
    elastic: ElasticPlan,
    out: Path,
    *,
    launchers: Sequence[str] | None = None,
    settings: Mapping[str, str] | None = None,
    version: str = MEGATRON_CORE,
    force: bool = False,
) -> list[Path]:
    """Write the files of an elastic plan for Megatron-LM into a new directory, all or none; returns their paths.

    `launchers`: names, None for the usual ones. `settings`: `OPTIONS`, options of launchers, variables of the job.
    `version`: of megatron-core. `force`: replace an older export of an elastic plan.
    """
    texts = compose(elastic, launchers, settings or {}, version)
    check = functools.partial(_check, elastic)
    write_directory(texts, out, check, force=force, listing=ELASTIC, load=load_elastic)
    return [out / name for name in texts]


def compose(
    elastic: ElasticPlan, names: Sequence[str] | None, settings: Mapping[str, str], version: str = MEGATRON_CORE
) -> dict[str, str]:
    """The texts of an export by name; each launch file is taken apart again and must start what is planned."""
    chosen = _values({option.name: settings.get(option.name, option.default) for option in OPTIONS})
    check_elastic(elastic, chosen)
    given = {name: value for name, value in settings.items() if name not in chosen}
    known = _launchers(elastic, USUAL if names is None else names)
    jobs = [_job(elastic, count, version, chosen, known, given) for count in elastic.counts]
    needed = tuple(dict.fromkeys(need for job in jobs for need in job.requirements))
    jobs = [dataclasses.replace(job, requirements=needed) for job in jobs]
    texts = {job.arguments_file: arguments.text(job, count, version) for job, count in zip(jobs, elastic.counts, strict=True)}
    texts[ENTRY] = files("moeplan.exporters.elastic").joinpath("entry_script.py").read_text(encoding="utf-8")
    texts[PREFLIGHT] = preflight_text()
    listed = [ELASTIC, *texts, *(one.file for one in known), README]
    texts[ELASTIC] = elastic_text(elastic_data(elastic, jobs, chosen, version, listed))
    for one in known:
        on_nodes = {name: text for name, text in texts.items() if name not in {o.file for o in known} - {RUN_NODE}}
        texts[one.file] = one.text(jobs[-1], option_values(one, jobs[-1], given), on_nodes)
        started = elastic.counts[-1].uses if one.name == "torchft" else jobs[-1].nodes  # it has no layout with spares
        check_launch(one, dataclasses.replace(jobs[-1], nodes=started), texts[one.file], on_nodes)
    texts[README] = readme_text(elastic, jobs, known, chosen)
    return {name: texts[name] for name in listed}


def _values(given: dict[str, str]) -> dict[str, str]:
    """The values of `OPTIONS`; refuses impossible ones."""
    for option in OPTIONS:
        if not re.fullmatch(option.pattern, given[option.name]):
            raise UsageError(f"{option.name}='{given[option.name]}' is not {option.meaning}")
    return given


def _launchers(elastic: ElasticPlan, names: Sequence[str]) -> list[Launcher]:
    """Launchers in the order that their files need, with those that others start."""
    known: list[Launcher] = []
    least = elastic.counts[0].nodes
    for name in dict.fromkeys(names):
        if name not in LAUNCHERS:
            raise UnknownNameError("launcher of elastic plans", name, LAUNCHERS)
        if name == "torchft":
            known.append(TorchFt(groups_of(elastic)))
        elif name == "pytorchjob":
            known.append(ElasticPyTorchJob(least))
        elif name == "slurm":
            known.append(ElasticSlurm(least))
    if "torchrun" in names or any(one.needs_node_script for one in known):
        known.insert(0, ElasticTorchrun(least))
    return known


def _job(
    elastic: ElasticPlan,
    count: CountPlan,
    version: str,
    chosen: Mapping[str, str],
    known: Sequence[Launcher],
    given: Mapping[str, str],
) -> Job:
    """The job of a count: that of its plan, started by way of the entry script."""
    MEGATRON.check(count.plan, version)
    job, each = MEGATRON.job(count.plan, version), gpus_per_node(count)
    checkpoints = Variable(name="CHECKPOINTS", meaning="a directory for checkpoints that all nodes share")
    resilient = (
        elastic.local_saves
        or (count.saving.asynchronous and chosen["async_strategy"] == "nvrx")
        or chosen["surplus"] == "reserve"
    )
    job = dataclasses.replace(
        job,
        nodes=count.nodes,
        program=(f"$here/{ENTRY}",),
        arguments_file=arguments.arguments_file(count),
        sections=arguments.sections(elastic, count, version, chosen, each),
        environment=arguments.environment(elastic, count),
        variables=(*job.variables, checkpoints),
        requirements=(*job.requirements, *((_RESILIENCY,) if resilient else ())),
    )
    check_settings(job, known, given)
    return with_settings(job, given)


def _check(elastic: ElasticPlan, directory: Path) -> None:
    """Compare what the written files say with the plan of every count."""
    data = load_elastic(directory / ELASTIC)
    for count, said in zip(elastic.counts, data["counts"], strict=True):
        path, world = directory / said["arguments"], said["uses"] * data["gpus_per_node"]
        found = read_file(path, gpus=world)
        check_reading(count.plan, Reading(model=found.model, workload=found.workload, layout=found.layout, world=found.world))
        if read_arguments(path.read_text(encoding="utf-8")) != (said["environment"], said["args"]):
            raise ExportError(f"{path.name} does not say what the plan does once a shell has read it")
