"""How far a predicted step time may be off.

The interval is meant to hold the measured step time in 80 % of cases. Its edges are the 10th and 90th percentile of measured
over predicted time on published runs, by regime (`catalog/spread.yaml`, written by benchmarks/fit_spread.py). Two releases of
the same software differ by about 5 % on the same run, so it is never narrower.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeplan.costmodels.model import Model
from moeplan.profiles.profile import Profile
from moeplan.records import from_mapping, load_yaml


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """Factors on a predicted time."""

    low: float
    high: float
    runs: int
    """Published runs behind the two factors."""


@functools.cache
def _spreads() -> dict[str, Spread]:
    data = load_yaml(Path(__file__).parent / "catalog" / "spread.yaml", "catalog file")
    return {name: from_mapping(Spread, values, f"spread.yaml, {name}") for name, values in data["regimes"].items()}


def regime(model: Model, profile: Profile) -> str:
    """Which spread applies: dense models or mixtures of experts, on measured devices or on scaled ones."""
    kind = "dense" if model.moe is None else "moe"
    origin = profile.origins.get("gemm/bf16")
    return kind if origin is None or origin.measured else f"{kind}, scaled device"


def interval(model: Model, profile: Profile, step_s: Any) -> tuple[Any, Any]:
    """Low and high end of the step time, numbers or arrays."""
    spread = _spreads()[regime(model, profile)]
    return step_s * spread.low, step_s * spread.high
