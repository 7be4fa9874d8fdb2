"""Places of ranks and their groups."""

from __future__ import annotations

import pytest

from moeplan.errors import DeviceError, LayoutError
from moeplan.runtime.placement import Placement, join


def test_groups_by_hand():
    placement = Placement(ep=2, esp=2, mp=4, replicas=2)
    assert placement.world == 8 and placement.at(6) == (1, 1, 0)
    assert placement.groups() == {
        "ep": [[0, 2], [1, 3], [4, 6], [5, 7]],
        "esp": [[0, 1], [2, 3], [4, 5], [6, 7]],
        "mp": [[0, 1, 2, 3], [4, 5, 6, 7]],
        "all": [[0, 1, 2, 3], [4, 5, 6, 7]],
        "copies": [[0, 4], [1, 5], [2, 6], [3, 7]],
        "dense": [[0, 4], [1, 5], [2, 6], [3, 7]],
        "owners": [[0], [1], [2], [3], [4], [5], [6], [7]],
    }


@pytest.mark.parametrize(
    "ep, esp, mp, replicas", [(2, 4, 2, 1), (1, 4, 1, 2), (4, 2, 4, 1), (3, 2, 3, 2), (1, 1, 1, 1), (8, 1, 2, 1)]
)
def test_groups_by_formula(ep, esp, mp, replicas):
    placement = Placement(ep=ep, esp=esp, mp=mp, replicas=replicas)
    groups = placement.groups()
    for axis, size in {"ep": ep, "esp": esp, "mp": mp, "all": ep * esp, "copies": replicas}.items():
        assert {len(group) for group in groups[axis]} == {size}
    for axis in groups:
        assert sorted(rank for group in groups[axis] for rank in group) == list(range(placement.world))
    for group in groups["mp"]:
        assert group == list(range(group[0], group[0] + mp))
    for group in groups["dense"]:
        assert len({rank % mp for rank in group}) == 1 and len(group) == placement.world // mp
    for rank in range(placement.world):
        replica, place, lane = placement.at(rank)
        assert rank == (replica * ep + place) * esp + lane
        assert [rank, placement.at(rank)[1:]] in [[r, placement.at(r)[1:]] for r in groups["copies"][rank % placement.ranks]]


@pytest.mark.parametrize("mp, esp, expected", [(1, 4, [[0, 1, 2, 3]]), (2, 4, [[0, 2], [1, 3]]), (4, 4, [[0], [1], [2], [3]])])
def test_owners_are_one_rank_of_each_tensor_parallel_group(mp, esp, expected):
    assert Placement(esp=esp, mp=mp).groups()["owners"] == expected


def test_bad_placements_are_refused():
    with pytest.raises(LayoutError, match="mp 4 does not divide the 6 ranks"):
        Placement(ep=3, esp=2, mp=4)
    with pytest.raises(LayoutError, match="replicas = 0 is not a number of copies"):
        Placement(replicas=0)


def test_other_numbers_of_processes_are_refused():
    with pytest.raises(DeviceError, match="the placement has 4 ranks, but 1 run.*start 4 processes"):
        join(Placement(ep=2, esp=2))


def test_a_single_process_needs_no_groups():
    ranks = join(Placement())
    assert ranks.rank == 0 and set(ranks.groups.values()) == {None} and ranks.size("all") == 1 and ranks.place("mp") == 0
    ranks.leave()
