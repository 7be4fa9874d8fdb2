"""What `moeplan profile` measures: cases, in the order of their worth.

A designed grid (corners and edges of the sizes that training has, not random points) and the shapes of the models asked for.
`tier` 0 is a coarse grid of everything, so that a budget that ends early leaves a usable profile; 1 the shapes of the models; 2
the rest of the grid; 3 models cut in further ways. On CPUs the grid has the same form with smaller sizes. Sizes are elements,
rows, bytes or FLOP, as `Sample` documents them; no torch in here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from moeplan.errors import DeviceError
from moeplan.profiles.curves import KNOT_BYTES, attention_bytes, causal_flop
from moeplan.units import GIB, KIB, MIB


class UnsupportedCase(DeviceError):
    """A case that this device or this torch cannot run; it is left out with its reason."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One operation at one size, to be measured."""

    op: str
    """As in `Sample`."""
    key: str
    """As in `Sample`."""
    sizes: Mapping[str, float] = field(default_factory=dict)
    """As in `Sample`."""
    group: str = ""
    """Of a collective: ranks / scale-up domains that they span, like "16/2"."""
    tier: int = 0
    """Lower ones are measured first."""

    @property
    def case(self) -> tuple[Any, ...]:
        """What is measured, equal to `Sample.case` of the sample that it gives."""
        return (self.op, self.key, tuple(sorted(self.sizes.items())), self.group)


@dataclass(frozen=True, kw_only=True, slots=True)
class GemmShape:
    """A dense weight as one rank holds it."""

    n: int
    """Output features."""
    k: int
    """Input features."""
    tp: int
    """Tensor-parallel ranks that it was cut for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupedShape:
    """One weight of the routed experts as one rank holds them."""

    groups: int
    """Local experts."""
    m: int
    """Rows of an expert."""
    n: int
    """Output features."""
    k: int
    """Input features."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionShape:
    """An attention core as one rank runs it, causal."""

    heads: int
    """Query heads."""
    kv_heads: int
    """Key / value heads."""
    qk_dim: int
    """Width of a query and of a key head."""
    v_dim: int
    """Width of a value head."""
    tp: int
    """Tensor-parallel ranks that it was cut for."""

    @property
    def key(self) -> str:
        """Name of its curve: "128", or "192/128" where values differ from keys."""
        return str(self.qk_dim) if self.qk_dim == self.v_dim else f"{self.qk_dim}/{self.v_dim}"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShapes:
    """What the kernels of one model look like under the usual ways to cut it."""

    name: str
    """Name of the model."""
    gemms: tuple[GemmShape, ...] = ()
    """Distinct dense weights."""
    grouped: tuple[GroupedShape, ...] = ()
    """Distinct expert weights."""
    attentions: tuple[AttentionShape, ...] = ()
    """Distinct attention cores."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """How large a grid a kind of device gets; a grid is written in the sizes of a GPU."""

    length: int
    """The grid's rows and widths are divided by this."""
    count: int
    """Its heads and groups are divided by this."""
    most_flop: float
    """The shapes of models take fewer rows, then are left out, above this."""
    stream_bytes: tuple[float, ...]
    """Traffic of streams, the last in tier 0."""
    stream_width: int
    """Elements of a row of a stream."""
    vocab: int
    """Logits of a row."""
    collective_bytes: float
    """The largest message of a collective by default."""


SCALES = {
    "cuda": Scale(
        length=1,
        count=1,
        most_flop=2e13,
        stream_bytes=(4.0 * MIB, 32.0 * MIB, GIB / 4, 1.0 * GIB),
        stream_width=4096,
        vocab=131072,
        collective_bytes=KNOT_BYTES[-1],
    ),
    "cpu": Scale(
        length=8,
        count=4,
        most_flop=4e9,
        stream_bytes=(256.0 * KIB, 1.0 * MIB, 4.0 * MIB, 32.0 * MIB),
        stream_width=512,
        vocab=8192,
        collective_bytes=16.0 * MIB,
    ),
}
MEMORY_SHARE = 0.2
"""Of a device's memory, that the tensors of one case may take."""
MODEL_ROWS = 4096
"""Tokens of a micro-batch at which the shapes of models are measured."""

# m, n, k of y[m, n] = x[m, k] w[k, n]: first the coarse ones.
_GEMMS = (
    (4096, 4096, 4096), (8192, 8192, 8192), (1024, 4096, 4096), (128, 4096, 4096), (8192, 512, 4096), (8192, 4096, 512),
    (1024, 1024, 1024), (2048, 8192, 2048),
), (
    (64, 8192, 8192), (256, 4096, 4096), (512, 4096, 4096), (2048, 4096, 4096), (16384, 4096, 4096), (8192, 256, 4096),
    (8192, 4096, 256), (32768, 2048, 2048), (4096, 14336, 4096), (4096, 4096, 14336), (512, 512, 512), (4096, 1024, 16384),
    (1024, 8192, 8192), (16384, 7168, 2048), (4096, 512, 512), (256, 1024, 8192),
)  # fmt: skip
# groups, m, n, k: from few wide experts with many rows to many narrow ones with few.
_GROUPED = (
    (8, 1024, 4096, 4096), (8, 4096, 4096, 4096), (32, 64, 4096, 2048), (32, 1024, 2048, 4096), (128, 32, 1536, 2048),
    (4, 4096, 1024, 4096), (128, 512, 1536, 2048),
), (
    (1, 8192, 4096, 4096), (2, 2048, 14336, 4096), (8, 2048, 4096, 14336), (8, 16, 4096, 7168), (8, 128, 4096, 7168),
    (8, 512, 7168, 2048), (16, 256, 4096, 4096), (16, 2048, 4096, 4096), (32, 16, 4096, 7168), (32, 256, 4096, 7168),
    (32, 1024, 7168, 2048), (64, 128, 2816, 2048), (64, 1024, 2048, 1408), (64, 16, 1024, 1024), (128, 128, 2048, 768),
    (128, 16, 2048, 768), (4, 8192, 4096, 7168), (4, 256, 512, 4096), (8, 4096, 4096, 512),
)  # fmt: skip
# batch, sequence, query heads, key / value heads.
_ATTENTIONS = (
    (1, 4096, 32, 8), (1, 1024, 32, 8), (1, 16384, 8, 4),
), (
    (1, 8192, 32, 32), (2, 2048, 32, 32), (8, 512, 16, 16), (1, 2048, 8, 4), (1, 4096, 8, 8), (1, 512, 4, 4),
    (4, 4096, 16, 4), (1, 32768, 4, 4),
)  # fmt: skip
HEAD_SIZES = (AttentionShape(heads=1, kv_heads=1, qk_dim=128, v_dim=128, tp=1),
              AttentionShape(heads=1, kv_heads=1, qk_dim=64, v_dim=64, tp=1))  # fmt: skip
"""Head sizes that every profile has; their heads do not count."""
STREAM_BYTES: Mapping[str, float] = {
    "copy": 4.0, "norm": 10.0, "swiglu": 6.0, "permute": 4.7, "unpermute": 4.7, "router": 48.0, "cross_entropy": 10.0,
    "optimizer": 34.0,
}  # fmt: skip
"""Bytes per element that the cost models count: of a tensor, of the gated half, of a dispatched row, per score, per logit
(forward and backward), per parameter. A curve over them prices the operation as it ran, whatever it really moved."""
TOPK = 8
"""Experts that a token of the router, permute and un-permute cases goes to."""
ROUTED_EXPERTS = 128
"""Experts of the router cases."""
RING_OPS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "all_to_all_skewed")
"""Collectives of a whole group."""
_DEEPEP_HIDDEN = 7168


def kernel_cases(shapes: Sequence[ModelShapes], device: str, memory_bytes: float) -> list[Case]:
    """Cases of one device ("cuda" or "cpu"), lower tiers first; `memory_bytes` is what the device has."""
    scale = SCALES[device]
    cases = [
        *_gemm_cases(shapes, scale, ("bf16", "fp8") if device == "cuda" else ("bf16",)),
        *_grouped_cases(shapes, scale),
        *_attention_cases(shapes, scale),
        *_stream_cases(scale),
        *(_host_copy_cases(scale) if device == "cuda" else ()),
        Case(op="launch", key="kernel"),
    ]
    return _in_order(case for case in cases if tensor_bytes(case) <= MEMORY_SHARE * memory_bytes)


def _in_order(cases: Iterable[Case]) -> list[Case]:
    """By tier, otherwise as given; of equal cases the one with the lowest tier."""
    first: dict[tuple[Any, ...], Case] = {}
    for case in sorted(cases, key=lambda c: c.tier):
        first.setdefault(case.case, case)
    return list(first.values())


def tensor_bytes(case: Case) -> float:
    """Bytes that the tensors of a kernel case take, temporary ones included."""
    s = case.sizes
    match case.op:
        case "gemm":
            return 2.0 * (s["m"] * s["k"] + s["k"] * s["n"] + s["m"] * s["n"])
        case "grouped_gemm":
            return 2.0 * s["groups"] * (s["m"] * s["k"] + s["k"] * s["n"] + s["m"] * s["n"])
        case "attention" | "attention-backward":
            return 3.0 * s["io_bytes"]
        case "stream":
            return 2.0 * s["bytes"]
        case _:
            return s.get("bytes", 0.0)


def _gemm_cases(shapes: Sequence[ModelShapes], scale: Scale, keys: Sequence[str]) -> Iterator[Case]:
    grid = [(tier, *(size // scale.length for size in mnk)) for tier, part in zip((0, 2), _GEMMS, strict=True) for mnk in part]
    for shape in (gemm for model in shapes for gemm in model.gemms):
        rows = _rows(2.0 * shape.n * shape.k, scale)
        grid += [(1 if shape.tp == 1 else 3, rows, shape.n, shape.k)] if rows else []
    for key in keys:
        for tier, m, n, k in grid:
            # In FP8 tensor cores take widths in steps of 16.
            if key == "bf16" or n % 16 == k % 16 == 0:
                yield Case(op="gemm", key=key, sizes={"m": m, "n": n, "k": k}, tier=tier)


def _rows(flop_per_row: float, scale: Scale) -> int:
    """Rows of a model's shape: `MODEL_ROWS`, or the power of two that takes no more FLOP than allowed; 0 below 16."""
    rows = 2 ** int(math.log2(max(1.0, scale.most_flop / flop_per_row)))
    return min(MODEL_ROWS, rows) if rows >= 16 else 0


def _grouped_cases(shapes: Sequence[ModelShapes], scale: Scale) -> Iterator[Case]:
    grid = [
        (tier, GroupedShape(groups=max(1, g // scale.count), m=m // scale.length, n=n // scale.length, k=k // scale.length))
        for tier, part in zip((0, 2), _GROUPED, strict=True)
        for g, m, n, k in part
    ]
    for shape in (grouped for model in shapes for grouped in model.grouped):
        rows = _rows(2.0 * shape.groups * shape.n * shape.k, scale)
        grid += [(1, replace(shape, m=min(shape.m, rows)))] if rows else []
    for direction in ("", "-dgrad", "-wgrad"):
        for tier, shape in grid:
            sizes = {"groups": shape.groups, "m": shape.m, "n": shape.n, "k": shape.k}
            yield Case(op="grouped_gemm", key=f"bf16{direction}", sizes=sizes, tier=tier)


def _attention_cases(shapes: Sequence[ModelShapes], scale: Scale) -> Iterator[Case]:
    of_models = [shape for model in shapes for shape in model.attentions]
    for head in {shape.key: shape for shape in (*HEAD_SIZES, *of_models)}.values():
        for tier, part in zip((0, 2), _ATTENTIONS, strict=True):
            for batch, seq, heads, kv_heads in part:
                heads, kv_heads = max(1, heads // scale.count), max(1, kv_heads // scale.count)
                # Latent attention has a key for every query.
                kv_heads = kv_heads if head.qk_dim == head.v_dim else heads
                yield from _attention(tier, batch, seq // scale.length, replace(head, heads=heads, kv_heads=kv_heads))
    for shape in of_models:
        flop = causal_flop(1, 1, shape.heads, shape.qk_dim, shape.v_dim)
        seq = min(MODEL_ROWS, 2 ** int(math.log2(scale.most_flop / flop) / 2))
        yield from _attention(1 if shape.tp == 1 else 3, 1, seq, shape)


def _attention(tier: int, batch: int, seq: int, shape: AttentionShape) -> Iterator[Case]:
    sizes = {
        "flop": float(causal_flop(batch, seq, shape.heads, shape.qk_dim, shape.v_dim)),
        "io_bytes": float(attention_bytes(batch, seq, shape.heads, shape.kv_heads, shape.qk_dim, shape.v_dim)),
        "batch": batch, "seq": seq, "heads": shape.heads, "kv_heads": shape.kv_heads,
    }  # fmt: skip
    for op in ("attention", "attention-backward"):
        yield Case(op=op, key=shape.key, sizes=sizes, tier=tier)


def _stream_cases(scale: Scale) -> Iterator[Case]:
    widths = {"router": ROUTED_EXPERTS, "cross_entropy": scale.vocab, "optimizer": 1}
    for kind, element_bytes in STREAM_BYTES.items():
        width = widths.get(kind, scale.stream_width)
        for target in scale.stream_bytes:
            step = TOPK if kind in ("permute", "unpermute") else 1  # rows of whole tokens
            rows = step * max(1, round(target / (step * width * element_bytes)))
            sizes = {"bytes": element_bytes * rows * width, "rows": rows, "width": width}
            yield Case(op="stream", key=kind, sizes=sizes, tier=0 if target == scale.stream_bytes[-1] else 2)


def _host_copy_cases(scale: Scale) -> Iterator[Case]:
    for key in ("host_to_device", "device_to_host"):
        for size in scale.stream_bytes[1:]:
            yield Case(op="host_copy", key=key, sizes={"bytes": size}, tier=0 if size == scale.stream_bytes[-1] else 2)


def collective_cases(ranks: int, per_domain: int, device: str, largest_bytes: float = 0.0) -> list[Case]:
    """Cases of `ranks` ranks in scale-up domains of `per_domain`, lower tiers first.

    Groups inside a domain; across domains strided (one rank of each) and blocked (all ranks of them). `largest_bytes` is the
    largest message, 0 the default of the device.
    """
    sizes = knots(largest_bytes or SCALES[device].collective_bytes)
    cases = []
    for group in groups(ranks, per_domain):
        ops = (*RING_OPS, *(("send",) if group in ("2/1", "2/2") else ()))
        first = group in _essential(ranks, per_domain) or "send" in ops
        for op in ops:
            for i, size in enumerate(sizes):
                tier = (0 if first or op == "send" else 1) if i in (0, len(sizes) // 2, len(sizes) - 1) else 2
                cases.append(Case(op=op, key="bf16", sizes={"message_bytes": size}, group=group, tier=tier))
    for group in _essential(ranks, per_domain):
        cases += [Case(op="overlap", key=f"{op}+gemm", group=group) for op in ("all_to_all", "all_gather")]
        cases += _deepep_cases(group) if device == "cuda" else []
    return _in_order(cases)


def knots(largest_bytes: float) -> tuple[float, ...]:
    """Seven message sizes (fewer where they coincide), powers of two from 64 KiB to about `largest_bytes`."""
    if largest_bytes >= KNOT_BYTES[-1]:
        return KNOT_BYTES
    low, high = math.log2(KNOT_BYTES[0]), math.log2(max(largest_bytes, 4 * KNOT_BYTES[0]))
    return tuple(sorted({2.0 ** round(low + (high - low) * i / 6) for i in range(7)}))


def groups(ranks: int, per_domain: int) -> list[str]:
    """Groups worth measuring as "RANKS/DOMAINS", larger ones of a kind last."""
    inside = [f"{n}/1" for n in _counts(min(ranks, per_domain))]
    domains = _counts(ranks // per_domain)
    return list(dict.fromkeys([*inside, *(f"{d}/{d}" for d in domains), *(f"{d * per_domain}/{d}" for d in domains)]))


def _counts(most: int) -> list[int]:
    """2, 4, 8, ... as far as they divide `most`, and `most`."""
    powers = [2**i for i in range(1, most.bit_length()) if most % 2**i == 0]
    return sorted({*powers, *([most] if most > 1 else [])})


def _essential(ranks: int, per_domain: int) -> list[str]:
    """The largest group inside a domain, and the largest across domains: strided and blocked."""
    most, domains = min(ranks, per_domain), ranks // per_domain
    names = [f"{most}/1"] if most > 1 else []
    return [*names, *dict.fromkeys([f"{domains}/{domains}", f"{domains * per_domain}/{domains}"])] if domains > 1 else names


def _deepep_cases(group: str) -> list[Case]:
    """Dispatch and combine of a DeepSeek-V3 layer, in bytes that the tokens of a rank have before they are copied."""
    ranks, domains = map(int, group.split("/"))
    if ranks == domains:  # the library wants all ranks of a node
        return []
    return [
        Case(
            op="deepep",
            key=key,
            sizes={"message_bytes": 2.0 * _DEEPEP_HIDDEN * tokens, "tokens": tokens, "hidden": _DEEPEP_HIDDEN, "topk": TOPK},
            group=group,
            tier=2,
        )
        for key in ("dispatch", "combine")
        for tokens in (128, 512, 2048, 4096, 8192)
    ]
