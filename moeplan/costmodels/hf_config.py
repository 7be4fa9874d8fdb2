"""Model from a published Hugging Face `config.json`.

Every family is read by the same code: key names are a table (`hf_keys.NAMES`), class defaults and what no key says
are data (`catalog/families.yaml`). Parameter counts then equal those of the real modelling classes exactly, but for
families that the catalog marks as `unmodelled`. A `model_type` that the catalog does not know is read by the usual
names, and `Model.remarks` says what was assumed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moeplan.costmodels.hf_blocks import read_block
from moeplan.costmodels.hf_keys import Family, Keys, load_family
from moeplan.costmodels.hf_layers import KINDS, mixer_kinds, moe_layers, single_blocks
from moeplan.costmodels.model import Layer, Model
from moeplan.errors import ModelError

_NESTED = ("text_config", "llm_config", "thinker_config", "language_config")
MOST_LAYERS = 10_000
"""More are taken for a slip."""
_ACTIVATIONS: dict[str, Any] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu",
    "gelu_fast": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "relu2": "relu2",
    "squared_relu": "relu2",
    "swigluoai": "swigluoai",
}
_POSITIONS: dict[str, Any] = {
    "rope": "rope",
    "rotary": "rope",
    "nope": "none",
    "none": "none",
    "alibi": "alibi",
    "learned": "learned",
    "absolute": "learned",
    "learned_absolute": "learned",
}


def read_config(config: Mapping[str, Any], *, name: str, source: str = "") -> Model:
    """The model that a published configuration describes; `source` says where it was published."""
    where = f"model '{name}'"
    if not isinstance(config, Mapping):
        raise ModelError(f"{where}: the configuration must be a mapping of keys, found {type(config).__name__}")
    inner = _text_config(config)
    model_type = inner.get("model_type") or config.get("model_type") or ""
    family = load_family(str(model_type))
    keys = Keys(inner, family or Family(), where)
    if family is None:
        keys.remark(_generic_remark(str(model_type)))
    elif family.unmodelled:
        keys.remark(f"not modelled, so not in the counts: {family.unmodelled}")
    layers = _layers(keys)
    return Model(
        name=name,
        hidden=keys.size("hidden_size"),
        vocab=keys.size("vocab_size"),
        layers=layers,
        mtp=_mtp(keys, layers),
        mtp_shared=keys.flag("mtp_shared"),
        tied=keys.flag("tied"),
        max_positions=keys.count("max_positions", 0),
        streams=keys.size("streams", 1),
        norm=_norm(keys),
        norm_bias=keys.flag("norm_bias", True),
        norm_eps=keys.number("norm_eps", 1e-5),
        activation=_activation(keys),
        position=_position(keys),
        rope_base=keys.number("rope_base", 10000.0),
        rope_fraction=_rope_fraction(keys),
        family=str(model_type),
        source=source,
        remarks=tuple(keys.remarks),
        config=config,
    )


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a multimodal configuration that describes its language model."""
    for name in _NESTED:
        inner = config.get(name)
        if isinstance(inner, Mapping) and inner:
            outer = {k: config[k] for k in ("tie_word_embeddings", "model_type") if k in config}
            return _text_config({**outer, **inner})
    return config


def _generic_remark(model_type: str) -> str:
    what = f"model_type '{model_type}' is not in the catalog" if model_type else "the configuration names no model_type"
    return (
        f"{what}: read by the usual names of keys; where no key says otherwise one norm before every block, gated "
        "feed-forward blocks, a softmax router, an output head of its own, and no biases or query/key norms are assumed"
    )


def _layers(keys: Keys) -> tuple[Layer, ...]:
    """The decoder layers; equal ones are built once."""
    singles = single_blocks(keys)
    if singles:
        plan = [((kind,), kind == "moe") for kind in singles]
    else:
        count = keys.size("layers")
        if count > MOST_LAYERS:
            raise ModelError(f"{keys.where}: {count} layers are more than the {MOST_LAYERS} that can be read")
        parts = keys.find("blocks")[1] or ["mixer", "feed_forward"]
        plan = [
            (tuple({"mixer": mixer, "feed_forward": "moe" if moe else "dense"}.get(p, p) for p in parts), moe)
            for mixer, moe in zip(mixer_kinds(keys, count), moe_layers(keys, count), strict=True)
        ]
    varies, built = keys.varies, {}
    for i, (kinds, moe) in enumerate(plan):
        key = (kinds, varies and i)
        if key not in built:
            built[key] = _layer(keys.at(i, len(plan)), kinds, moe)
    return tuple(built[kinds, varies and i] for i, (kinds, _) in enumerate(plan))


def _layer(keys: Keys, kinds: tuple[str, ...], moe: bool) -> Layer:
    norms = keys.find("norms")[1]
    if isinstance(norms, Mapping):
        norms = norms["moe" if moe else "dense"]
    try:
        return Layer(blocks=tuple(read_block(keys, kind) for kind in kinds), norms=-1 if norms is None else norms)
    except ModelError as error:
        # Blocks check themselves without knowing whose they are.
        where = "" if error.message.startswith(keys.where) else f"{keys.where}: "
        raise ModelError(f"{where}{error.message}", hint=error.hint) from None


def _mtp(keys: Keys, layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    """Prediction layers: one more of the last decoder layer's kind, unless the configuration lists their blocks."""
    depth = keys.count("mtp_layers", 0)
    kinds = single_blocks(keys) and [KINDS.get(str(item), "full") for item in keys.items("mtp_blocks")]
    if kinds and depth:
        return (_layer(keys.at(len(layers), len(layers)), tuple(kinds), "moe" in kinds),) * depth
    return layers[-1:] * depth


def _norm(keys: Keys) -> Any:
    named = keys.text("norm", "")
    if not named:
        # Nothing says it: an epsilon called layer norm's is one's only without any called RMS norm's.
        named = "layernorm" if keys.find("norm_eps")[0].startswith("layer") else "rmsnorm"
    return "rmsnorm" if "rms" in named else "layernorm"


def _activation(keys: Keys) -> Any:
    named = keys.text("activation", "silu")
    if named not in _ACTIVATIONS:
        keys.remark(f"activation '{named}' is priced as 'silu'")
    return _ACTIVATIONS.get(named, "silu")


def _position(keys: Keys) -> Any:
    if keys.flag("alibi"):
        return "alibi"
    if keys.flag("learned_positions"):
        return "learned"
    named = keys.text("position", "rope")
    if named not in _POSITIONS:
        keys.remark(f"position embedding '{named}' is priced as 'rope'")
    return _POSITIONS.get(named, "rope")


def _rope_fraction(keys: Keys) -> float:
    if keys.known("rope_fraction") or not (keys.known("rotary_dim") and keys.known("head_dim")):
        return keys.number("rope_fraction", 1.0)
    return keys.size("rotary_dim") / keys.size("head_dim")
