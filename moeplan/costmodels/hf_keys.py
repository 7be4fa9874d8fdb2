"""A published configuration read by meaning, whatever its family calls things.

`NAMES` lists for every meaning the keys it goes by, in the order to try. A key that is absent stands for the default of
the family's class, `null` for "none"; both defaults and what no key says are data, `catalog/families.yaml`. A new
family is an entry there; a new spelling is a name here.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moeplan.errors import ModelError
from moeplan.records import from_mapping, parse_yaml, read_text

FAMILIES = Path(__file__).parent / "catalog" / "families.yaml"

NAMES: Mapping[str, tuple[str, ...]] = {
    # The model as a whole. A dot leads into a nested mapping, "not" turns a flag around.
    "layers": ("num_hidden_layers", "num_layers", "n_layers", "n_layer"),
    "hidden_size": ("hidden_size", "d_model", "n_embd"),
    "vocab_size": ("vocab_size",),
    "max_positions": (
        *("max_position_embeddings", "model_max_length", "max_sequence_length", "max_seq_len", "n_positions"),
        *("n_ctx", "seq_length"),
    ),
    "tied": ("tie_word_embeddings",),
    "streams": ("hc_mult",),
    "norm": ("norm_type", "normalization"),
    "norm_bias": ("not no_bias",),
    "norm_eps": (*("rms_norm_eps", "norm_eps", "layer_norm_eps", "layer_norm_epsilon", "layernorm_epsilon", "norm_epsilon"),),
    "activation": (
        *("hidden_act", "hidden_activation", "mlp_hidden_act", "activation_function", "activation"),
        "ffn_config.ffn_act_fn.name",
    ),
    "alibi": ("alibi", "attn_config.alibi"),
    "learned_positions": ("learned_pos_emb",),
    "position": ("position_embedding_type",),
    "rope_base": (
        *("rope_theta", "rope_parameters.rope_theta", "rope_parameters.full_attention.rope_theta"),
        *("attn_config.rope_theta", "rotary_emb_base", "rotary_base"),
    ),
    "rope_fraction": (
        *("partial_rotary_factor", "rope_parameters.partial_rotary_factor", "rotary_pct", "rotary_percent"),
        "rope_parameters.full_attention.partial_rotary_factor",
    ),
    "rotary_dim": ("rotary_dim",),
    "mtp_layers": (
        *("num_nextn_predict_layers", "num_mtp_modules", "mtp_num_layers", "mtp_num_hidden_layers", "num_mtp_layers"),
    ),
    "mtp_blocks": ("mtp_hybrid_override_pattern", "mtp_layers_block_type"),
    "mtp_shared": ("mtp_use_repeated_layer",),
    # Which block stands in which layer.
    "layer_types": ("layer_types", "layers_block_type"),
    "block_pattern": ("hybrid_override_pattern", "layers_block_type"),
    "full_flags": ("attn_type_list",),
    "window_flags": ("hybrid_layer_pattern",),
    "linear_layers": ("linear_attn_config.kda_layers",),
    "compress_ratios": ("compress_ratios",),
    "full_period": ("full_attention_interval", "layer_group_size", "attn_layer_period"),
    "full_offset": ("attn_layer_offset",),
    "use_window": ("use_sliding_window",),
    "window_period": ("sliding_window_pattern", "global_attn_every_n_layers", "no_rope_layer_interval"),
    "window_from": ("max_window_layers",),
    "indexer_types": ("indexer_types",),
    "ffn_types": ("mlp_layer_types",),
    "moe_layers": ("moe_layers",),
    "dense_layers": ("mlp_only_layers",),
    "moe_start": ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"),
    "moe_end": ("moe_layer_end_index",),
    "moe_freq": ("moe_layer_freq",),
    "moe_period": (
        *("decoder_sparse_step", "interleave_moe_layer_step", "moe_layer_interval", "expert_layer_period"),
        "moe_layer_frequency",
    ),
    "moe_offset": ("expert_layer_offset",),
    # Attention with grouped queries; sliding layers may have sizes of their own.
    "heads": ("num_attention_heads_per_layer", "num_attention_heads", "n_heads", "n_head", "num_heads"),
    "kv_heads": (*("num_key_value_heads", "num_query_groups", "n_kv_heads", "num_kv_heads", "attn_config.kv_n_heads"),),
    "head_dim": ("head_dim", "attention_head_dim", "kv_channels"),
    "v_head_dim": ("v_head_dim",),
    "window": ("sliding_window", "sliding_window_size", "attention_chunk_size"),
    "window_heads": ("swa_num_attention_heads",),
    "window_kv_heads": ("swa_num_key_value_heads",),
    "window_head_dim": ("swa_head_dim",),
    "window_v_head_dim": ("swa_v_head_dim",),
    "qkv_bias": ("attention_bias", "qkv_bias", "use_qkv_bias", "add_qkv_bias", "use_bias", "bias", "not no_bias"),
    "out_bias": ("attention_out_bias", "attention_bias", "use_bias", "bias", "not no_bias"),
    "qk_norm": ("use_qk_norm", "qk_layernorm", "use_qk_layernorm", "attn_config.qk_ln"),
    "qk_norm_form": (),
    "attention_gate": ("attn_output_gate",),
    "head_gate": (),
    "sinks": (),
    # Latent attention, its indexer and its compressed form.
    "q_rank": ("q_lora_rank",),
    "kv_rank": ("kv_lora_rank",),
    "nope_dim": ("qk_nope_head_dim",),
    "rope_dim": ("qk_rope_head_dim",),
    "v_dim": ("v_head_dim",),
    "index_heads": ("index_n_heads",),
    "index_dim": ("index_head_dim",),
    "index_topk": ("index_topk",),
    "out_groups": ("o_groups",),
    "out_rank": ("o_lora_rank",),
    "sparse_rate": ("compress_rates.compressed_sparse_attention", "compress_rate_csa"),
    "heavy_rate": ("compress_rates.heavily_compressed_attention", "compress_rate_hca"),
    # Linear attention and state space blocks.
    "lightning": ("attn_type_list",),
    "gdn_key_heads": ("linear_num_key_heads",),
    "gdn_value_heads": ("linear_num_value_heads",),
    "gdn_key_dim": ("linear_key_head_dim",),
    "gdn_value_dim": ("linear_value_head_dim",),
    "kda_heads": ("linear_num_heads", "linear_attn_config.num_heads"),
    "kda_dim": ("linear_head_dim", "linear_attn_config.head_dim"),
    "linear_conv": ("linear_conv_kernel_dim", "linear_attn_config.short_conv_kernel_size", "short_conv_kernel_size"),
    "linear_full_rank": (),
    "mamba2_heads": ("mamba_num_heads", "mamba_n_heads"),
    "mamba2_head_dim": ("mamba_head_dim", "mamba_d_head"),
    "mamba_state": ("ssm_state_size", "mamba_d_state"),
    "mamba_groups": ("n_groups", "mamba_n_groups"),
    "mamba_conv": ("conv_kernel", "mamba_d_conv"),
    "mamba_conv_bias": ("use_conv_bias", "mamba_conv_bias"),
    "mamba_bias": ("mamba_proj_bias",),
    "mamba_chunk": ("chunk_size", "mamba_chunk_size"),
    "mamba_expand": ("mamba_expand",),
    "mamba_dt_rank": ("mamba_dt_rank",),
    # Feed-forward blocks. `width` is the one that a model with a single width has.
    "width": ("intermediate_size", "ffn_hidden_size", "n_inner", "ffn_config.ffn_hidden_size"),
    "width_ratio": ("expansion_ratio",),
    "dense_width": ("intermediate_size_mlp", "dense_intermediate_size"),
    "gated": (),
    "mlp_bias": ("mlp_bias", "use_bias", "bias", "not no_bias"),
    "experts": (*("n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts", "ffn_config.moe_num_experts"),),
    "experts_per_token": (
        *("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts", "moe_top_k"),
        *("ffn_config.moe_top_k", "experts_per_token"),
    ),
    "expert_width": ("moe_intermediate_size", "expert_ffn_hidden_size", "moe_ffn_hidden_size"),
    "expert_matrix_bias": (),
    "shared_experts": ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "num_shared_expert"),
    "shared_width": (
        *("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", "shared_intermediate_size"),
        *("shared_experts_intermediate_size", "share_expert_dim"),
    ),
    "shared_gate": (),
    "latent": ("moe_latent_size",),
    "zero_experts": ("zero_expert_num",),
    # The router.
    "router_bias": (),
    "score": ("scoring_func", "score_function", "moe_router_activation_func", "expert_selection_fn"),
    "normalised": ("norm_topk_prob", "moe_renormalize", "route_norm"),
    "topk_method": ("topk_method",),
    "expert_bias": (*("use_routing_bias", "moe_router_enable_expert_bias", "use_expert_bias", "moe_use_aux_free"),),
    "expert_bias_is_parameter": (),
    "groups": ("n_group", "num_expert_group"),
    "group_topk": ("topk_group",),
    "scaling": (
        *("routed_scaling_factor", "route_scale", "router_scaling_factor", "moe_router_scaling_factor"),
        "moe_routed_scaling_factor",
    ),
    # Shape of a layer where it is not norm, mixer, norm, feed-forward.
    "blocks": (),
    "norms": (),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """What the configurations of one `model_type` leave unsaid."""

    like: str = ""
    """A family whose entry this one starts from."""
    keys: Mapping[str, Any] = field(default_factory=dict)
    """Class defaults of keys that a configuration may leave out."""
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Keys that stand for a meaning in this family, in place of those in `NAMES`."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Values of meanings that no key carries."""
    unmodelled: str = ""
    """What the family computes and moeplan does not count; becomes a remark."""


@functools.cache
def load_family(model_type: str) -> Family | None:
    """The catalog's entry for a `model_type`, with or without the suffix "_text"; None where there is none."""
    for name in (model_type, f"{model_type}_text", model_type.removesuffix("_text")):
        # One entry is cut out of the file, as parsing all of them would take longer than reading a model.
        entry = re.search(rf"^{re.escape(name)}:.*\n(?:[ #].*\n|\n)*", _families_text(), re.MULTILINE)
        if entry and name:
            where = f"catalog of model families, '{name}'"
            family = from_mapping(Family, parse_yaml(entry[0], where)[name] or {}, where)
            return _extend(family)
    return None


@functools.cache
def _families_text() -> str:
    return read_text(FAMILIES, "catalog of model families")


def _extend(family: Family) -> Family:
    base = load_family(family.like) if family.like else None
    if base is None:
        return family
    return Family(
        keys={**base.keys, **family.keys},
        names={**base.names, **family.names},
        facts={**base.facts, **family.facts},
        unmodelled=family.unmodelled or base.unmodelled,
    )


class Keys:
    """One configuration, asked by meaning: its own keys, then the class defaults, then the facts of its family."""

    def __init__(self, config: Mapping[str, Any], family: Family, where: str) -> None:
        self._config, self._family, self.where = config, family, where
        self._layer, self._layers = 0, 0
        self.remarks: list[str] = []

    def at(self, layer: int, layers: int) -> Keys:
        """The configuration as one of `layers` layers sees it: its entries of lists and of `per_layer_config`."""
        changes = self._config.get("per_layer_config") or {}
        if not isinstance(changes, Mapping) or not all(isinstance(v, Mapping) for v in changes.values()):
            raise ModelError(f"{self.where}: 'per_layer_config' must map layer numbers to keys, found {changes!r:.60}")
        own: Mapping[str, Any] = next((v for k, v in changes.items() if str(k).zfill(4) == str(layer).zfill(4)), {})
        keys = Keys({**self._config, **own}, self._family, self.where)
        keys._layer, keys._layers, keys.remarks = layer, layers, self.remarks
        return keys

    @property
    def varies(self) -> bool:
        """Whether sizes may differ from layer to layer beyond the kinds of blocks."""
        return bool(self._config.get("per_layer_config")) or any(
            isinstance(self.find(meaning)[1], list) for meaning in _SIZES_BY_LAYER
        )

    def names(self, meaning: str) -> tuple[str, ...]:
        """The keys that stand for a meaning, in the order to try."""
        return self._family.names.get(meaning, NAMES[meaning])

    def find(self, meaning: str) -> tuple[str, Any]:
        """The key that carries a meaning, and its value; the value is None for `null` and where nothing is known."""
        for source in (self._config, self._family.keys):
            null = ""
            for name in self.names(meaning):
                present, value = _dig(source, name)
                if present and value is not None:
                    return name, value
                null = null or (name if present else "")
            if null:
                return null, None
        return meaning, self._family.facts.get(meaning)

    def known(self, meaning: str) -> bool:
        """Whether a meaning has a value other than `null`."""
        return self.find(meaning)[1] is not None

    def count(self, meaning: str, default: int | None = None, *, least: int = 0) -> int:
        """A whole number not below `least`; without a default the meaning must be there."""
        name, value = self.find(meaning)
        if isinstance(value, list) and value and self._layers:
            if len(value) < self._layers:
                self.remark(f"'{name}' lists {len(value)} values; the first is used")
            value = value[min(self._layer, len(value) - 1) if len(value) >= self._layers else 0]
        if value is None and default is None:
            tried = ", ".join(f"'{n}'" for n in self.names(meaning))
            raise ModelError(f"{self.where}: no {_label(meaning)} found", hint=f"looked for {tried}")
        if value is None:
            return int(default or 0)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            kind = "a positive whole number" if least else "a whole number that is not negative"
            raise ModelError(f"{self.where}: {_label(meaning)} '{name}' must be {kind}, found {value!r}")
        if value > _MOST and meaning != "max_positions":  # tokenizers write 10^30 where they know no limit
            raise ModelError(f"{self.where}: {_label(meaning)} '{name}' is {value:g}, more than the {_MOST} that are handled")
        return value

    def size(self, meaning: str, default: int | None = None) -> int:
        """A positive whole number; without a default the meaning must be there."""
        return self.count(meaning, default, least=1)

    def number(self, meaning: str, default: float) -> float:
        """A positive number."""
        name, value = self.find(meaning)
        if value is None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
            raise ModelError(f"{self.where}: {_label(meaning)} '{name}' must be a positive number, found {value!r}")
        return float(value)

    def flag(self, meaning: str, default: bool = False) -> bool:
        """True or false."""
        name, value = self.find(meaning)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise ModelError(f"{self.where}: {_label(meaning)} '{name}' must be true or false, found {value!r}")
        return value != name.startswith("not ")

    def text(self, meaning: str, default: str) -> str:
        """A word, in lower case."""
        name, value = self.find(meaning)
        if value is None:
            return default
        if not isinstance(value, str):
            raise ModelError(f"{self.where}: {_label(meaning)} '{name}' must be a word, found {value!r}")
        return value.lower()

    def items(self, meaning: str) -> list[Any]:
        """A list, or the letters of a word; empty where the meaning is absent or something else."""
        value = self.find(meaning)[1]
        return list(value) if isinstance(value, list | str) else []

    def remark(self, text: str) -> None:
        """Note what had to be assumed, once."""
        if text not in self.remarks:
            self.remarks.append(text)


# Larger sizes are slips; products of two stay within 64-bit integers.
_MOST = 1_000_000_000

# Sizes that some families list by layer.
_SIZES_BY_LAYER = ("heads", "kv_heads", "width", "experts", "experts_per_token", "expert_width", "shared_experts")


def _dig(config: Mapping[str, Any], name: str) -> tuple[bool, Any]:
    """Whether a key is there, and its value; a dotted one may stand as such or lead into nested mappings."""
    name = name.removeprefix("not ")
    if name in config:
        return True, config[name]
    value: Any = config
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return False, None
        value = value[part]
    return True, value


def _label(meaning: str) -> str:
    return meaning.replace("_", " ")
