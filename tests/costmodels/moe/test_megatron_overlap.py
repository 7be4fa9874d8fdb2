"""A forward beside a backward: the recurrence, the text, what delaying gains."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplan.costmodels.moe.megatron_overlap import DELAYED_OVERLAP, KINDS, OVERLAP
from moeplan.costmodels.moe.schedules import PAIR_SCHEDULES
from moeplan.costmodels.simulate import bound_s, makespan_s, serial_s, simulate
from moeplan.costmodels.tasks import parse_graph
from tests.costmodels.moe.vectors import QUICK, all_lines, sizes

PAIRS = pytest.mark.parametrize("pair", PAIR_SCHEDULES, ids=lambda p: p.name)
parts_of = st.fixed_dictionaries(dict.fromkeys(KINDS, st.one_of(st.just(0.0), st.floats(1e-3, 1e3))))


def test_by_hand():
    # Attention to 4, dispatch to 6, input gradients to 5, weights to 6, backward dispatch from 6 to 8, experts to 8, the rest.
    parts = {"CB": 2.0, "DF": 2.0, "DB": 2.0, "CF": 2.0, "AF": 4.0, "ED": 1.0, "EW": 1.0, "EF": 2.0, "AB": 5.0}
    assert OVERLAP.seconds(parts) == DELAYED_OVERLAP.seconds(parts) == 13.0
    # Longer weight gradients, to 9, delay the backward dispatch to 9; beside it they end with the experts at 11.
    longer = {**parts, "EW": 4.0, "EF": 0.0, "CF": 0.0}
    assert OVERLAP.seconds(longer) == 16.0 and DELAYED_OVERLAP.seconds(longer) == 14.0


@PAIRS
@given(parts=parts_of, more=st.floats(1, 10), kind=st.sampled_from(KINDS))
@QUICK
def test_the_recurrence_is_the_makespan(pair, parts, more, kind):
    graph, took_s = pair.graph(), pair.seconds(parts)
    assert took_s == pytest.approx(makespan_s(graph, parts), rel=1e-9)
    assert took_s == pytest.approx(simulate(graph, parts).makespan_s, rel=1e-9)
    assert bound_s(graph, parts) * (1 - 1e-12) <= took_s <= pair.serial_seconds(parts) * (1 + 1e-12)
    assert pair.serial_seconds(parts) == pytest.approx(serial_s(graph, parts))
    assert pair.seconds({**parts, kind: parts[kind] * more}) >= took_s * (1 - 1e-12)
    assert DELAYED_OVERLAP.seconds(parts) <= OVERLAP.seconds(parts) * (1 + 1e-12)
    assert parse_graph(str(graph)) == graph


@given(
    a=st.floats(0, 10), af=st.floats(0, 10), ed=st.floats(0, 10), ew=st.floats(0, 10), ef=st.floats(0, 10), ab=st.floats(0, 10)
)
@QUICK
def test_equal_exchanges(a, af, ed, ew, ef, ab):
    """The recurrence as it is written for one length of all exchanges."""
    parts = dict(zip(KINDS, (a, a, a, a, af, ed, ew, ef, ab), strict=True))
    x = max(af, a)
    end_d, end_df = x + ed, x + a
    end_db = max(end_df, end_d) + a
    end_ef = max(end_d + ew, end_df) + ef
    expected = max(max(end_db, end_ef) + a, max(end_ef, end_db) + ab)
    assert DELAYED_OVERLAP.seconds(parts) == pytest.approx(expected)


@PAIRS
@given(rows=st.lists(st.tuples(sizes(), all_lines), min_size=1, max_size=3))
@QUICK
def test_arrays_equal_numbers(pair, rows):
    apart = [{**pair.parts(size, lines), "AF": 1e-3, "AB": 2e-3} for size, lines in rows]
    together = {kind: np.array([parts[kind] for parts in apart]) for kind in KINDS}
    assert pair.seconds(together).tolist() == pytest.approx([float(pair.seconds(parts)) for parts in apart])
    for parts in apart:
        assert parts["CB"] == parts["DF"] and parts["DB"] == parts["CF"] and parts["ED"] == parts["EW"] == parts["EF"]
