"""Uncertainty: shares worked out by hand, deviations of a step and of a ratio of steps, laws, regimes, the catalog."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplan.costmodels.breakdown import Breakdown
from moeplan.costmodels.layout import Layout, Layouts
from moeplan.costmodels.price import Pricing
from moeplan.costmodels.uncertainty import (
    KINDS,
    MEDIAN_ERROR,
    SHAPES,
    Z_80,
    curve_errors,
    deviations,
    difference_parts,
    difference_sigma,
    interval,
    is_tie,
    regime,
    shares,
    sigmas,
    spread,
    step_sigma,
)
from moeplan.costmodels.workload import load_era
from moeplan.profiles.hardware import load_cluster
from moeplan.profiles.nominal import nominal
from tests.conftest import NODE, PLAIN, TINY_DENSE, TINY_LATENT, TINY_MOE, workload_of

SCALED = nominal(load_cluster("h800x8"))
WORK = workload_of()
PYTORCH = workload_of(era=load_era("pytorch-compiled"))
NAMES = list(KINDS)

# Seconds of a step of 10: 8 in the stages, of which 0.5 repeat others, 1 of bubble, 1 once a step.
PARTS = {
    "layers/attention GEMM": 2.0,
    "layers/MLP GEMM": 1.0,
    "layers/attention core": 1.5,
    "layers/expert all-to-all": 2.0,
    "layers/norms and activations": 0.5,
    "layers/recompute": 0.5,
    "head/output GEMM": 0.5,
    "pipeline bubble": 1.0,
    "data-parallel exchange": 0.7,
    "optimizer": 0.2,
    "step overhead": 0.1,
}


def step(**changes: Any) -> Breakdown:
    """The step above with some parts changed, by the last word of their path with "_" for spaces."""
    parts = {n: changes.get(n.rsplit("/", 1)[-1].replace(" ", "_").replace("-", "_"), v) for n, v in PARTS.items()}
    return Breakdown(unit="seconds", parts=parts)


def named(values: Any) -> dict[str, Any]:
    return dict(zip(NAMES, values, strict=True))


def one(**sigma: float) -> Any:
    """Deviations by kind, 0 but for those given."""
    return np.array([sigma.get(n.replace(" ", "_").replace("-", "_"), 0.0) for n in NAMES])


# -- shares --------------------------------------------------------------------------------------------------------------


def test_shares_by_hand() -> None:
    share = named(shares(step()))
    # What repeats others, 1.5 s of recompute and bubble, is spread over the 7.5 s that it repeats: a fifth more of each.
    assert share["dense GEMM"] == pytest.approx(3.5 * 1.2 / 10)
    assert share["attention core"] == pytest.approx(1.5 * 1.2 / 10)
    assert share["expert all-to-all"] == pytest.approx(2.0 * 1.2 / 10)
    assert share["element-wise"] == pytest.approx(0.5 * 1.2 / 10)
    # Both also err by themselves; what happens once a step does not repeat.
    assert (share["recompute"], share["pipeline bubble"]) == pytest.approx((0.05, 0.1))
    assert (share["data-parallel exchange"], share["once a step"]) == pytest.approx((0.07, 0.03))
    assert share["expert GEMM"] == share["permute"] == 0.0
    # Without what is counted twice the shares are those of the whole step.
    assert sum(share.values()) - share["recompute"] - share["pipeline bubble"] == pytest.approx(1.0)


@pytest.mark.parametrize("model", (TINY_DENSE, TINY_MOE, TINY_LATENT), ids=lambda m: str(m.name))
def test_every_part_of_a_priced_step_has_a_kind(model: Any) -> None:
    layouts = [Layout(tp=2, pp=2, vpp=2, dp=4, edp=8, recompute=("layernorm",)), Layout(dp=16, edp=16, micro_batch=2)]
    if model.moe is not None:
        layouts = [dataclasses.replace(x, ep=4, edp=x.edp // 4, dispatcher="alltoall") for x in layouts]
    time = Pricing(model, PLAIN, WORK, Layouts.of(layouts)).step_cost().time
    share = shares(time)
    twice = share[NAMES.index("recompute")] + share[NAMES.index("pipeline bubble")]
    np.testing.assert_allclose(share.sum(axis=0) - twice, 1.0)
    for i in range(2):
        np.testing.assert_allclose(share[:, i], shares(time.at(i)))


def test_a_factor_on_all_parts_changes_no_share() -> None:
    slower = Breakdown(unit="seconds", parts={n: 1.3 * v for n, v in PARTS.items()})
    np.testing.assert_allclose(shares(slower), shares(step()))


# -- deviations ----------------------------------------------------------------------------------------------------------


def test_deviation_of_a_step_by_hand() -> None:
    share = shares(step())
    sigma = one(dense_GEMM=0.1, expert_all_to_all=0.2)
    assert step_sigma(share, sigma, 0.05) == pytest.approx(math.sqrt(0.05**2 + (0.42 * 0.1) ** 2 + (0.24 * 0.2) ** 2))
    assert step_sigma(share, one(), 0.05) == pytest.approx(0.05)


def test_equal_steps_differ_by_the_floor_and_tie() -> None:
    share = shares(step())
    assert difference_sigma(share, share, np.ones(len(NAMES)), 0.02) == pytest.approx(0.02)
    assert is_tie(0.0, 0.02)


def test_steps_that_differ_in_one_part_differ_by_its_deviation() -> None:
    # Seconds move from the exchange of data parallelism to the optimizer: both are paid once, so nothing else moves.
    first, second = shares(step()), shares(step(data_parallel_exchange=0.2, optimizer=0.7))
    sigma = one(data_parallel_exchange=0.3, dense_GEMM=0.5)
    assert difference_sigma(first, second, sigma, 0.0) == pytest.approx(0.05 * 0.3)
    parts = named(difference_parts(first, second, sigma))
    assert parts.pop("data-parallel exchange") == pytest.approx((0.05 * 0.3) ** 2)
    assert sum(parts.values()) == pytest.approx(0.0, abs=1e-30)


def test_a_tie_lies_within_1_28_deviations() -> None:
    assert is_tie(0.0128, 0.01) and is_tie(-0.0128, 0.01) and not is_tie(0.013, 0.01)
    assert is_tie(np.array([0.0, 0.1]), 0.01).tolist() == [True, False]


SHARES = st.lists(st.floats(0.0, 1.0), min_size=len(NAMES), max_size=len(NAMES)).map(np.array)


@given(
    first=SHARES, second=SHARES, sigma=SHARES, floor=st.floats(0.0, 0.1), more=st.floats(1.0, 3.0), shared=st.floats(0.0, 1.0)
)
def test_laws_of_a_difference(first: Any, second: Any, sigma: Any, floor: float, more: float, shared: float) -> None:
    found = difference_sigma(first, second, sigma, floor)
    assert found == pytest.approx(difference_sigma(second, first, sigma, floor))  # symmetric
    assert difference_sigma(first, second, more * sigma, floor) >= found - 1e-12  # monotone
    assert found >= floor - 1e-12
    assert difference_sigma(first + shared, second + shared, sigma, floor) == pytest.approx(found)  # what both have cancels
    apart = math.hypot(float(step_sigma(first, sigma, 0.0)), float(step_sigma(second, sigma, 0.0)), floor)
    assert found <= apart + 1e-12  # shared errors never hurt


def test_arrays_equal_numbers() -> None:
    steps = [step(), step(MLP_GEMM=4.0), step(pipeline_bubble=0.0)]
    parts = {n: np.array([s.parts[n] for s in steps]) for n in PARTS}
    share = shares(Breakdown(unit="seconds", parts=parts))
    sigma = sigmas(NODE, WORK)
    apart = difference_sigma(share[:, :, None], share[:, None, :], sigma, 0.01)
    for i, first in enumerate(steps):
        assert step_sigma(share, sigma, 0.05)[i] == pytest.approx(step_sigma(shares(first), sigma, 0.05))
        for j, second in enumerate(steps):
            assert apart[i, j] == pytest.approx(difference_sigma(shares(first), shares(second), sigma, 0.01))
    low, high = interval(TINY_MOE, NODE, WORK, Breakdown(unit="seconds", parts=parts))
    alone = [interval(TINY_MOE, NODE, WORK, s) for s in steps]
    assert low.tolist() == pytest.approx([x[0] for x in alone]) and high.tolist() == pytest.approx([x[1] for x in alone])


# -- curves --------------------------------------------------------------------------------------------------------------


def test_errors_of_curves_by_hand() -> None:
    found = named(curve_errors(NODE, WORK, 0.1))
    gemm = NODE.origins["gemm/bf16"]
    assert gemm.measured and found["dense GEMM"] == pytest.approx(gemm.error / MEDIAN_ERROR / math.sqrt(SHAPES))
    experts = [
        o for n, o in NODE.origins.items() if n in ("grouped_gemm/bf16", "grouped_gemm/bf16-dgrad", "grouped_gemm/bf16-wgrad")
    ]
    squares = [(o.error / MEDIAN_ERROR) ** 2 / SHAPES + 0.01 * (not o.measured) for o in experts]
    assert found["expert GEMM"] == pytest.approx(math.sqrt(sum(squares) / 3))
    assert found["pipeline bubble"] == 0.0


def test_a_scaled_curve_is_less_certain() -> None:
    assert (sigmas(SCALED, WORK) >= sigmas(NODE, WORK) - 1e-12).all()
    assert sigmas(SCALED, WORK)[0] > sigmas(NODE, WORK)[0]


def test_a_profile_without_origins_has_the_deviations_of_the_kinds_alone() -> None:
    assert curve_errors(PLAIN, WORK, 0.1).tolist() == [0.0] * len(NAMES)
    assert sigmas(PLAIN, WORK).tolist() == [deviations().kinds[n] for n in NAMES]


# -- intervals -----------------------------------------------------------------------------------------------------------

# Model, profile, workload, regime; a profile that says nothing of origins was measured on its own cluster.
REGIMES = [
    (TINY_DENSE, NODE, WORK, "dense"),
    (TINY_DENSE, PLAIN, WORK, "dense"),
    (TINY_DENSE, SCALED, WORK, "dense, scaled device"),
    (TINY_DENSE, NODE, PYTORCH, "dense, other framework"),
    (TINY_MOE, NODE, WORK, "moe"),
    (TINY_LATENT, SCALED, WORK, "moe, scaled device"),
    (TINY_LATENT, SCALED, PYTORCH, "moe, scaled device, other framework"),
]


@pytest.mark.parametrize(("model", "profile", "workload", "name"), REGIMES, ids=[f"{r[0].name} {r[3]}" for r in REGIMES])
def test_regime_and_interval(model: Any, profile: Any, workload: Any, name: str) -> None:
    assert regime(model, profile, workload) == name
    held = deviations().regimes[name]
    reach = Z_80 * held.scale * step_sigma(shares(step()), sigmas(profile, workload), deviations().common)
    low, high = interval(model, profile, workload, step())
    assert (low, high) == pytest.approx((10 * math.exp(held.bias - reach), 10 * math.exp(held.bias + reach)))
    assert spread(model, profile, workload, step()).runs == held.runs
    # Two releases of the same software differ by about 5 %: an interval narrower than that claims too much.
    assert 0.4 < low / 10 < high / 10 < 2.5 and high / low > 1.05


def test_intervals_scale_with_the_step() -> None:
    low, high = interval(TINY_MOE, NODE, WORK, step())
    twice = Breakdown(unit="seconds", parts={n: 2 * v for n, v in PARTS.items()})
    assert interval(TINY_MOE, NODE, WORK, twice) == pytest.approx((2 * low, 2 * high))


def test_the_catalog() -> None:
    known = deviations()
    assert set(known.kinds) == set(KINDS)
    assert set(known.regimes) == {
        f"{kind}{device}{framework}"
        for kind in ("dense", "moe")
        for device in ("", ", scaled device")
        for framework in ("", ", other framework")
    }
    assert all(0 < v < 1 for v in (known.common, known.scaled, known.floor, *known.kinds.values()))
    assert all(r.scale >= max(x.scale for x in known.regimes.values()) for r in known.regimes.values() if not r.runs)
