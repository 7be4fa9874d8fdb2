"""The model that Megatron-LM's flags describe: the inverse of `megatron_model.py`.

Flags become a configuration in Megatron's own names, which `costmodels/hf_config.py` reads like a published one, so that a plan
file can carry it. Defaults are those of megatron-core 0.19.2. Models whose flags are those of a catalog model are that model.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from moeplan.costmodels.hf_config import MOST_LAYERS, read_config
from moeplan.costmodels.model import Model
from moeplan.costmodels.model_catalog import MODELS, named_model
from moeplan.errors import ExportError, ModelError
from moeplan.exporters.megatron_model import model_arguments
from moeplan.exporters.reading.flags import Flags, numbers_of

SIZE_FLAGS = ("--num-layers", "--hidden-size", "--num-attention-heads")
"""Flags without which there is no model."""
_MANNER = {
    "--max-position-embeddings", "--norm-epsilon", "--rotary-base", "--rotary-percent", "--no-rope-freq", "--qk-l2-norm",
    "--moe-router-load-balancing-type", "--moe-aux-loss-coeff", "--moe-router-score-function", "--moe-router-dtype",
    "--moe-router-pre-softmax", "--moe-router-enable-expert-bias", "--moe-router-num-groups", "--moe-router-group-topk",
    "--moe-router-topk-scaling-factor", "--vocab-size",
}  # fmt: skip
"""Flags that change neither the parameters of layers nor their work."""
_TOKENIZERS = {"GPT2BPETokenizer": 50257, "Llama2Tokenizer": 32000}
"""Vocabularies of tokenizers that have only one."""
_LETTERS = "M*-E"
"""Blocks of hybrid patterns that can be priced."""


@dataclasses.dataclass(slots=True)
class Found:
    """A model with what is to be said about it."""

    model: Model
    remarks: list[str]


def read_model(flags: Flags, seq_len: int, name: str) -> Found:
    """The model of the flags; `name` is what it is called if the catalog does not know it."""
    remarks: list[str] = []
    config = _config(flags, remarks)
    vocab = _vocabulary(flags)
    if vocab is None:
        vocab = _tokenizer_vocabulary(flags)
        if vocab is None:
            match = _catalog_model(read_config({**config, "vocab_size": 1}, name=name), seq_len, any_vocab=True)
            vocab = match[0].vocab if match else None
        if vocab is None:
            raise ModelError(
                "no flag says how large the vocabulary is", hint="give --add '--vocab-size N', with N as the tokenizer has it"
            )
        remarks.append(f"no flag says how large the vocabulary is: {vocab} is taken")
    model = read_config({**config, "vocab_size": vocab}, name=name, source="arguments of Megatron-LM")
    match = _catalog_model(model, seq_len)
    if match is None:
        return Found(model, remarks)
    published, differences = match
    if not differences - {"--max-position-embeddings"}:
        return Found(published, remarks)
    theirs, ours = ({f[0]: " ".join(f[1:]) for f in model_arguments(m, seq_len)} for m in (published, model))
    listed = ", ".join(
        f"{flag} {ours.get(flag, 'not given')} ({theirs.get(flag, 'not given')})"
        for flag in sorted(differences - {"--max-position-embeddings"})
    )
    remarks.append(f"the sizes are those of {published.name}; it differs in {listed}")
    return Found(dataclasses.replace(model, name=published.name), remarks)


def _catalog_model(model: Model, seq_len: int, *, any_vocab: bool = False) -> tuple[Model, set[str]] | None:
    """The catalog model of the same sizes that differs in the fewest flags, and these flags."""
    best: tuple[tuple[int, int, str], Model, set[str]] | None = None
    for path in sorted(MODELS.glob("*.yaml")):
        if not re.search(rf"\b{model.hidden}\b", path.read_text(encoding="utf-8")):
            continue
        published = named_model(path.stem)
        if published is None or len(published.layers) < len(model.layers) or len(published.mtp) < len(model.mtp):
            continue
        if len(published.layers) > len(model.layers):
            published = published.cut(len(model.layers))
        published = dataclasses.replace(published, mtp=published.mtp[: len(model.mtp)])
        ours = dataclasses.replace(model, vocab=published.vocab) if any_vocab else model
        differences = _differences(ours, published, seq_len)
        if differences is None or not 1 <= ours.vocab / published.vocab < 1.02:
            continue
        rank = (len(differences), "proxy" in published.name, path.stem)
        if best is None or rank < best[0]:
            best = rank, published, differences
    return best and (best[1], best[2])


def _differences(one: Model, other: Model, seq_len: int) -> set[str] | None:
    """Flags in which two models of the same sizes differ; None if their sizes differ."""
    try:
        flags = [{f[0]: f[1:] for f in model_arguments(m, seq_len)} for m in (one, other)]
    except ExportError:
        return None
    found = {flag for flag in (*flags[0], *flags[1]) if flags[0].get(flag) != flags[1].get(flag)}
    positions = one.position != "learned" or "--max-position-embeddings" not in found
    return found if found <= _MANNER and positions else None


def _vocabulary(flags: Flags) -> int | None:
    flags.find("--make-vocab-size-divisible-by")
    return flags.number("--padded-vocab-size") or flags.number("--vocab-size")


def _tokenizer_vocabulary(flags: Flags) -> int | None:
    kind = flags.text("--tokenizer-type") or ""
    path = "" if kind in _TOKENIZERS else flags.text("--tokenizer-model") or ""
    flags.asked -= {"--tokenizer-type", "--tokenizer-model"}  # the model keeps their vocabulary only: they are passed on
    if kind in _TOKENIZERS:
        return _TOKENIZERS[kind]
    for part in path.split("/"):
        published = named_model(part) if part else None
        if published is not None:
            return published.vocab
    return None


# The configuration, in Megatron's names.


def _config(flags: Flags, remarks: list[str]) -> dict[str, Any]:
    hybrid = flags.text("--hybrid-layer-pattern", "--hybrid-override-pattern")
    layers = flags.number("--num-layers", "--encoder-num-layers", least=0 if hybrid else 1)
    missing = [f for f in SIZE_FLAGS if not flags.has(f) and not (f == "--num-layers" and (hybrid or layers))]
    if missing:
        from_checkpoint = flags.has("--use-checkpoint-args")
        raise ModelError(
            f"the arguments have no {', '.join(missing)}",
            hint="--use-checkpoint-args takes them from a checkpoint: say them with --add '--hidden-size N ...'"
            if from_checkpoint
            else "a training command of Megatron-LM has them",
        )
    hidden = flags.count("--hidden-size", default=1, least=1)
    config: dict[str, Any] = {"model_type": "megatron", "hidden_size": hidden}
    if hybrid:
        config |= _pattern(hybrid, flags)
    else:
        config["num_layers"] = layers or 1
        if depth := flags.number("--mtp-num-layers"):
            config["mtp_num_layers"] = depth
        for flag, number in (("--num-layers", config["num_layers"]), ("--mtp-num-layers", depth or 0)):
            if number > MOST_LAYERS:
                raise ModelError(f"{flag} {number} is more than the {MOST_LAYERS} that can be read")
    if flags.has("--mtp-use-repeated-layer"):
        config["mtp_use_repeated_layer"] = True
    bias = not flags.has("--disable-bias-linear")
    if bias:
        flags.defaults["--disable-bias-linear"] = "off: linear layers have biases"
    latent = flags.has("--multi-latent-attention")
    config |= {"add_bias_linear": bias, "add_qkv_bias": (bias or flags.has("--add-qkv-bias")) and not latent}
    count = len(config["hybrid_layer_pattern"]) if hybrid else config["num_layers"]
    config |= _latent(flags, remarks) if latent else _attention(flags, hidden, count, remarks)
    config |= _linear(flags, count, remarks) | _mamba(flags, hybrid or "")
    config |= _position(flags, count, remarks) | _feed_forward(flags, hidden, count, remarks)
    config["normalization"] = flags.word("--normalization", default="LayerNorm")
    config["layernorm_epsilon"] = flags.real("--norm-epsilon", default=1e-5)
    config["untie_embeddings_and_output_weights"] = flags.has("--untie-embeddings-and-output-weights")
    return config


def _pattern(text: str, flags: Flags) -> dict[str, Any]:
    main, *depths = text.split("/")
    letters = main.replace("|", "")
    if not letters or set(letters) - set(_LETTERS) or not set(letters) & {"-", "E"}:
        raise ModelError(
            f"--hybrid-layer-pattern {text}: blocks of Mamba-2 (M), attention (*), dense (-) and experts (E) can be read, "
            "with at least one that is dense or of experts"
        )
    config: dict[str, Any] = {"hybrid_layer_pattern": letters}
    flags.find("--num-layers", "--is-hybrid-model")
    old = flags.text("--mtp-hybrid-override-pattern")
    if not depths and old:
        depths = [old] * (flags.number("--mtp-num-layers") or 1)
    if depths := [d for d in depths if d]:
        config |= {"mtp_num_layers": len(depths), "mtp_hybrid_override_pattern": depths[0]}
    flags.find("--mtp-num-layers")
    return config


def _attention(flags: Flags, hidden: int, count: int, remarks: list[str]) -> dict[str, Any]:
    heads = flags.count("--num-attention-heads", default=1, least=1)
    groups = flags.number("--num-query-groups")
    if flags.has("--group-query-attention"):
        groups = flags.count("--num-query-groups", default=1, least=1)
    else:
        groups = heads
    config: dict[str, Any] = {
        "num_attention_heads": heads,
        "num_query_groups": groups,
        "kv_channels": flags.number("--kv-channels", least=1) or hidden // heads or 1,
        "qk_layernorm": flags.has("--qk-layernorm"),
        "attention_output_gate": flags.has("--attention-output-gate"),
    }
    if flags.has("--qk-l2-norm"):
        config["use_qk_norm"] = True
    match flags.text("--softmax-type"):
        case "learnable":
            config["softmax_sinks"] = "all"
        case "off-by-one":
            remarks.append("--softmax-type off-by-one: it has no weights and is not priced")
    window = re.match(r"\(?(\d+)\s*,", flags.text("--window-size") or "")
    if window:
        config["window_size"] = int(window[1]) + 1  # Megatron counts the tokens before the query
        inside = _list(flags, "--window-attn-skip-freq", count, lambda n: [int((i + 1) % n != 0) for i in range(count)])
        config["layer_types"] = ["sliding_attention" if w else "full_attention" for w in inside or [1] * count]
    return config


def _list(flags: Flags, flag: str, count: int, periodic: Any) -> list[int] | None:
    """What a flag says of every layer; None where it was not given."""
    text = flags.text(flag)
    if text is None:
        return None
    found = numbers_of(text, count, periodic)
    if found is None:
        raise ModelError(f"{flag} {text} is no list of the {count} layers", hint="write it like '([0]*3+[1]*58)'")
    return found


def _latent(flags: Flags, remarks: list[str]) -> dict[str, Any]:
    config: dict[str, Any] = {
        "num_attention_heads": flags.count("--num-attention-heads", default=1),
        "q_lora_rank": flags.number("--q-lora-rank"),
        "kv_lora_rank": flags.count("--kv-lora-rank", default=32),
        "qk_head_dim": flags.count("--qk-head-dim", default=128),
        "qk_pos_emb_head_dim": flags.count("--qk-pos-emb-head-dim", default=64),
        "v_head_dim": flags.count("--v-head-dim", default=128),
    }
    flags.find("--kv-channels")
    if not flags.has("--qk-layernorm"):
        remarks.append("latent attention without --qk-layernorm is priced with the norms of its compressions")
    if flags.text("--experimental-attention-variant") == "dsa":
        for name in ("n-heads", "head-dim", "topk"):
            config[f"dsa_indexer_{name.replace('-', '_')}"] = flags.number(f"--dsa-indexer-{name}")
        flags.find("--dsa-indexer-loss-coeff", "--no-rope-fusion")
        if None in config.values() and not all(config[f"dsa_indexer_{n}"] for n in ("n_heads", "head_dim", "topk")):
            raise ModelError(
                "sparse attention (dsa) needs --dsa-indexer-n-heads, --dsa-indexer-head-dim and --dsa-indexer-topk"
            )
    return config


def _linear(flags: Flags, count: int, remarks: list[str]) -> dict[str, Any]:
    variant = flags.text("--experimental-attention-variant")
    if variant in (None, "dsa"):
        return {}
    if variant not in ("gated_delta_net", "gdn"):
        raise ModelError(f"--experimental-attention-variant {variant} cannot be priced", hint="gated_delta_net and dsa can")
    linear = _list(flags, "--linear-attention-freq", count, lambda n: [int((i + 1) % n != 0) for i in range(count)])
    if linear is None:
        raise ModelError(
            "linear attention needs --linear-attention-freq", hint="which layers are linear, like '([1]*3+[0])*12'"
        )
    return {
        "layer_types": ["linear_attention" if x else "full_attention" for x in linear],
        "linear_conv_kernel_dim": flags.count("--linear-conv-kernel-dim", default=4),
        "linear_key_head_dim": flags.count("--linear-key-head-dim", default=128),
        "linear_value_head_dim": flags.count("--linear-value-head-dim", default=128),
        "linear_num_key_heads": flags.count("--linear-num-key-heads", default=16),
        "linear_num_value_heads": flags.count("--linear-num-value-heads", default=32),
    }


def _mamba(flags: Flags, pattern: str) -> dict[str, Any]:
    if "M" not in pattern:
        return {}
    inner = 2 * flags.count("--hidden-size", default=1)
    head_dim = flags.count("--mamba-head-dim", default=64, least=1)
    return {
        "mamba_head_dim": head_dim,
        "mamba_num_heads": flags.number("--mamba-num-heads") or inner // head_dim,
        "mamba_state_dim": flags.count("--mamba-state-dim", default=128),
        "mamba_num_groups": flags.count("--mamba-num-groups", default=8),
    }


def _position(flags: Flags, count: int, remarks: list[str]) -> dict[str, Any]:
    kind = flags.word("--position-embedding-type", default="learned_absolute")
    if flags.has("--use-rotary-position-embeddings"):
        kind = "rope"
        flags.defaults.pop("--position-embedding-type", None)
    if kind not in ("rope", "learned_absolute", "none"):
        remarks.append(f"--position-embedding-type {kind} is priced as rope")
        kind = "rope"
    config: dict[str, Any] = {"position_embedding_type": kind}
    longest = flags.number("--max-position-embeddings") or flags.number("--seq-length")
    if longest:
        config["max_position_embeddings"] = longest
    config["rotary_base"] = flags.real("--rotary-base", default=10000.0)
    config["rotary_percent"] = flags.real("--rotary-percent", default=1.0)
    without = _list(flags, "--no-rope-freq", count, lambda n: [int((i + 1) % n == 0) for i in range(count)])
    if without:
        config["no_rope_layers"] = [1 - x for x in without]
    return config


def _feed_forward(flags: Flags, hidden: int, count: int, remarks: list[str]) -> dict[str, Any]:
    gated, activation = False, "gelu"
    if flags.has("--swiglu"):
        gated, activation = True, "silu"
    elif flags.has("--quick-geglu"):
        gated, activation = True, "swigluoai"
        flags.find("--glu-linear-offset", "--activation-func-clamp-value")
    elif flags.has("--squared-relu"):
        activation = "relu2"
    width = flags.number("--ffn-hidden-size")
    if width is None:
        width = int(4 * hidden * 2 / 3 / 64) * 64 if activation == "silu" else 4 * hidden
        flags.defaults["--ffn-hidden-size"] = str(width)
    config: dict[str, Any] = {"gated_linear_unit": gated, "activation_func": activation, "ffn_hidden_size": width}
    return config | _experts(flags, width, count)


def _experts(flags: Flags, width: int, count: int) -> dict[str, Any]:
    experts = flags.number("--num-experts")
    if not experts:
        return {}
    config: dict[str, Any] = {
        "num_experts": experts,
        "moe_router_topk": flags.count("--moe-router-topk", default=2),
        "moe_ffn_hidden_size": flags.count("--moe-ffn-hidden-size", default=width),
        "moe_router_score_function": flags.word("--moe-router-score-function", default="softmax"),
        "moe_router_pre_softmax": flags.has("--moe-router-pre-softmax"),
        "moe_router_enable_expert_bias": flags.has("--moe-router-enable-expert-bias"),
        "moe_shared_expert_gate": flags.has("--moe-shared-expert-gate"),
    }
    if not flags.has("--hybrid-layer-pattern", "--hybrid-override-pattern"):
        frequency = _list(flags, "--moe-layer-freq", count, lambda n: [int(i % n == 0) for i in range(count)])
        config["moe_layer_freq"] = frequency or [1] * count
    grouped = ("--moe-router-num-groups", "--moe-router-group-topk")
    sizes = ("--moe-shared-expert-intermediate-size", "--moe-latent-size")
    for flag in (*sizes, *(grouped if all(flags.number(flag) for flag in grouped) else ())):
        if number := flags.number(flag):
            config[flag.removeprefix("--").replace("-", "_")] = number
    config["moe_router_topk_scaling_factor"] = flags.real("--moe-router-topk-scaling-factor", default=1.0)
    flags.find("--moe-router-dtype"), flags.find("--moe-router-load-balancing-type"), flags.find("--moe-aux-loss-coeff")
    return config


__all__: Sequence[str] = ["SIZE_FLAGS", "Found", "read_model"]
