"""Messages between ranks: curves through medians, the law of links against the cost models, dispatch in bytes that leave."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.costmodels.routing import deduplicated_copies
from moeplan.profiles.cases import collective_cases
from moeplan.profiles.curve_fit import BLANK
from moeplan.profiles.curves import KNOT_BYTES, CollectiveCurve
from moeplan.profiles.fitting import fit
from moeplan.profiles.hardware import load_cluster
from moeplan.profiles.nominal import nominal
from moeplan.profiles.samples import Sample
from tests.profiles.synthetic import sample, samples_of

TWO_NODES = nominal(load_cluster("h100x16"))


def messages(op: str, group: str, seconds: Any, spread: float = 0.01) -> list[Sample]:
    return [sample(op, "bf16", float(seconds(size)), group, "a library", spread, message_bytes=size) for size in KNOT_BYTES]


def test_collectives_go_through_their_medians() -> None:
    truth = CollectiveCurve(times_s=(1e-5, 1.2e-5, 2e-5, 5e-5, 2e-4, 7e-4, 5e-3), **BLANK)
    samples = messages("all_gather", "4/1", truth.seconds)
    faster = dataclasses.replace(samples[2], seconds=1.1e-5)  # a larger message that was faster: noise only ever adds
    again = dataclasses.replace(samples[5], seconds=9e-4)
    found = fit([again, *samples[:2], faster, *samples[3:], again]).collectives["all_gather"][4]
    assert found.times_s == pytest.approx((1e-5, 1.1e-5, 1.1e-5, 5e-5, 2e-4, 9e-4, 5e-3))
    assert found.sizes_bytes == KNOT_BYTES and found.samples == 9
    assert found.residuals[0] == 0.0 and found.residuals[2] == pytest.approx(1.1 / 1.2 - 1, rel=1e-2)
    assert found.valid == {"message_bytes": (KNOT_BYTES[0], KNOT_BYTES[-1])}


def test_the_error_of_a_collective_is_at_least_its_spread() -> None:
    straight = messages("all_reduce", "2/1", lambda size: 1e-10 * size)
    assert fit(straight).collectives["all_reduce"][2].error == pytest.approx(0.01)
    noisy = fit(messages("all_reduce", "2/1", lambda size: 1e-10 * size, spread=0.2)).collectives["all_reduce"][2]
    assert noisy.error == noisy.error_p90 == pytest.approx(0.2)
    bent = fit(messages("all_reduce", "2/1", lambda size: 3e-5 + 1e-10 * size)).collectives["all_reduce"][2]
    assert bent.error > 0.01


def test_one_size_is_no_curve() -> None:
    found = fit(messages("all_gather", "2/1", lambda size: size * 1e-9)[:1])
    assert not found.collectives and found.remarks == ("all_gather of group 2/1: measured at one size, a curve needs 2",)


@settings(max_examples=5, deadline=None)
@given(st.floats(0.3, 1.2), st.floats(0.3, 1.2), st.floats(2e-6, 2e-5))
def test_the_law_of_links_is_recovered(ring: float, exchange: float, hop_s: float) -> None:
    truth = dataclasses.replace(TWO_NODES, ring_share=ring, all_to_all_share=exchange, hop_s=hop_s)
    law = fit([s for s in samples_of(truth) if s.group]).law
    assert law.ring_bytes_per_s == pytest.approx(truth.scale_out_bytes_per_s, rel=0.02)
    assert law.all_to_all_bytes_per_s == pytest.approx(truth.all_to_all_bytes_per_s, rel=0.02)
    assert law.hop_s == pytest.approx(hop_s, rel=0.02)
    assert law.error < 0.02 and max(map(abs, law.residuals)) < 0.05


def test_the_law_predicts_groups_that_nobody_measured() -> None:
    four = nominal(load_cluster("h100x32"))
    samples = [s for s in samples_of(four, noise=0.02) if s.group]
    largest = {"32/4", "4/4"}
    law = fit([s for s in samples if s.group not in largest]).law
    assert law.ring_bytes_per_s == pytest.approx(four.scale_out_bytes_per_s, rel=0.05)
    assert law.hop_s == pytest.approx(four.scale_out_latency_s, rel=0.1)


def test_curves_across_domains_stand_by_their_groups() -> None:
    found = fit([s for s in samples_of(TWO_NODES) if s.group])
    assert set(found.multi_node) == set(found.collectives) == {"all_gather", "reduce_scatter", "all_reduce", "all_to_all"}
    assert all(set(groups) == {"2/2", "16/2"} for groups in found.multi_node.values())
    assert all(set(counts) == {2, 4, 8} for counts in found.collectives.values())
    assert found.law.send_bytes_per_s == pytest.approx(TWO_NODES.scale_up_bytes_per_s, rel=0.01)
    groups = {c.group for c in collective_cases(16, 8, "cuda")}
    assert groups == {"2/1", "4/1", "8/1", "2/2", "16/2"}


def test_what_the_local_ranks_do_must_be_known_for_the_law() -> None:
    # a blocked group hides behind the collective of its 8 local ranks, which was not measured: it tells nothing of the links
    samples = [s for s in samples_of(TWO_NODES) if s.group == "16/2"]
    law = fit(samples).law
    assert law.ring_bytes_per_s is None and law.samples == 0
    assert "16/2" in fit(samples).multi_node["all_gather"]


def test_a_skewed_exchange_is_remarked() -> None:
    even = messages("all_to_all", "4/1", lambda size: 1e-5 + size * 1e-10)
    skewed = [dataclasses.replace(s, op="all_to_all_skewed", seconds=1.7 * s.seconds) for s in even]
    assert fit([*even, *skewed]).remarks == ("a skewed all-to-all takes 1.70 times an even one of as many bytes",)


@pytest.mark.parametrize(("group", "reach"), [("8/1", ""), ("16/2", "-scale-out")])
def test_dispatch_counts_the_copies_that_leave(group: str, reach: str) -> None:
    ranks, domains = map(int, group.split("/"))
    copies = deduplicated_copies(8, ranks, ranks / domains)
    each = float(copies.scale_out if domains > 1 else copies.scale_up)
    samples = [
        sample(
            "deepep", "dispatch", 3e-5 + each * size / 4e10, group, message_bytes=size, tokens=size / 14336, topk=8, hidden=7168
        )
        for size in 14336.0 * np.array([128, 512, 2048, 8192])
    ]
    found = fit(samples).dispatches
    assert set(found) == {f"deepep-dispatch{reach}"}
    curve = found[f"deepep-dispatch{reach}"]
    assert curve.bytes_per_s == pytest.approx(4e10, rel=2e-2) and curve.latency_s == pytest.approx(3e-5, rel=0.1)
