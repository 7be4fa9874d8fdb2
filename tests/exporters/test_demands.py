"""Demands of targets are documented word for word, and every target is listed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from moeplan.cli.export import TARGETS
from moeplan.exporters import deepspeed_config, megatron_bridge, torchtitan_demands
from moeplan.exporters.demands import Demand
from moeplan.exporters.targets import EXPORTERS

PAGE = (Path(__file__).parents[2] / "docs" / "export-targets.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("title", "demands"),
    [
        ("Megatron-Bridge", megatron_bridge.DEMANDS),
        ("DeepSpeed", deepspeed_config.DEMANDS),
        ("torchtitan", torchtitan_demands.DEMANDS),
    ],
)
def test_the_page_has_them(title: str, demands: Sequence[Demand]) -> None:
    part = PAGE.split(f"## {title}\n")[1].split("\n## ")[0]
    rows = [line for line in part.splitlines() if line.startswith("| `")]
    assert rows == [f"| `{d.name}` | {d.demands} |" for d in demands]


def test_targets_of_the_command_line() -> None:
    assert tuple(known.name for known in EXPORTERS) == TARGETS
    for known in EXPORTERS:
        assert all(version in PAGE for version in known.versions) or known.name == "megatron"
