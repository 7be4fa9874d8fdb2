"""The bound of tiles."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplan.costmodels.moe.comet import Comet
from moeplan.costmodels.moe.schedules import find_schedule
from tests.costmodels.moe.vectors import QUICK, all_lines, sizes

TILES = 512


def took_s(schedule, degree, size, lines, direction="forward"):
    return schedule.seconds(degree, schedule.parts(size, lines, degree, direction), size)


@given(size=sizes(), lines=all_lines, r=st.integers(1, 64), direction=st.sampled_from(["forward", "backward"]))
@QUICK
def test_no_chunked_schedule_is_quicker(size, lines, r, direction):
    free = replace(lines, mp_gather=replace(lines.mp_gather, startup_s=0.0))
    bound_s = took_s(Comet(), TILES, size, free, direction)
    names = ["tutel", "tutel-improved", "pipemoe", "lina", "fsmoe-no-iio", "fsmoe", "hierarchical", "shared-overlap"]
    if size.closing_ranks == 1:
        names.append("flowmoe")
    for name in names:
        degree = r if find_schedule(name).chunked else 1
        assert bound_s <= took_s(find_schedule(name), degree, size, free, direction) * (1 + 1e-9)
    assert bound_s <= took_s(Comet(), r, size, free, direction) * (1 + 1e-9)


@given(size=sizes(), lines=all_lines)
@QUICK
def test_without_shards_it_is_the_longer_one_and_a_tile(size, lines):
    size = replace(size, esp_ranks=1, sequence_parallel=True)
    parts = Comet().parts(size, lines, TILES, "forward")
    exchange_s, experts_s = 2 * TILES * parts["D"], TILES * parts["E"]
    assert np.maximum(exchange_s, experts_s) <= took_s(Comet(), TILES, size, lines) * (1 + 1e-12)
    tile_s = 2 * parts["D"] + parts["E"]
    assert took_s(Comet(), TILES, size, lines) <= np.maximum(exchange_s, experts_s) + tile_s * (1 + 1e-9)
    assert parts["E"] == pytest.approx(lines.experts.unit_s * size.expert_flop / size.mp_ranks / TILES)
