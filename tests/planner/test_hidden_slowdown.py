"""A slowdown that hides in one collective of a machine shows in its profile, and another schedule is chosen.

The collectives are measured for real on two processes, one of them with a pause inside; kernels are those of a made-up device.
"""

from __future__ import annotations

from typing import Any

import pytest

from moeplan.costmodels.moe.schedules import find_schedule
from moeplan.planner.layers.runs import LayerRun, predict
from moeplan.profiles.measured import measured_profile
from moeplan.profiles.profile import Profile
from moeplan.profiles.samples import Sample
from moeplan.records import from_mapping
from tests.conftest import PLAIN
from tests.profiles.launching import scene
from tests.profiles.synthetic import environment_of, samples_of

COLLECTIVES = {"all_reduce", "all_gather", "reduce_scatter", "all_to_all", "all_to_all_skewed", "send", "overlap", "deepep"}
SLOW_S = 0.2
"""The pause of the worker."""


def real(part: str) -> list[Sample]:
    """Samples of collectives that two processes measured."""
    found = [from_mapping(Sample, each, "worker") for each in scene("two", 2).said[0][part]["samples"]]
    return [s for s in found if s.op in COLLECTIVES - {"overlap", "deepep"}]


def profile(slow: str, part: str) -> Profile:
    """The profile of a machine one of whose collectives is slow."""
    kernels = [s for s in samples_of(PLAIN, scale="cpu") if s.op not in COLLECTIVES]
    others = [s for s in real("all") if s.op != slow]
    here = environment_of(PLAIN, ranks=2, per_node=2, device="nobody's device", backend="cpu")
    return measured_profile([*kernels, *others, *(s for s in real(part) if s.op == slow)], here)


def chosen(machine: Profile) -> str:
    """The quicker of two ways to run a layer that two ranks share: by all-to-alls, or by gather and reduce-scatter."""
    sizes: dict[str, Any] = {"tokens": 128, "hidden": 256, "expert_hidden": 64, "experts": 4, "topk": 2, "gemms": 3}
    took = {}
    for name in ("s1", "hierarchical"):
        assert find_schedule(name).name == name
        run = LayerRun(id=name, schedule=name, direction="forward", degree=1, mp=2, esp=2, ep=1, measured_layer_s=1.0, **sizes)
        took[name] = predict(run, machine).makespan_s
    return min(took, key=lambda name: took[name])


@pytest.mark.parametrize(
    ("slow", "part", "schedule"),
    [("all_to_all", "slowed", "hierarchical"), ("reduce_scatter", "slow scatter", "s1")],
)
def test_the_slow_collective_is_seen_and_avoided(slow: str, part: str, schedule: str) -> None:
    machine = profile(slow, part)
    assert float(machine.collective_s(slow, 65536.0, 2)) >= SLOW_S
    others = {"all_to_all", "all_gather", "reduce_scatter"} - {slow}
    assert all(float(machine.collective_s(op, 65536.0, 2)) < SLOW_S for op in others)
    assert chosen(machine) == schedule
