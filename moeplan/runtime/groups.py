"""The ranks of every parallel axis, in Megatron's default order.

Dense parts see the ranks as a grid pp x dp x cp x tp, experts as pp x edp x ep x etp, the last axis running fastest in both
(order "tp-cp-ep-dp-pp"). A group is the ranks that differ on the named axes alone; groups come in the order of the axes they
share, ranks in the order of the axes they differ on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from moeplan.costmodels.layout import Layout

DENSE_AXES = {"tp": ("tp",), "cp": ("cp",), "dp": ("dp",), "dp_cp": ("dp", "cp"), "pp": ("pp",)}
EXPERT_AXES = {"etp": ("etp",), "ep": ("ep",), "edp": ("edp",), "tp_ep": ("ep", "etp")}
"""Names of the groups and the axes their ranks differ on, the slower first; "tp_ep" is the whole of one set of experts."""


def rank_groups(layout: Layout) -> dict[str, list[list[int]]]:
    """The groups of every name in `DENSE_AXES` and `EXPERT_AXES`; each is a list of lists of ranks."""
    dense = {"pp": layout.pp, "dp": layout.dp, "cp": layout.cp, "tp": layout.tp}
    expert = {"pp": layout.pp, "edp": layout.edp, "ep": layout.ep, "etp": layout.etp}
    groups = {name: _groups(dense, axes) for name, axes in DENSE_AXES.items()}
    return groups | {name: _groups(expert, axes) for name, axes in EXPERT_AXES.items()}


def _groups(sizes: Mapping[str, int], axes: tuple[str, ...]) -> list[list[int]]:
    order = list(sizes)
    grid = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
    shared = [i for i, axis in enumerate(order) if axis not in axes]
    # [shared axes..., named axes...]
    grid = grid.transpose(shared + [order.index(axis) for axis in axes])
    result: list[list[int]] = grid.reshape(-1, math.prod(sizes[axis] for axis in axes)).tolist()
    return result
