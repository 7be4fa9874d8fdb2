"""A profile whose machine is better in one respect: what a catalog of such a machine gives, and laws."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplan.profiles.curves import CollectiveCurve
from moeplan.profiles.hardware import load_cluster
from moeplan.profiles.nominal import nominal
from moeplan.profiles.profile import Profile
from moeplan.profiles.scaling import with_link_rate, with_memory_rate
from tests.conftest import PLAIN, TWO_NODES

Level = Literal["scale_up", "scale_out"]
LEVELS: tuple[Level, ...] = ("scale_up", "scale_out")
LINK_CURVES = ("collectives", "dispatches", "multi_node")


def across(profile: Profile) -> Profile:
    """With an all-gather measured across two domains."""
    curve = profile.collectives["all_gather"][8]
    return dataclasses.replace(profile, multi_node={"all_gather": {"16/2": curve}})


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", ("h100x16", "h800x16", "gb200x144", "mi300xx16"))
def test_faster_links_are_those_of_a_catalog_machine_with_them(name: str, level: Level) -> None:
    cluster = load_cluster(name)
    faster = dataclasses.replace(getattr(cluster, level), bytes_per_s=2.0 * getattr(cluster, level).bytes_per_s)
    wanted = nominal(dataclasses.replace(cluster, **{level: faster}))
    got = with_link_rate(nominal(cluster), level, 2.0)
    assert getattr(got.cluster, level).bytes_per_s == faster.bytes_per_s
    for op, curves in wanted.collectives.items():
        for ranks, curve in curves.items():
            np.testing.assert_allclose(got.collectives[op][ranks].times_s, curve.times_s, rtol=1e-12)
    for key, dispatch in wanted.dispatches.items():
        assert got.dispatches[key].bytes_per_s == pytest.approx(dispatch.bytes_per_s, rel=1e-12)
    for rate in ("scale_out_bytes_per_s", "all_to_all_bytes_per_s", "scale_up_bytes_per_s"):
        assert getattr(got, rate) == pytest.approx(getattr(wanted, rate), rel=1e-12)


@pytest.mark.parametrize("level", LEVELS)
def test_one_level_leaves_all_else_as_it_is(level: Level) -> None:
    got = with_link_rate(across(TWO_NODES), level, 3.0)
    other = LEVELS[1 - LEVELS.index(level)]
    assert getattr(got.cluster, other) == getattr(TWO_NODES.cluster, other)
    untouched = [f.name for f in dataclasses.fields(Profile) if f.name not in ("cluster", *LINK_CURVES)]
    assert all(getattr(got, name) == getattr(TWO_NODES, name) for name in untouched)
    ends = ["-scale-out"] if level == "scale_out" else ["-dispatch", "-combine"]
    for key, curve in got.dispatches.items():
        factor = 3.0 if any(key.endswith(end) for end in ends) else 1.0
        assert curve.bytes_per_s == pytest.approx(factor * TWO_NODES.dispatches[key].bytes_per_s)


def test_by_hand() -> None:
    # 1e12 bytes in a ring of 8 at 100 GB/s: 8.75 s, of which the first knot's time is next to nothing.
    whole = PLAIN.collective_s("all_gather", 1e12, 8)
    assert with_link_rate(PLAIN, "scale_up", 2.0).collective_s("all_gather", 1e12, 8) == pytest.approx(whole / 2)
    assert with_link_rate(PLAIN, "scale_out", 2.0).collective_s("all_gather", 1e12, 8) == whole
    measured = across(PLAIN)
    times = [p.across_s("all_gather", 1e12, 16, 2, 0.0) for p in (measured, with_link_rate(measured, "scale_out", 2.0))]
    assert times[1] == pytest.approx(times[0] / 2)
    # 2 x 1e6 x 1e6 elements: no time for memory in the plain profile, so that its rate changes nothing but streams.
    faster = with_memory_rate(PLAIN, 2.0)
    assert faster.gemm("bf16").seconds(1e3, 1e3, 1e3) == pytest.approx(PLAIN.gemm("bf16").seconds(1e3, 1e3, 1e3))
    assert faster.stream_s(1e12) == pytest.approx(0.5 * PLAIN.stream_s(1e12))
    assert faster.cluster.device.memory_bytes_per_s == 2.0 * PLAIN.cluster.device.memory_bytes_per_s


SIZES = st.floats(1.0, 1e11)
FACTORS = st.floats(1.0, 20.0)


@given(SIZES, FACTORS, st.sampled_from(LEVELS), st.sampled_from((2, 4, 8, 16)))
def test_faster_links_never_take_longer(size: float, factor: float, level: Level, ranks: int) -> None:
    slow = across(TWO_NODES)
    fast = with_link_rate(slow, level, factor)
    for op in ("all_gather", "reduce_scatter", "all_reduce", "all_to_all"):
        assert fast.collective_s(op, size, ranks) <= slow.collective_s(op, size, ranks) * (1 + 1e-12)
    assert fast.across_s("all_gather", size, 16, 2, 0.0) <= slow.across_s("all_gather", size, 16, 2, 0.0) * (1 + 1e-12)
    for library in ("deepep", "hybridep"):
        assert fast.dispatch_s(library, size, size / 3, 100.0) <= slow.dispatch_s(library, size, size / 3, 100.0)


@given(st.tuples(*[st.floats(1.0, 1e5)] * 3), FACTORS)
def test_faster_memory_never_takes_longer(shape: Any, factor: float) -> None:
    fast = with_memory_rate(TWO_NODES, factor)
    for precision in TWO_NODES.gemms:
        assert fast.gemm(precision).seconds(*shape) <= TWO_NODES.gemm(precision).seconds(*shape) * (1 + 1e-12)
        for pair in zip(*(p.grouped.values() for p in (fast, TWO_NODES)), strict=True):
            assert pair[0].seconds(4, *shape) <= pair[1].seconds(4, *shape) * (1 + 1e-12)
    for key, curve in fast.attentions.items():
        assert curve.seconds(shape[0], shape[1]) <= TWO_NODES.attentions[key].seconds(shape[0], shape[1])


def test_a_factor_of_one_changes_no_time() -> None:
    for got in (*(with_link_rate(TWO_NODES, level, 1.0) for level in LEVELS), with_memory_rate(TWO_NODES, 1.0)):
        for name in ("gemms", "grouped", "attentions", "dispatches", "stream_bytes_per_s"):
            assert getattr(got, name) == getattr(TWO_NODES, name)
        for op, curves in got.collectives.items():
            for ranks, curve in curves.items():
                known: CollectiveCurve = TWO_NODES.collectives[op][ranks]
                np.testing.assert_allclose(curve.times_s, known.times_s, rtol=1e-12)
