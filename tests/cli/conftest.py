"""Running the command line in this process, as its entry point does."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from moeplan import cli

SMALL = {"model": "mixtral-8x7b-4l-proxy", "cluster": "h100x8", "global_batch": 16, "seq_len": 4096}
"""A question that is answered in a moment."""


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """What stands on stderr, without click's lines on usage."""
        lines = [line for line in self.err.splitlines() if not line.startswith(("Usage:", "Try '", "note:")) and line.strip()]
        return "\n".join(lines)


Moeplan = Callable[..., Outcome]


def question(**changes: Any) -> list[str]:
    """The options of the small question, with some changed, added, or left out (None)."""
    values = {**SMALL, **changes}
    return [part for name, value in values.items() if value is not None for part in (f"--{name.replace('_', '-')}", str(value))]


@pytest.fixture
def moeplan(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Moeplan:
    """Run `moeplan` with arguments; whatever is not a clean end fails the test by itself."""

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["moeplan", *map(str, arguments)])
        capsys.readouterr()
        code = cli.main()
        return Outcome(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def plan_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan of the small question."""
    from moeplan.costmodels.model_catalog import load_model
    from moeplan.planner.solve import solve
    from tests.planner import tiny

    path = tmp_path_factory.mktemp("plans") / "plan.yaml"
    solve(tiny.problem(load_model(str(SMALL["model"])), "h100x8", batch=16)).plans[0].save(path)
    return path
