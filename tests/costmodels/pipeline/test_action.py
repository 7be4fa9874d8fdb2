"""Schedules as text: reading is the inverse of printing, and what cannot run is refused with the bad step marked."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplan.costmodels.pipeline.action import (
    KINDS,
    Action,
    check_orders,
    format_order,
    loop_route,
    parse_order,
    parse_orders,
)  # fmt: skip
from moeplan.costmodels.pipeline.schedules import SCHEDULES, find_pipeline_schedule
from moeplan.errors import ScheduleError

GOLDEN = {
    ("gpipe", 2, 1, 3): """F0.0 F1.0 F2.0 B2.0 B1.0 B0.0
F0.0 F1.0 F2.0 B2.0 B1.0 B0.0""",
    ("1f1b", 3, 1, 4): """F0.0 F1.0 F2.0 B0.0 F3.0 B1.0 B2.0 B3.0
F0.0 F1.0 B0.0 F2.0 B1.0 F3.0 B2.0 B3.0
F0.0 B0.0 F1.0 B1.0 F2.0 B2.0 F3.0 B3.0""",
    ("interleaved", 2, 2, 4): """F0.0 F1.0 F0.1 F1.1 F2.0 B0.1 F3.0 B1.1 F2.1 B0.0 F3.1 B1.0 B2.1 B3.1 B2.0 B3.0
F0.0 F1.0 F0.1 B0.1 F1.1 B1.1 F2.0 B0.0 F3.0 B1.0 F2.1 B2.1 F3.1 B3.1 B2.0 B3.0""",
    ("zero-bubble", 2, 1, 3): """F0.0 F1.0 I0.0 W0.0 F2.0 I1.0 W1.0 I2.0 W2.0
F0.0 I0.0 F1.0 I1.0 W0.0 F2.0 I2.0 W1.0 W2.0""",
    ("dualpipe", 2, 2, 4): """F0.0 F2.1 F1.0 B2.1 F3.1&B0.0 B3.1 I1.0 W1.0
F2.1 F0.0 F3.1 B0.0 F1.0&B2.1 B1.0 I3.1 W3.1""",
}
"""Text of each schedule for a few ranks, chunks and micro-batches."""


@pytest.mark.parametrize(("key", "text"), GOLDEN.items(), ids=[k[0] for k in GOLDEN])
def test_golden(key: tuple[str, int, int, int], text: str) -> None:
    name, stages, chunks, batches = key
    orders = find_pipeline_schedule(name).orders(stages, chunks, batches)
    assert str(orders) == text
    assert parse_orders(text, orders.routes) == orders


def test_every_schedule_has_a_golden() -> None:
    assert {key[0] for key in GOLDEN} == {s.name for s in SCHEDULES}


ACTIONS = st.builds(Action, st.sampled_from(KINDS), st.integers(0, 999), st.integers(0, 99), st.just(False))


@given(st.lists(st.tuples(ACTIONS, st.booleans()), max_size=20))
def test_reading_is_the_inverse_of_printing(pairs: list[tuple[Action, bool]]) -> None:
    order: list[Action] = []
    for action, joined in pairs:
        if joined:
            order.append(action._replace(joined=True))
            order.append(action._replace(kind="B" if action.kind == "F" else "F"))
        else:
            order.append(action)
    assert parse_order(format_order(order)) == tuple(order)


@pytest.mark.parametrize("word", ["F", "F1", "X1.0", "F1.0&", "F-1.0", "F1.0&B1.0&F2.0", "1F0", "F1.0,B1.0"])
def test_words_that_are_no_actions(word: str) -> None:
    with pytest.raises(ScheduleError, match="is not an action"):
        parse_order(f"F0.0 {word}")


@pytest.mark.parametrize(
    ("text", "marked", "why"),
    [
        ("F0.0 F0.0 B0.0\nF0.0 B0.0", "F0.0 >>>F0.0<<< B0.0", "stands there twice"),
        ("B0.0 F0.0\nF0.0 B0.0", ">>>B0.0<<< F0.0", "stands before F0.0"),
        ("F0.0 W0.0\nF0.0 B0.0", "F0.0 >>>W0.0<<<", "stands before I0.0"),
        ("F0.0 B0.0 I0.0\nF0.0 B0.0", "F0.0 B0.0 >>>I0.0<<<", "whole or in two halves"),
        ("F0.0 I0.0\nF0.0 B0.0", "F0.0 I0.0 >>>end<<<", "without the backward of micro-batch 0 in chunk 0"),
        ("F0.0 F1.0 B0.0 B1.0\nF0.0 B0.0", "F0.0 B0.0 >>>end<<<", "without the backward of micro-batch 1"),
        ("F0.0 B0.0 F1.0 B1.0\nF1.0 F0.0 B0.0 B1.0", "F0.0 >>>B0.0<<< F1.0 B1.0", "waits for ever"),
        ("F0.0&F1.0 B0.0 B1.0\nF0.0 F1.0 B0.0 B1.0", ">>>F0.0<<< F1.0", "is joined to what is not its counterpart"),
    ],
)  # fmt: skip
def test_orders_that_cannot_run(text: str, marked: str, why: str) -> None:
    with pytest.raises(ScheduleError) as caught:
        parse_orders(text)
    assert why in caught.value.message and marked in caught.value.message
    assert len(caught.value.message.splitlines()) == 3


def test_a_step_on_the_wrong_rank() -> None:
    with pytest.raises(ScheduleError, match="F0.1 has no business on rank 1"):
        parse_orders("F0.0 F0.1 B0.1 B0.0\nF0.1 B0.1 F0.0 B0.0", [[(0, 0), (1, 0), (0, 1)]])


@pytest.mark.parametrize("text", ["", "  \n ", "F999999999.0 B999999999.0"])
def test_texts_without_a_schedule(text: str) -> None:
    with pytest.raises(ScheduleError, match="without actions|are too few for"):
        parse_orders(text)


def test_long_schedules_are_shown_in_part() -> None:
    orders = find_pipeline_schedule("1f1b").orders(64, 1, 100)
    text = str(orders).splitlines()
    text[40] = text[40].replace(" F70.0", " F69.0", 1)
    with pytest.raises(ScheduleError) as caught:
        parse_orders("\n".join(text))
    lines = caught.value.message.splitlines()
    assert len(lines) == 2 and lines[1].startswith("  40: ... ") and lines[1].endswith(" ...") and len(lines[1]) < 600


def test_micro_batches_loop_through_the_ranks() -> None:
    assert loop_route(2, 2) == ((0, 0), (1, 0), (0, 1), (1, 1))
    check_orders(find_pipeline_schedule("interleaved").orders(3, 4, 6))
