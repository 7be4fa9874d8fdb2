"""Which block stands in which layer of a published model.

A layer's token mixer has a kind: "full", "reuse" (full, with the keys picked by an earlier layer's indexer), "window",
"linear", "sparse" or "heavy" (compressed keys with and without an indexer). Its feed-forward block is "dense" or "moe".
Layers are numbered from 0; every rule is one way in which published configurations say it.
"""

from __future__ import annotations

from typing import Any

from moeplan.costmodels.hf_keys import Keys
from moeplan.errors import ModelError

KINDS = {
    "full_attention": "full",
    "attention": "full",
    "indexed_attention": "full",
    "sliding_attention": "window",
    "chunked_attention": "window",
    "reference_sliding_attention": "window",
    "hybrid": "full",
    "hybrid_sliding": "window",
    "linear_attention": "linear",
    "mamba": "linear",
    "compressed_sparse_attention": "sparse",
    "heavily_compressed_attention": "heavy",
    "moe": "moe",
    "mlp": "dense",
    # Letters of a hybrid pattern.
    "*": "full",
    "M": "linear",
    "E": "moe",
    "-": "dense",
}
"""Kind of block by the words of published layer lists."""


def single_blocks(keys: Keys) -> list[str]:
    """Kinds of the blocks of a hybrid that has one block a layer; empty for other models."""
    kinds = [_kind(keys, item) for item in keys.items("block_pattern")]
    if not {"moe", "dense"} & set(kinds):
        return []
    return kinds[: len(_list(keys, "block_pattern", keys.size("layers", len(kinds))))]


def mixer_kinds(keys: Keys, layers: int) -> list[str]:
    """Kind of the token mixer of every layer, by the first rule whose keys are there."""
    if types := _list(keys, "layer_types", layers):
        kinds = [_kind(keys, item) for item in types]
    elif flags := _list(keys, "full_flags", layers):
        kinds = ["full" if flag else "linear" for flag in flags]
    elif flags := _list(keys, "window_flags", layers):
        kinds = ["window" if flag else "full" for flag in flags]
    elif linear := keys.items("linear_layers"):
        kinds = ["linear" if i + 1 in linear else "full" for i in range(layers)]
    elif ratios := _list(keys, "compress_ratios", layers):
        sparse, heavy = keys.size("sparse_rate"), keys.size("heavy_rate")
        kinds = ["sparse" if r == sparse else "heavy" if r == heavy else "window" for r in ratios]
    elif keys.known("full_period"):
        period = keys.size("full_period")
        offset = keys.count("full_offset", period - 1)
        kinds = ["full" if i % period == offset else "linear" for i in range(layers)]
    else:
        kinds = _windows(keys, layers)
    reuse = _list(keys, "indexer_types", layers) or [""] * layers
    return ["reuse" if kind == "full" and how == "shared" else kind for kind, how in zip(kinds, reuse, strict=True)]


def _windows(keys: Keys, layers: int) -> list[str]:
    """Layers of plain attention: all with the window, all after some layer, or all but every so many."""
    if not keys.count("window", 0) or not keys.flag("use_window", True):
        return ["full"] * layers
    if isinstance(pattern := keys.find("window_period")[1], str):
        return ["full" if pattern[i % len(pattern)].upper() == "G" else "window" for i in range(layers)]
    if period := keys.count("window_period", 0):
        return ["full" if (i + 1) % period == 0 else "window" for i in range(layers)]
    first = keys.count("window_from", 0)
    return ["window" if i >= first else "full" for i in range(layers)]


def moe_layers(keys: Keys, layers: int) -> list[bool]:
    """Whether each layer holds routed experts."""
    if not keys.find("experts")[1]:
        return [False] * layers
    if types := _list(keys, "ffn_types", layers):
        return [item not in ("dense", "mlp") for item in types]
    if flags := _list(keys, "moe_freq", layers):
        return [bool(flag) for flag in flags]
    if listed := keys.items("moe_layers"):
        return [i in listed for i in range(layers)]
    start, dense = keys.count("moe_start", 0), keys.items("dense_layers")
    end = layers - 1 if keys.find("moe_end")[1] in (None, -1) else keys.count("moe_end")
    # Most families count the period from layer 1, `moe_layer_freq` counts it from layer 0.
    frequency, period = keys.size("moe_freq", 1), keys.size("moe_period", 1)
    offset = keys.count("moe_offset", period - 1)
    return [start <= i <= end and i % frequency == 0 and i % period == offset and i not in dense for i in range(layers)]


def _kind(keys: Keys, item: Any) -> str:
    kind = KINDS.get(str(item))
    if kind is None:
        keys.remark(f"layers of type '{item}' are read as full attention")
    return kind or "full"


def _list(keys: Keys, meaning: str, layers: int) -> list[Any]:
    """A list with one entry a layer; entries beyond the last layer (prediction layers) are dropped."""
    items = keys.items(meaning)
    if 0 < len(items) < layers:
        name = keys.find(meaning)[0]
        raise ModelError(f"{keys.where}: '{name}' lists {len(items)} layers, the model has {layers}")
    return items[:layers]
