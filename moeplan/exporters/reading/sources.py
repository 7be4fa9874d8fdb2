"""Files that say how a training run is started, each kind brought to the same form: flags, processes, environment.

Read are launch scripts (bash), argument files, directories that `moeplan export` wrote, argument dumps in logs of
Megatron-LM, and YAML files with `MODEL_ARGS`. Nothing in them is run.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moeplan.errors import FileError, SchemaError
from moeplan.exporters.reading.flags import Flags, Given, catalog, split_words, with_lines
from moeplan.exporters.reading.launch import Launch, launched, slurm_request, slurm_variables
from moeplan.exporters.reading.megatron_log import is_log, read_log
from moeplan.exporters.reading.shell import Shell, shell_of
from moeplan.exporters.reading.words import Expander, Variables, mark, shown
from moeplan.records import parse_yaml, read_text

MOST_BYTES = 5_000_000
"""Larger files are no launch scripts."""
ARGUMENT_FILE = "megatron.args"
"""Name of the argument file in a directory that an export wrote."""
_VARIABLES = ("CUDA_", "NCCL_", "NVTE_", "PYTORCH_", "TORCH_", "NVSHMEM_", "HSA_", "RCCL_", "GLOO_", "UCX_")
"""Variables that change how a run goes; others are the script's own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """How a run is started."""

    kind: str
    """"launch script", "argument file", "export", "log" or "YAML file"."""
    flags: Flags
    world: int | None = None
    """Processes; None where they are not known."""
    unknown: Mapping[str, str] = field(default_factory=dict)
    """What hides the number of processes, with what it is needed for."""
    program: str = ""
    """The script or module that is started."""
    environment: Mapping[str, str] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    complete: bool = True
    """Whether only the flags of the user are there; a dump lists all arguments that exist."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Texts of files that the script writes, by their names."""


def read_source(path: Path, settings: Mapping[str, str], positional: Sequence[str]) -> Source:
    """The start of a run that a file or a directory describes; `settings` are variables, `positional` arguments of a script."""
    if path.is_dir():
        if not (path / ARGUMENT_FILE).is_file():
            raise FileError(f"directory '{path}' holds no {ARGUMENT_FILE} of an export", hint="give the launch script itself")
        return _export(path)
    text = _text(path)
    where = f"'{path}'"
    if is_log(text):
        flags, world = read_log(text, where)
        return Source(kind="log", flags=flags, world=world, complete=False)
    if path.suffix.lower() in (".yaml", ".yml"):
        return _yaml(text, where, settings)
    if path.suffix.lower() == ".py":
        raise FileError(f"{where} is Python, no launch script", hint="give the script that starts the run")
    if path.suffix.lower() == ".json" or text.lstrip().startswith("{"):
        raise FileError(f"{where} is JSON, no launch script of Megatron-LM", hint="give the script that starts the run")
    if _is_argument_file(text):
        return _arguments(text, where, settings)
    if ARGUMENT_FILE in text and (path.parent / ARGUMENT_FILE).is_file():
        return _export(path.parent, path)
    return _script(text, path, settings, positional)


def _text(path: Path) -> str:
    """The text of a file that can be a launch script."""
    try:
        size = path.stat().st_size
    except (OSError, ValueError):
        size = 0
    if size > MOST_BYTES:
        raise FileError(
            f"'{path}' has {size} bytes, more than the {MOST_BYTES} of a launch script",
            hint="of a log keep the part with the arguments",
        )
    text = read_text(path, "launch script")
    if "\0" in text:
        raise FileError(f"'{path}' is binary, no launch script")
    if not text.strip():
        raise FileError(f"'{path}' is empty")
    return text


def _is_argument_file(text: str) -> bool:
    """Whether a flag comes before anything else but comments and `export` lines; no script begins so."""
    lines = (line.strip() for line in text.splitlines())
    first = next((line for line in lines if line and not line.startswith(("#", "export "))), "")
    return first.startswith("--")


def _arguments(text: str, where: str, settings: Mapping[str, str]) -> Source:
    """An argument file: flags with their values as a shell would quote them, and `export` lines."""
    words: list[str] = []
    environment: dict[str, str] = {}
    expander = Expander(Variables(values=dict(settings)), lambda command: mark(f"$({command})"))
    for number, line in enumerate(text.splitlines(), 1):
        try:
            found = shlex.split(line.rstrip("\\"), comments=True)
        except ValueError as error:
            raise SchemaError(f"{where}, line {number}: {str(error).lower()}") from None
        if found[:1] == ["export"]:
            environment |= dict(w.split("=", 1) for w in found[1:] if "=" in w)
        else:
            words += [expander.quoted(word) if "$" in word else word for word in found]
    return Source(kind="argument file", flags=with_lines(split_words(words), text), environment=environment)


def _export(folder: Path, script: Path | None = None) -> Source:
    """A directory that `moeplan export` wrote: its argument file, and the processes that its launch script starts."""
    text = _text(folder / ARGUMENT_FILE)
    source = _arguments(text, f"'{folder / ARGUMENT_FILE}'", {})
    scripts = (
        [script] if script is not None else sorted(folder.glob("*.sh"), key=lambda p: (p.name != "run_torchrun.sh", p.name))
    )
    for candidate in scripts:
        launches = read_launches(_text(candidate), candidate, {}, ())[1]
        if launches:
            found = launches[-1]
            return Source(
                kind="export",
                flags=source.flags,
                world=found.world,
                unknown=found.unknown,
                program=found.program,
                environment=source.environment,
                remarks=found.remarks,
            )
    return Source(kind="export", flags=source.flags, environment=source.environment)


def _yaml(text: str, where: str, settings: Mapping[str, str]) -> Source:
    """A YAML file with the flags as a mapping under MODEL_ARGS, as Megatron's own test recipes have them."""
    data = parse_yaml(text, where)
    listed: Any = data.get("MODEL_ARGS") if isinstance(data, Mapping) else None
    if not isinstance(listed, Mapping):
        raise FileError(f"{where} has no mapping MODEL_ARGS", hint="give the script that starts the run")
    variables = data.get("ENV_VARS") or {}
    environment = {str(k): str(v) for k, v in variables.items()} if isinstance(variables, Mapping) else {}
    expander = Expander(Variables(values={**environment, **settings}), lambda command: mark(f"$({command})"))
    given = []
    for flag, value in listed.items():
        if value is True:
            given.append(Given(str(flag)))
        elif value not in (False, None):
            filled = expander.quoted(str(value))
            given.append(Given(str(flag), tuple(filled.split()) if catalog().takes.get(str(flag)) == "list" else (filled,)))
    return Source(kind="YAML file", flags=with_lines(Flags(given), text), environment=environment)


def _script(text: str, path: Path, settings: Mapping[str, str], positional: Sequence[str]) -> Source:
    shell, launches = read_launches(text, path, settings, positional)
    training = [x for x in launches if _weight(x)]
    if not training:
        raise FileError(f"'{path}' starts no training with Megatron's arguments", hint=_why_none(shell, launches, text))
    best = max(_weight(x) for x in training)
    chosen = [x for x in training if _weight(x) == best][-1]
    remarks = [*shell.remarks, *chosen.remarks]
    others = sorted({x.line for x in training} - {chosen.line})
    if others:
        remarks.append(f"{len(training)} training commands: that of line {chosen.line} is read, not that of {others}")
    elif len({x.words for x in training}) > 1:
        remarks.append(f"line {chosen.line} starts {len(training)} runs with other arguments each: the last one is read")
    return Source(
        kind="launch script",
        flags=with_lines(split_words(chosen.words), text),
        world=chosen.world,
        unknown=chosen.unknown,
        program=chosen.program,
        environment={k: shown(v) for k, v in chosen.environment.items() if k.startswith(_VARIABLES)},
        remarks=tuple(remarks),
        files=shell.files,
    )


def read_launches(text: str, path: Path, settings: Mapping[str, str], positional: Sequence[str]) -> tuple[Shell, list[Launch]]:
    """What a script starts."""
    request = slurm_request(text)
    shell = shell_of(f"'{path}'", path, {**settings}, positional)
    for name, value in slurm_variables(request).items():
        shell.variables.values.setdefault(name, value)
        shell.variables.exported.add(name)
    shell.read(text)
    return shell, [launch for started in shell.started if (launch := launched(started, request)) is not None]


def _weight(launch: Launch) -> int:
    """How many of Megatron's flags a command has; 0 if too few for a training command."""
    takes = catalog().takes
    count = sum(word.partition("=")[0] in takes for word in launch.words)
    names = {word.partition("=")[0] for word in launch.words}
    return count if names & {"--micro-batch-size", "--num-layers", "--hidden-size", "--hybrid-layer-pattern"} else 0


def _why_none(shell: Shell, launches: Sequence[Launch], text: str) -> str:
    if re.search(r"\b(?:model|trainer|train)\.\w+=", text):
        return "arguments like model.tensor_model_parallel_size=8 are those of NeMo or Megatron-Bridge, not of Megatron-LM"
    if launches:
        programs = ", ".join(dict.fromkeys(x.program for x in launches))
        return f"started are {programs}; flags like --num-layers and --micro-batch-size are missing"
    if shell.remarks:
        return f"not followed: {'; '.join(shell.remarks[:3])}"
    return "looked for torchrun, python or deepspeed with flags like --num-layers"
