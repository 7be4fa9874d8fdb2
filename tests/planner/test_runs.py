"""One row of a run table becomes one layout, with a remark for everything that it does not say."""

import re
from typing import Any

import pytest

from moeplan.costmodels.model_catalog import load_model
from moeplan.planner.cells import Unsupported
from moeplan.planner.runs import SURPLUS, Run, group_key, read_run
from tests.planner.published_rows import (
    BRIDGE,
    DGXC,
    FOLDING,
    LORA,
    MLPERF,
    PAXML,
    ROWS,
    SIMUMAX,
    SWIFT,
    TITAN,
    UNSTATED,
)

FULL = {
    **{k: v for k, v in BRIDGE.items() if k != "measured_step_s"},
    "id": "full", "model": "Mixtral-8x7B", "gpu": "H100", "num_gpus": "64", "gpus_per_node": "8", "precision": "bf16",
    "gbs": "256", "mbs": "1", "tp": "2", "pp": "2", "vpp": "4", "ep": "8", "sequence_parallel": "yes",
    "cuda_graphs": "none", "dispatcher": "alltoall", "a2a_overlap": "no", "other": "force-balanced routing; mock data",
}  # fmt: skip
"""A row that says everything."""


def read(row: dict[str, str], **cells: str) -> Run:
    return read_run({**row, **cells})


def test_a_row_that_says_everything() -> None:
    run = read(FULL)
    assert run.remarks == () and run.model == load_model("mixtral-8x7b")
    assert (run.cluster.name, run.cluster.domain_gpus, run.workload.era.name) == ("H100x64", 8, "graphs-2026")
    assert (run.workload.seq_len, run.workload.global_batch, run.workload.precision.name) == (4096, 256, "bf16")
    x = run.layout
    assert (x.tp, x.cp, x.pp, x.vpp, x.dp, x.ep, x.etp, x.edp, x.micro_batch) == (2, 1, 2, 4, 16, 8, 1, 4, 1)
    assert (x.sequence_parallel, x.sharding, x.dispatcher, x.ep_overlap, x.stages) == (True, "optimizer", "alltoall", False, "")


def test_megatron_bridge() -> None:
    run = read(BRIDGE)
    assert (run.layout.cuda_graphs, run.layout.dispatcher, run.layout.ep_overlap) == (("full_iteration",), "hybridep", True)
    assert (run.workload.gradient_bytes, run.workload.capacity_factor, run.workload.imbalance) == (2, 0.0, 1.0)
    assert (run.cluster.domain_gpus, run.cluster.gpus_per_node, run.remarks) == (72, 4, ())


def test_token_drop_and_fsdp() -> None:
    run = read(FOLDING)
    assert (run.layout.sharding, run.layout.tp, run.layout.etp, run.layout.edp) == ("fsdp", 8, 8, 16)
    assert (run.workload.capacity_factor, run.workload.gradient_bytes, run.workload.era.name) == (1.0, 2, "deepep-2025")
    assert [r.split(":")[0] for r in run.remarks] == [
        "vpp", "mbs", "recompute", "dispatcher", "CUDA graphs", "offload",
    ]  # fmt: skip


def test_before_folding_etp_was_tp() -> None:
    run = read(DGXC)
    assert (run.layout.etp, run.layout.edp, run.workload.era.name, len(run.model.layers)) == (4, 1, "te-2024", 4)
    assert "etp: assumed 4" in run.remarks
    assert "precision: fp8 does not say how it scales, assumed per-tensor scaling" in run.remarks
    later = read(DGXC, source="release 25.05", source_ref="")
    assert later.layout.etp == 1 and "etp: assumed 1" in later.remarks


def test_uneven_stages() -> None:
    run = read(MLPERF)
    assert run.layout.stages and not [r for r in run.remarks if "split" in r]
    assert run.layout.tp_overlap and run.workload.gradient_bytes == 2
    plain = read(MLPERF, other="real C4 data")
    assert plain.layout.stages == run.layout.stages
    assert "pipeline split: 126 layers over 64 chunks, assumed the balanced one" in plain.remarks


def test_no_overlap() -> None:
    run = read(SIMUMAX)
    assert not run.layout.dp_overlap and not run.layout.tp_overlap and run.remarks == ()
    assert read(SIMUMAX, other="mock data").layout.dp_overlap


def test_other_frameworks() -> None:
    titan, paxml = read(TITAN), read(PAXML)
    assert titan.layout.sharding == paxml.layout.sharding == "fsdp"
    assert titan.layout.recompute == ("core_attn",) and "priced as core attention" in titan.remarks[0]
    assert (paxml.layout.tp, paxml.layout.pp, paxml.layout.dp) == (1, 1, 128)
    assert {"tp: assumed 1", "pp: assumed 1"} <= set(paxml.remarks)


def test_routing_of_real_data_is_uneven() -> None:
    assert read(SWIFT).workload.imbalance == 1.1
    assert "routing imbalance of real data: assumed 1.1" in read(SWIFT).remarks
    assert read(SWIFT, notes="").workload.imbalance == 1.0
    assert read(SWIFT, other="token drop, capacity factor 1").workload.imbalance == 1.0
    dense = read(TITAN, notes="real C4 data")
    assert dense.workload.imbalance == 1.0


@pytest.mark.parametrize(
    ("row", "cells", "reason"),
    [
        (LORA, {}, "adapter fine-tuning (LoRA) is not modelled"),
        (UNSTATED, {}, "num_gpus is not given"),
        (FULL, {"model": ""}, "model is not given"),
        (FULL, {"gpu": ""}, "gpu is not given"),
        (FULL, {"seq_len": ""}, "seq_len is not given"),
        (FULL, {"gbs": " "}, "gbs is not given"),
        (FULL, {"tp": ""}, "tp is not given"),
        (FULL, {"ep": ""}, "ep is not given"),
        (FULL, {"model": "Mixtrl-8x7B"}, "unknown model 'Mixtrl-8x7B' (did you mean"),
        (FULL, {"model": "m" * 300}, "unknown model"),
        (FULL, {"model": "./no/such/config.json"}, "does not exist"),
        (FULL, {"model": "mixtral-8x7b-99l-proxy"}, "has 32 layers, cannot be cut to 99"),
        (FULL, {"gpu": "Z100"}, "unknown device 'Z100'"),
        (FULL, {"precision": "fp9"}, "unknown precision 'fp9'"),
        (FULL, {"era": "yesterday"}, "unknown era 'yesterday'"),
        (FULL, {"num_gpus": "60"}, "60 GPUs do not fill nodes of 8"),
        (FULL, {"num_gpus": "1e9"}, "at most 10000000"),
        (FULL, {"gpus_per_node": "3"}, "do not fill nodes of 3"),
        (FULL, {"tp": "3"}, "tp*cp*pp = 3*1*2 = 6 does not divide 64 GPUs"),
        (FULL, {"etp": "3"}, "etp*ep = 3*8 = 24 does not divide the 32 GPUs of a stage"),
        (FULL, {"ep": "16"}, "ep=16 does not divide the 8 experts of mixtral-8x7b"),
        (FULL, {"mbs": "3"}, "global batch 256 is not a multiple of mbs*dp = 3*16 = 48"),
        (FULL, {"vpp": "18"}, "pp*vpp = 2*18 = 36 chunks exceed the 32 layers"),
        (FULL, {"gbs": "x"}, "gbs='x' is not a number"),
        (FULL, {"seq_len": "nan"}, "seq_len=nan"),
        (FULL, {"seq_len": "1e9"}, "seq_len=1000000000 is more than"),
        (FULL, {"sequence_parallel": "perhaps"}, "sequence_parallel='perhaps' is neither yes nor no"),
        (FULL, {"dp_type": "magic"}, "dp_type 'magic' is not known"),
        (FULL, {"recompute": "everything"}, "module 'everything' is not known"),
        (FULL, {"cuda_graphs": "te:all"}, "scope 'all' is not known"),
        (FULL, {"dispatcher": "pigeon"}, "dispatcher 'pigeon' is not known"),
        (FULL, {"offload": "optimizer, fraction 3"}, "a share of 3 is more than all"),
        (FULL, {"other": "pp_layout=Et*3|tL"}, "pp_layout 'Et*3|tL' does not fit"),
        (FULL, {"other": "pp_layout=(("}, "pp_layout '((' does not fit"),
        (FULL, {"other": "pp_layout=t*99999999999L"}, "does not fit"),
        (FULL, {SURPLUS: "8,8"}, "more cells than the table has columns: '8,8'"),
    ],
)
def test_what_cannot_be_priced_says_why(row: dict[str, str], cells: dict[str, str], reason: str) -> None:
    with pytest.raises(Unsupported) as caught:
        read(row, **cells)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("name", "remark", "field", "value"),
    [
        ("gpus_per_node", "gpus_per_node: assumed 8", "tp", 2),
        ("precision", "precision: assumed bf16", "tp", 2),
        ("mbs", "mbs: assumed 1", "micro_batch", 1),
        ("cp", "cp: assumed 1", "cp", 1),
        ("vpp", "vpp: assumed 16", "vpp", 16),
        ("etp", "etp: assumed 1", "etp", 1),
        ("dp_type", "dp_type: assumed dist-opt", "sharding", "optimizer"),
        ("sequence_parallel", "sequence_parallel: assumed yes", "sequence_parallel", True),
        ("recompute", "recompute: assumed none", "recompute", ()),
        ("cuda_graphs", "CUDA graphs: assumed none", "cuda_graphs", ()),
        ("dispatcher", "dispatcher: assumed hybridep", "dispatcher", "hybridep"),
        ("a2a_overlap", "a2a_overlap: assumed no", "ep_overlap", False),
        ("offload", "offload: assumed none", "optimizer_offload", 0.0),
    ],
)
@pytest.mark.parametrize("how", ("blank", "absent"))
def test_a_blank_cell_takes_a_stated_default(name: str, remark: str, field: str, value: Any, how: str) -> None:
    row = {k: v for k, v in FULL.items() if k != name} if how == "absent" else {**FULL, name: "  "}
    run = read_run(row)
    assert run.remarks == (remark,) and getattr(run.layout, field) == value


def test_blanks_that_change_nothing_go_without_a_remark() -> None:
    dense = {**FULL, "model": "Llama3-8B", "tp": "1", "pp": "1", "vpp": "1", "num_gpus": "64"}
    for name in ("sequence_parallel", "a2a_overlap", "dispatcher", "ep", "etp", "notes", "other"):
        assert read(dense, **{name: ""}).remarks == ()
    assert read({**dense, "vpp": ""}).layout.vpp == 1


@pytest.mark.parametrize(
    ("cells", "wanted"),
    [
        ({"precision": "fp8-mx ", "gpu": "B200"}, {"precision": "fp8-mx"}),
        ({"precision": "FP8_CS"}, {"precision": "fp8-cs"}),
        ({"model": " mixtral_8x7b "}, {}),
        ({"gpu": "h100-sxm"}, {}),
        ({"num_gpus": "64.0", "tp": "2.0"}, {}),
        ({"sequence_parallel": "TRUE", "a2a_overlap": "False"}, {}),
        ({"dispatcher": "All-to-All", "recompute": "None", "cuda_graphs": "NONE"}, {}),
        ({"dp_type": "Dist-Opt"}, {}),
    ],
)
def test_odd_spellings_mean_the_same(cells: dict[str, str], wanted: dict[str, str]) -> None:
    run, plain = read(FULL, **cells), read(FULL)
    assert run.layout == plain.layout and run.model == plain.model and run.remarks == ()
    assert run.workload.precision.name == wanted.get("precision", "bf16")


@pytest.mark.parametrize("text", ["MTP=0 (from GFLOP/token)", "table label: w/o MTP", "no MTP layer", "mtp = 0", "without MTP"])
def test_prediction_layers_left_out(text: str) -> None:
    row = {**FULL, "model": "DeepSeek-V3-671B", "pp": "8", "vpp": "1", "ep": "4", "tp": "1"}
    assert len(read(row).model.mtp) == 1
    assert read(row, notes=text).model.mtp == () == read(row, other=text).model.mtp
    assert len(read(row, other="MTP=1 layer (from GFLOP/token)").model.mtp) == 1


@pytest.mark.parametrize(
    ("gpu", "domain", "node", "nics"),
    [("H100", "4", 4, 4), ("H100", "16", 16, 16), ("H100", "8", 8, 8), ("GB200", "36", 4, 4), ("A100", "1", 1, 1)],
)
def test_domains_of_another_size(gpu: str, domain: str, node: int, nics: int) -> None:
    # Where a domain is a host, hosts follow it; a rack of trays keeps its trays.
    cluster = read(FULL, gpu=gpu, gpus_per_node=domain).cluster
    assert (cluster.domain_gpus, cluster.gpus_per_node, cluster.nics_per_node) == (int(domain), node, nics)
    assert cluster.gpus == 64


@pytest.mark.parametrize(
    ("source", "era"),
    [
        ("NeMo 24.07", "te-2024"),
        ("release 25.04", "deepep-2025"),
        ("NeMo 25.11", "hybridep-2025"),
        ("NeMo 26.08", "graphs-2026"),
        ("arXiv:2104.04473", "megatron-2021"),
        ("NeMo 25.09", "fsdp-2025"),
        ("somewhere", "graphs-2026"),
    ],
)
def test_the_era_is_that_of_the_source(source: str, era: str) -> None:
    run = read(FULL, id="x", source=source, source_ref="", dispatcher="allgather")
    assert run.workload.era.name == era
    assert ("era: assumed graphs-2026" in run.remarks) == (source == "somewhere")
    assert read(FULL, source=source, era="te-2024").workload.era.name == "te-2024"


def test_a_written_split_is_taken() -> None:
    run = read(FULL, vpp="1", other="pp_layout=Et*15|t*17L; mock data")
    assert run.layout.stages == "Et*15|t*17L" and run.remarks == ()


def test_only_equal_questions_are_priced_together() -> None:
    keys = [group_key(run) for run in (read(FULL), read(FULL, tp="1"), read(FULL, gbs="512"), read(FULL, gpu="H200"))]
    assert keys[0] == keys[1] and len(set(keys)) == 3
    assert group_key(read(FULL, gpus_per_node="16")) not in keys


def test_every_published_row_reads_or_says_why() -> None:
    for row in ROWS:
        try:
            read_run(row)
        except Unsupported as reason:
            assert re.search(r"not given|not modelled", str(reason))


def test_nothing_in_a_row_stops_the_reader() -> None:
    strange = ["", " ", "\x00", "é", "nan", "inf", "-1", "0", "1e400", "1.5", "x" * 5000, "((", "=1+1", "None", "\n", "tp=2"]
    for name in FULL:
        for text in strange:
            try:
                run = read(FULL, **{name: text})
            except Unsupported as reason:
                assert str(reason)
            else:
                assert run.layout.world == run.cluster.gpus
