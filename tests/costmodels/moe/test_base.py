"""A fitted time, a group of one, an expert of several GEMMs."""

import numpy as np
import pytest

from moeplan.costmodels.moe.base import AlphaBeta, MoeSize, expert_line

LINE = AlphaBeta(startup_s=2.0, unit_s=0.5)


def test_by_hand():
    assert LINE.time_s(10) == 7.0
    assert LINE.among_s(10, 1) == 0.0 and LINE.among_s(10, 2) == 7.0
    assert LINE.among_s(np.array([10, 10, 20]), np.array([1, 4, 4])).tolist() == [0.0, 7.0, 12.0]


def test_an_expert_starts_each_of_its_gemms():
    # Three GEMMs of 10 FLOP each.
    assert expert_line(LINE, 3).time_s(30) == pytest.approx(3 * LINE.time_s(10))


def test_ranks_of_one_copy_of_the_experts():
    assert MoeSize(token_bytes=1, slot_bytes=1, expert_flop=1, mp_ranks=2, esp_ranks=4, ep_ranks=8).all_ranks == 32
