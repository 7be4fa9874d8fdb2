"""A measured profile: the chain from samples to prices, what stands in where nothing was measured, and the file."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeplan.costmodels.collectives import Group, all_gather_s, all_reduce_s, all_to_all_s, reduce_scatter_s
from moeplan.costmodels.layout import Layout
from moeplan.costmodels.model_catalog import load_model
from moeplan.costmodels.uncertainty import KINDS, curve_errors
from moeplan.errors import ClusterError, DeviceError
from moeplan.planner.plan import price_plan
from moeplan.planner.problem import Problem, parse_condition
from moeplan.planner.solve import solve
from moeplan.profiles.cases import collective_cases, kernel_cases
from moeplan.profiles.hardware import load_cluster
from moeplan.profiles.measured import MOST_REMARKS, measured_profile
from moeplan.profiles.nominal import nominal
from moeplan.profiles.origin import AS_NOMINAL
from moeplan.profiles.profile import Profile
from moeplan.profiles.profile_file import load_profile
from moeplan.profiles.samples import Sample
from tests.conftest import TINY_MOE, workload_of
from tests.profiles.synthetic import environment_of, samples_of


def in_bf16(profile: Profile) -> Profile:
    """The profile with gradients of weights that are written in bf16, as `moeplan profile` measures them."""
    grouped = {key: dataclasses.replace(curve, weight_bytes=2.0) for key, curve in profile.grouped.items()}
    return dataclasses.replace(profile, grouped=grouped)


TRUTH = in_bf16(nominal(load_cluster("h100x16")))
SAMPLES = samples_of(TRUTH, noise=0.02)
MEASURED = measured_profile(SAMPLES, environment_of(TRUTH), samples_sha256="ab12", remarks=("a slow rank",))
SMALL = dataclasses.replace(TRUTH, cluster=dataclasses.replace(TRUTH.cluster, gpus=4, gpus_per_node=2, domain_gpus=2))
CPU_SAMPLES = [
    dataclasses.replace(s, seconds=50 * s.seconds) for s in samples_of(SMALL, scale="cpu", noise=0.03) if s.op != "overlap"
]
CPU: dict[str, Any] = {
    "device": "AMD EPYC 7B13",
    "backend": "cpu",
    "communication": "gloo",
    "memory_bytes": 8e9,
    "processors": 1,
}


def cpu_profile(samples: list[Sample], **changes: Any) -> Profile:
    return measured_profile(samples, environment_of(SMALL, **CPU | {"per_node": 2} | changes))


# ---------------------------------------------------------------- the chain


LAYOUTS = (
    Layout(dp=16, ep=16, dispatcher="alltoall"),
    Layout(dp=16, ep=8, edp=2, dispatcher="allgather", micro_batch=2),
    Layout(tp=4, dp=2, pp=2, ep=8, dispatcher="deepep", sequence_parallel=True, recompute=("moe_act",)),
    Layout(tp=2, cp=2, dp=4, ep=4, etp=2, edp=2, dispatcher="alltoall", sequence_parallel=True, sharding="fsdp"),
)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: f"tp{x.tp} cp{x.cp} pp{x.pp} ep{x.ep} etp{x.etp}")
def test_a_measured_machine_prices_as_the_machine(layout: Layout) -> None:
    workload, model = workload_of(seq_len=4096), load_model("qwen3-30b-a3b")
    plan, again = (price_plan(Problem(model=model, profile=p, workload=workload), layout) for p in (TRUTH, MEASURED))
    assert again.step_s == pytest.approx(plan.step_s, rel=0.03)
    for name, seconds in plan.time:
        assert abs(float(again.time.parts[name]) - float(seconds)) < 0.03 * plan.step_s, name


def test_everything_measured_is_said_to_be() -> None:
    measured = {name for name, origin in MEASURED.origins.items() if not origin.note.startswith(AS_NOMINAL)}
    assert {"gemm/bf16", "gemm/fp8", "grouped_gemm/bf16", "grouped_gemm/bf16-dgrad", "grouped_gemm/bf16-wgrad", "attention/128",
            "attention/64", "rates/memory", "streams/swiglu", "collectives/all_gather of 8", "collectives/all_to_all of 2",
            "multi_node/reduce_scatter of 16/2", "links/ring", "links/all_to_all", "links/send"} <= measured  # fmt: skip
    assert all(MEASURED.origins[name].measured for name in measured)
    assert {"dispatch/deepep-dispatch", "attention/192/128", "gemm/fp8-blockwise"} <= set(MEASURED.origins) - measured
    assert MEASURED.cluster == TRUTH.cluster and MEASURED.name == "measured"
    run = MEASURED.measured_on
    assert run is not None
    assert (run.backend, run.ranks, run.nodes, run.samples, run.samples_sha256) == ("cuda", 16, 2, len(SAMPLES), "ab12")
    assert run.software == "torch 2.13.0, nccl 2.29.2" and run.remarks[0] == "a slow rank"
    assert any("skewed" in text for text in run.remarks)


def test_every_kind_of_part_finds_the_errors_of_its_curves() -> None:
    errors = dict(zip(KINDS, curve_errors(MEASURED, workload_of(), 0.12), strict=True))
    with_curves = {kind for kind, prefixes in KINDS.items() if prefixes}
    assert {kind for kind, error in errors.items() if error > 0} == with_curves
    assert max(errors.values()) < 0.12


def test_links_and_factors_come_back() -> None:
    assert MEASURED.ring_share == pytest.approx(TRUTH.ring_share, rel=0.03)
    assert MEASURED.all_to_all_share == pytest.approx(TRUTH.all_to_all_share, rel=0.03)
    assert MEASURED.send_share == pytest.approx(TRUTH.send_share, rel=0.03)
    assert MEASURED.scale_out_latency_s == pytest.approx(TRUTH.scale_out_latency_s, rel=0.1)
    assert MEASURED.overlap_loss == pytest.approx(TRUTH.overlap_loss, abs=0.03)
    assert MEASURED.host == pytest.approx(1.0, rel=0.05)
    assert MEASURED.host_copies["host_to_device"] == pytest.approx(TRUTH.cluster.pcie.bytes_per_s, rel=0.05)
    assert MEASURED.sustained == TRUTH.sustained


def test_what_was_measured_across_domains_is_priced_as_it_was() -> None:
    message, where = 64.0 * 2**20, Group(ranks=16, local=8)
    for op, price in (("all_gather", all_gather_s), ("reduce_scatter", reduce_scatter_s), ("all_reduce", all_reduce_s)):
        (sample,) = (s for s in SAMPLES if (s.op, s.group, s.sizes.get("message_bytes")) == (op, "16/2", message))
        assert float(price(MEASURED, message, where)) == pytest.approx(sample.seconds, rel=1e-6)
    (sample,) = (s for s in SAMPLES if (s.op, s.group, s.sizes.get("message_bytes")) == ("all_to_all", "16/2", message))
    assert float(all_to_all_s(MEASURED, message / 2, message * 7 / 16, where)) == pytest.approx(sample.seconds, rel=1e-6)


def test_the_file_holds_it_digit_by_digit(tmp_path: Path) -> None:
    for profile in (MEASURED, cpu_profile(CPU_SAMPLES)):
        profile.save(tmp_path / "profile.yaml")
        again = load_profile(tmp_path / "profile.yaml")
        for field in dataclasses.fields(Profile):
            if field.name not in ("path", "sha256"):
                assert getattr(again, field.name) == getattr(profile, field.name), field.name


# ---------------------------------------------------------------- a slow collective


def test_a_slow_all_to_all_changes_the_plan() -> None:
    truth = nominal(load_cluster("h100x8"))
    problem = Problem(model=TINY_MOE, profile=truth, workload=workload_of(seq_len=2048), pins=(parse_condition("ep=8"),))

    def chosen(factor: float) -> Any:
        samples = [dataclasses.replace(s, seconds=factor * s.seconds) if s.op == "all_to_all" else s for s in samples_of(truth)]
        profile = measured_profile(samples, environment_of(truth))
        return solve(dataclasses.replace(problem, profile=profile)).plans[0].layout

    assert chosen(1.0).dispatcher == "alltoall"
    assert chosen(5.0).dispatcher == "allgather"


# ---------------------------------------------------------------- parts of a run on a known device


def test_collectives_alone_leave_the_kernels_nominal() -> None:
    usual = nominal(load_cluster("h100x16"))
    profile = measured_profile([s for s in SAMPLES if s.group], environment_of(TRUTH))
    assert profile.gemms == usual.gemms and profile.attentions == usual.attentions and profile.host == usual.host
    assert profile.collectives["all_gather"][8] != usual.collectives["all_gather"][8]
    origin = profile.origins["gemm/bf16"]
    assert origin.note == AS_NOMINAL + usual.origins["gemm/bf16"].note and origin.measured


def test_kernels_alone_leave_the_links_nominal() -> None:
    usual = nominal(load_cluster("h100x16"))
    profile = measured_profile([s for s in SAMPLES if not s.group], environment_of(TRUTH))
    assert profile.collectives == usual.collectives and profile.dispatches == usual.dispatches and not profile.multi_node
    assert (profile.ring_share, profile.hop_s, profile.overlap_loss) == (usual.ring_share, 0.0, pytest.approx(0.33))
    assert not any(name.startswith("links/") for name in profile.origins)


def test_groups_that_were_not_measured_stay_nominal() -> None:
    four = in_bf16(nominal(load_cluster("h100x4")))
    profile = measured_profile(samples_of(four, noise=0.01), environment_of(four))
    usual = nominal(load_cluster("h100x4"))
    assert profile.collectives["all_gather"][8] == usual.collectives["all_gather"][8]
    assert profile.collectives["all_gather"][4] != usual.collectives["all_gather"][4]
    assert profile.origins["collectives/all_gather of 8"].note.startswith(AS_NOMINAL)


def test_a_forward_alone_takes_the_nominal_backward() -> None:
    forward = [s for s in SAMPLES if s.op != "attention-backward"]
    profile = measured_profile(forward, environment_of(TRUTH))
    assert profile.attentions["128"].backward_ratio == TRUTH.attentions["128"].backward_ratio
    assert "backward over forward nominal" in profile.origins["attention/128"].note


def test_a_step_sustains_no_more_than_what_was_measured() -> None:
    usual = nominal(load_cluster("gb300x72"))
    assert usual.sustained["quantized"] > 1.0  # of curves that were scaled from another device
    kernels = [s for s in samples_of(in_bf16(usual)) if not s.group]
    profile = measured_profile(kernels, environment_of(usual))
    assert profile.sustained == {**usual.sustained, "quantized": 1.0}
    unmeasured = measured_profile([s for s in kernels if s.key != "fp8"], environment_of(usual))
    assert unmeasured.sustained == usual.sustained


@pytest.mark.parametrize(("launch_s", "host"), [(3e-6, 0.5), (12e-6, 2.0), (1.0, 100.0)])
def test_the_host_is_as_fast_as_it_launches(launch_s: float, host: float) -> None:
    launch = Sample(op="launch", key="kernel", seconds=launch_s, spread=0.01)
    assert measured_profile([launch], environment_of(TRUTH)).host == pytest.approx(host)


def test_a_named_cluster_counts() -> None:
    assert measured_profile(SAMPLES, environment_of(TRUTH, cluster="h100x256")).cluster == load_cluster("h100x256")
    assert measured_profile(SAMPLES, environment_of(TRUTH), load_cluster("h100x64")).cluster == load_cluster("h100x64")


def test_links_faster_than_any_are_refused() -> None:
    fast = [dataclasses.replace(s, seconds=1e-9) if s.op == "send" and s.group == "2/1" else s for s in SAMPLES]
    with pytest.raises(ClusterError, match="send attains .* times the raw rate"):
        measured_profile(fast, environment_of(TRUTH))


def test_remarks_are_counted_where_they_are_many() -> None:
    said = [f"remark {i}" for i in range(MOST_REMARKS + 5)]
    run = measured_profile([], environment_of(TRUTH), remarks=said).measured_on
    assert run is not None and len(run.remarks) == MOST_REMARKS and run.remarks[-1] == "and 6 further remarks"


# ---------------------------------------------------------------- a device that the catalog lacks


def test_a_cpu_cluster_can_be_planned_for() -> None:
    profile = cpu_profile(CPU_SAMPLES)
    assert (profile.cluster.gpus, profile.cluster.domain_gpus, profile.sustained) == (4, 2, {})
    assert profile.scale_up_bytes_per_s == pytest.approx(SMALL.scale_up_bytes_per_s / 50, rel=0.05)
    assert profile.scale_out_bytes_per_s == pytest.approx(SMALL.scale_out_bytes_per_s / 50, rel=0.05)
    solution = solve(Problem(model=TINY_MOE, profile=profile, workload=workload_of()))
    assert solution.status == "optimal"
    best = solution.plans[0]
    assert best.layout.world == 4 and 0 < best.low_s < best.step_s < best.high_s
    # the price is that of the machine that was measured, 50 times slower
    truth = price_plan(Problem(model=TINY_MOE, profile=SMALL, workload=workload_of()), best.layout)
    device = ("attention GEMM", "MLP GEMM", "expert GEMM", "norms and activations")
    for name in device:
        parts = [sum(float(s) for part, s in plan.time if part.endswith(name)) for plan in (best, truth)]
        assert parts[0] == pytest.approx(50 * parts[1], rel=0.25), name


def test_a_single_process_has_rules_for_the_rest() -> None:
    profile = cpu_profile([s for s in CPU_SAMPLES if not s.group], ranks=1, per_node=1)
    assert solve(Problem(model=TINY_MOE, profile=profile, workload=workload_of())).status == "optimal"
    for op in ("all_gather", "reduce_scatter", "all_reduce", "all_to_all"):
        origin = profile.origins[f"collectives/{op} of 2"]
        assert not origin.measured and origin.error == 1.0 and origin.note == "the rate of a copy in memory"
    largest = 2.0**29
    copy_s = largest / profile.stream_bytes_per_s
    assert profile.collectives["all_gather"][2].seconds(largest) == pytest.approx(
        copy_s, rel=1e-2
    )  # half of it, read and written
    assert profile.collectives["all_reduce"][2].seconds(largest) == pytest.approx(2 * copy_s, rel=1e-2)
    assert not profile.origins["dispatch/hybridep-combine-scale-out"].measured


def without(*ops: str, keys: tuple[str, ...] = ()) -> list[Sample]:
    return [s for s in CPU_SAMPLES if s.op not in ops and s.key not in keys]


def test_grouped_products_from_dense_ones() -> None:
    profile = cpu_profile(without("grouped_gemm"))
    dense = profile.gemms["bf16"]
    for key in ("bf16", "bf16-dgrad", "bf16-wgrad"):
        assert profile.grouped[key].seconds(1, 512, 256, 128) == pytest.approx(dense.seconds(512, 256, 128))
        assert float(profile.grouped[key].seconds(8, 512, 256, 128)) > dense.seconds(8 * 512, 256, 128)
        assert not profile.origins[f"grouped_gemm/{key}"].measured
    assert profile.origins["grouped_gemm/bf16"].error == pytest.approx(dense.error + 0.14)
    assert profile.origins["grouped_gemm/bf16-wgrad"].note == "as the forward product"


def test_a_direction_from_the_forward() -> None:
    profile = cpu_profile(without(keys=("bf16-wgrad",)))
    assert profile.grouped["bf16-wgrad"] == profile.grouped["bf16"] != profile.grouped["bf16-dgrad"]


def test_attention_from_another_head_size_or_from_products() -> None:
    latent = [dataclasses.replace(s, key="192/128") if s.key == "128" else s for s in without(keys=("64",))]
    profile = cpu_profile(latent)
    assert profile.attentions["128"] == profile.attentions["192/128"]
    assert profile.origins["attention/128"].note == "as head size 192/128" and not profile.origins["attention/128"].measured
    profile = cpu_profile(without("attention", "attention-backward"))
    assert profile.attentions["128"].flop_per_s == pytest.approx(0.85 * profile.gemms["bf16"].flop_per_s)
    assert profile.origins["attention/128"].note == "dense bf16 GEMM and memory"


def test_collectives_from_others() -> None:
    whole = cpu_profile(CPU_SAMPLES).collectives
    profile = cpu_profile(without("all_gather", "all_reduce"))
    assert profile.collectives["all_gather"][2].times_s == whole["reduce_scatter"][2].times_s
    both = 2 * np.array(whole["reduce_scatter"][2].times_s)
    assert profile.collectives["all_reduce"][2].times_s == pytest.approx(both.tolist())
    assert profile.origins["collectives/all_reduce of 2"].note == "reduce-scatter and all-gather"
    profile = cpu_profile(without("all_to_all"))
    assert profile.origins["collectives/all_to_all of 2"].note == "as all_gather"
    assert profile.all_to_all_share == 1.0 and "links/all_to_all" not in profile.origins


def test_small_groups_from_larger_ones() -> None:
    four = dataclasses.replace(SMALL, cluster=dataclasses.replace(SMALL.cluster, gpus_per_node=4, domain_gpus=4))
    samples = [s for s in samples_of(four, scale="cpu") if s.group != "2/1"]
    profile = measured_profile(samples, environment_of(four, **CPU))
    ratio = profile.collective_s("all_gather", 1e6, 2) / profile.collective_s("all_gather", 1e6, 4)
    assert ratio == pytest.approx((1 / 2) / (3 / 4))
    assert profile.origins["collectives/all_gather of 2"].note == "that of 4 by (n - 1) / n"


def test_memory_from_products_where_no_copy_was_measured() -> None:
    profile = cpu_profile(without("stream"))
    assert profile.stream_bytes_per_s == profile.gemms["bf16"].bytes_per_s
    assert not profile.origins["rates/memory"].measured


def test_the_coarse_grid_alone_gives_a_profile() -> None:
    first = {c.case for c in [*kernel_cases([], "cuda", 80e9), *collective_cases(16, 8, "cuda")] if c.tier == 0}
    coarse = measured_profile([s for s in samples_of(TRUTH) if s.case in first or s.op == "overlap"], environment_of(TRUTH))
    workload, model = workload_of(seq_len=4096), load_model("qwen3-30b-a3b")
    for layout in LAYOUTS:
        plan, again = (price_plan(Problem(model=model, profile=p, workload=workload), layout) for p in (TRUTH, coarse))
        assert again.step_s == pytest.approx(plan.step_s, rel=0.1)


def test_without_products_there_is_no_profile() -> None:
    with pytest.raises(DeviceError, match="AMD EPYC 7B13: too few bf16 GEMMs") as caught:
        cpu_profile(without("gemm"))
    assert caught.value.hint is not None and "--resume" in caught.value.hint
