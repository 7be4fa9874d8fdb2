"""What the search prunes by is never above a price, on tiny models and on published ones."""

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.costmodels.layout import Layout, Layouts
from moeplan.costmodels.memory import least_state_bytes
from moeplan.costmodels.model_catalog import load_model
from moeplan.costmodels.price import Pricing
from moeplan.planner import space
from moeplan.planner.bounds import least_step_seconds
from moeplan.planner.problem import Problem
from tests.planner import brute, tiny

PUBLISHED = [
    ("deepseek-v3", "h100x256", {"batch": 2048, "precision": "fp8-cs"}),
    ("deepseek-v3", "gb200x72", {"batch": 576, "precision": "fp8-mx", "era": "latest", "imbalance": 1.3}),
    ("mixtral-8x7b", "a100x64", {"batch": 256, "era": "te-2024"}),
    ("qwen3-235b-a22b", "b200x128", {"batch": 1024, "precision": "fp8-mx", "era": "latest"}),
    ("nemotron-3-nano-30b-a3b", "h200x32", {"batch": 96, "capacity_factor": 1.5}),
    ("gpt-oss-20b", "mi300xx16", {"batch": 64, "era": "te-2024"}),
    ("llama3.1-405b", "h100x512", {"batch": 256, "seq": 8192, "gradient_bytes": 2}),
    ("llama-4-scout", "gb300x144", {"batch": 144, "seq": 32768, "era": "latest"}),
    ("glm-4.5-air", "h20x128", {"batch": 512, "moment_bytes": 2}),
]


def random_layout(problem: Problem, pick: random.Random) -> Layout | None:
    """A layout that the framework takes, None where the dice fall badly."""
    world, batch, model = problem.profile.cluster.gpus, problem.workload.global_batch, problem.model

    def divisor(n: int) -> int:
        return pick.choice([d for d in space.divisors(n) if d <= 64])

    pp = divisor(world)
    tp = divisor(min(8, world // pp)) if world // pp % 8 == 0 else 1
    cp = pick.choice((1, 1, 2, 4))
    if world % (pp * tp * cp):
        return None
    dp = world // (pp * tp * cp)
    ep = divisor(tp * cp * dp) if model.moe is not None else 1
    etp = pick.choice((1, 1, 1, 2)) if model.moe is not None and tp * cp * dp % (2 * ep) == 0 else 1
    vpp = pick.randint(1, max(1, len(model.layers) // pp)) if pp > 1 and pick.random() < 0.6 else 1
    if pp * vpp > len(model.layers) + 2 or batch % dp:
        return None
    return Layout(
        tp=tp, cp=cp, pp=pp, vpp=vpp, dp=dp, ep=ep, etp=etp, edp=tp * cp * dp // (ep * etp),
        micro_batch=divisor(batch // dp),
        sequence_parallel=tp > 1,
        stages=pick.choice(brute.splits(problem, pp * vpp)),
        recompute=pick.choice(brute.recompute_sets(model)),
        **pick.choice(brute.features(problem)),
    )  # fmt: skip


def sample(problem: Problem, count: int, seed: int) -> list[Layout]:
    pick = random.Random(seed)
    drawn = [x for x in (random_layout(problem, pick) for _ in range(count)) if x is not None]
    return brute.accepted(problem, drawn)


def groups_of(rows: Layouts) -> Layouts:
    """The group of every layout: its degrees, with what a search settles later as it is at the start."""
    none = rows.tp * 0
    return rows.with_columns(vpp=none + 1, split=none, micro_batch=none + 1, recompute=none, stages=("",))


def assert_below(problem: Problem, layouts: list[Layout]) -> None:
    """Bounds of time and memory of the groups stay below the price of each of their layouts."""
    rows = Layouts.of(layouts)
    micro = space.batch_options(problem)["micro_batch"]
    pricing = Pricing(problem.model, problem.profile, problem.workload, rows)
    step_s, peak = pricing.step_seconds(), pricing.peak_bytes()
    bound = least_step_seconds(problem, groups_of(rows), micro)
    least = least_state_bytes(problem.model, problem.profile.cluster.device, problem.workload, groups_of(rows))
    assert (bound <= step_s * (1 + 1e-9)).all(), layouts[int((bound / step_s).argmax())]
    assert (least <= peak * (1 + 1e-9)).all(), layouts[int((least / peak).argmax())]
    assert (bound > 0).all() and (least > 0).all()


@pytest.mark.parametrize(("model", "cluster", "more"), PUBLISHED, ids=[f"{m}-{c}" for m, c, _ in PUBLISHED])
def test_below_every_price_of_published_models(model: str, cluster: str, more: dict[str, Any]) -> None:
    problem = tiny.problem(load_model(model), cluster, extend_positions=True, **more)
    layouts = sample(problem, 600, 7)
    assert len(layouts) > 20
    assert_below(problem, layouts)
    assert_below(problem, [replace(x, sharding="fsdp", ep_overlap=False) for x in layouts])
    assert_below(problem, [replace(x, dp_overlap=False) for x in layouts])


@given(
    model=st.sampled_from([tiny.DENSE, tiny.ODD, tiny.MIXED, tiny.LATENT]),
    cluster=st.sampled_from(["h100x4", "a100x8", "b200x16", "gb200x8", "mi355xx8", "h800x3"]),
    batch=st.sampled_from([1, 4, 6, 24, 128]),
    seq=st.sampled_from([128, 1024, 8192, 65536]),
    era=st.sampled_from(["te-2024", "deepep-2025", "latest"]),
    imbalance=st.sampled_from([1.0, 1.2, 3.0]),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=60, deadline=None)
def test_below_every_price_of_tiny_models(model: Any, cluster: str, seed: int, **more: Any) -> None:
    problem = tiny.problem(model, cluster, **more)
    layouts = sample(problem, 60, seed)
    if layouts:
        assert_below(problem, layouts)


@pytest.mark.parametrize(("model", "cluster", "more"), PUBLISHED[:5], ids=[f"{m}-{c}" for m, c, _ in PUBLISHED[:5]])
def test_recompute_only_costs_time(model: str, cluster: str, more: dict[str, Any]) -> None:
    # The search relies on it twice: prices without recompute are bounds, and supersets of what fits are passed over.
    problem = tiny.problem(load_model(model), cluster, extend_positions=True, **more)
    sets = [set(s) for s in brute.recompute_sets(problem.model) if s != ("full",)]
    for base in sample(problem, 300, 11)[:12]:
        rows = Layouts.of([replace(base, recompute=tuple(s)) for s in sets] + [replace(base, recompute=("full",))])
        step_s = Pricing(problem.model, problem.profile, problem.workload, rows).step_seconds()
        for i, small in enumerate(sets):
            above = [j for j, large in enumerate(sets) if small < large]
            assert (step_s[above] >= step_s[i] * (1 - 1e-9)).all()
        assert step_s[-1] >= step_s.max() * (1 - 1e-9)


def test_the_bound_is_close_enough_to_help() -> None:
    problem = tiny.problem(load_model("mixtral-8x7b"), "h100x64", batch=256)
    layouts = [x for x in sample(problem, 4000, 3) if not x.recompute]
    step_s = Pricing(problem.model, problem.profile, problem.workload, Layouts.of(layouts)).step_seconds()
    bound = least_step_seconds(problem, groups_of(Layouts.of(layouts)), space.batch_options(problem)["micro_batch"])
    assert np.median(bound / step_s) > 0.5


def test_no_groups_no_bounds() -> None:
    problem = tiny.problem(tiny.DENSE)
    assert len(least_step_seconds(problem, space.degree_grid(problem).take(slice(0, 0)), [1])) == 0
