"""What memory refuses fits with the fewest recomputed layers and the least offload, and no bound cuts off what is better."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from moeplan.costmodels.layout import Layout, Layouts
from moeplan.costmodels.model_catalog import load_model
from moeplan.costmodels.price import Pricing
from moeplan.planner.constraints import violations
from moeplan.planner.problem import Problem, parse_condition
from moeplan.planner.relief import FULL, Partly, Room, counts_layers, offload_shares
from moeplan.planner.search import search
from tests.exporters.cases import judged
from tests.planner import tiny
from tests.planner.brute import needed_bytes

MIXED = tiny.problem(tiny.MIXED, "h100x4")
LATENT = tiny.problem(tiny.LATENT, "h100x4", gradient_bytes=2)
ROWS = [
    Layout(dp=4, edp=4, dispatcher="alltoall"),
    Layout(tp=2, dp=2, ep=2, edp=2, sequence_parallel=True, dispatcher="alltoall"),
    Layout(pp=2, dp=2, ep=2, dispatcher="alltoall", micro_batch=2),
    Layout(pp=2, vpp=2, dp=2, edp=2, dispatcher="alltoall", stages="Et|t|t|tL"),
    Layout(pp=2, dp=2, edp=2, dispatcher="alltoall", stages="E|t*4L"),
]
LATENT_ROWS = [
    Layout(dp=4, edp=4, dispatcher="alltoall"),
    Layout(pp=2, dp=2, edp=2, dispatcher="alltoall", stages="Ett|tmL"),
    Layout(pp=2, vpp=2, dp=2, ep=2, dispatcher="alltoall", stages="Et|t|t|mL"),
]
CASES = {"mixed": (MIXED, ROWS), "latent": (LATENT, LATENT_ROWS)}


def priced(problem: Problem, rows: Layouts) -> tuple[Any, Any]:
    pricing = Pricing(problem.model, problem.profile, problem.workload, rows)
    return pricing.step_seconds(), pricing.peak_bytes()


def limited(problem: Problem, rows: Layouts, share: float) -> Problem:
    """With a limit at that share of the way from all of the optimizer offloaded to none of it, for the smallest row."""
    peaks = [priced(problem, rows.with_columns(optimizer_offload=np.full(len(rows), s)))[1].min() for s in (1.0, 0.0)]
    peak = peaks[0] + share * (peaks[1] - peaks[0])
    least = problem.excess_bytes(peak) + problem.device_bytes
    return dataclasses.replace(problem, memory_limit_bytes=float(least))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("share", (-0.1, 0.0, 0.37, 0.999, 1.5))
def test_the_least_share_is_that_of_trying_all(name: str, share: float) -> None:
    problem, rows = CASES[name][0], Layouts.of(CASES[name][1])
    problem = limited(problem, rows, share)
    room = Room(problem, offload_shares(problem))
    assert room.shares.tolist() == [i / 10 for i in range(11)]
    found, peak = room.with_least_share(rows)
    for i, row in enumerate(CASES[name][1]):
        alone = priced(problem, Layouts.of([dataclasses.replace(row, optimizer_offload=float(s)) for s in room.shares]))[1]
        wanted = next((j for j, its in enumerate(alone) if problem.excess_bytes(its) <= 0), 10)
        assert found.optimizer_offload[i] == wanted / 10 and peak[i] == pytest.approx(alone[wanted])


@pytest.mark.parametrize("name", CASES)
def test_a_byte_takes_no_less_than_its_bound(name: str) -> None:
    problem, rows = CASES[name][0], Layouts.of(CASES[name][1])
    room = Room(problem, offload_shares(problem))
    before_s, before = priced(problem, rows)
    for share in (0.01, 0.3, 1.0):
        after_s, after = priced(problem, rows.with_columns(optimizer_offload=np.full(len(rows), share)))
        assert (after_s - before_s >= room.byte_s * (before - after) * (1 - 1e-9)).all() and (before > after).all()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("share", (-1.0, 0.2, 0.9, 2.0))
def test_no_number_of_layers_that_is_faster_is_passed_over(name: str, share: float) -> None:
    problem, rows = CASES[name][0], Layouts.of(CASES[name][1])
    problem = limited(problem, rows.with_columns(recompute=0 * rows.recompute + FULL), share)
    room = Room(problem, offload_shares(problem))
    step_s, peak = priced(problem, rows)
    whole = priced(problem, rows.with_columns(recompute=0 * rows.recompute + FULL))[1]
    for limit_s in np.quantile(step_s, (0.0, 0.5, 1.0)) * 1.1:
        found = room.with_counts([Partly(rows, step_s, peak, whole)], float(limit_s))
        kept = {found.row(i) for i in range(len(found))}
        for row in CASES[name][1]:
            wanted = None
            for k in range(1, len(problem.model.layers) + bool(problem.model.mtp)):
                some = dataclasses.replace(row, recompute=("full",), recompute_layers=str(k))
                its_s, its_peak = priced(problem, Layouts.of([some]))
                if wanted is None and its_s[0] < limit_s and its_peak[0] <= problem.peak_limit_bytes:
                    wanted = some if not violations(problem, some) else None
            assert wanted is None or wanted in kept


def test_what_is_looked_at() -> None:
    def shares(pins: str = "", forbid: str = "", **more: Any) -> list[float]:
        found: list[float] = offload_shares(tiny.problem(tiny.MIXED, pins=pins, forbid=forbid, **more)).tolist()
        return found

    assert len(shares()) == 11 and shares("optimizer_offload=0.123") == [0.123]
    assert shares("optimizer_offload<=0.2") == [0.0, 0.1, 0.2] and shares(forbid="optimizer_offload<0.9") == [0.9, 1.0]
    assert shares("optimizer_offload>1") == shares("sharding=fsdp") == shares(era="pytorch-2025") == [0.0]
    assert shares(precision="fp8-cs") == [0.0] and shares("sharding=optimizer") == shares()
    assert Room(MIXED, np.zeros(1)).byte_s == np.inf
    assert counts_layers(MIXED) and counts_layers(tiny.problem(tiny.MIXED, pins="recompute!=none"))
    for pins in ("recompute=full", "recompute_layers=1", "recompute_layers=all"):
        assert not counts_layers(tiny.problem(tiny.MIXED, pins=pins))
    assert not counts_layers(tiny.problem(tiny.MIXED, era="pytorch-2025"))


LLAMA = tiny.problem(load_model("llama3-70b"), "h100x16", batch=128, seq=8192, pins="tp=8 mbs=1 vpp=1")
QWEN = tiny.problem(load_model("qwen3-30b-a3b"), "h200x8", batch=64, pins="ep=8 pp=1 tp=1 cp=1 mbs=1 dispatcher=alltoall")


def test_a_model_fits_with_part_of_its_optimizer_on_the_host() -> None:
    kept = dataclasses.replace(LLAMA, pins=(*LLAMA.pins, parse_condition("optimizer_offload=0")))
    assert search(kept).best == [] and search(kept).variants == 0
    found = search(LLAMA)
    shares = [c.layout.optimizer_offload for c in found.best]
    assert 0 < shares[0] < 1 and all(shares) and found.variants >= len(shares)
    assert found.considered == sum(found.rejected.values()) + found.priced
    less = dataclasses.replace(LLAMA, pins=(*LLAMA.pins, parse_condition(f"optimizer_offload<={shares[0] - 0.01:.2f}")))
    assert all(c.step_s > found.best[0].step_s for c in search(less).best)


def test_a_pinned_number_of_layers_is_kept() -> None:
    asked = dataclasses.replace(
        QWEN, pins=(*QWEN.pins, parse_condition("recompute_layers=30"), parse_condition("recompute=full"))
    )
    best = search(asked, 1).best[0].layout
    assert (best.recompute, best.recompute_layers) == (("full",), "30")


@pytest.mark.parametrize("forbid", ["optimizer_offload>0", "recompute!=none"])
def test_megatron_takes_what_is_found(forbid: str) -> None:
    # Short of the memory that it takes without recompute, so that whole layers recompute in some of them or states move.
    free = search(QWEN, 1).best[0]
    pins = (*QWEN.pins, *(parse_condition(f"recompute!={names}") for names in ("moe", "moe_act", "layernorm", "layernorm+moe")))
    pins += (parse_condition("recompute!=layernorm+moe_act"),)
    tight = dataclasses.replace(
        QWEN, pins=pins, memory_limit_bytes=needed_bytes(free.peak_bytes) * 0.95, forbidden=(parse_condition(forbid),)
    )
    best = search(tight, 1).best[0].layout
    if forbid == "recompute!=none":
        assert not best.recompute and 0 < best.optimizer_offload < 1
    else:
        assert best.recompute == ("full",) and 0 < int(best.recompute_layers) < 48 and not best.optimizer_offload
    verdict = judged(tight, best)
    assert verdict.accepted, verdict
