"""Who judges what was read: bash itself, with launchers that only record, and Megatron's own parser."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.megatron_session import session

SAMPLES = Path(__file__).parent / "samples"
_RECORD = '#!/usr/bin/env bash\nprintf \'%s\\0\' "$@" > "$RECORD"\n'
_THROUGH = """#!/usr/bin/env bash
while [ $# -gt 0 ]; do
  case "$1" in sh|bash|torchrun|python|python3) exec "$@" ;; esac
  shift
done
"""


def recorded(script: Path, folder: Path, arguments: Sequence[str] = (), **variables: str) -> list[str]:
    """The arguments with which bash starts the training of a script."""
    stubs = folder / "stubs"
    stubs.mkdir()
    texts = dict.fromkeys(("torchrun", "deepspeed", "python", "python3"), _RECORD) | dict.fromkeys(("srun", "mpirun"), _THROUGH)
    for name, text in {**texts, "scontrol": "#!/bin/sh\necho node1\n"}.items():
        (stubs / name).write_text(text)
        (stubs / name).chmod(0o755)
    record = folder / "record"
    kept = {k: v for k, v in os.environ.items() if k in ("HOME", "LANG", "TMPDIR")}
    environment = {**kept, "PATH": f"{stubs}:{os.environ['PATH']}", "RECORD": str(record), **variables}
    subprocess.run(["bash", str(script), *arguments], env=environment, cwd=folder, capture_output=True, timeout=60, check=False)
    words = record.read_text().split("\0")[:-1]
    return words[next(i for i, word in enumerate(words) if word.endswith(".py")) + 1 :]


def namespace(arguments: Sequence[str], world: int, environment: Mapping[str, str]) -> tuple[Any, str]:
    """What Megatron's parser makes of arguments after its own checks, and how it prints that into a log."""
    import contextlib
    import io
    import sys
    from unittest import mock

    with session(world, environment, (9, 0), "2.14.0") as megatron:
        with mock.patch.object(sys, "argv", ["pretrain_gpt.py", *arguments]):
            args = megatron.arguments.parse_args()
        megatron.arguments.validate_args(args, {})
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), mock.patch("megatron.training.utils.is_rank0", lambda: True):
            megatron.arguments._print_args("arguments", args)
        return args, printed.getvalue()
