"""What layers, head and prediction layers cost under many layouts: seconds and bytes of one micro-batch.

Both depend on few fields of a layout, and routed experts on others than the rest, so they are computed on the distinct
combinations when first needed and gathered. `without_recompute` makes the same of layers that recompute nothing.
Units: seconds, bytes, [n].
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np

from moeplan.costmodels.layer import DENSE_FIELDS, ROUTED_FIELDS, fold, without_experts
from moeplan.costmodels.layout import Codes, Layouts
from moeplan.costmodels.model import Model
from moeplan.costmodels.passes import pass_totals
from moeplan.costmodels.peak import LayerMemory, dense_memory, routed_memory
from moeplan.costmodels.step import UnitTime, unit_times
from moeplan.costmodels.workload import Workload
from moeplan.profiles.profile import Profile


class LayerTables:
    """Tables of one unit each: layers by kind, the head, prediction layers (if the model has any)."""

    def __init__(self, model: Model, profile: Profile, workload: Workload, layouts: Layouts, codes: Codes) -> None:
        """`codes`: those of `layouts`."""
        self.model, self.profile, self.workload = model, profile, workload
        dense = Codes(without_experts(layouts), codes, ("recompute",))
        self.dense, self.dense_of_row = dense.distinct(*DENSE_FIELDS)
        folded = Codes(fold(layouts), codes, ("tp", "cp", "micro_batch", "sequence_parallel", "recompute"))
        self.routed, self.routed_of_row = folded.distinct(*ROUTED_FIELDS)

    @classmethod
    def without_recompute(cls, model: Model, profile: Profile, workload: Workload, layouts: Layouts, rows: Any) -> LayerTables:
        """Tables of the rows at the places `rows` as if they recomputed nothing; other rows have no meaning in them."""
        some = layouts.take(rows)
        some = some.with_columns(recompute=0 * some.recompute)
        out = cls(model, profile, workload, some, Codes(some))
        places = np.zeros((2, len(layouts)), np.int64)
        places[:, rows] = out.dense_of_row, out.routed_of_row
        out.dense_of_row, out.routed_of_row = places
        return out

    def seconds(self, rows: Any) -> Iterator[Any]:
        """Forward plus backward of one micro-batch in each unit, [n]."""
        dense, routed = self.dense_of_row[rows], self.routed_of_row[rows]
        for one, two in self._totals:
            yield gather(one, dense) if two is None else gather(one, dense) + gather(two, routed)

    def pass_seconds(self, rows: Any) -> list[list[Any]]:
        """Seconds of one micro-batch in each unit, forward and backward, [n]."""
        dense, routed = self.dense_of_row[rows], self.routed_of_row[rows]
        return [[gather(one, dense) + gather(two, routed) for one, two in way] for way in self._pass_totals]

    def saved_bytes(self, rows: Any) -> list[Any]:
        """Kept for one micro-batch by a layer of each kind and by a prediction layer (0 if the model has none), [n]."""
        dense, routed = self.dense_of_row[rows], self.routed_of_row[rows]
        one, two = self.dense_memory, self.routed_memory
        saved = [gather(kept, dense) for kept in one.kinds]
        saved = [s + gather(two.kinds[k], routed) if self.model.kinds[k].is_moe else s for k, s in enumerate(saved)]
        return [*saved, gather(one.mtp, dense) + gather(two.mtp, routed) if self.model.mtp else 0.0]

    @functools.cached_property
    def units(self) -> list[UnitTime]:
        """Seconds of every unit by part, on the distinct combinations."""
        return unit_times(self.model, self.profile, self.workload, self.dense, self.routed)

    @functools.cached_property
    def dense_memory(self) -> LayerMemory:
        """Bytes outside routed experts, on the distinct combinations."""
        return dense_memory(self.model, self.workload, self.dense)

    @functools.cached_property
    def routed_memory(self) -> LayerMemory:
        """Bytes of routed experts, on the distinct combinations."""
        return routed_memory(self.model, self.workload, self.routed)

    @functools.cached_property
    def _totals(self) -> list[tuple[Any, Any]]:
        """All parts of a unit together, dense and routed (None where it has no experts)."""
        return [
            (
                np.broadcast_to(sum(u.dense.values()), len(self.dense)),
                np.broadcast_to(sum(u.routed.values()), len(self.routed)) if u.routed else None,
            )
            for u in self.units
        ]

    @functools.cached_property
    def _pass_totals(self) -> list[list[tuple[Any, Any]]]:
        return pass_totals(self.model, self.profile, self.workload, self.dense, self.routed)


def gather(values: Any, places: Any) -> Any:
    """`values` along the last axis at `places`."""
    return np.take(values, places, axis=-1, mode="clip")
