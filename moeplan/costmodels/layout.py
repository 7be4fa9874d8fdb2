"""Layout: how one model is cut over the ranks of a job, and how its steps are run.

Dense and expert parts fold over the same ranks independently within a pipeline stage:
    world = tp * cp * dp * pp = etp * ep * edp * pp
Rank order is Megatron's default: tp fastest, then cp, then dp, pp slowest; for experts etp, ep, edp, pp
(arXiv:2504.14960, section 3). `Layout` is one candidate with names; `Layouts` holds many as columns of numpy arrays, names
turned into codes. Cost functions read columns, so they price one layout and a million with the same code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from moeplan.costmodels.moe_choice import parse_choices
from moeplan.costmodels.recompute import parse_counts
from moeplan.errors import LayoutError

Ints: TypeAlias = npt.NDArray[np.int64]
Bools: TypeAlias = npt.NDArray[np.bool_]

RECOMPUTE_MODULES = (
    "core_attn", "moe_act", "layernorm", "mla_up_proj", "mlp", "moe", "shared_experts", "full",
)  # fmt: skip
"""Megatron's names of what can be recomputed; "full" is the whole layer. Bit i of a recompute mask is entry i."""
GRAPH_SCOPES = ("attn", "mlp", "moe", "moe_router", "moe_preprocess", "mamba", "full_iteration")
"""Megatron's names of what a CUDA graph can cover. Bit i of a graph mask is entry i."""
DISPATCHERS = ("none", "allgather", "alltoall", "deepep", "hybridep")
"""How tokens reach their experts; "none" for dense models. The code of a dispatcher is its place here."""
SHARDINGS = ("ddp", "optimizer", "fsdp")
"""What data parallelism shards: nothing, optimizer states (ZeRO-1), or weights, gradients and states (ZeRO-3)."""

MOST = 1_000_000_000
"""Larger degrees are taken for slips; products of two stay within 64-bit integers."""

DEGREES = ("tp", "cp", "pp", "vpp", "dp", "ep", "etp", "edp")


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """One way to run a model on `world` ranks."""

    tp: int = 1
    """Tensor-parallel size of the dense parts."""
    cp: int = 1
    """Context-parallel size: ranks that share a sequence."""
    pp: int = 1
    """Pipeline-parallel size: stages."""
    vpp: int = 1
    """Virtual stages (model chunks) per pipeline rank; 1: plain 1F1B."""
    dp: int = 1
    """Data-parallel size of the dense parts; tp * cp * dp ranks form a stage."""
    ep: int = 1
    """Expert-parallel size."""
    etp: int = 1
    """Tensor-parallel size of the experts."""
    edp: int = 1
    """Data-parallel size of the experts; etp * ep * edp = tp * cp * dp."""
    micro_batch: int = 1
    """Sequences in a micro-batch of one data-parallel rank."""
    sequence_parallel: bool = False
    """Norms and residuals sharded over the tensor-parallel ranks."""
    sharding: Literal["ddp", "optimizer", "fsdp"] = "optimizer"
    """What data parallelism shards, see `SHARDINGS`."""
    recompute: tuple[str, ...] = ()
    """Modules whose activations are recomputed in the backward pass, see `RECOMPUTE_MODULES`."""
    recompute_layers: str = ""
    """How many layers of each chunk do so, see `recompute.py` ("2", "4*8|0*24"); empty: all, and prediction layers."""
    dispatcher: Literal["none", "allgather", "alltoall", "deepep", "hybridep"] = "none"
    """How tokens reach their experts."""
    ep_overlap: bool = False
    """Expert all-to-all of one micro-batch hidden behind the compute of another (1F1B overlap)."""
    shared_overlap: bool = False
    """Shared experts computed beside dispatch and combine, on a stream of their own."""
    moe_schedule: str = ""
    """Schedule of the MoE layers, see `moe_choice.py`; empty: what dispatcher and overlaps say, all that Megatron runs."""
    tp_overlap: bool = False
    """Tensor-parallel gathers and scatters pipelined with their GEMMs."""
    dp_overlap: bool = True
    """Gradient reduction and parameter gather overlapped with backward and forward."""
    cuda_graphs: tuple[str, ...] = ()
    """What CUDA graphs cover, see `GRAPH_SCOPES`."""
    optimizer_offload: float = 0.0
    """Share of the optimizer states kept in host memory."""
    stages: str = ""
    """Explicit split in Megatron's layout letters ("Et*3|(tt|)*29m|L"); empty: the balanced split of `stages.py`."""

    def __post_init__(self) -> None:
        for name in (*DEGREES, "micro_batch"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise LayoutError(f"{name}={value!r} must be a whole number of at least 1")
            if value > MOST:
                raise LayoutError(f"{name}={value} is more than the {MOST} that are handled")
        dense, expert = self.tp * self.cp * self.dp, self.etp * self.ep * self.edp
        if dense != expert:
            raise LayoutError(
                f"dense and expert grids differ: tp*cp*dp = {self.tp}*{self.cp}*{self.dp} = {dense} ranks a stage, "
                f"etp*ep*edp = {self.etp}*{self.ep}*{self.edp} = {expert}",
                hint=f"edp = {dense}/(etp*ep) must be a whole number",
            )
        _known("recompute module", self.recompute, RECOMPUTE_MODULES)
        _known("CUDA graph scope", self.cuda_graphs, GRAPH_SCOPES)
        _known("dispatcher", (self.dispatcher,), DISPATCHERS)
        _known("sharding", (self.sharding,), SHARDINGS)
        if not 0.0 <= self.optimizer_offload <= 1.0:
            raise LayoutError(f"optimizer_offload={self.optimizer_offload} must lie between 0 and 1")
        parse_choices(self.moe_schedule)
        parse_counts(self.recompute_layers)
        for name, known in (("recompute", RECOMPUTE_MODULES), ("cuda_graphs", GRAPH_SCOPES)):
            names = getattr(self, name)
            object.__setattr__(self, name, names_of(mask_of(names, known), known))

    @property
    def world(self) -> int:
        """Ranks of the job."""
        return self.tp * self.cp * self.dp * self.pp

    def degrees(self) -> str:
        """The degrees that differ from 1, for a line of text: "TP2 PP8 VPP4 EP32 DP16"."""
        parts = [f"{n.upper()}{getattr(self, n)}" for n in DEGREES if getattr(self, n) > 1 and n not in ("edp",)]
        return " ".join(parts) or "1 GPU"

    def recompute_text(self) -> str:
        """What is recomputed, for a line of text: "none", "mla_up_proj+moe_act", "full in 2 layers of a chunk"."""
        if not self.recompute or not self.recompute_layers:
            return "+".join(self.recompute) or "none"
        counts, what = parse_counts(self.recompute_layers), "+".join(self.recompute)
        if not isinstance(counts, int):
            return f"{what} in {self.recompute_layers} layers"
        return f"{what} in {counts} layer{'s' * (counts != 1)} of a chunk"


def _known(kind: str, names: Iterable[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise LayoutError(f"unknown {kind} '{name}'", hint=f"one of {', '.join(known)}")


def mask_of(names: Iterable[str], known: Sequence[str]) -> int:
    """Bit mask of `names`: bit i stands for `known[i]`."""
    return sum(1 << known.index(n) for n in set(names))


def names_of(mask: int, known: Sequence[str]) -> tuple[str, ...]:
    """The names whose bits are set in `mask`, in the order of `known`."""
    return tuple(n for i, n in enumerate(known) if mask >> i & 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Layouts:
    """Many layouts as columns; every field is an array of shape [n] (integers, masks and codes as int64)."""

    tp: Ints
    cp: Ints
    pp: Ints
    vpp: Ints
    dp: Ints
    ep: Ints
    etp: Ints
    edp: Ints
    micro_batch: Ints
    sequence_parallel: Bools
    sharding: Ints
    """Places in `SHARDINGS`."""
    recompute: Ints
    """Masks over `RECOMPUTE_MODULES`."""
    dispatcher: Ints
    """Places in `DISPATCHERS`."""
    ep_overlap: Bools
    shared_overlap: Bools
    tp_overlap: Bools
    dp_overlap: Bools
    cuda_graphs: Ints
    """Masks over `GRAPH_SCOPES`."""
    optimizer_offload: npt.NDArray[np.float64]
    stages: tuple[str, ...] = ("",)
    """Explicit splits, see `Layout.stages`; `split` says which one a row uses."""
    split: Ints = dataclasses.field(default_factory=lambda: np.zeros(1, np.int64))
    """Places in `stages`."""
    schedules: tuple[str, ...] = ("",)
    """Schedules of MoE layers, see `Layout.moe_schedule`; `schedule` says which one a row uses."""
    schedule: Ints = dataclasses.field(default_factory=lambda: np.zeros(1, np.int64))
    """Places in `schedules`."""
    recompute_counts: tuple[str, ...] = ("",)
    """Layers of chunks that recompute, see `Layout.recompute_layers`; `recompute_count` says which text a row uses."""
    recompute_count: Ints = dataclasses.field(default_factory=lambda: np.zeros(1, np.int64))
    """Places in `recompute_counts`."""

    def __len__(self) -> int:
        return len(self.tp)

    def recomputes(self, module: str) -> Bools:
        """Whether each layout recomputes `module`, [n]."""
        return (self.recompute >> RECOMPUTE_MODULES.index(module) & 1).astype(bool)

    def graphs(self, scope: str) -> Bools:
        """Whether a CUDA graph covers `scope`, [n]."""
        return (self.cuda_graphs >> GRAPH_SCOPES.index(scope) & 1).astype(bool)

    def dispatches_with(self, *names: str) -> Bools:
        """Whether each layout uses one of the named dispatchers, [n]."""
        wanted = sum(1 << DISPATCHERS.index(n) for n in names)
        return (wanted >> self.dispatcher & 1).astype(bool)

    def shards_as(self, name: str) -> Bools:
        """Whether each layout shards as named, [n]."""
        return np.equal(self.sharding, SHARDINGS.index(name))

    def take(self, rows: Any) -> Layouts:
        """The layouts at the given places (indices, mask or slice)."""
        columns = {f.name: getattr(self, f.name)[rows] for f in dataclasses.fields(self) if f.name not in _TEXTS}
        return Layouts(**columns, **{name: getattr(self, name) for name in _TEXTS})

    def with_columns(self, **columns: Any) -> Layouts:
        """The same layouts with some columns replaced."""
        return dataclasses.replace(self, **columns)

    @classmethod
    def joined(cls, parts: Sequence[Layouts]) -> Layouts:
        """The layouts of all parts, of which there is at least one, in their order."""
        columns: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            if field.name not in _TEXTS:
                columns[field.name] = np.concatenate([getattr(part, field.name) for part in parts])
        for texts, place in _TEXTS.items():
            known = {text: i for i, text in enumerate(dict.fromkeys(text for part in parts for text in getattr(part, texts)))}
            maps = [np.array([known[text] for text in getattr(part, texts)], np.int64) for part in parts]
            columns[texts] = tuple(known)
            columns[place] = np.concatenate([m[getattr(part, place)] for m, part in zip(maps, parts, strict=True)])
        return cls(**columns)

    def distinct(self, *names: str) -> tuple[Layouts, Ints]:
        """The layouts that differ in the named columns, and for every row its place among them."""
        return Codes(self).distinct(*names)

    def row(self, i: int) -> Layout:
        """The layout at place `i`, with names again."""
        values: dict[str, Any] = {}
        for field in dataclasses.fields(Layout):
            if field.name not in ("stages", "moe_schedule", "recompute_layers"):
                values[field.name] = getattr(self, field.name)[i].item()
        values["sharding"] = SHARDINGS[values["sharding"]]
        values["dispatcher"] = DISPATCHERS[values["dispatcher"]]
        values["recompute"] = names_of(values["recompute"], RECOMPUTE_MODULES)
        values["cuda_graphs"] = names_of(values["cuda_graphs"], GRAPH_SCOPES)
        values["moe_schedule"] = self.schedules[int(self.schedule[i])]
        values["recompute_layers"] = self.recompute_counts[int(self.recompute_count[i])]
        return Layout(**values, stages=self.stages[int(self.split[i])])

    @classmethod
    def of(cls, layouts: Sequence[Layout]) -> Layouts:
        """Columns of the given layouts, in their order."""
        stages = tuple(dict.fromkeys(x.stages for x in layouts))
        schedules = tuple(dict.fromkeys(x.moe_schedule for x in layouts))
        counts = tuple(dict.fromkeys(x.recompute_layers for x in layouts))
        columns: dict[str, Any] = {f.name: [getattr(x, f.name) for x in layouts] for f in dataclasses.fields(Layout)}
        del columns["stages"], columns["moe_schedule"], columns["recompute_layers"]
        columns["sharding"] = [SHARDINGS.index(x) for x in columns["sharding"]]
        columns["dispatcher"] = [DISPATCHERS.index(x) for x in columns["dispatcher"]]
        columns["recompute"] = [mask_of(x, RECOMPUTE_MODULES) for x in columns["recompute"]]
        columns["cuda_graphs"] = [mask_of(x, GRAPH_SCOPES) for x in columns["cuda_graphs"]]
        columns["split"] = [stages.index(x.stages) for x in layouts]
        columns["schedule"] = [schedules.index(x.moe_schedule) for x in layouts]
        columns["recompute_count"] = [counts.index(x.recompute_layers) for x in layouts]
        kinds = dict.fromkeys(("sequence_parallel", "ep_overlap", "shared_overlap", "tp_overlap", "dp_overlap"), bool)
        arrays = {
            name: np.asarray(values, np.float64 if name == "optimizer_offload" else kinds.get(name, np.int64))
            for name, values in columns.items()
        }
        return cls(**arrays, stages=stages, schedules=schedules, recompute_counts=counts)


_TEXTS = {"stages": "split", "schedules": "schedule", "recompute_counts": "recompute_count"}
"""Fields of `Layouts` that are no columns, and the columns of places in them."""


class Codes:
    """Columns of many layouts as codes of the values that occur, made once for each column.

    Columns hold small non-negative integers, so tables of what occurs replace sorting (but for the offloaded share of the
    optimizer), and a combination of columns is a number in a mixed radix. Costs that depend on few columns are computed on the
    few distinct layouts and gathered.
    """

    def __init__(self, layouts: Layouts, known: Codes | None = None, changed: tuple[str, ...] = ()) -> None:
        """`known`: codes of other layouts that differ from these in the columns `changed` only."""
        self.layouts = layouts
        shared = {} if known is None else known._codes
        self._codes: dict[str, tuple[Any, int]] = {name: code for name, code in shared.items() if name not in changed}

    def column(self, name: str, rows: Any = slice(None)) -> Any:
        """The values of a column at `rows`; one number where all layouts have the same."""
        codes, count = self._code(name)
        values = getattr(self.layouts, name)
        return values[0] if codes is None and count else values[rows]

    def distinct(self, *names: str) -> tuple[Layouts, Ints]:
        """The layouts that differ in the named columns, and for every row its place among them."""
        code: Any = None
        size = 1
        for name in names:
            codes, count = self._code(name)
            if codes is None:
                continue
            size *= count
            kind: Any = np.int32 if size < 2**31 else np.int64
            code = codes if code is None else code.astype(kind, copy=False) * kind(count) + codes
        n = len(self.layouts)
        if code is None:
            return self.layouts.take(slice(0, min(n, 1))), np.zeros(n, np.int64)
        if size <= 8 * n + 4096:
            occurring, lookup = _places(code, size)
            of_row = lookup[code]
            first = np.empty(len(occurring), np.int64)
            first[of_row[::-1]] = np.arange(n - 1, -1, -1)
        else:
            _, first, of_row = np.unique(code, return_index=True, return_inverse=True)
        return self.layouts.take(first), of_row

    def _code(self, name: str) -> tuple[Any, int]:
        """Codes of a column and their number; no codes where all values are the same."""
        if name not in self._codes:
            column = getattr(self.layouts, name)
            if not len(column) or column.max() == column.min():
                self._codes[name] = (None, min(1, len(column)))
            elif column.dtype == np.float64:
                shares, codes = np.unique(column, return_inverse=True)
                self._codes[name] = (codes.astype(np.int32), len(shares))
            else:
                column = column.astype(np.int64, copy=False)
                values, lookup = _places(column, int(column.max()) + 1)
                self._codes[name] = (lookup.astype(np.int32)[column], len(values))
        return self._codes[name]


def _places(column: Any, size: int) -> tuple[Ints, Ints]:
    """The values that occur in `column`, all below `size`, and a table from value to its place among them."""
    seen = np.zeros(size, np.bool_)
    seen[column] = True
    values = np.flatnonzero(seen)
    lookup = np.empty(size, np.int64)
    lookup[values] = np.arange(len(values))
    return values, lookup
