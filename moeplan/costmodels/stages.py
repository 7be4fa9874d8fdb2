"""Which layers stand on which pipeline stage.

A split is text in Megatron's letters: E embedding, t decoder layer, m multi-token-prediction layer, L output head and loss;
"|" ends a chunk, "x*n" and "(...)*n" repeat. Chunk c runs on pipeline rank c mod pp as virtual stage c div pp. The empty text
is the framework's even split. `balanced_split` is the contiguous split whose heaviest chunk has the least FLOP, filled from
the end, so that the first stage, which holds the most micro-batches in flight, is the lightest of equals.
`binding_ranks` reduces the ranks of a split to the few that can be slowest or fullest.
"""

from __future__ import annotations

import functools
import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any

import numpy as np
import numpy.typing as npt

from moeplan.costmodels.counts import attention_flops_per_token, layer_weights, mtp_weights
from moeplan.costmodels.model import Layer, Model
from moeplan.costmodels.moments import compositions
from moeplan.costmodels.recompute import recomputed_layers
from moeplan.errors import LayoutError

Floats = npt.NDArray[np.float64]
_MOST_LETTERS = 100_000


def parse_split(text: str) -> tuple[str, ...]:
    """Chunks of a split, each a run of letters: "Et*2|tL" -> ("Ett", "tL"). As in Megatron only commas are ignored."""
    example = "write it like 'Et*3|(tt|)*29m|L'"
    clean = text.replace(",", "")
    if not clean or re.search(r"[^EtmL|*()0-9]", clean):
        raise LayoutError(f"'{text}' is not a pipeline split", hint=example)
    # brackets before letters, as in Megatron
    expanded = clean
    for repeat in (r"\(([^()]+)\)\*(\d{1,9})", r"([EtmL|])\*(\d{1,9})"):
        if sum(len(m[1]) * int(m[2]) for m in re.finditer(repeat, expanded)) > _MOST_LETTERS:
            raise LayoutError(f"'{text}' is not a pipeline split: it repeats into more than {_MOST_LETTERS} letters")
        expanded = re.sub(repeat, lambda m: m[1] * int(m[2]), expanded)
    if re.search(r"[*()0-9]", expanded):
        raise LayoutError(f"'{text}' is not a pipeline split: a repeat or a bracket stands alone", hint=example)
    return tuple(expanded.split("|"))


def format_split(chunks: Sequence[str]) -> str:
    """Text of chunks, runs written with "*": the inverse of `parse_split`."""
    shorten = ("".join(f"{k}*{n}" if n > 2 else k * n for k, n in ((k, len(list(g))) for k, g in groupby(c))) for c in chunks)
    runs = [(chunk, len(list(group))) for chunk, group in groupby(shorten)]
    out = ""
    for i, (chunk, count) in enumerate(runs):
        last = i == len(runs) - 1
        if count > 2 and not (last and count == 3):
            out += f"({chunk}|)*{count - 1 if last else count}" + (chunk if last else "")
        else:
            out += "|".join([chunk] * count) + ("" if last else "|")
    return out


def split_letters(sizes: Sequence[int], mtp: int, *, head_alone: bool = False) -> list[str]:
    """Chunks of decoder layers with embedding, prediction layers and head; `head_alone`: prediction layers a chunk earlier."""
    chunks = ["t" * size for size in sizes]
    chunks[0] = "E" + chunks[0]
    chunks[-2 if head_alone else -1] += "m" * mtp
    chunks[-1] += "L"
    return chunks


def check_split(text: str, layers: int, mtp: int, pp: int, vpp: int) -> str | None:
    """What is wrong with a split for a model of `layers` decoder and `mtp` prediction layers; None if nothing.

    The conditions are Megatron's: exactly one E first and one L last, every layer once, prediction layers together after all
    decoder layers and on the last virtual stage of their rank. Megatron lets an empty chunk stand before E or after L, but
    builds embedding and head on the outer chunks all the same; here that is refused.
    """
    try:
        chunks = parse_split(text)
    except LayoutError as error:
        return error.message
    letters = "".join(chunks)
    if len(chunks) != pp * vpp:
        return f"{len(chunks)} chunks, pp*vpp = {pp}*{vpp} = {pp * vpp} are needed"
    if letters.count("E") != 1 or not chunks[0].startswith("E"):
        return "it must start with the one E"
    if letters.count("L") != 1 or not chunks[-1].endswith("L"):
        return "it must end with the one L"
    if letters.count("t") != layers:
        return f"it places {letters.count('t')} decoder layers, the model has {layers}"
    if letters.count("m") != mtp:
        return f"it places {letters.count('m')} prediction layers, {mtp} are trained"
    if mtp:
        holders = [c for c, chunk in enumerate(chunks) if "m" in chunk]
        if len(holders) > 1 or "t" in letters[letters.index("m") :]:
            return "prediction layers must stand together after all decoder layers"
        if holders[0] // pp != vpp - 1:
            return "prediction layers must be on the last virtual stage of their rank"
    return None


def layer_flops(layer: Layer, model: Model, seq_len: int) -> float:
    """Forward FLOP of one layer per token."""
    gemm = sum(w.out * w.inp * (w.used if w.shard.is_expert else 1) for w in layer_weights(layer, model) if w.gemm)
    return 2 * gemm + sum(attention_flops_per_token(b, seq_len) for b in layer.blocks)


def balanced_split(model: Model, seq_len: int, chunks: int) -> str:
    """The contiguous split of `model` into `chunks` that minimises the heaviest chunk's forward FLOP.

    Chunks hold at least one decoder layer each, but the last may hold only prediction layers and head, and the first only the
    embedding where there are two chunks more than layers. Refuses more chunks than decoder layers + 2.
    """
    return _balanced(model, seq_len, chunks)


@functools.lru_cache(maxsize=4096)
def _balanced(model: Model, seq_len: int, chunks: int) -> str:
    count = len(model.layers)
    if chunks > count + 2:
        raise LayoutError(f"{chunks} pipeline chunks exceed the {count} layers of '{model.name}'")
    by_kind = [layer_flops(kind, model, seq_len) for kind in model.kinds]
    load = [by_kind[k] for k in model.kind_of_layer]
    head = 2.0 * model.vocab * model.hidden
    prediction = sum(layer_flops(x, model, seq_len) + head for x in model.mtp)
    prediction += sum(2 * w.size for w in mtp_weights(model) if w.gemm) * len(model.mtp)
    prefix = [0.0, *accumulate(load)]
    tail = head + prediction
    sizes = _fill(prefix, tail, chunks, prefix[-1] + tail)
    assert sizes is not None  # one bound holds everything
    low, high = max(max(load), (prefix[-1] + tail) / chunks), _heaviest(prefix, tail, sizes)
    while low < high * (1 - 1e-9):
        for bound in ((low + high) / 2, high * (1 - 1e-9)):  # that none is just below the best proves it
            found = _fill(prefix, tail, chunks, bound)
            if found is None:
                low = bound
            else:
                sizes, high = found, _heaviest(prefix, tail, found)
                break
    return format_split(split_letters(sizes, len(model.mtp)))


def _heaviest(prefix: list[float], tail: float, sizes: Sequence[int]) -> float:
    """Load of the heaviest chunk."""
    ends = list(accumulate(sizes))
    loads = [prefix[end] - prefix[end - size] for end, size in zip(ends, sizes, strict=True)]
    loads[-1] += tail
    return max(loads)


def _fill(prefix: list[float], tail: float, chunks: int, bound: float) -> list[int] | None:
    """Layers of each chunk, filled from the end up to `bound`; None if they do not fit. `tail` sits on the last chunk."""
    sizes: list[int] = []
    end = len(prefix) - 1
    bare_first = chunks == end + 2
    for left in range(chunks - 1, -1, -1):
        room = bound * (1 + 1e-12) - (tail if not sizes else 0.0)
        # the first layer that still fits, leaving one layer for each chunk before
        start = min(end, max(bisect_left(prefix, prefix[end] - room, 0, end + 1), left - bare_first, 0))
        if start == end and (room < 0 or (sizes and not (bare_first and left == 0))):
            return None
        sizes.append(end - start)
        end = start
    return sizes[::-1] if end == 0 else None


@dataclass(frozen=True, slots=True)
class Ranks:
    """What pipeline ranks of one split hold; arrays over K ranks."""

    rank: Floats
    """Pipeline rank, [K]."""
    kinds: Floats
    """Decoder layers of each kind, [K, kinds]."""
    embedding: Floats
    """1 where the rank holds the embedding, [K]."""
    head: Floats
    """1 where the rank holds the output head, [K]."""
    mtp: Floats
    """Prediction layers, [K]."""
    copies: Floats
    """Copies of the embedding: where tokens enter, and where prediction layers stand in another chunk, [K]."""
    norms: Floats
    """Final norms: with the head; beside the last decoder layer if prediction layers follow it, but in Mamba hybrids, [K]."""
    recomputes: Floats
    """1 where a layer of the rank recomputes something, if the layout does at all, [K]."""
    layers: Floats
    """Layers of each kind and prediction layers; where only some recompute, those that do before those that do not,
    [K, kinds + 1] or [K, 2 (kinds + 1)]."""
    moments: tuple[tuple[Floats, Floats], ...]
    """Of each rank of several chunks, when it can be fullest: its `layers` times micro-batches in flight, [moments, columns].
    Those of steps of pp micro-batches, and of longer ones. Empty for ranks of one chunk."""
    loss: Floats
    """The same on the rank with the head while it works on its last chunk: one micro-batch there, pp in others, [columns]."""


def chunk_letters(model: Model, pp: int, vpp: int, split: str) -> tuple[str, ...]:
    """Chunks of a split; the empty text is the even split, its remainder going to the first ranks."""
    if split:
        return parse_split(split)
    chunks, count = pp * vpp, len(model.layers)
    sizes = [count // chunks + (1 if c < count % chunks else 0) for c in range(chunks)]
    return tuple(split_letters(sizes, len(model.mtp)))


@functools.lru_cache(maxsize=4096)
def chunk_units(model: Model, pp: int, vpp: int, split: str, recompute: str = "") -> Floats:
    """How many units every chunk of every rank holds, [pp, vpp, units]: layers of each kind, the head, prediction layers.

    `recompute`: how many layers of each chunk recompute; unless it is empty, the same units follow without recompute.
    """
    kinds = len(model.kinds)
    width = kinds + 1 + bool(model.mtp)
    out = np.zeros((pp, vpp, 2 * width if recompute else width))
    for c, units in enumerate(chunk_pieces(model, pp, vpp, split, recompute)):
        for unit in units:
            out[c % pp, c // pp, unit] += 1
    return out


def chunk_pieces(model: Model, pp: int, vpp: int, split: str, recompute: str = "") -> list[list[int]]:
    """The units of every chunk of the model in their order, as their places in `chunk_units`."""
    kinds = len(model.kinds)
    without = kinds + 1 + bool(model.mtp)
    chunks = chunk_letters(model, pp, vpp, split)
    counts = recomputed_layers(recompute, [chunk.count("t") for chunk in chunks])
    out, layer = [], 0
    for chunk, left in zip(chunks, counts, strict=True):
        units = []
        for letter in chunk:
            if letter == "t":
                if layer < len(model.layers):
                    units.append(model.kind_of_layer[layer] + (0 if left > 0 else without))
                layer, left = layer + 1, left - 1
            elif letter == "L":
                units.append(kinds)
            elif letter == "m":
                units.append(kinds + 1 + (without if recompute else 0))
        out.append(units)
    return out


@dataclass(frozen=True, slots=True)
class Fill:
    """Ranks of a split that a step can wait for, and what stands before and behind them; arrays over K ranks."""

    ranks: int
    """Ranks of the pipeline."""
    chunks: int
    """Chunks of a rank."""
    held: Floats
    """Units of each, [K, units]."""
    before: Floats
    """Units in the first chunks of all ranks before it, [K, units]."""
    behind: Floats
    """Units of all ranks behind it, [K, units]."""
    ranks_behind: Floats
    """How many these are, [K]."""


@functools.lru_cache(maxsize=4096)
def filling(model: Model, pp: int, vpp: int, split: str, recompute: str = "") -> Fill:
    """The first and the last of the ranks that hold the same; interleaved, those that no later rank holds as much as."""
    units = chunk_units(model, pp, vpp, split, recompute)
    held = units.sum(axis=1)
    before = np.cumsum(units[:, 0], axis=0) - units[:, 0]
    behind = held.sum(axis=0) - np.cumsum(held, axis=0)
    first: dict[tuple[float, ...], int] = {}
    last: dict[tuple[float, ...], int] = {}
    for rank, row in enumerate(held.tolist()):
        first.setdefault(tuple(row), rank)
        last[tuple(row)] = rank
    chosen = sorted({*first.values(), *last.values()})
    if vpp > 1:  # more ranks stand before a later one
        chosen = [r for r in chosen if not any((held[later] >= held[r]).all() for later in chosen if later > r)]
    return Fill(pp, vpp, held[chosen], before[chosen], behind[chosen], pp - 1.0 - np.array(chosen))


def rank_contents(model: Model, pp: int, vpp: int, split: str) -> npt.NDArray[np.float64]:
    """What every pipeline rank holds, [pp, kinds + 3]: layers of each kind, then E, L and m."""
    kinds = len(model.kinds)
    units = chunk_units(model, pp, vpp, split).sum(axis=1)
    return np.column_stack([units[:, :kinds], np.eye(pp, 1), units[:, kinds], units[:, kinds + 1 :].sum(axis=1)])


def _contents(model: Model, pp: int, vpp: int, split: str) -> Floats:
    """`rank_contents`, then copies of the embedding, final norms and the rank itself, [pp, kinds + 6]."""
    chunks = chunk_letters(model, pp, vpp, split)
    last = len(chunks) - 1
    if model.mtp and not model.is_hybrid:
        last = max(c for c, chunk in enumerate(chunks) if "t" in chunk)
    ends = np.zeros((pp, 2))
    for c, chunk in enumerate(chunks):
        ends[c % pp] += "E" in chunk or "m" in chunk, c == last
    return np.column_stack([rank_contents(model, pp, vpp, split), ends, np.arange(pp)])


def chunk_layers(model: Model, pp: int, vpp: int, split: str, recompute: str = "") -> Floats:
    """Layers of each kind and prediction layers in every chunk of every rank, as in `Ranks.layers`, [pp, vpp, columns]."""
    units, kinds = chunk_units(model, pp, vpp, split, recompute), len(model.kinds)
    parts = np.split(units, 2, axis=-1) if recompute else [units]
    columns = [(part[..., :kinds], part[..., kinds + 1 :].sum(axis=-1, keepdims=True)) for part in parts]
    return np.concatenate([column for pair in columns for column in pair], axis=-1)


@functools.lru_cache(maxsize=4096)
def all_ranks(model: Model, pp: int, vpp: int, split: str, recompute: str = "") -> Ranks:
    """Every rank of a split."""
    return _ranks(model, pp, _contents(model, pp, vpp, split), chunk_layers(model, pp, vpp, split, recompute), recompute)


@functools.lru_cache(maxsize=4096)
def binding_ranks(model: Model, pp: int, vpp: int, split: str, recompute: str = "") -> Ranks:
    """The ranks that can be slowest or fullest: those that no earlier one dominates by holding as much of everything or more.

    That is chunk by chunk: at any moment of a rank an earlier one has as many micro-batches in flight in each chunk, or more.
    """
    table, layers = _contents(model, pp, vpp, split), chunk_layers(model, pp, vpp, split, recompute)
    measure = np.column_stack([table[:, :-1], layers.reshape(pp, -1)])
    rows: list[int] = []
    for rank in range(pp):
        if not (measure[rows] >= measure[rank]).all(axis=1).any():
            rows.append(rank)
    return _ranks(model, pp, table[rows], layers[rows], recompute)


def _ranks(model: Model, pp: int, table: Floats, layers: Floats, recompute: str) -> Ranks:
    """Rows of `_contents` and of `chunk_layers`."""
    kinds, held = len(model.kinds), layers.sum(axis=1)
    embedding, head, mtp, copies, norms, rank = table[:, kinds:].T
    return Ranks(
        rank=rank,
        kinds=table[:, :kinds],
        embedding=embedding,
        head=head,
        mtp=mtp,
        copies=copies,
        norms=norms,
        recomputes=held[:, :kinds].any(axis=1).astype(np.float64) if recompute else np.ones(len(rank)),
        layers=held,
        moments=_moments(pp, rank, layers) if layers.shape[1] > 1 else (),
        loss=pp * layers[-1, :-1].sum(axis=0) + layers[-1, -1],
    )


def _moments(pp: int, rank: Floats, layers: Floats) -> tuple[tuple[Floats, Floats], ...]:
    """`Ranks.moments` of ranks of several chunks, without moments at which another holds as much of everything or more."""
    vpp = layers.shape[1]
    passes = (vpp + 1) * pp - 2 * rank.astype(np.int64) - 1
    # [2, K, moments, kinds + 1]: longer steps repeat the moments of two rounds
    held = np.stack([compositions(pp, vpp, passes, rounds * pp) @ layers for rounds in (1, 2)])
    covers: Any = (held[..., :, None, :] >= held[..., None, :, :]).all(axis=-1)
    # of equal moments the first stays
    equal = covers & np.swapaxes(covers, -1, -2)
    order = np.arange(held.shape[2])
    needless: Any = (covers & (~equal | (order[:, None] < order))).any(axis=-2)
    out = []
    for k in range(len(rank)):
        once, longer = (held[i, k][~needless[i, k]] for i in (0, 1))
        out.append((longer if np.array_equal(once, longer) else once, longer))
    return tuple(out)
