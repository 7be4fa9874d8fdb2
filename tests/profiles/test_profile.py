"""Profile: what a nominal profile of every device holds and where it comes from, times by hand, orders, links."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.errors import ClusterError, ProblemError
from moeplan.profiles.curve_file import device_curves, load_curves
from moeplan.profiles.curves import StreamCurve
from moeplan.profiles.hardware import device_names, load_cluster
from moeplan.profiles.nominal import nominal
from moeplan.profiles.profile import Profile
from tests.conftest import PLAIN

MEASURED_GEMM = ("A100", "A100-PCIe", "H100", "H200", "B200", "GB200", "L40S")
"""Devices on which somebody measured a bf16 GEMM and published it."""
FP8 = ("H100", "H200", "H800", "H20", "B200", "GB300", "L40S", "MI300X")
"""Some devices with FP8 matrix units."""
OPERATIONS = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all")

# Slower and faster device in a product of 8192^3.
SLOWER = [
    ("L40S", "A100"), ("A100", "H100"), ("H100-PCIe", "H100"), ("H20", "A100"), ("H200", "B200"), ("H100", "B200"),
    ("B200", "GB200"), ("B200", "B300"), ("MI300X", "MI325X"), ("MI325X", "MI355X"), ("A800", "H800"),
]  # fmt: skip


@functools.cache
def built(name: str) -> Profile:
    """The nominal profile of 8 of a device."""
    return nominal(load_cluster(f"{name}x8"))


def product_s(name: str, precision: str = "bf16", size: float = 8192.0) -> float:
    return float(built(name).gemm(precision).seconds(size, size, size))


# ---------------------------------------------------------------- every device


@pytest.mark.parametrize("name", device_names())
def test_every_device_has_a_profile(name: str) -> None:
    profile = built(name)
    device = profile.cluster.device
    assert "bf16" in profile.gemms
    assert ("fp8" in profile.gemms) == ("fp8" in device.peak_flop_per_s)
    assert ("nvfp4" in profile.gemms) == ("fp4" in device.peak_flop_per_s)
    # Every precision has its grouped products in three directions.
    assert set(profile.grouped) == {p + way for p in profile.gemms for way in ("", "-dgrad", "-wgrad")}
    assert {"64", "128", "192", "192/128"} <= set(profile.attentions)
    assert set(profile.collectives) >= set(OPERATIONS)
    reach = {
        f"{lib}-{phase}{r}" for lib in ("deepep", "hybridep") for phase in ("dispatch", "combine") for r in ("", "-scale-out")
    }
    assert set(profile.dispatches) == reach


@pytest.mark.parametrize("name", device_names())
def test_nothing_is_faster_than_its_peak(name: str) -> None:
    profile = built(name)
    device, cluster = profile.cluster.device, profile.cluster
    sizes = np.array([512.0, 4096.0, 32768.0])
    for precision in profile.gemms:
        peak = device.peak_flop_per_s["bf16" if precision == "bf16" else "fp4" if precision == "nvfp4" else "fp8"]
        assert (2 * sizes**3 / profile.gemm(precision).seconds(sizes, sizes, sizes) < peak).all()
        for way in ("", "-dgrad", "-wgrad"):
            assert (16 * sizes**3 / profile.grouped[precision + way].seconds(8, sizes, sizes, sizes) < peak).all()
    assert all(curve.flop_per_s < device.peak_flop_per_s["bf16"] for curve in profile.attentions.values())
    assert 0.75 * device.memory_bytes_per_s < profile.stream_bytes_per_s < device.memory_bytes_per_s
    for op in ("all_gather", "reduce_scatter", "all_to_all"):  # an all-reduce in the switch moves less than its bytes
        for ranks in (2, 4, 8):
            if ranks <= cluster.domain_gpus:
                bus = 2**29 * (ranks - 1) / ranks / profile.collective_s(op, 2.0**29, ranks)
                assert bus < cluster.scale_up.bytes_per_s, (op, ranks)
    for key, curve in profile.dispatches.items():
        links = (cluster.scale_up.bytes_per_s, cluster.scale_out_bytes_per_s_per_gpu)
        assert curve.bytes_per_s < links[key.endswith("scale-out")], key


@pytest.mark.parametrize("name", device_names())
def test_origins_tell_the_truth(name: str) -> None:
    profile = built(name)
    assert profile.origins["gemm/bf16"].measured == (name in MEASURED_GEMM)
    for what, origin in profile.origins.items():
        assert origin.note, what
        substituted = any(rule in origin.note for rule in ("rate of", "as forward", "over bf16", "as deepep", "link x"))
        if origin.measured:
            assert origin.device == name.lower() and not substituted, what
        elif origin.device == name.lower():  # measured here, but as another precision or direction
            assert substituted, what
        else:
            assert device_curves(origin.device) is not None, what
    assert 0.0 <= profile.confidence() < 1.0
    if device_curves(name.lower()) is None:
        assert profile.confidence() == 0.0
    measured = sum(o.measured for o in profile.origins.values())
    assert profile.confidence() == measured / len(profile.origins)


def test_the_curves_of_one_device_are_its_part_of_the_file() -> None:
    everything = load_curves()
    assert {name: device_curves(name) for name in everything} == everything
    assert device_curves("H100") is device_curves("devices") is None


def test_curves_do_not_depend_on_the_number_of_nodes() -> None:
    small, large = (nominal(load_cluster(f"h100x{gpus}")) for gpus in (8, 1024))
    assert (small.cluster, large.cluster) == (load_cluster("h100x8"), load_cluster("h100x1024"))
    assert small.gemms == large.gemms and small.dispatches == large.dispatches


def test_a_scaled_curve_says_by_how_much() -> None:
    # A800: an A100 with two thirds of its NVLink; its rates of compute and memory are the same.
    profile = built("A800")
    assert "scaled from a100: compute x1.00, memory x1.00" in profile.origins["gemm/bf16"].note
    assert "link x0.67" in profile.origins["collectives/all_gather of 8"].note
    # H200: no own measurement of MXFP8, its plain FP8 stands for it. B200: that of NVFP4 is twice its FP8, as their peaks.
    assert "rate of fp8 x1.00" in built("H200").origins["gemm/fp8-mx"].note
    assert "rate of fp8 x2.00" in built("B200").origins["gemm/nvfp4"].note
    assert built("B200").gemms["nvfp4"].flop_per_s == pytest.approx(2 * built("B200").gemms["fp8"].flop_per_s)


def test_a_device_without_relatives_is_refused() -> None:
    cluster = load_cluster("h100x8")
    unknown = dataclasses.replace(cluster, device=dataclasses.replace(cluster.device, name="H1000"))
    with pytest.raises(ClusterError, match="'H1000' has neither measurements nor a measured relative"):
        nominal(unknown)


# ---------------------------------------------------------------- orders


@pytest.mark.parametrize("slower, faster", SLOWER)
def test_order_of_devices(slower: str, faster: str) -> None:
    assert product_s(slower) > product_s(faster)


@pytest.mark.parametrize("name", FP8)
def test_fewer_bits_are_faster_but_less_than_in_proportion(name: str) -> None:
    for precision in ("fp8", "fp8-blockwise", "fp8-mx"):
        assert 0.49 * product_s(name) < product_s(name, precision) < product_s(name)


def test_memory_and_links_follow_the_device() -> None:
    assert built("H200").stream_bytes_per_s > 1.3 * built("H100").stream_bytes_per_s
    for op in OPERATIONS:
        assert built("H800").collective_s(op, 2.0**29, 8) > 1.5 * built("H100").collective_s(op, 2.0**29, 8)
        assert built("B200").collective_s(op, 2.0**29, 8) < built("H100").collective_s(op, 2.0**29, 8)
    assert built("H100").attention(128, 128).flop_per_s < built("B200").attention(128, 128).flop_per_s


# ---------------------------------------------------------------- by hand


def test_rates_between_nodes_by_hand() -> None:
    # One NIC of 400 Gbit/s a GPU: 50 GB/s, of which rings attain 0.89 and an all-to-all 0.86; NVLink of 450 GB/s, 0.75.
    profile = nominal(load_cluster("h100x16"))
    assert profile.scale_out_bytes_per_s == pytest.approx(0.89 * 50e9)
    assert profile.all_to_all_bytes_per_s == pytest.approx(0.86 * 50e9)
    assert profile.scale_up_bytes_per_s == pytest.approx(0.75 * 450e9)
    assert PLAIN.stream_s(3e12) == 3.0


def test_only_fused_passes_enter_a_price() -> None:
    known = {"launch_s": 1.0, "error": 0.0, "error_p90": 0.0, "samples": 1, "valid": {}, "source": ""}
    streams = {
        "norm": StreamCurve(bytes_per_s=0.5e12, fused=True, **known),
        "swiglu": StreamCurve(bytes_per_s=0.1e12, **known),
    }
    profile = dataclasses.replace(PLAIN, streams=streams)
    assert [profile.stream_s(1e12, kind) for kind in ("norm", "swiglu", "router", "")] == [2.0, 1.0, 1.0, 1.0]
    assert streams["norm"].seconds(1e12) == 3.0


def test_a_slower_fabric_scales_what_crosses_it(tmp_path: Path) -> None:
    path = tmp_path / "half.yaml"
    path.write_text(yaml.safe_dump({"device": "H100", "gpus": 16, "nic": {"gbit_per_s": 200}, "scale_up": {"gb_per_s": 225}}))
    half, usual = nominal(load_cluster(path)), nominal(load_cluster("h100x16"))
    assert half.scale_out_bytes_per_s == pytest.approx(usual.scale_out_bytes_per_s / 2)
    for library in ("deepep", "hybridep"):
        for reach in ("", "-scale-out"):
            slow, fast = (p.dispatches[f"{library}-dispatch{reach}"].bytes_per_s for p in (half, usual))
            assert slow == pytest.approx(fast / 2)
    # Times of a collective double but for what the smallest message takes.
    fixed = float(usual.collective_s("all_gather", 1.0, 8))
    slow, fast = (float(p.collective_s("all_gather", 2.0**29, 8)) for p in (half, usual))
    assert slow - fixed == pytest.approx(2 * (fast - fixed))
    assert half.gemms["bf16"] == usual.gemms["bf16"]


def test_groups_between_measured_sizes() -> None:
    # Measured: 2, 4 and 8 ranks. A ring's bytes go with (n - 1) / n: six ranks take those of four times (5/6) / (3/4).
    four = PLAIN.collective_s("all_gather", 1e9, 4)
    assert PLAIN.collective_s("all_gather", 1e9, 6) == pytest.approx(four * (5 / 6) / (3 / 4)) == pytest.approx(5 / 6 / 100)
    assert PLAIN.collective_s("all_gather", 1e9, 64) == pytest.approx(63 / 64 / 100)
    assert PLAIN.collective_s("all_gather", 1e9, 1) == 0.0


def test_dispatch_by_hand() -> None:
    # Dispatch and combine: 100 MB at 100 GB/s inside, 10 MB at 20 GB/s outside; both links work at once.
    assert PLAIN.dispatch_s("deepep", 100e6, 10e6, 1024) == pytest.approx(2 * 1e-3)
    assert PLAIN.dispatch_s("deepep", 10e6, 10e6, 1024) == pytest.approx(2 * 0.5e-3)
    profile = built("H100")
    inside = profile.dispatch_s("deepep", 100e6, 0.0, 4096)
    assert profile.dispatch_s("deepep", 100e6, 1.0, 4096) == inside  # a fixed time outside does not show beside it
    assert inside == sum(profile.dispatches[f"deepep-{phase}"].seconds(100e6, 4096) for phase in ("dispatch", "combine"))


def test_attention_of_a_size_that_nobody_measured() -> None:
    profile = built("H100")
    assert profile.attention(192, 128) is profile.attentions["192/128"]
    assert profile.attention(128, 128) is profile.attentions["128"]
    # The next smaller one, by the mean of keys and values; 64 for all below it.
    assert profile.attention(160, 160) is profile.attentions["128"]
    assert profile.attention(256, 256) is profile.attentions["192"]
    assert profile.attention(32, 32) is profile.attentions["64"]


def test_casts_cost_nothing_in_bf16() -> None:
    assert built("H100").quantize_s("bf16", 1e9) == 0.0
    assert built("H100").quantize_s("fp8", 1e9) > 0.0


def test_what_a_device_lacks() -> None:
    with pytest.raises(ProblemError, match="A100 has no GEMM in fp8.*it has bf16"):
        built("A100").gemm("fp8")
    with pytest.raises(ProblemError, match="H100 has no grouped GEMM in nvfp4-wgrad"):
        built("H100").grouped_gemm("nvfp4", "wgrad")


# ---------------------------------------------------------------- laws

ROW = st.tuples(st.floats(1, 1e10), st.sampled_from([1, 2, 3, 4, 6, 8, 16, 64]), st.floats(0, 1e8))


@given(rows=st.lists(ROW, min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_arrays_equal_numbers(rows: list[tuple[float, int, float]]) -> None:
    profile = built("GB200")
    size, ranks, far = (np.array(column) for column in zip(*rows, strict=True))
    for op in OPERATIONS:
        single = [float(profile.collective_s(op, s, r)) for s, r, _ in rows]
        assert profile.collective_s(op, size, ranks).tolist() == pytest.approx(single, rel=1e-12)
    single = [float(profile.dispatch_s("hybridep", s, f, 4096)) for s, _, f in rows]
    assert profile.dispatch_s("hybridep", size, far, 4096).tolist() == pytest.approx(single, rel=1e-12)


@given(size=st.floats(1, 1e10), more=st.floats(1, 1e3))
@pytest.mark.parametrize("name", ["A100", "H100", "GB200", "L40S"])
@settings(max_examples=40, deadline=None)
def test_more_bytes_take_no_less(name: str, size: float, more: float) -> None:
    profile: Any = built(name)
    for op in OPERATIONS:
        for ranks in (2, 4, 8, 64):
            assert profile.collective_s(op, size * more, ranks) >= profile.collective_s(op, size, ranks) > 0.0
    near, far = profile.dispatch_s("deepep", size, 0.0, 1.0), profile.dispatch_s("deepep", size, size, 1.0)
    assert far >= near
    assert profile.dispatch_s("deepep", size * more, size, 1.0) >= far
