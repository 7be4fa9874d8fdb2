"""The question is checked once, and conditions mean what a user writes."""

import operator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from moeplan.costmodels.constants import MEMORY
from moeplan.costmodels.layout import Layout, Layouts
from moeplan.costmodels.model_catalog import load_model
from moeplan.errors import MoeplanError, ProblemError, UsageError
from moeplan.planner.problem import FIELDS, parse_condition
from moeplan.units import GIB
from tests.planner import tiny

LAYOUTS = [
    Layout(),
    Layout(tp=2, edp=2, sequence_parallel=True, recompute=("full",)),
    Layout(dp=8, ep=8, dispatcher="deepep", ep_overlap=True, micro_batch=4),
    Layout(pp=4, vpp=3, dp=2, edp=2, recompute=("layernorm", "moe_act"), sharding="fsdp"),
    Layout(cp=4, etp=2, edp=2, dispatcher="alltoall", cuda_graphs=("attn", "moe_router"), dp_overlap=False),
    Layout(tp=2, edp=2, tp_overlap=True, optimizer_offload=0.5, sharding="ddp"),
]

CONDITIONS: list[tuple[str, Any]] = [
    ("tp=2", lambda x: x.tp == 2),
    ("TP==2", lambda x: x.tp == 2),
    (" tp = 2 ", lambda x: x.tp == 2),
    ("tp!=2", lambda x: x.tp != 2),
    ("ep>8", lambda x: x.ep > 8),
    ("ep>=8", lambda x: x.ep >= 8),
    ("pp<4", lambda x: x.pp < 4),
    ("pp<=4", lambda x: x.pp <= 4),
    ("vpp=3.0", lambda x: x.vpp == 3),
    ("mbs=4", lambda x: x.micro_batch == 4),
    ("edp=2", lambda x: x.edp == 2),
    ("optimizer_offload>0.25", lambda x: x.optimizer_offload > 0.25),
    ("sp=yes", lambda x: x.sequence_parallel),
    ("ep_overlap=TRUE", lambda x: x.ep_overlap),
    ("tp_overlap=0", lambda x: not x.tp_overlap),
    ("dp_overlap!=on", lambda x: not x.dp_overlap),
    ("dispatcher=deepep", lambda x: x.dispatcher == "deepep"),
    ("dispatcher!=none", lambda x: x.dispatcher != "none"),
    ("sharding=fsdp", lambda x: x.sharding == "fsdp"),
    ("recompute=none", lambda x: x.recompute == ()),
    ("recompute=moe_act+layernorm", lambda x: set(x.recompute) == {"moe_act", "layernorm"}),
    ("recompute!=full", lambda x: x.recompute != ("full",)),
    ("recompute_layers=2", lambda x: x.recompute_layers == "2"),
    ("recompute_layers!=1*3|0", lambda x: x.recompute_layers != "1*3|0"),
    ("recompute_layers=all", lambda x: x.recompute_layers == ""),
    ("cuda_graphs=moe_router+attn", lambda x: set(x.cuda_graphs) == {"attn", "moe_router"}),
]


@pytest.mark.parametrize(("text", "meets"), CONDITIONS, ids=[text for text, _ in CONDITIONS])
def test_conditions(text: str, meets: Any) -> None:
    condition = parse_condition(text)
    assert condition.holds(Layouts.of(LAYOUTS)).tolist() == [bool(meets(x)) for x in LAYOUTS]
    assert condition.text == text.strip() and condition.field in FIELDS


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("", "'' is not a condition", "tp=2"),
        ("tp", "'tp' is not a condition", "tp=2"),
        ("tp=", "'tp=' is not a condition", "tp=2"),
        ("=2", "'=2' is not a condition", "tp=2"),
        ("tp=>2", "'>2' is not a number", ""),
        ("2=tp", "is not a condition", ""),
        ("tp=2 pp=4", "is not a condition", ""),
        ("tpp=2", "unknown field 'tpp'", "did you mean 'tp'"),
        ("dispatch=deepep", "unknown field 'dispatch'", "'dispatcher'"),
        ("tp=banana", "'banana' is not a number", ""),
        ("tp=2.5", "tp is a whole number, 2.5 is not", ""),
        ("tp=nan", "'nan' is not a number", ""),
        ("optimizer_offload=inf", "'inf' is not a number", ""),
        ("tp=1e400", "'1e400' is not a number", ""),
        ("sp=maybe", "sequence_parallel is true or false, not 'maybe'", ""),
        ("sp<yes", "sequence_parallel has no order", "sequence_parallel=yes"),
        ("dispatcher=deepp", "unknown dispatcher 'deepp'", "'deepep'"),
        ("sharding>ddp", "sharding has no order", "sharding=ddp"),
        ("recompute=moe_at", "unknown recompute 'moe_at'", "'moe_act'"),
        ("recompute=mlp+", "unknown recompute ''", ""),
        ("cuda_graphs=all", "unknown cuda_graphs 'all'", ""),
        ("recompute_layers=two", "'two' does not say how many layers", "write 2"),
        ("recompute_layers>2", "recompute_layers has no order", "recompute_layers=2"),
    ],
)
def test_conditions_that_mean_nothing(text: str, message: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_condition(text)
    assert message in caught.value.message and hint in (caught.value.hint or "")


def test_pins_and_forbidden_conditions_together() -> None:
    problem = tiny.problem(tiny.MIXED, pins="tp<=2 recompute!=full", forbid="ep>4 dp_overlap=no")
    wanted = [x.tp <= 2 and x.recompute != ("full",) and not x.ep > 4 and x.dp_overlap for x in LAYOUTS]
    assert problem.allows(Layouts.of(LAYOUTS)).tolist() == wanted and any(wanted) and not all(wanted)
    assert problem.allows(Layouts.of(LAYOUTS), ("tp",)).tolist() == [x.tp <= 2 for x in LAYOUTS]
    assert problem.allowed_values("tp", [1, 2, 3, 4]) == [1, 2] and problem.allowed_values("ep", [2, 4, 8]) == [2, 4]
    assert problem.pinned("tp") == [] and tiny.problem(tiny.MIXED, pins="tp=2 tp=4").pinned("tp") == [2.0]


@pytest.mark.parametrize(
    ("more", "message", "hint"),
    [
        ({"cluster": "a100x8", "precision": "fp8-cs"}, "fp8-cs needs compute capability 8.9, A100 has 8.0", "--precision bf16"),
        (
            {"cluster": "h100x8", "precision": "fp8-mx"},
            "fp8-mx needs compute capability 10.0, H100 has 9.0",
            "--precision bf16",
        ),
        ({"cluster": "mi300xx8", "precision": "nvfp4"}, "MI300X has no fp4 matrix units for nvfp4", "--precision bf16"),
        ({"memory_limit_bytes": -1.0}, "memory limit -1 B", ""),
        ({"memory_limit_bytes": np.inf}, "memory limit inf", ""),
        ({"memory_limit_bytes": np.nan}, "memory limit nan", ""),
        ({"imbalance": 9.0}, "imbalance=9 exceeds the 8 experts of tiny-mixed", ""),
        ({"capacity_factor": 8.5}, "capacity_factor=8.5 exceeds the 8 experts of tiny-mixed", ""),
    ],
)
def test_what_does_not_go_together(more: dict[str, Any], message: str, hint: str) -> None:
    with pytest.raises(ProblemError) as caught:
        tiny.problem(tiny.MIXED, **more)
    assert message in caught.value.message and hint in (caught.value.hint or "")


def test_sequences_longer_than_the_positions() -> None:
    model = load_model("mixtral-8x7b")
    with pytest.raises(ProblemError, match="sequence length 65536 exceeds the 32768 positions of mixtral-8x7b"):
        tiny.problem(model, seq=65536)
    assert tiny.problem(model, seq=65536, extend_positions=True).workload.seq_len == 65536
    assert tiny.problem(replace(model, max_positions=0), seq=65536).workload.seq_len == 65536


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seq": 0}, "seq_len=0 must be a whole number of at least 1"),
        ({"seq": 10**9}, "seq_len=1000000000 is more than"),
        ({"batch": -4}, "global_batch=-4"),
        ({"batch": 10**8}, "global_batch=100000000 is more than"),
        ({"batch": 2.0}, "global_batch=2.0"),
        ({"gradient_bytes": 3}, "gradient_bytes=3 must be 2 (bf16) or 4 (fp32)"),
        ({"imbalance": 0.9}, "imbalance=0.9"),
        ({"imbalance": float("nan")}, "imbalance=nan"),
        ({"precision": "fp9"}, "unknown precision 'fp9'"),
        ({"era": "yesterday"}, "unknown era 'yesterday'"),
        ({"cluster": "h100x12"}, "12 GPUs do not fill nodes of 8"),
    ],
)
def test_parts_that_cannot_be(values: dict[str, Any], message: str) -> None:
    with pytest.raises(MoeplanError) as caught:
        tiny.problem(tiny.MIXED, **values)
    assert message in str(caught.value)


def test_device_memory_and_what_must_stay_free() -> None:
    whole, limited = tiny.problem(tiny.MIXED), tiny.problem(tiny.MIXED, memory_limit_bytes=60 * GIB)
    device = whole.profile.cluster.device.memory_bytes
    assert (whole.device_bytes, limited.device_bytes) == (device, 60 * GIB)
    assert tiny.problem(tiny.MIXED, memory_limit_bytes=1000 * GIB).device_bytes == device
    kept = MEMORY.context_bytes + MEMORY.communicator_bytes
    exact = (60 * GIB - kept) / (1 + MEMORY.fragmentation)
    assert limited.excess_bytes(exact) == pytest.approx(0.0, abs=1.0)
    np.testing.assert_allclose(limited.excess_bytes(np.array([0.0, exact])), [kept - 60 * GIB, 0.0], atol=1.0)


def test_operators_are_all_there() -> None:
    for sign, function in {"<": operator.lt, ">": operator.gt, "<=": operator.le, ">=": operator.ge, "!=": operator.ne}.items():
        holds = parse_condition(f"tp{sign}2").holds(Layouts.of(LAYOUTS)).tolist()
        assert holds == [function(x.tp, 2) for x in LAYOUTS]
