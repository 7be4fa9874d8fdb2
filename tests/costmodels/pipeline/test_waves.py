"""Waves take as long as the passes run one by one, however many micro-batches, and for many layouts at once."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.costmodels.bubble import exact_span_s, least_span_s, pass_seconds
from moeplan.costmodels.pipeline import waves
from moeplan.costmodels.pipeline.interleaved import Interleaved
from moeplan.costmodels.pipeline.one_f_one_b import OneForwardOneBackward
from moeplan.costmodels.pipeline.run import run
from moeplan.costmodels.pipeline.waves import span_s
from moeplan.costmodels.stages import chunk_units, filling
from tests.conftest import TINY_DENSE, TINY_LATENT


@st.composite
def pipelines(draw, most_groups=4):
    """Seconds of both directions, [p, v], and micro-batches."""
    p, v = draw(st.integers(2, 6), label="p"), draw(st.integers(1, 4), label="v")
    groups = draw(st.integers(1, most_groups), label="groups")
    batches = p * groups if v > 1 else draw(st.integers(1, p * groups), label="batches")
    rng = np.random.default_rng(draw(st.integers(0, 10_000), label="seed"))
    spread = draw(st.sampled_from([0.0, 0.1, 0.9]), label="spread")
    forward = 1.0 + spread * rng.uniform(-1, 1, (p, v))
    return forward, forward * rng.uniform(1.5, 2.5, (p, v) if spread else ()), batches


def one_by_one(forward, backward, batches):
    """The makespan of the schedule's own orders."""
    p, v = forward.shape
    schedule = Interleaved() if v > 1 else OneForwardOneBackward()
    seconds = {"F": forward[..., None], "B": backward[..., None]}
    return run(schedule.orders(p, v, batches), seconds).makespan_s


@given(case=pipelines())
@settings(max_examples=150, deadline=None)
def test_waves_equal_passes_run_one_by_one(case):
    forward, backward, batches = case
    assert span_s(forward[..., None], backward[..., None], batches)[0] == pytest.approx(one_by_one(*case), rel=1e-12)


@given(case=pipelines(), further=st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_groups_that_are_not_run_take_as_long_as_the_last(case, further):
    forward, backward, batches = case
    batches += (waves.GROUPS + further) * len(forward)
    took = span_s(forward[..., None], backward[..., None], batches)[0]
    assert took == pytest.approx(one_by_one(forward, backward, batches), rel=1e-9)


@given(case=pipelines(), factors=st.lists(st.floats(0.5, 2.0), min_size=2, max_size=4))
@settings(max_examples=40, deadline=None)
def test_many_layouts_equal_each_alone(case, factors):
    forward, backward, batches = case
    many = np.array(factors)
    together = span_s(forward[..., None] * many, backward[..., None] * many[::-1], batches)
    alone = [span_s(forward[..., None] * a, backward[..., None] * b, batches)[0] for a, b in zip(many, many[::-1], strict=True)]
    assert together == pytest.approx(alone, rel=1e-12)


@given(case=pipelines(), place=st.integers(0, 23), more=st.floats(0.01, 2.0))
@settings(max_examples=60, deadline=None)
def test_longer_passes_never_shorten_the_step(case, place, more):
    forward, backward, batches = case
    longer = forward.copy()
    longer.reshape(-1)[place % forward.size] += more
    before, after = (span_s(f[..., None], backward[..., None], batches)[0] for f in (forward, longer))
    assert after >= before * (1 - 1e-12)


@pytest.mark.parametrize(("p", "v", "groups"), [(2, 1, 3), (4, 1, 8), (4, 2, 2), (8, 3, 9), (16, 2, 4)])
def test_equal_chunks_take_the_published_time(p, v, groups):
    forward, backward, m = np.full((p, v, 1), 0.3), np.full((p, v, 1), 0.7), p * groups
    assert span_s(forward, backward, m)[0] == pytest.approx((m + (p - 1) / v) * v)


@pytest.mark.parametrize(("p", "light", "heavy"), [(4, 0.2, 1.0), (8, 0.5, 1.0), (16, 0.7, 1.0), (16, 0.9, 1.0), (8, 0.8, 1.0)])
def test_a_light_chunk_before_a_heavy_one_makes_neighbours_wait(p, light, heavy):
    # Each group of p micro-batches waits (p - 2)(heavy - light) - light where that is positive.
    chunks = np.tile([light, heavy], (p, 1))[..., None]
    few, many = (span_s(chunks / 3, 2 * chunks / 3, p * groups)[0] for groups in (8, 16))
    waits = max(0.0, (p - 2) * (heavy - light) - light)
    assert (many - few) / 8 == pytest.approx(p * (light + heavy) + waits)


SPLITS = [(2, 1, ""), (4, 1, "Et|tt|tt|tttmL"), (4, 2, ""), (2, 2, "Et|ttt|t|tttmL"), (2, 3, "Et|t|ttt|t|t|tmL"), (8, 1, "")]


@pytest.mark.parametrize(("pp", "vpp", "text"), SPLITS)
@given(seconds=st.lists(st.floats(0.1, 3.0), min_size=4, max_size=4), groups=st.integers(1, 10), odd=st.integers(0, 7))
@settings(max_examples=40, deadline=None)
def test_the_closed_form_is_never_above_the_passes(pp, vpp, text, seconds, groups, odd):
    batches = np.array([float(pp * groups + (odd if vpp == 1 else 0))])
    units = [np.array([s]) for s in seconds]
    split = (TINY_LATENT, pp, vpp, text)
    least = least_span_s(filling(*split), units, batches)
    exact = exact_span_s(*(pass_seconds(chunk_units(*split), [u * share for u in units]) for share in (1 / 3, 2 / 3)), batches)
    assert (least <= exact * (1 + 1e-12)).all()


@pytest.mark.parametrize(("pp", "vpp"), [(2, 1), (4, 1), (8, 1), (2, 2), (4, 2), (2, 4)])
@pytest.mark.parametrize("groups", (1, 3, 20))
def test_the_closed_form_is_the_time_of_equal_chunks(pp, vpp, groups):
    batches, units = np.array([float(pp * groups)]), [np.array([0.9]), np.array([0.0])]  # layers, a head that takes no time
    split = (TINY_DENSE, pp, vpp, "")
    exact = exact_span_s(*(pass_seconds(chunk_units(*split), [u * share for u in units]) for share in (1 / 3, 2 / 3)), batches)
    assert least_span_s(filling(*split), units, batches) == pytest.approx(exact, rel=1e-12)


def test_no_order_is_known_for_groups_that_are_not_full():
    units = [np.ones(3)] * 4
    batches = np.array([4.0, 5.0, 4.5])
    passes = pass_seconds(chunk_units(TINY_LATENT, 2, 2, ""), units)
    assert exact_span_s(passes, passes, batches)[1:].tolist() == [0.0, 0.0]
