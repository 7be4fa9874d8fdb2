"""What every launcher is: it writes files that start a job on all GPUs, and reads back how many processes they start.

Options are what only the user knows (image, queue). A value that would make an invalid file is refused before anything is
written, and so is a file without a value that it cannot do without.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moeplan.errors import UsageError
from moeplan.exporters.base import Job

RUN_NODE = "run_torchrun.sh"
"""The script that starts the processes of one node, which several launchers use."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """Something that the user says about the machine, with `--set NAME=VALUE`."""

    name: str
    meaning: str
    default: str = ""
    """Empty: what it says is left out."""
    required: bool = False
    pattern: str = r"\S+"
    """Regular expression of valid values."""


@dataclass(frozen=True, slots=True)
class Size:
    """What a launch file asks for."""

    nodes: int
    per_node: int

    def __str__(self) -> str:
        return f"{self.nodes} x {self.per_node} = {self.nodes * self.per_node}"


class Launcher(ABC):
    """A way to start the same process on every GPU."""

    name: str
    """Word of `--launcher`."""
    file: str
    """Name of the file that it writes."""
    start: str
    """How to start it, for the README."""
    needs_node_script: bool
    """Whether it starts `run_torchrun.sh`, which then is written too."""
    needs_variables: bool
    """Whether the variables of the job must be known when the file is written, because nobody's shell is there later."""
    options: tuple[Option, ...]

    @abstractmethod
    def text(self, job: Job, values: Mapping[str, str], files: Mapping[str, str]) -> str:
        """The file. `values`: options; `files`: what a node needs of the export, by name."""

    @abstractmethod
    def size(self, text: str) -> Size:
        """Nodes and processes of a node, read back from the file."""


def option_values(launcher: Launcher, job: Job, given: Mapping[str, str]) -> dict[str, str]:
    """The values of a launcher's options; refuses impossible ones, and names all that it must be told and was not."""
    missing = {v.name: v.meaning for v in job.variables if launcher.needs_variables and not v.default}
    values = {}
    for option in launcher.options:
        value = values[option.name] = given.get(option.name, option.default)
        if not value and option.required:
            missing[option.name] = option.meaning
        if value and not re.fullmatch(option.pattern, value):
            raise UsageError(f"{option.name}='{value}' of launcher '{launcher.name}' is not {option.meaning}")
    if missing:
        raise UsageError(
            f"launcher '{launcher.name}' needs " + " and ".join(f"{name}: {meaning}" for name, meaning in missing.items()),
            hint="give " + " ".join(f"--set {name}=..." for name in missing) + ", as it is on the nodes",
        )
    return values


def number_in(text: str, pattern: str) -> int:
    """The one number that a pattern finds in a text; 0 where it finds none, or several that differ."""
    found = set(re.findall(pattern, text, re.M))
    return int(found.pop()) if len(found) == 1 else 0


def kubernetes_name(name: str, longest: int = 40) -> str:
    """A name as Kubernetes takes it: small letters, digits and dashes, with room for what it appends."""
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:longest].strip("-")
    return plain if plain[:1].isalpha() else f"job-{plain}".strip("-")


def quoted_program(words: Sequence[str]) -> str:
    """Words of a program for bash: variables are replaced, all else is taken as it stands."""
    return " ".join('"' + re.sub(r'([`"\\])', r"\\\1", word) + '"' for word in words)
