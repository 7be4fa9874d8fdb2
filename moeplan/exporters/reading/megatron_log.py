"""The arguments that Megatron-LM prints into the log of a run, turned back into flags.

Between two lines of dashes with the word "arguments" every argument stands with its value, as in "  seq_length .. 4096", after
Megatron's own checks and changes. Logs of several ranks or days may repeat the dump; the last one counts.
"""

from __future__ import annotations

import re

from moeplan.errors import FileError
from moeplan.exporters.reading.flags import Flags, Given, catalog

_BEGIN = re.compile(r"-{8,} arguments -{8,}")
_END = re.compile(r"-{8,} end of arguments -{8,}")
_ROW = re.compile(r"(?:^|\s)(\w+) \.{1,60} (.*?)\s*$")
_ENUM = re.compile(r"<\w+\.(\w+): [^>]*>|\b(?:AttnBackend|CudaGraphModule|InferenceCudaGraphScope)\.(\w+)")
_TYPES = {"torch.float32": "fp32", "torch.bfloat16": "bf16", "torch.float16": "fp16", "torch.uint8": "fp8"}


def is_log(text: str) -> bool:
    """Whether a text holds an argument dump."""
    return _BEGIN.search(text) is not None


def read_log(text: str, where: str) -> tuple[Flags, int | None]:
    """The flags of the last argument dump of a log, and the processes of its job."""
    lines = text.splitlines()
    starts = [i for i, line in enumerate(lines) if _BEGIN.search(line)]
    rows: dict[str, tuple[str, int]] = {}
    for number, line in enumerate(lines[starts[-1] + 1 :], starts[-1] + 2):
        if _END.search(line):
            break
        if match := _ROW.search(line):
            rows[match[1]] = match[2], number
    else:
        raise FileError(f"{where}: the argument dump that starts in line {starts[-1] + 1} does not end")
    if len(rows) < 20:
        raise FileError(f"{where}: the dump in line {starts[-1] + 1} holds {len(rows)} arguments; Megatron's has hundreds")
    if "deepspeed_config" in rows:
        raise FileError(f"{where}: the dump is one of Megatron-DeepSpeed", hint="give the script that starts the run")
    world = rows.get("world_size", ("", 0))[0]
    return Flags([g for name, (value, line) in rows.items() if (g := _flag(name, value, line))]), (
        int(world) if world.isdigit() else None
    )


def _flag(name: str, value: str, line: int) -> Given | None:
    """The flag behind an argument; None where it was not given, or the parser has none."""
    known = catalog()
    if value in ("True", "False"):
        flag = known.dumped_false.get(name) if value == "False" else "--" + name.replace("_", "-")
        return Given(flag, (), line) if flag is not None and known.takes.get(flag) == "switch" else None
    flag = known.dumped.get(name, "--" + name.replace("_", "-"))
    kind = known.takes.get(flag)
    if value in ("None", "[]", "") or kind in (None, "switch"):
        return None
    value = _TYPES.get(value, _ENUM.sub(lambda m: m[1] or m[2], value))
    if kind == "list":
        return Given(flag, tuple(w.strip("'\"") for w in re.split(r",\s*", value.strip("[]()"))), line)
    return Given(flag, (value,), line)
