"""The layout of a job for every number of its nodes, as a training script reads it from `elastic.json`.

A count that is not planned is served by the next smaller one that is: its layout runs on the first ranks, the others stay in
reserve. Below the smallest planned count there is none. Read are only degrees, stages, batches and the interval between
checkpoints; the format is that of the elastic export. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeplan.costmodels.layout import Layout
from moeplan.errors import DeviceError, LayoutError, SchemaError
from moeplan.records import load_yaml

SCHEMA = "moeplan.elastic/1"
_WHAT = "elastic table"
_DEGREES = ("tp", "cp", "pp", "vpp", "dp", "ep", "etp", "micro_batch")


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeCount:
    """What runs on one number of nodes."""

    nodes: int
    layout: Layout
    stages: tuple[int, ...] = ()
    """Layers of every stage; empty: equally many."""
    save_steps: int
    """Steps between checkpoints."""

    def layers_of(self, stage: int, layers: int) -> range:
        """The layers of a stage, of `layers` in all."""
        pp = self.layout.pp
        if not self.stages and layers % pp:
            raise LayoutError(f"{self.nodes} nodes: pp={pp} does not divide {layers} layers", hint="give 'stages'")
        sizes = self.stages or (layers // pp,) * pp
        if len(sizes) != pp or sum(sizes) != layers:
            raise LayoutError(f"{self.nodes} nodes: stages {list(sizes)} are not {pp} stages with {layers} layers in all")
        start = sum(sizes[:stage])
        return range(start, start + sizes[stage])


@dataclass(frozen=True, kw_only=True, slots=True)
class ElasticTable:
    """Layouts by number of nodes."""

    global_batch: int
    """Sequences in a step, the same for all counts."""
    counts: tuple[NodeCount, ...]
    """By ascending number of nodes."""

    def __post_init__(self) -> None:
        if not self.counts or self.global_batch < 1:
            raise LayoutError(f"{len(self.counts)} node counts with {self.global_batch} sequences a step are no table")
        for count in self.counts:
            x = count.layout
            if self.global_batch % (x.dp * x.micro_batch):
                raise LayoutError(
                    f"{count.nodes} nodes: dp*micro_batch = {x.dp}*{x.micro_batch} does not divide the "
                    f"{self.global_batch} sequences of a step",
                    hint="samples would be lost or repeated",
                )

    def at(self, nodes: int) -> NodeCount:
        """What runs when `nodes` nodes are there."""
        fitting = [count for count in self.counts if count.nodes <= nodes]
        if not fitting:
            known = ", ".join(str(count.nodes) for count in self.counts)
            raise DeviceError(f"{nodes} nodes are not a planned count", hint=f"planned are {known}")
        return fitting[-1]


def load_table(path: Path) -> ElasticTable:
    """The table of an `elastic.json`."""
    where = f"{_WHAT} '{path}'"
    data = _mapping(load_yaml(path, _WHAT), where)
    if data.get("schema") != SCHEMA:
        raise SchemaError(f"{where}: schema is {data.get('schema')!r}, {SCHEMA!r} is needed")
    entries = data.get("counts")
    if not isinstance(entries, list):
        raise SchemaError(f"{where}: 'counts' is not a list")
    counts = [_count(_mapping(each, f"{where}: count {i + 1}"), f"{where}: count {i + 1}") for i, each in enumerate(entries)]
    return ElasticTable(
        global_batch=_number(data, "global_batch", where), counts=tuple(sorted(counts, key=lambda count: count.nodes))
    )


def _count(data: Mapping[str, Any], where: str) -> NodeCount:
    given = _mapping(data.get("layout"), f"{where}: layout")
    sizes: dict[str, Any] = {name: _number(given, name, f"{where}: layout", 1) for name in _DEGREES}
    experts = sizes["etp"] * sizes["ep"]
    # A remainder is refused by the identities of Layout.
    edp = max(1, sizes["tp"] * sizes["cp"] * sizes["dp"] // experts)
    return NodeCount(
        nodes=_number(data, "nodes", where),
        layout=Layout(edp=edp, **sizes),
        stages=_stages(given, where),
        save_steps=_number(data, "ckpt_interval_steps", where),
    )


def _stages(layout: Mapping[str, Any], where: str) -> tuple[int, ...]:
    stages = layout.get("stages") or []
    if not isinstance(stages, list) or not all(isinstance(n, int) and n >= 0 for n in stages):
        raise SchemaError(f"{where}: stages is {stages!r}, a list of numbers of layers is needed")
    return tuple(stages)


def _mapping(data: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(data, Mapping):
        raise SchemaError(f"{where}: a mapping is needed")
    return data


def _number(data: Mapping[str, Any], key: str, where: str, default: int | None = None) -> int:
    value = data.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise SchemaError(f"{where}: {key} is {value!r}, a whole number from 1 is needed")
    return value
