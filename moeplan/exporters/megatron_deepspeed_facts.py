"""Facts about Megatron-DeepSpeed: its flags where they are not Megatron-LM's, and those of a model.

It is a Megatron-LM of 2023 whose engine is DeepSpeed's. flags/megatron_deepspeed.yaml is the dictionary, read forwards by the
exporter and backwards by the importer; its parser is in no package, so that no test asks it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from moeplan.costmodels.model import Model
from moeplan.errors import ExportError
from moeplan.exporters.base import Flag
from moeplan.exporters.megatron_model import model_arguments
from moeplan.records import from_mapping, load_yaml

CONFIG = "megatron_deepspeed.json"
"""Name of DeepSpeed's JSON for it in an export."""
_IMPLIED = {
    "--moe-router-score-function", "--moe-router-dtype", "--moe-router-load-balancing-type", "--group-query-attention",
    "--moe-ffn-hidden-size", "--position-embedding-type",
}  # fmt: skip
"""Flags of Megatron-LM that its router and its experts need not be told, or that others say."""
_POSITIONS = {"rope": ("--use-rotary-position-embeddings",), "none": ("--no-position-embedding",)}


@dataclass(frozen=True, kw_only=True, slots=True)
class DialectFacts:
    """What is known of Megatron-DeepSpeed's flags."""

    framework: str
    written_for: str
    signs: tuple[str, ...]
    """Flags that no other program has."""
    same: tuple[str, ...]
    renamed: Mapping[str, str]
    """Flags of Megatron-LM by its own."""
    idle: tuple[str, ...]
    """Flags without effect under DeepSpeed's engine."""
    takes: Mapping[str, tuple[str, ...]]
    """Own flags by "switch", "value" or "list"."""

    @property
    def kinds(self) -> dict[str, str]:
        """What each own flag takes."""
        return {flag: kind for kind, flags in self.takes.items() for flag in flags}

    @property
    def own(self) -> dict[str, str]:
        """Own flags by those of Megatron-LM."""
        return {theirs: ours for ours, theirs in self.renamed.items()}


@functools.cache
def dialect() -> DialectFacts:
    """The facts of flags/megatron_deepspeed.yaml."""
    where = "megatron_deepspeed.yaml"
    return from_mapping(DialectFacts, load_yaml(Path(__file__).parent / "flags" / where, "flag file"), f"flags/{where}")


def model_flags(model: Model, seq_len: int) -> list[Flag] | None:
    """The flags of a model whose layers all hold experts; None if it has what Megatron-DeepSpeed lacks."""
    try:
        theirs = {flag[0]: flag[1:] for flag in model_arguments(model, seq_len)}
    except ExportError:
        return None
    moe = model.moe
    if moe is None or moe.pre_softmax != (moe.topk == 1):  # its gate normalises the weights of two experts and more
        return None
    theirs.pop("--moe-router-pre-softmax", None)
    words = {
        "--ffn-hidden-size": (str(moe.width),),
        "--normalization": (model.norm,),
        "--vocab-size": (str(model.vocab - 1),),  # the NullTokenizer adds one
    }
    out: list[Flag] = []
    for flag, values in theirs.items():
        own = dialect().own.get(flag, flag)
        if own in dialect().same or flag in dialect().own:
            out.append((own, *words.get(flag, values)))
        elif flag not in _IMPLIED:
            return None
    position = _POSITIONS.get(model.position)
    return [*out, position] if position else out
