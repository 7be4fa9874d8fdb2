"""Schedules of MoE layers as text: reading is the inverse of printing, and what is no schedule is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplan.costmodels.layout import Layout
from moeplan.costmodels.moe.schedules import find_schedule
from moeplan.costmodels.moe_choice import BEST, CHUNKED, IDEAL, MOST_CHUNKS, NAMES, MoeChoice, parse_choices
from moeplan.errors import LayoutError

CHUNKS = st.integers(1, MOST_CHUNKS)
CHOICES = st.one_of(
    st.builds(MoeChoice, st.sampled_from(CHUNKED), CHUNKS, CHUNKS),
    st.sampled_from([MoeChoice(name) for name in (*NAMES, IDEAL) if name not in CHUNKED]),
)


@given(st.lists(CHOICES, min_size=1, max_size=4))
def test_reading_is_the_inverse_of_printing(choices: list[MoeChoice]) -> None:
    text = "; ".join(map(str, choices))
    assert parse_choices(text) == tuple(choices)
    assert Layout(moe_schedule=text).moe_schedule == text


@pytest.mark.parametrize("name", (*NAMES, IDEAL))
def test_every_name_is_a_schedule_that_is_described(name: str) -> None:
    assert find_schedule(name).chunked == (name in CHUNKED or name == IDEAL)


def test_what_leaves_the_choice_open_names_none() -> None:
    assert parse_choices("") == parse_choices(BEST) == ()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("fsmo 2/4", "unknown schedule 'fsmo'.*did you mean 'fsmoe'"),
        ("fsmoe", "fsmoe needs its chunks"),
        ("fsmoe 2", "'fsmoe 2' is not a schedule"),
        ("fsmoe 0/4", "0 chunks, 1 to 64"),
        ("fsmoe 2/65", "65 chunks, 1 to 64"),
        ("s1 2/2", "s1 takes no chunks"),
        ("s1;", "'' is not a schedule"),
        ("best; s1", "unknown schedule 'best'"),
    ],
)
def test_what_is_no_schedule_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(LayoutError, match=f"moe_schedule '{text}': .*") as found:
        Layout(moe_schedule=text)
    import re

    assert re.search(complaint, str(found.value))
