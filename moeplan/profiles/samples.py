"""Raw measurements of a machine, as lines of a file beside the profile that they gave.

`profile.samples.jsonl` belongs to `profile.yaml`: its first line is the `Environment`, each further one a `Sample`, written as
soon as it is measured, so that whatever ends a run leaves what it had and a later one can go on. Units: seconds, bytes. A last
line that was cut short is left out; any other line that cannot be read is refused with its number.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moeplan.errors import FileError, SchemaError
from moeplan.records import check_schema, from_mapping, read_text, save_text, to_mapping

SCHEMA = "moeplan.samples/1"


@dataclass(frozen=True, kw_only=True, slots=True)
class Environment:
    """What was measured, and with what."""

    schema: str = SCHEMA
    moeplan: str
    """Version that measured."""
    torch: str
    backend: str
    """"cuda", "rocm" or "cpu"."""
    communication: str
    """Library of the collectives with its version: "nccl 2.29.2", "gloo"; empty: a single process."""
    device: str
    """Name of the device as its driver says it."""
    memory_bytes: float
    """Memory of one device; on CPUs that of the host over its ranks."""
    processors: int
    """Streaming multiprocessors, compute units, or threads of a rank on a CPU."""
    capability: str = ""
    """Compute capability, like "9.0", or the architecture, like "gfx942"."""
    host: str = "x86"
    """Kind of the host's processor: "x86" or "grace"."""
    host_memory_bytes: float = 0.0
    ranks: int = 1
    per_node: int = 1
    """Ranks of a node."""
    cluster: str = ""
    """What the user says it is (shorthand or file); empty: to be found from the device."""
    when: str = ""
    """Day and time at which it began, ISO 8601."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One operation at one size."""

    op: str
    """Like "gemm", "all_gather"."""
    key: str
    """Variant: precision and direction, head size, kind of stream."""
    sizes: Mapping[str, float] = field(default_factory=dict)
    """Arguments of the curve by name, and others that tell the shape."""
    group: str = ""
    """Of a collective: ranks / scale-up domains that they span, like "16/2"."""
    seconds: float
    """Median of the repeats that are no outliers."""
    spread: float
    """Half-width of the 95 % confidence interval of the median, over the median."""
    times_s: tuple[float, ...] = ()
    """Repeats, in their order."""
    outliers: int = 0
    """Repeats that were left out."""
    how: str = ""
    """Implementation that ran."""
    clock_mhz: float | None = None
    temperature_c: float | None = None

    @property
    def case(self) -> tuple[Any, ...]:
        """What was measured; two samples of one case are repeats."""
        return (self.op, self.key, tuple(sorted(self.sizes.items())), self.group)


def samples_path(profile: Path) -> Path:
    """The file of samples that belongs to a profile file."""
    return profile.with_suffix(".samples.jsonl")


class SampleLog:
    """A file of samples that grows by one line a measurement."""

    def __init__(self, path: Path, environment: Environment, *, resume: bool = False) -> None:
        """Begin the file anew, or go on behind what it holds."""
        self.path = path
        if resume:
            text = read_text(path, "samples")
            if text and not text.endswith("\n"):  # its writer was stopped in the middle of a line
                save_text(path, text[: text.rfind("\n") + 1], "samples")
        else:
            self._write("w", _line(environment))

    def add(self, sample: Sample) -> None:
        """Append a sample; it is on disk when this returns."""
        self._write("a", _line(sample))

    def _write(self, mode: str, text: str) -> None:
        try:
            with self.path.open(mode, encoding="utf-8") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise FileError(f"cannot write samples '{self.path}': {error.strerror}") from None


def _line(record: Any) -> str:
    return json.dumps({**to_mapping(record), **({"schema": SCHEMA} if isinstance(record, Environment) else {})}) + "\n"


def load_samples(path: Path) -> tuple[Environment, list[Sample]]:
    """The environment and the samples of a file."""
    where = f"samples '{path}'"
    lines = read_text(path, "samples").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()  # its writer was stopped in the middle of it
    data = []
    for number, line in enumerate(lines, 1):
        try:
            data.append(json.loads(line))
        except ValueError:
            raise SchemaError(f"{where}, line {number}: not JSON", hint="remove the line, or measure anew") from None
    head = check_schema(data[0] if data else None, SCHEMA, where, "file of samples", version="", remedy="measure anew")
    environment = from_mapping(Environment, head, f"{where}, line 1")
    return environment, [from_mapping(Sample, each, f"{where}, line {n}") for n, each in enumerate(data[1:], 2)]
