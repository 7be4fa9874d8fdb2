"""Lines through the curves of a profile: within the error that they state, exact where a curve is a line."""

import dataclasses

import numpy as np
import pytest

from moeplan.costmodels.collectives import all_gather_s, group
from moeplan.costmodels.moe.base import MoeSize
from moeplan.costmodels.moe.fitted import Experts, fit_constants
from moeplan.errors import ProblemError
from moeplan.profiles.hardware import load_cluster
from moeplan.profiles.nominal import nominal

PROFILE = nominal(load_cluster("h100x64"))
EXPERTS = Experts(hidden=4096, width=14336, count=8, gemms=3)


def sized(mp=8, esp=8, ep=8, tokens=8192):
    token_bytes = 2.0 * tokens * 4096
    return MoeSize(
        token_bytes=token_bytes, slot_bytes=2.0 * token_bytes, expert_flop=2.0 * 3 * 2 * tokens * 4096 * 14336, mp_ranks=mp,
        esp_ranks=esp, ep_ranks=ep,
    )  # fmt: skip


def test_lines_stay_within_the_error_that_is_stated():
    size = sized()
    fit = fit_constants(PROFILE, size, EXPERTS, most_chunks=8, gradient_bytes=1e8)
    assert set(fit.errors) == set(fit.constants.given) == {
        "a2a", "fused-a2a", "all-gather", "reduce-scatter", "all-reduce", "mp-all-gather", "gemm", "gradient-all-reduce",
    }  # fmt: skip
    assert all(0.0 <= error < 0.1 for error in fit.errors.values())
    gathered = size.slot_bytes * size.esp_ranks / size.mp_ranks * np.array([1.0, 0.5, 0.125])
    exact = all_gather_s(PROFILE, gathered, group(PROFILE, 8, 1))
    line = fit.constants.given["all-gather"].time_s(gathered)
    assert np.max(np.abs(line / exact - 1.0)) <= fit.errors["all-gather"] * (1.0 + 1e-9)


def test_all_to_all_between_nodes_is_a_line():
    fit = fit_constants(PROFILE, sized(), EXPERTS, most_chunks=8)
    assert fit.errors["a2a"] < 1e-9
    # 8 ranks of 8 nodes: 7/8 of the buffer leave.
    assert fit.constants.given["a2a"].unit_s == pytest.approx(7.0 / 8.0 / PROFILE.all_to_all_bytes_per_s)
    assert fit.constants.given["a2a"].startup_s == pytest.approx(7.0 * PROFILE.scale_out_latency_s)


def test_gemms_of_a_whole_expert():
    size = sized(mp=1, esp=1)
    fit = fit_constants(PROFILE, size, EXPERTS, most_chunks=8)
    experts = fit.constants.lines(gemms=3, mp=1, esp=1, ep=8).experts
    curve, rows = PROFILE.grouped_gemm("bf16", "forward"), 2 * 8192
    exact = (curve.seconds(1.0, rows, 2 * 14336, 4096) + curve.seconds(1.0, rows, 4096, 14336)) / PROFILE.sustained_gemm("bf16")
    assert experts.time_s(size.expert_flop) == pytest.approx(exact, rel=fit.errors["gemm"] * 1.001 + 1e-12)


def test_groups_of_one_rank_need_no_line():
    fit = fit_constants(PROFILE, sized(mp=1, esp=1), EXPERTS, most_chunks=8)
    assert set(fit.constants.given) == {"a2a", "fused-a2a", "gemm"}
    assert fit.constants.groups == {"mp": 1, "esp": 1, "ep": 8}


def test_slopes_are_never_negative():
    for tokens in (1, 64, 1 << 20):
        fit = fit_constants(PROFILE, sized(tokens=tokens), EXPERTS, most_chunks=64, gradient_bytes=1.0)
        assert all(line.startup_s >= 0.0 and line.unit_s >= 0.0 for line in fit.constants.given.values())


def test_more_ranks_than_gpus():
    with pytest.raises(ProblemError, match="128 ranks are more than the 64 GPUs of H100x64"):
        fit_constants(PROFILE, sized(ep=16), EXPERTS, most_chunks=8)


def test_experts_follow_their_precision():
    slow, fast = (
        fit_constants(PROFILE, sized(), dataclasses.replace(EXPERTS, precision=name), most_chunks=8).constants.given["gemm"]
        for name in ("bf16", "fp8-blockwise")
    )
    assert fast.unit_s < slow.unit_s
