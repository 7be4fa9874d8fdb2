"""Help and plain imports load none of the heavy libraries; solving loads no torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

from moeplan.cli import COMMANDS

HEAVY = ("numpy", "torch", "pulp", "scipy", "highspy")


def loaded(code: str) -> set[str]:
    """Top-level modules in a fresh interpreter after `code`."""
    script = f"import sys\n{code}\nprint('\\n' + ' '.join({{m.split('.')[0] for m in sys.modules}}))"
    end = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(end.stdout.splitlines()[-1].split())


def program(*arguments: str) -> str:
    return f"sys.argv = {['moeplan', *arguments]!r}\nfrom moeplan.cli import main\nassert main() == 0"


@pytest.mark.parametrize("arguments", [("--help",), ("--version",), *((name, "--help") for name in COMMANDS)], ids=" ".join)
def test_help_is_light(arguments: tuple[str, ...]) -> None:
    assert not loaded(program(*arguments)) & set(HEAVY)


def test_help_overview_needs_no_yaml_or_rich() -> None:
    assert not loaded(program("--help")) & {"yaml", "rich"}


def test_import_is_light() -> None:
    assert not loaded("import moeplan\nmoeplan.__version__\ndir(moeplan)") & {*HEAVY, "yaml", "click", "rich"}


def test_solving_needs_neither_torch_nor_a_milp_solver() -> None:
    question = "--model mixtral-8x7b-4l-proxy --cluster h100x8 --global-batch 16 --seq-len 4096 --json"
    assert not loaded(program("solve", *question.split())) & {"torch", "pulp", "scipy", "highspy"}
