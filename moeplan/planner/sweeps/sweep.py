"""Sweep: one question over many sizes, devices and workloads, as a file states it.

A sweep file has a question (the options of `solve`), axes (lists or ranges of values of further options) and conditions that
leave points out. Its points are the product of the axes, the last axis fastest. Every name and file in it is looked up when
it is loaded; that a point's model, machine and workload do not go together is the answer to that point. Units: as in
`Question`.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeplan._version import VERSION
from moeplan.costmodels.model_catalog import load_model
from moeplan.costmodels.workload import load_precision
from moeplan.errors import MoeplanError, SchemaError, UnknownNameError, UsageError, nearest_hint
from moeplan.planner.plan_data import located
from moeplan.planner.problem import Problem, parse_condition
from moeplan.planner.question import Question, load_software, problem_of
from moeplan.profiles.hardware import device_names, load_cluster, load_device
from moeplan.profiles.profile_file import load_profile
from moeplan.records import check_schema, from_mapping, load_yaml, sha256_of
from moeplan.units import parse_bytes

SCHEMA = "moeplan.sweep/1"
MOST_POINTS, MOST_VALUES = 10_000_000, 10_000
"""Points of a sweep, and values of an axis; more are taken for slips."""
Point = Mapping[str, Any]
"""A value for every axis."""

_KEYS = tuple(f.name for f in dataclasses.fields(Question))
_TEXTS = {f.name for f in dataclasses.fields(Question) if f.type in ("str", "str | None")}
_COUNTS = ("gpus", "global_batch", "seq_len")
_OPERATORS: Mapping[str, Callable[[Any, Any], bool]] = {
    "<=": operator.le, ">=": operator.ge, "!=": operator.ne, "<": operator.lt, ">": operator.gt,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class _File:
    """The keys of a sweep file."""

    schema: str
    question: Mapping[str, Any]
    axes: Mapping[str, Any]
    exclude: tuple[Any, ...] = ()
    prices: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """A sweep, every name of it known."""

    name: str
    """Its file without directory and ending."""
    directory: Path
    """Where its files are looked for."""
    question: Mapping[str, Any]
    """What holds at every point: fields of a `Question`."""
    axes: Mapping[str, tuple[Any, ...]]
    """Values of further fields, in the order of the file."""
    exclude: tuple[Mapping[str, Any], ...] = ()
    """Points at which every axis of one of them has the value, one of the values, or meets the comparison, are left out."""
    prices: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Price of a GPU-hour by device."""

    @property
    def product(self) -> int:
        """Points before any is left out."""
        return math.prod(len(values) for values in self.axes.values())

    def points(self) -> Iterator[Point]:
        """All points, the last axis fastest."""
        for values in itertools.product(*self.axes.values()):
            point = dict(zip(self.axes, values, strict=True))
            if not any(all(_meets(point[name], wanted) for name, wanted in rule.items()) for rule in self.exclude):
                yield point

    def question_of(self, point: Point) -> Question:
        """The question of a point, files as seen from here."""
        values = {name: self._resolved(name, value) for name, value in {**self.question, **point}.items()}
        return from_mapping(Question, values, f"sweep '{self.name}'")

    def problem_of(self, point: Point, say: Callable[[str], None]) -> Problem:
        """The problem of a point, at the price of its device; an error where its parts do not go together."""
        problem = problem_of(self.question_of(point), say)
        cluster = problem.profile.cluster
        if (price := self.prices.get(cluster.device.name)) is None:
            return problem
        cluster = dataclasses.replace(cluster, price_per_gpu_hour=price)
        return dataclasses.replace(problem, profile=dataclasses.replace(problem.profile, cluster=cluster))

    def identity(self) -> dict[str, Any]:
        """What tells this sweep from others: its parts, the version of moeplan, and the content of the files that it names."""
        stated = {name: [value] for name, value in self.question.items()} | dict(self.axes)
        refs = [self._resolved(n, v) for n in ("model", "cluster", "profile") for v in stated.get(n, ())]
        paths = [Path(ref) / "config.json" if Path(ref).is_dir() else Path(ref) for ref in refs]
        files = {str(path): sha256_of(path, "file") for path in paths if path.is_file()}
        parts = {name: getattr(self, name) for name in ("question", "axes", "exclude", "prices")}
        return {"moeplan": VERSION, **parts, "files": files}

    def _resolved(self, name: str, value: Any) -> Any:
        if name in ("pin", "forbid") and isinstance(value, str):
            return [value]
        named = name in ("model", "cluster") and re.search(r"[/\\]|\.(json|ya?ml)$", str(value), re.IGNORECASE)
        return str(self.directory / str(value)) if name == "profile" or named else value


def load_sweep(path: Path) -> Sweep:
    """The sweep of a file; every key, name and value in it is checked."""
    where = f"sweep file '{path}'"
    data = check_schema(load_yaml(path, "sweep file"), SCHEMA, where, "sweep file", version=VERSION, remedy="mend the file")
    file = from_mapping(_File, data, where)
    for part, stated in (("question", file.question), ("axes", file.axes)):
        for name in stated:
            if name not in _KEYS:
                kind = "axis" if part == "axes" else "key"
                raise SchemaError(f"{where}, {part}: unknown {kind} '{name}'", hint=nearest_hint(str(name), _KEYS))
    twice = [name for name in file.axes if name in file.question]
    if twice:
        raise SchemaError(f"{where}: '{twice[0]}' stands in question and in axes", hint="leave it in one of them")
    axes = {name: _values(given, f"{where}, axis '{name}'") for name, given in file.axes.items()}
    if not axes:
        raise SchemaError(f"{where}: no axes", hint="`moeplan solve` answers a single question")
    sweep = Sweep(
        name=path.stem,
        directory=path.parent,
        question=file.question,
        axes=axes,
        exclude=tuple(_rule(rule, axes, f"{where}, exclude[{i}]") for i, rule in enumerate(file.exclude)),
        prices=_prices(file.prices, f"{where}, prices"),
    )
    if sweep.product > MOST_POINTS:
        raise SchemaError(f"{where}: {sweep.product:,} points are more than the {MOST_POINTS:,} that a sweep may have")
    _check(sweep, where)
    if next(sweep.points(), None) is None:
        raise SchemaError(f"{where}: exclude leaves none of the {sweep.product:,} points")
    return sweep


def _check(sweep: Sweep, where: str) -> None:
    """Look at every value by itself, and whether the first point states a question."""
    for part, stated in (
        ("question", {n: (v,) for n, v in sweep.question.items()}),
        ("axis", sweep.axes),
    ):
        for name, values in stated.items():
            here = f"{where}, question, key '{name}'" if part == "question" else f"{where}, axis '{name}'"
            for value in values:
                if name in _TEXTS and isinstance(value, (int, float)) and not isinstance(value, bool):
                    raise SchemaError(f"{here}: {value!r} is a number, text is needed", hint=f"put it in quotes: '{value}'")
    first = {name: values[0] for name, values in sweep.axes.items()}
    with located(where):
        sweep.question_of(first)
    for name, value in sweep.question.items():
        _look(name, sweep, value, f"{where}, question, key '{name}'")
    for name, values in sweep.axes.items():
        here = f"{where}, axis '{name}'"
        for value in values:
            with located(here):
                sweep.question_of({**first, name: value})
            _look(name, sweep, value, here)


def _look(name: str, sweep: Sweep, value: Any, where: str) -> None:
    """Look up what a value names."""
    with located(where):
        if name in _COUNTS and value < 1:
            raise UsageError(f"{value} is not a whole number of at least 1")
        if name == "price_per_gpu_hour" and not 0 <= value < math.inf:
            raise UsageError(f"{value:g}: a price of 0 or more is needed")
        find = _NAMED.get(name)
        if find is not None and value is not None:
            find(sweep._resolved(name, value))


def _conditions(texts: Sequence[str]) -> None:
    for text in texts:
        parse_condition(text)


_NAMED: Mapping[str, Callable[[Any], Any]] = {
    "model": load_model, "cluster": load_cluster, "profile": lambda ref: load_profile(Path(ref)), "device": load_device,
    "precision": load_precision, "era": load_software, "memory_limit": parse_bytes, "pin": _conditions, "forbid": _conditions,
}  # fmt: skip
"""How a value of a field is looked up."""


def _values(given: Any, where: str) -> tuple[Any, ...]:
    """The values of an axis: a list, or a range."""
    values = _range(given, where) if isinstance(given, Mapping) else given
    if not isinstance(values, list):
        raise SchemaError(
            f"{where}: expected a list or a range, found {given!r}", hint="write [64, 128] or {from: 64, to: 1024, times: 2}"
        )
    if not values:
        raise SchemaError(f"{where}: no values")
    seen = set()
    for value in values:
        if (key := json.dumps(value, default=str)) in seen:
            raise SchemaError(f"{where}: {value!r} stands twice")
        seen.add(key)
    return tuple(values)


def _range(given: Mapping[str, Any], where: str) -> list[float]:
    """Numbers from one to another, both counted, by a step or by a factor."""
    known = ("from", "to", "step", "times")
    for key, value in given.items():
        if key not in known:
            raise SchemaError(f"{where}: unknown key '{key}' of a range", hint=nearest_hint(str(key), known))
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
            raise SchemaError(f"{where}: {key} {value!r} is not a number")
    if "from" not in given or "to" not in given or ("step" in given) == ("times" in given):
        raise SchemaError(
            f"{where}: a range has from, to and either step or times", hint="write {from: 64, to: 1024, times: 2}"
        )
    value, last, step, times = given["from"], given["to"], given.get("step", 0), given.get("times", 1)
    if last < value:
        raise SchemaError(f"{where}: from {value} to {last} holds no value")
    if step <= 0 and "step" in given or "times" in given and (times <= 1 or value <= 0):
        raise SchemaError(f"{where}: the range does not grow", hint="step is above 0; times is above 1, and from above 0")
    out: list[float] = []
    while value <= last * (1 + 1e-12):
        if len(out) == MOST_VALUES:
            raise SchemaError(f"{where}: more than {MOST_VALUES:,} values")
        out.append(int(value) if value == int(value) else round(value, 12))
        value = value * times + step
    return out


def _rule(rule: Any, axes: Mapping[str, tuple[Any, ...]], where: str) -> Mapping[str, Any]:
    """One condition that leaves points out; a value that its axis does not have is a slip."""
    if not isinstance(rule, Mapping) or not rule:
        raise SchemaError(
            f"{where}: expected axes and their values, found {rule!r}", hint="write {device: h100, gpus: '>1024'}"
        )
    for name, wanted in rule.items():
        if name not in axes:
            raise SchemaError(f"{where}: '{name}' is no axis of this sweep", hint=nearest_hint(str(name), axes))
        if not any(_meets(value, wanted) for value in axes[name]):
            raise SchemaError(
                f"{where}: no value of axis '{name}' is {wanted!r}", hint=f"it has {', '.join(map(str, axes[name][:12]))}"
            )
    return rule


def _meets(value: Any, wanted: Any) -> bool:
    """Whether a value is the one wanted, one of those, or meets a comparison like ">1024"."""
    if isinstance(wanted, list) and not isinstance(value, list):
        return any(_meets(value, one) for one in wanted)
    found = re.fullmatch(r"\s*(<=|>=|!=|<|>)\s*(\S+)\s*", wanted) if isinstance(wanted, str) else None
    if found is None:
        return bool(value == wanted)
    try:
        return _OPERATORS[found[1]](float(value), float(found[2]))
    except (TypeError, ValueError):
        return found[1] == "!=" and str(value) != found[2]


def _prices(given: Mapping[str, float], where: str) -> dict[str, float]:
    """Prices by the catalog's names of devices."""
    out = {}
    for name, price in given.items():
        if not 0 <= price < math.inf:
            raise SchemaError(f"{where}: {price:g} for {name}: a price of 0 or more is needed")
        try:
            out[load_device(name).name] = price
        except MoeplanError:
            raise UnknownNameError(
                "device", name, device_names(), hint=f"in {where}; {nearest_hint(name, device_names())}"
            ) from None
    return out
