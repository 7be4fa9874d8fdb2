"""What layouts do once a step: reduce gradients, update and gather parameters. On the distinct spreads of these.

Dense parameters and experts are spread differently, and of each the rank that holds most counts. Units: seconds, [n].
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from moeplan.costmodels.layout import Codes, Layouts
from moeplan.costmodels.memory import UnitParameters, rank_parameters, unit_parameters
from moeplan.costmodels.model import Model
from moeplan.costmodels.stages import binding_ranks
from moeplan.costmodels.step import DataParallelTime, data_parallel_times, dense_group, expert_group
from moeplan.costmodels.workload import Workload
from moeplan.profiles.profile import Profile

SPLIT_FIELDS = ("pp", "vpp", "split")
"""What says which layers stand on which rank."""
DENSE_SPREAD = (*SPLIT_FIELDS, "tp", "cp", "dp", "sharding", "optimizer_offload")
"""What the exchange of dense parameters depends on."""
EXPERT_SPREAD = (*SPLIT_FIELDS, "ep", "etp", "edp", "sharding", "optimizer_offload")
"""What the exchange of expert parameters depends on."""


class OnceTables:
    """Tables of the distinct spreads of many layouts."""

    def __init__(self, model: Model, profile: Profile, workload: Workload, codes: Codes) -> None:
        self.model, self.profile, self.workload = model, profile, workload
        self.dense, self.dense_of_row = codes.distinct(*DENSE_SPREAD)
        self.expert, self.expert_of_row = codes.distinct(*EXPERT_SPREAD)

    @functools.cached_property
    def stage_in_domain(self) -> Any:
        """Whether the next pipeline rank stands in the same scale-up domain, on the distinct dense spreads."""
        return self.dense.tp * self.dense.cp * self.dense.dp < self.profile.cluster.domain_gpus

    @functools.cached_property
    def dense_times(self) -> DataParallelTime:
        """Exchange and update of dense parameters, on their distinct spreads."""
        most, where = self._most(self.dense).dense, dense_group(self.profile, self.dense)
        return data_parallel_times(self.profile, self.workload, self.dense, most, where)

    @functools.cached_property
    def expert_times(self) -> DataParallelTime:
        """Exchange and update of experts, on their distinct spreads."""
        most, where = self._most(self.expert).expert, expert_group(self.profile, self.expert)
        return data_parallel_times(self.profile, self.workload, self.expert, most, where)

    def _most(self, spread: Layouts) -> UnitParameters:
        """Most dense and most expert parameters of any rank of each layout's split, [n]."""
        keys, of_row = spread.distinct(*SPLIT_FIELDS, "tp", "ep", "etp")
        splits, of_key = keys.distinct(*SPLIT_FIELDS)
        dense, expert = np.empty(len(keys)), np.empty(len(keys))
        units = unit_parameters(self.model, keys)
        names = zip(splits.pp.tolist(), splits.vpp.tolist(), splits.split.tolist(), strict=True)
        for place, (pp, vpp, split) in enumerate(names):
            rows = np.flatnonzero(of_key == place)
            some = UnitParameters(units.dense[:, rows], units.expert[:, rows])
            held = rank_parameters(self.model, binding_ranks(self.model, pp, vpp, splits.stages[split]), some)
            dense[rows], expert[rows] = held.dense.max(axis=0), held.expert.max(axis=0)
        return UnitParameters(dense[of_row], expert[of_row])
