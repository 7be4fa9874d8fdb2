"""Measured tables of NVIDIA's aiconfigurator (package aiconfigurator-core, Apache-2.0) as samples.

Tables lie in systems/data/SYSTEM/FAMILY/FRAMEWORK/VERSION/NAME_perf.parquet, those that its collector writes in .txt (CSV);
times are in ms. Taken are forward passes: dense GEMM (in fp8 with the quantisation of the input), causal attention, latent
attention, and NCCL within a node, whose message_size counts elements. Not taken: whole MoE operations. Their passes over rows
and their products cannot be told apart: less the passes they beat dense GEMM (H100: 980 against 790 TFLOP/s).
"""

from __future__ import annotations

import csv
import functools
import importlib
import importlib.util
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moeplan.errors import ClusterError, DeviceError, FileError, MoeplanError, SchemaError, UsageError
from moeplan.profiles.curves import KNOT_BYTES, attention_bytes, causal_flop
from moeplan.profiles.hardware import Cluster, load_device
from moeplan.profiles.samples import Sample
from moeplan.records import read_text

PACKAGE, EXTRA = "aiconfigurator_core", "moeplan[aiconfigurator]"
FRAMEWORKS = ("trtllm", "vllm", "sglang")
MOST = 400
"""Rows of a curve that are taken: the fits need twenty, a file of samples should stay readable."""
CORE = 0.75
"""Share of them in the region that training uses."""
LATENT = (192.0, 128.0)
"""Head sizes of latent attention: queries and keys, values."""
NOT_TAKEN = (
    "the tables hold no backward pass: gradients and the backward of attention are nominal",
    "whole MoE operations of serving engines are not taken, so grouped GEMMs are nominal, and so are dispatch and memory",
)
"""What a profile from these tables must say."""

Columns = Mapping[str, Any]


class Kind(NamedTuple):
    """One table and the rows of it that belong to a curve."""

    op: str
    key: str
    table: str
    framework: str
    """The one that is taken by default: its kernel is what a training step would run (cuBLAS, DeepGEMM, FlashAttention). No
    other stands in for it, because those fall back to kernels of a fifth of the speed (B300, head size 192: Triton)."""
    wanted: Mapping[str, str | int]
    """Values of columns; a column that a table lacks has them."""


_PLAIN: Mapping[str, str | int] = {"kv_cache_dtype": "bfloat16", "step": 0}
KINDS = (
    Kind("gemm", "bf16", "gemm_perf", "vllm", {"gemm_dtype": "bfloat16"}),
    Kind("gemm", "fp8", "gemm_perf", "trtllm", {"gemm_dtype": "fp8"}),
    Kind("gemm", "fp8-blockwise", "gemm_perf", "sglang", {"gemm_dtype": "fp8_block"}),
    Kind("gemm", "nvfp4", "gemm_perf", "trtllm", {"gemm_dtype": "nvfp4"}),
    *(
        Kind("attention", str(size), "context_attention_perf", "vllm",
             {**_PLAIN, "attn_dtype": "bfloat16", "window_size": 0, "head_dim": size})
        for size in (64, 128, 192, 256)
    ),
    Kind("attention", "192/128", "context_mla_perf", "trtllm", {**_PLAIN, "mla_dtype": "bfloat16"}),
)  # fmt: skip
_OPERATIONS = {
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "all_reduce": "all_reduce",
    "alltoall": "all_to_all",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Tables:
    """What was taken."""

    samples: tuple[Sample, ...]
    device: str
    """Name of the device as its driver says it."""
    software: str
    """Package and versions of the frameworks."""
    remarks: tuple[str, ...]


def read_tables(cluster: Cluster, *, root: Path | None = None, framework: str = "", version: str = "") -> Tables:
    """The samples of a cluster's device, of the newest version of each table.

    `root` is a folder of systems in place of that of the package; `framework` and `version` take all kernels from one of them.
    """
    if version and not framework:
        raise UsageError(f"--version {version} belongs to a framework", hint=f"name it with --framework {'|'.join(FRAMEWORKS)}")
    source, data = _root(root)
    folder = _system(data, cluster)
    samples: list[Sample] = []
    devices: Counter[str] = Counter()
    most = 0
    for kind in KINDS:
        rows, found = _kernel_samples(folder, kind, framework or kind.framework, version, devices)
        samples, most = samples + rows, max(most, found)
    samples += _collectives(folder, cluster)
    if not samples:
        there = ", ".join(sorted({f"{p.parts[-3]} {p.parts[-2]}" for k in KINDS for p in _paths(folder, k.table)}))
        wanted = f" of {framework} {version}".rstrip() if framework else ""
        raise FileError(f"no table{wanted} for {cluster.device.name} in '{folder}'", hint=f"there are {there or 'none'}")
    used = sorted({s.how.partition(",")[0] for s in samples})
    thinned = (f"at most {MOST} rows of a curve were taken, of up to {most}",) if most > MOST else ()
    return Tables(
        samples=tuple(samples),
        device=devices.most_common(1)[0][0] if devices else cluster.device.name,
        software=f"{source}: {', '.join(used)}",
        remarks=(*NOT_TAKEN, *thinned),
    )


def _root(root: Path | None) -> tuple[str, Path]:
    """Name of the source, and its folder of tables by system."""
    if root is not None:
        data = root / "data" if (root / "data").is_dir() else root
        if not data.is_dir():
            raise FileError(f"there is no directory '{root}'", hint="give the folder 'systems' of aiconfigurator")
        return "aiconfigurator tables", data
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise DeviceError("the tables of aiconfigurator are not installed", hint=f"pip install '{EXTRA}'")
    from importlib.metadata import version

    name = PACKAGE.replace("_", "-")
    return f"{name} {version(name)}", Path(next(iter(spec.submodule_search_locations))) / "systems" / "data"


def _system(data: Path, cluster: Cluster) -> Path:
    """The folder of the cluster's device."""
    known = {}
    for folder in sorted(path for path in data.iterdir() if path.is_dir() and _paths(path, "*_perf")):
        try:
            known[load_device(folder.name).name] = folder
        except MoeplanError:  # a device that the catalog lacks
            continue
    if cluster.device.name not in known:
        raise ClusterError(
            f"aiconfigurator has no tables for {cluster.device.name}", hint=f"it has {', '.join(known) or 'none'}"
        )
    return known[cluster.device.name]


def _paths(folder: Path, table: str) -> list[Path]:
    """Files of a table, .../FRAMEWORK/VERSION/NAME, the newest version last."""
    found = [path for suffix in ("parquet", "txt") for path in folder.rglob(f"{table}.{suffix}")]
    return sorted(found, key=lambda path: (_order(path.parts[-2]), path.suffix == ".parquet"))


def _order(version: str) -> tuple[int, ...]:
    """Versions in their order: 1.3.0rc20 < 1.3.0rc23 < 1.3.0 < 1.3.0.post1."""
    ranks = {"dev": -3, "a": -2, "b": -2, "rc": -1, "post": 1}
    parts = re.findall(r"\d+|[a-z]+", version.lower())
    return (*(int(part) if part.isdecimal() else ranks.get(part, -2) for part in parts), 0)


def _kernel_samples(folder: Path, kind: Kind, framework: str, version: str, devices: Counter[str]) -> tuple[list[Sample], int]:
    """Rows of a curve from the newest table of a framework that has some, and how many there were."""
    for path in reversed(_paths(folder, kind.table)):
        if path.parts[-3] != framework or version not in ("", path.parts[-2]):
            continue
        columns = _where(_read(path), kind.wanted)
        if kind.op == "gemm":
            sizes, keep, core = _gemm(columns, path)
        else:
            sizes, keep, core = _attention(columns, path, kind.key)
        seconds = _column(columns, "latency", path) * 1e-3
        keep &= np.isfinite(seconds) & (seconds > 0)
        kernels = columns.get("kernel_source", np.full(seconds.size, "")).astype(str)
        kernel = Counter(kernels[keep].tolist()).most_common(1)[0][0] if keep.any() else ""
        keep &= kernels == kernel  # the same shape by another kernel would be another curve
        if not keep.any():
            continue
        devices.update(columns["device"][keep].astype(str).tolist() if "device" in columns else ())
        how = f"{framework} {path.parts[-2]}, {kernel}".removesuffix(", ")
        return list(_samples(kind, sizes, seconds, _thinned(sizes, keep, core), how)), int(keep.sum())
    return [], 0


def _samples(kind: Kind, sizes: Columns, seconds: Any, rows: Sequence[int], how: str) -> Iterator[Sample]:
    for i in rows:
        shape = {name: float(values[i]) for name, values in sizes.items()}
        yield Sample(op=kind.op, key=kind.key, sizes=shape, seconds=float(f"{seconds[i]:.6g}"), spread=0.0, how=how)


def _gemm(columns: Columns, path: Path) -> tuple[Columns, Any, Any]:
    """Sizes, rows of a training step at its smallest, and those of its usual region."""
    m, n, k = (_column(columns, name, path) for name in "mnk")
    return {"m": m, "n": n, "k": k}, (m >= 64) & (n >= 256) & (k >= 256), (m >= 1024) & (n >= 512) & (k >= 512)


def _attention(columns: Columns, path: Path, key: str) -> tuple[Columns, Any, Any]:
    batch, seq, heads = (_column(columns, name, path) for name in ("batch_size", "isl", "num_heads"))
    latent = "/" in key
    qk, v = LATENT if latent else (float(key), float(key))
    kv_heads = heads if latent else _column(columns, "num_key_value_heads", path)
    sizes = {
        "flop": causal_flop(batch, seq, heads, qk, v), "io_bytes": attention_bytes(batch, seq, heads, kv_heads, qk, v),
        "batch": batch, "seq": seq, "heads": heads, "kv_heads": kv_heads,
    }  # fmt: skip
    return sizes, (seq >= 256) & (kv_heads > 0), sizes["flop"] >= 3e10


def _thinned(sizes: Columns, keep: Any, core: Any) -> list[int]:
    """At most `MOST` of the rows, by a hash of their shape, most of them from the core."""
    shapes = list(zip(*(values.tolist() for values in sizes.values()), strict=True))
    order = sorted(np.flatnonzero(keep).tolist(), key=lambda i: (zlib.crc32(repr(shapes[i]).encode()), shapes[i]))
    inside, outside = [i for i in order if core[i]], [i for i in order if not core[i]]
    room = max(int(CORE * MOST), MOST - len(outside))
    chosen = [*inside[:room], *outside[: MOST - min(room, len(inside))]]
    return sorted(chosen, key=lambda i: shapes[i])


def _collectives(folder: Path, cluster: Cluster) -> Iterator[Sample]:
    """NCCL inside a domain, newest version, in 16-bit floats (8-bit ones are not reduced in switches)."""
    for path in reversed([p for p in _paths(folder, "nccl_perf") if p.parts[-3] == "nccl"]):
        columns = _where(_read(path), {"nccl_dtype": "half"})
        ranks, elements, latency_ms = (_column(columns, name, path) for name in ("num_gpus", "message_size", "latency"))
        size = 2.0 * elements
        keep = (size >= KNOT_BYTES[0]) & (size <= KNOT_BYTES[-1]) & (ranks <= cluster.domain_gpus) & (latency_ms > 0)
        for i in np.flatnonzero(keep).tolist():
            op = _OPERATIONS.get(str(columns["op_name"][i]))
            if op is not None:
                group, sizes = f"{ranks[i]:.0f}/1", {"message_bytes": float(size[i])}
                how = f"nccl {path.parts[-2]}"
                yield Sample(op=op, key="bf16", sizes=sizes, group=group, seconds=latency_ms[i] * 1e-3, spread=0.0, how=how)
        if keep.any():
            return


def _where(columns: Columns, wanted: Mapping[str, str | int]) -> Columns:
    """The rows whose columns have the wanted values."""
    mask: Any = np.ones(len(next(iter(columns.values()))), bool)
    for name, value in wanted.items():
        if name in columns:
            mask &= columns[name].astype(float if isinstance(value, int) else str) == value
    return {name: values[mask] for name, values in columns.items()}


def _column(columns: Columns, name: str, path: Path) -> Any:
    if name not in columns:
        raise SchemaError(f"table '{path}': no column '{name}'", hint=f"it has {', '.join(columns)}")
    try:
        return columns[name].astype(float)
    except ValueError:
        raise SchemaError(f"table '{path}', column '{name}': not all values are numbers") from None


@functools.lru_cache(maxsize=4)
def _read(path: Path) -> Columns:
    """The columns of a table; parquet needs pyarrow, which aiconfigurator-core brings along."""
    readers: Mapping[str, Callable[[Path], Columns]] = {".parquet": _read_parquet, ".txt": _read_csv}
    columns = readers[path.suffix](path)
    if not columns:
        raise SchemaError(f"table '{path}' has no columns", hint="is the file whole?")
    return columns


def _read_parquet(path: Path) -> Columns:
    if importlib.util.find_spec("pyarrow") is None:
        raise DeviceError(
            "reading the tables of aiconfigurator needs pyarrow, which is not installed", hint=f"pip install '{EXTRA}'"
        )
    parquet = importlib.import_module("pyarrow.parquet")
    errors = importlib.import_module("pyarrow").ArrowException
    try:
        table = parquet.read_table(path)
    except (errors, OSError) as error:
        raise SchemaError(
            f"table '{path}' is not parquet: {str(error).splitlines()[0]}", hint="install the package anew"
        ) from None
    return {name: table.column(name).to_numpy() for name in table.column_names}


def _read_csv(path: Path) -> Columns:
    rows = list(csv.reader(read_text(path, "table").splitlines()))
    for number, row in enumerate(rows, 1):
        if len(row) != len(rows[0]):
            raise SchemaError(f"table '{path}', line {number}: {len(row)} values for {len(rows[0])} columns")
    return {name: np.array([row[i] for row in rows[1:]]) for i, name in enumerate(rows[0])} if rows else {}
