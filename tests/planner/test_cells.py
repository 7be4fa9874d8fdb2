"""Cells of run tables: every spelling that published tables have, and what nobody should guess at."""

from typing import Any

import pytest

from moeplan.planner import cells
from moeplan.planner.cells import Unsupported


@pytest.mark.parametrize(
    ("text", "month"),
    [
        ("NVIDIA Megatron-Bridge performance summary, NeMo 25.09", "2025-09"),
        ("NVIDIA Megatron-Bridge performance summary, NeMo 26.04.01", "2026-04"),
        ("NVIDIA DGX Cloud benchmarking recipes NeMo 24.09/24.11", "2024-09"),
        ("NVIDIA/dgxc-benchmarking/nemotron/README_15b.md@v24.11.1", "2024-11"),
        ("MoE Parallel Folding (NVIDIA, Apr 2025; Eos H100, PyTorch 2.5, token drop CF=1, BF16)", "2025-04"),
        ("SimuMax v1.2 B200 release validation (2026-05; measured columns)", "2026-05"),
        ("torchtitan benchmarks, Dec 2024 (H100 96GB HBM2e 500W)", "2024-12"),
        ("MLPerf Training v5.0 results, submitter NVIDIA", "2025-06"),
        ("MLPerf Training v5.1 results, submitter AMD", "2025-10"),
        ("arXiv:2504.14960 table 4", "2025-04"),
        ("Efficient Large-Scale LM Training (Narayanan 2021; Selene)", "2021-06"),
        ("September 2025", "2025-09"),
        ("Reducing Activation Recomputation (Korthikanti 2022; A100 80GB Selene)", "2022-06"),
        ("released 2025-13", "2025-06"),
        ("Megatron-LM core/transformer/moe README, MCore v0.8", None),
        ("2112.01", None),
        ("", None),
    ],
)
def test_months(text: str, month: str | None) -> None:
    assert cells.month_of(text) == month


@pytest.mark.parametrize(("text", "value"), [("8", 8), ("8.0", 8), ("1e3", 1000), (" 64", 64), ("131072", 131072)])
def test_whole_numbers(text: str, value: int) -> None:
    assert cells.whole_number("gbs", text) == value


@pytest.mark.parametrize("text", ["x", "1,024", "8k", "--", "0", "-1", "1.5", "nan", "inf", "-inf", "1e30", "1e400", "8 GPUs"])
def test_what_is_no_whole_number(text: str) -> None:
    with pytest.raises(Unsupported, match="^gbs="):
        cells.whole_number("gbs", text)


@pytest.mark.parametrize("text", ["yes", "Yes", "TRUE", "true", "1", "on", "y", "1.0"])
def test_yes(text: str) -> None:
    assert cells.switch("a2a_overlap", text) is True


@pytest.mark.parametrize("text", ["no", "No", "FALSE", "0", "off", "none", "n", "0.0"])
def test_no(text: str) -> None:
    assert cells.switch("a2a_overlap", text) is False


@pytest.mark.parametrize("text", ["maybe", "2", "yes and no", "?"])
def test_neither_yes_nor_no(text: str) -> None:
    with pytest.raises(Unsupported, match="neither yes nor no"):
        cells.switch("a2a_overlap", text)


@pytest.mark.parametrize(
    ("text", "sharding", "remark"),
    [
        ("dist-opt", "optimizer", ""),
        ("Distributed Optimizer", "optimizer", ""),
        ("zero1", "optimizer", ""),
        ("ZeRO-2", "optimizer", "whole gradients"),
        ("fsdp", "fsdp", ""),
        ("FSDP2", "fsdp", ""),
        ("megatron-fsdp", "fsdp", ""),
        ("hsdp", "fsdp", "as fsdp over all ranks"),
        ("zero3", "fsdp", ""),
        ("DeepSpeed ZeRO-3", "fsdp", ""),
        ("ddp", "ddp", ""),
    ],
)
def test_shardings(text: str, sharding: str, remark: str) -> None:
    found, said = cells.sharding(text)
    assert found == sharding and remark in said and bool(said) == bool(remark)


@pytest.mark.parametrize(
    ("text", "modules", "remark"),
    [
        ("none", (), ""),
        ("None", (), ""),
        ("no", (), ""),
        ("full", ("full",), ""),
        ("full (uniform)", ("full",), ""),
        ("full,block,5 layers", ("full",), "full recompute of every layer"),
        ("mla_up_proj", ("mla_up_proj",), ""),
        ("layernorm+moe_act", ("layernorm", "moe_act"), ""),
        ("moe+layernorm+core_attn+moe_act", ("moe", "layernorm", "core_attn", "moe_act"), ""),
        ("mla_up_proj, mlp", ("mla_up_proj", "mlp"), ""),
        ("MLA-up-proj + MoE act", ("mla_up_proj", "moe_act"), ""),
        ("selective", ("core_attn",), ""),
        ("selective (core_attn)", ("core_attn",), ""),
        ("selective (layernorm+mlp)", ("layernorm", "mlp"), ""),
        ("selective (op-level)", ("core_attn",), "priced as core attention"),
        ("core_attn (selective, module list unset)", ("core_attn",), ""),
        ("core attention", ("core_attn",), ""),
        ("mlp+mlp", ("mlp",), ""),
    ],
)
def test_recompute(text: str, modules: tuple[str, ...], remark: str) -> None:
    found, said = cells.recompute_modules(text)
    assert found == modules and remark in said and bool(said) == bool(remark)


@pytest.mark.parametrize(
    ("text", "scopes"),
    [
        ("none", ()),
        ("full_iteration", ("full_iteration",)),
        ("full iteration", ("full_iteration",)),
        ("local:full_iteration", ("full_iteration",)),
        ("te:mlp", ("mlp",)),
        ("te:attn+mamba", ("attn", "mamba")),
        ("te:attn+moe_router+moe_preprocess", ("attn", "moe_router", "moe_preprocess")),
        ("TE: attn, moe-router", ("attn", "moe_router")),
        ("te:attn+mamba+moe_router+moe_preprocess", ("attn", "mamba", "moe_router", "moe_preprocess")),
    ],
)
def test_graphs(text: str, scopes: tuple[str, ...]) -> None:
    assert cells.graph_scopes(text) == scopes


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("alltoall", "alltoall"),
        ("AllToAll", "alltoall"),
        ("all-to-all", "alltoall"),
        ("all2all", "alltoall"),
        ("a2a", "alltoall"),
        ("allgather", "allgather"),
        ("deepep", "deepep"),
        ("DeepEP", "deepep"),
        ("hybridep", "hybridep"),
        ("hybrid-ep", "hybridep"),
    ],
)
def test_dispatchers(text: str, name: str) -> None:
    assert cells.dispatcher(text) == name


@pytest.mark.parametrize(
    ("text", "share", "remark"),
    [
        ("none", 0.0, ""),
        ("no", 0.0, ""),
        ("optimizer states to CPU, fraction 1", 1.0, ""),
        ("optimizer states to CPU, fraction 0.25", 0.25, ""),
        ("optimizer, fraction=.5", 0.5, ""),
        ("optimizer states to CPU, 30%", 0.3, ""),
        ("optimizer states to CPU", 1.0, ""),
        ("activations of 40 layers to CPU", 0.0, "activations is not modelled"),
        ("activations:fused_group_mlp", 0.0, "activations is not modelled"),
        ("activations and optimizer, fraction 0.5", 0.5, "activations is not modelled"),
        ("weights to CPU", 0.0, "'weights to CPU' is not modelled"),
    ],
)
def test_offload(text: str, share: float, remark: str) -> None:
    found, said = cells.offloaded_states(text)
    assert found == pytest.approx(share) and remark in said and bool(said) == bool(remark)


@pytest.mark.parametrize(
    ("text", "factor"),
    [
        ("token drop, capacity factor 1.0", 1.0),
        ("method=MCore 5D; token drop, capacity factor 1", 1.0),
        ("capacity factor 1.25.", 1.25),
        ("capacity_factor=1.5; mock data", 1.5),
        ("Capacity Factor: 2", 2.0),
        ("token drop, capacity=.5", 0.5),
        ("rank_capacity_factor=1.5; paged_stash=True", 0.0),
        ("force-balanced routing, dropless; mock data", 0.0),
        ("memory at capacity", 0.0),
        ("", 0.0),
    ],
)
def test_capacity_factors(text: str, factor: float) -> None:
    assert cells.capacity_factor(text) == factor


@pytest.mark.parametrize(
    ("text", "split"),
    [
        ("pp_layout=Et*3|(tt|)*29m|L; mock data", "Et*3|(tt|)*29m|L"),
        ("pp_layout='Et|t*3L'", "Et|t*3L"),
        ("mock data; pp_layout: Et*2|(tt|)*3L, other", "Et*2|(tt|)*3L"),
        ("first pipeline stage 25 layers", None),
        ("", None),
    ],
)
def test_pipeline_splits(text: str, split: str | None) -> None:
    assert cells.written_split(text) == split


@pytest.mark.parametrize(
    ("read", "text", "message"),
    [
        (cells.sharding, "banana", "dp_type 'banana' is not known"),
        (cells.recompute_modules, "banana", "recompute 'banana': module 'banana' is not known"),
        (cells.recompute_modules, "mlp+", "module '' is not known"),
        (cells.recompute_modules, "yes", "module 'yes' is not known"),
        (cells.graph_scopes, "te:attn+banana", "scope 'banana' is not known"),
        (cells.graph_scopes, "te", "scope 'te' is not known"),
        (cells.dispatcher, "none", "dispatcher 'none' is not known"),
        (cells.dispatcher, "flex", "dispatcher 'flex' is not known"),
        (cells.offloaded_states, "optimizer, fraction 5", "a share of 5 is more than all"),
    ],
)
def test_what_is_not_understood_is_named(read: Any, text: str, message: str) -> None:
    with pytest.raises(Unsupported) as caught:
        read(text)
    assert message in str(caught.value)
