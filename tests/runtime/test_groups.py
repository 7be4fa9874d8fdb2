from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moeplan.costmodels.layout import Layout
from moeplan.runtime.groups import rank_groups
from tests import megatron


def _layout(tp: int, cp: int, dp: int, pp: int, etp: int, ep: int) -> Layout:
    return Layout(tp=tp, cp=cp, dp=dp, pp=pp, etp=etp, ep=ep, edp=tp * cp * dp // (etp * ep))


def _arguments(layout: Layout) -> list[str]:
    sizes = {
        "tensor-model": layout.tp, "context": layout.cp, "pipeline-model": layout.pp, "expert-model": layout.ep,
        "expert-tensor": layout.etp,
    }  # fmt: skip
    return [word for name, size in sizes.items() for word in (f"--{name}-parallel-size", str(size))]


TABLE = [  # tp, cp, dp, pp, etp, ep
    (1, 1, 1, 1, 1, 1),
    (1, 1, 8, 1, 1, 8),
    (2, 1, 2, 2, 1, 4),
    (2, 2, 2, 2, 1, 8),
    (4, 1, 1, 2, 1, 4),
    (1, 2, 4, 1, 2, 4),
    (2, 2, 3, 1, 3, 2),
    (1, 1, 32, 8, 1, 32),
    (2, 1, 16, 8, 2, 4),
]


@pytest.mark.parametrize("degrees", TABLE)
def test_equal_to_megatron(degrees: tuple[int, ...]) -> None:
    layout = _layout(*degrees)
    assert rank_groups(layout) == megatron.rank_groups(_arguments(layout), layout.world)


@st.composite
def layouts(draw: Any) -> Layout:
    size = st.sampled_from([1, 2, 3, 4])
    tp, cp, dp, pp = (draw(size) for _ in range(4))
    stage = tp * cp * dp
    etp = draw(st.sampled_from([d for d in range(1, stage + 1) if stage % d == 0]))
    ep = draw(st.sampled_from([d for d in range(1, stage // etp + 1) if stage // etp % d == 0]))
    return _layout(tp, cp, dp, pp, etp, ep)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(layouts())
def test_random_layouts_equal_megatron(layout: Layout) -> None:
    assert rank_groups(layout) == megatron.rank_groups(_arguments(layout), layout.world)


@settings(max_examples=100, deadline=None)
@given(layouts())
def test_every_rank_is_in_one_group_of_every_axis(layout: Layout) -> None:
    sizes = {name: getattr(layout, name) for name in ("tp", "cp", "dp", "pp", "etp", "ep", "edp")}
    sizes |= {"dp_cp": layout.dp * layout.cp, "tp_ep": layout.etp * layout.ep}
    for name, groups in rank_groups(layout).items():
        assert {len(group) for group in groups} == {sizes[name]}
        assert sorted(rank for group in groups for rank in group) == list(range(layout.world))


def test_deepseek_v3_on_256_ranks() -> None:
    groups = rank_groups(_layout(1, 1, 32, 8, 1, 32))
    assert groups["ep"][0] == list(range(32))
    assert groups["pp"][0] == list(range(0, 256, 32))
