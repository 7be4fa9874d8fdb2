"""What every exporter is, and the job that it hands to launchers.

An exporter says a plan in the words of one framework: configuration files, and the command of one process. A launcher starts
that command on every GPU and knows nothing of frameworks. What was written is read back before anybody may use it (`write.py`).
"""

from __future__ import annotations

import re
import shlex
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeplan.costmodels.layout import Layout
from moeplan.costmodels.model import Model
from moeplan.costmodels.workload import Workload
from moeplan.errors import ExportError
from moeplan.planner.plan import Plan

Flag = tuple[str, ...]
"""A flag and its values, each one word of a command line (not yet quoted for a shell)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Variable:
    """A variable of the environment that whoever starts an export sets."""

    name: str
    meaning: str
    """What it is to be, for a message: "a Megatron-LM checkout"."""
    default: str = ""
    """What it is where it is not set, in which $NAME is another variable; empty: it must be set."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """The same process on every GPU of a cluster."""

    name: str
    """Letters, digits and ._+- only."""
    nodes: int
    per_node: int
    """Processes of a node, one a GPU."""
    device: str
    """Name of the GPU in the catalog."""
    vendor: str
    """"nvidia" or "amd"."""
    program: tuple[str, ...]
    """What a process runs, before its arguments; $NAME in a word is one of `variables`, $here the directory of the export."""
    arguments_file: str
    """File of the export that holds environment and arguments, see `arguments_text`."""
    sections: Mapping[str, Sequence[Flag]]
    """Arguments under their headings, taken word for word."""
    environment: Mapping[str, str]
    """Variables that the arguments require."""
    variables: tuple[Variable, ...] = ()
    requirements: tuple[str, ...] = ()
    """Libraries that a node must have, as pip writes them: "transformer-engine>=2.8"."""

    @property
    def world(self) -> int:
        """Processes in all."""
        return self.nodes * self.per_node

    @property
    def arguments(self) -> list[str]:
        """The arguments as words."""
        return [word for flags in self.sections.values() for flag in flags for word in flag]


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """What the files of an export say, read without the plan that they were written from."""

    model: Model
    workload: Workload
    layout: Layout
    world: int


class Exporter(ABC):
    """A framework that plans are written for."""

    name: str
    """Word of `--to`."""
    title: str
    """Name of the framework."""
    versions: tuple[str, ...]
    """Versions that can be written for, oldest first; empty: the target has none."""
    version: str
    """The version that is written for unless another one is asked for."""

    @abstractmethod
    def check(self, plan: Plan, version: str) -> None:
        """Refuse a plan that the framework cannot run, naming the rule; nothing is left out or replaced."""

    @abstractmethod
    def job(self, plan: Plan, version: str) -> Job | None:
        """The job that runs the plan; None for a target that runs nothing."""

    @abstractmethod
    def files(self, plan: Plan, version: str) -> dict[str, str]:
        """Files beside the argument file, by name."""

    @abstractmethod
    def notes(self, plan: Plan, version: str) -> list[str]:
        """What was assumed, for the README."""

    @abstractmethod
    def read(self, directory: Path) -> Reading:
        """What the files in `directory` say."""


def node_size(plan: Plan) -> tuple[int, int]:
    """Nodes and processes of a node; refuses a plan whose ranks are not those of the cluster."""
    cluster = plan.problem.profile.cluster
    nodes, each = cluster.nodes, min(cluster.gpus_per_node, cluster.gpus)
    if nodes * each != plan.layout.world:
        raise ExportError(f"{nodes} nodes of {each} processes are not the {plan.layout.world} ranks of the plan")
    return nodes, each


def job_of(plan: Plan, **how: Any) -> Job:
    """The job of a plan: its name, size and device from the plan, the rest from `how`."""
    nodes, each = node_size(plan)
    device = plan.problem.profile.cluster.device
    name = plain_name(plan.problem.model.name)
    return Job(name=name, nodes=nodes, per_node=each, device=device.name, vendor=device.vendor, **how)


def plain_name(name: str) -> str:
    """A name with nothing in it that a shell or Slurm could misread."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", name)


def arguments_text(job: Job, heading: Sequence[str]) -> str:
    """The argument file: comments, `export` lines, then a line for each flag, quoted for a shell."""
    lines = [f"# {line}" for line in heading]
    lines += ["", "# environment", *(f"export {name}={shlex.quote(value)}" for name, value in job.environment.items())]
    for section, flags in job.sections.items():
        if flags:
            lines += ["", f"# {section}", *(" ".join(map(shlex.quote, flag)) for flag in flags)]
    return "\n".join(lines) + "\n"


def read_arguments(text: str) -> tuple[dict[str, str], list[str]]:
    """Environment and words of an argument file, as a shell reads them."""
    environment: dict[str, str] = {}
    words: list[str] = []
    for line in text.splitlines():
        found = shlex.split(line, comments=True)
        if found[:1] == ["export"]:
            environment |= dict(word.split("=", 1) for word in found[1:])
        else:
            words += found
    return environment, words
