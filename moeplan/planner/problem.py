"""Problem: model, profile, workload and limits that go together, checked once.

What is said about fields of layouts (`--pin tp=2`, `--forbid "ep>8"`) are `Condition`s; the space of layouts leaves out what
contradicts them before anything is priced.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeplan.costmodels.layout import DISPATCHERS, GRAPH_SCOPES, RECOMPUTE_MODULES, SHARDINGS, Layouts, mask_of
from moeplan.costmodels.memory import largest_peak_bytes, reserve_bytes
from moeplan.costmodels.model import Model
from moeplan.costmodels.recompute import parse_counts
from moeplan.costmodels.workload import Workload
from moeplan.errors import LayoutError, ProblemError, UnknownNameError, UsageError, nearest_hint
from moeplan.profiles.profile import Profile
from moeplan.units import format_bytes

NUMBERS = ("tp", "cp", "pp", "vpp", "dp", "ep", "etp", "edp", "micro_batch", "optimizer_offload")
SWITCHES = ("sequence_parallel", "ep_overlap", "shared_overlap", "tp_overlap", "dp_overlap")
TARGETS = ("megatron", "research")
"""Whose rules a plan keeps: Megatron's, or those and every published schedule of MoE layers besides."""
NAMES = {"dispatcher": DISPATCHERS, "sharding": SHARDINGS}
SETS = {"recompute": RECOMPUTE_MODULES, "cuda_graphs": GRAPH_SCOPES}
TEXTS = {"recompute_layers": ("recompute_counts", "recompute_count")}
"""Fields that are text, with the names of their texts and places in `Layouts`."""
FIELDS = (*NUMBERS, *SWITCHES, *NAMES, *SETS, *TEXTS)
"""Fields of a layout that conditions can speak of."""

_ALIASES = {"mbs": "micro_batch", "sp": "sequence_parallel"}
_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "<=": operator.le, ">=": operator.ge, "!=": operator.ne, "=": operator.eq, "==": operator.eq,
    "<": operator.lt, ">": operator.gt,
}  # fmt: skip
_TRUTH = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


@dataclass(frozen=True, slots=True)
class Condition:
    """A comparison of one field of a layout: "tp=2", "ep>8", "recompute=moe_act+layernorm"."""

    field: str
    operation: str
    value: float | bool | str
    """The number, truth value, code, mask or text to compare with."""
    text: str
    """As the user wrote it."""

    def holds(self, layouts: Layouts) -> Any:
        """Whether each layout meets it, [n]."""
        if self.field in TEXTS:
            texts, places = (getattr(layouts, name) for name in TEXTS[self.field])
            return np.array([self.holds_for(text) for text in texts], np.bool_)[places]
        return self.holds_for(getattr(layouts, self.field))

    def holds_for(self, values: Any) -> Any:
        """Whether values of its field meet it."""
        return _OPERATORS[self.operation](values, self.value)


def parse_condition(text: str) -> Condition:
    """The condition that a user wrote; refuses unknown fields and values with the nearest known ones."""
    match = re.fullmatch(r"\s*([A-Za-z_]+)\s*(<=|>=|!=|==|=|<|>)\s*(\S+)\s*", text)
    if match is None:
        raise UsageError(f"'{text}' is not a condition", hint="write it like tp=2 or 'ep>8'")
    name, operation, value = _ALIASES.get(match[1].lower(), match[1].lower()), match[2], match[3]
    if name not in FIELDS:
        raise UsageError(f"condition '{text}': unknown field '{match[1]}'", hint=nearest_hint(match[1], (*FIELDS, *_ALIASES)))
    if name not in NUMBERS and operation not in ("=", "==", "!="):
        raise UsageError(f"condition '{text}': {name} has no order", hint=f"write {name}={value} or {name}!={value}")
    return Condition(name, operation, _value(name, value, text), text.strip())


def _value(name: str, value: str, text: str) -> float | bool | str:
    if name in NUMBERS:
        try:
            number = float(value)
        except ValueError:
            raise UsageError(f"condition '{text}': '{value}' is not a number") from None
        if not math.isfinite(number):
            raise UsageError(f"condition '{text}': '{value}' is not a number")
        if name != "optimizer_offload" and number != int(number):
            raise UsageError(f"condition '{text}': {name} is a whole number, {value} is not")
        return number
    if name in SWITCHES:
        if value.lower() not in _TRUTH:
            raise UsageError(f"condition '{text}': {name} is true or false, not '{value}'")
        return _TRUTH[value.lower()]
    if name in NAMES:
        if value not in NAMES[name]:
            raise UsageError(f"condition '{text}': unknown {name} '{value}'", hint=nearest_hint(value, NAMES[name]))
        return NAMES[name].index(value)
    if name in TEXTS:
        counts = "" if value == "all" else value
        try:
            parse_counts(counts)
        except LayoutError as error:
            raise UsageError(f"condition '{text}': {error.message}", hint=error.hint) from None
        return counts
    names = [] if value in ("none", "") else value.split("+")
    for n in names:
        if n not in SETS[name]:
            raise UsageError(f"condition '{text}': unknown {name} '{n}'", hint=nearest_hint(n, SETS[name]))
    return mask_of(names, SETS[name])


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """The whole question."""

    model: Model
    profile: Profile
    workload: Workload
    pins: tuple[Condition, ...] = ()
    """Every layout must meet all of them."""
    forbidden: tuple[Condition, ...] = ()
    """No layout may meet any of them."""
    extend_positions: bool = False
    """Accept sequences longer than the positions that the model was published with (context extension)."""
    memory_limit_bytes: float = 0.0
    """Device memory that a plan may use; 0: all that the device has."""
    target: str = "megatron"
    """What the plan is to run on, one of `TARGETS`."""

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise UnknownNameError("target", self.target, TARGETS)
        device, precision = self.profile.cluster.device, self.workload.precision
        if device.capability_number and device.capability_number < precision.min_capability:
            raise ProblemError(
                f"{precision.name} needs compute capability {precision.min_capability}, {device.name} has {device.capability}",
                hint="use --precision bf16",
            )
        if precision.peak not in device.peak_flop_per_s:
            raise ProblemError(
                f"{device.name} has no {precision.peak} matrix units for {precision.name}", hint="use --precision bf16"
            )
        longest = self.model.max_positions
        if longest and self.workload.seq_len > longest and not self.extend_positions:
            raise ProblemError(
                f"sequence length {self.workload.seq_len} exceeds the {longest} positions of {self.model.name}",
                hint=f"use --seq-len {longest} or less",
            )
        if not 0 <= self.memory_limit_bytes < math.inf:
            raise ProblemError(f"memory limit {format_bytes(self.memory_limit_bytes)}: 0 (no limit) or more is needed")
        for name in ("imbalance", "capacity_factor"):
            if self.model.moe is not None and getattr(self.workload, name) > self.model.moe.experts:
                raise ProblemError(
                    f"{name}={getattr(self.workload, name):g} exceeds the {self.model.moe.experts} experts of "
                    f"{self.model.name}: no rank receives more than all tokens"
                )

    @property
    def device_bytes(self) -> float:
        """Device memory that a plan may use, context and communicators included."""
        whole = self.profile.cluster.device.memory_bytes
        return min(self.memory_limit_bytes, whole) if self.memory_limit_bytes else whole

    @property
    def peak_limit_bytes(self) -> float:
        """The largest peak allocation that fits."""
        return largest_peak_bytes(self.device_bytes)

    def excess_bytes(self, peak: Any) -> Any:
        """How far a peak allocation, with what must stay free beside it, exceeds the device; negative: it fits."""
        return peak + reserve_bytes(peak) - self.device_bytes

    def pinned(self, field: str) -> list[float | bool | str]:
        """The value that pins ask of a field; none where no pin names it with "="."""
        return list(dict.fromkeys(c.value for c in self.pins if c.field == field and c.operation in ("=", "==")))[:1]

    def allowed_values(self, field: str, values: Sequence[int]) -> list[int]:
        """The values of one field that meet its pins and no forbidden condition on it."""
        pins = [c for c in self.pins if c.field == field]
        forbidden = [c for c in self.forbidden if c.field == field]
        return [v for v in values if all(c.holds_for(v) for c in pins) and not any(c.holds_for(v) for c in forbidden)]

    def allows(self, layouts: Layouts, fields: Sequence[str] = FIELDS) -> Any:
        """Whether each layout meets all pins and no forbidden condition that speak of `fields`, [n]."""
        allowed = np.ones(len(layouts), np.bool_)
        for condition in self.pins:
            if condition.field in fields:
                allowed &= condition.holds(layouts)
        for condition in self.forbidden:
            if condition.field in fields:
                allowed &= ~condition.holds(layouts)
        return allowed
