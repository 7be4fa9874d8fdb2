import dataclasses
import re
from importlib.resources import files
from typing import Any

import pytest
import yaml

from moeplan.costmodels.counts import parameter_count
from moeplan.costmodels.megatron_counts import padded_vocab
from moeplan.costmodels.model import Attention, Compression, LatentAttention, Layer, LinearAttention, Mamba, Mlp, Model, Moe
from moeplan.costmodels.model_catalog import load_model, model_names
from moeplan.errors import ExportError
from moeplan.exporters.megatron_model import hybrid_pattern, model_arguments, pattern
from tests import megatron
from tests.megatron_models import MODELS, launch_arguments

FLAGS: dict[str, dict[str, Any]] = yaml.safe_load(files("moeplan.exporters").joinpath("flags/megatron.yaml").read_text())[
    "flags"
]
LLAMA, MIXTRAL, DEEPSEEK = MODELS["llama3-8b"], MODELS["mixtral-8x7b"], MODELS["deepseek-v3"]
ATTENTION = Attention(heads=32, kv_heads=8, head_dim=128, v_head_dim=128)
LATENT = LatentAttention(heads=32, q_rank=64, kv_rank=64, nope_dim=128, rope_dim=64, v_dim=128)
LINEAR = LinearAttention(variant="gdn", key_heads=8, value_heads=8, key_dim=64, value_dim=64, conv=4)
MLP, MOE = Mlp(width=1024), Moe(experts=8, topk=2, width=1024)


def flags_of(model: Model, seq_len: int = 0) -> dict[str, tuple[str, ...]]:
    return {flag[0]: flag[1:] for flag in model_arguments(model, seq_len)}


@pytest.mark.parametrize("flag", FLAGS)
def test_flag_is_known_to_megatron(flag: str) -> None:
    action = megatron.known_flags()[flag]
    takes = {0: "switch", None: "value"}.get(action.nargs, "list")
    assert FLAGS[flag]["takes"] == takes
    if "values" in FLAGS[flag]:
        assert FLAGS[flag]["values"] == list(action.choices)


@pytest.mark.parametrize("name", MODELS)
def test_every_flag_is_in_the_catalog(name: str) -> None:
    for flag, *values in model_arguments(MODELS[name]):
        takes = FLAGS[flag]["takes"]
        assert len(values) == {"switch": 0, "value": 1}.get(takes, len(values))


@pytest.mark.parametrize("name", MODELS)
def test_megatron_builds_the_model(name: str) -> None:
    verdict = megatron.accept(launch_arguments(model_arguments(MODELS[name])), world=1, build=True)
    assert verdict.accepted, verdict


@pytest.mark.parametrize("name", model_names())
def test_catalog_model_is_built_with_its_parameters_or_refused(name: str) -> None:
    model = load_model(name)
    length = min(4096, model.max_positions or 4096)
    try:
        arguments = launch_arguments(model_arguments(model, length), f"--seq-length {length}")
    except ExportError:
        return
    count = parameter_count(model)
    expected = count.total + count.mtp + (padded_vocab(model, 1) - model.vocab) * model.hidden * (1 if model.tied else 2)
    latent = [b for layer in model.layers for b in layer.blocks if isinstance(b, LatentAttention)]
    expected += sum(model.hidden for b in latent if not b.q_rank)
    assert sum(megatron.build_counts(arguments, 1)[0]) == expected


def _with(model: Model, *blocks: Any, norms: int = 2, **rest: Any) -> Model:
    return dataclasses.replace(model, layers=(Layer(blocks=blocks, norms=norms),) * 2, **rest)


def _alter(block: Any, **change: Any) -> Any:
    return dataclasses.replace(block, **change)


REFUSED = [
    ("lightning", _with(LLAMA, _alter(LINEAR, variant="lightning"), MLP)),
    ("Kimi delta", _with(LLAMA, _alter(LINEAR, variant="kda"), MLP)),
    ("Mamba-1", _with(LLAMA, Mamba(version=1, inner=1024, state=16, dt_rank=64), norms=1)),
    ("norms over all heads", _with(LLAMA, _alter(ATTENTION, qk_norm="full"), MLP)),
    ("value heads of 64", _with(LLAMA, _alter(ATTENTION, v_head_dim=64), MLP)),
    ("layers with 4 norms", _with(LLAMA, ATTENTION, MLP, norms=4)),
    ("layers with 1 norms", _with(LLAMA, ATTENTION, MLP, norms=1)),
    ("Attention + Mlp + Moe", _with(LLAMA, ATTENTION, MLP, MOE, norms=3)),
    ("layers of Attention", _with(LLAMA, ATTENTION, norms=1)),
    ("head_gate", _with(LLAMA, _alter(ATTENTION, head_gate=True), MLP)),
    ("compression", _with(LLAMA, _alter(LATENT, compression=Compression(window=8, rate=4, out_groups=1, out_rank=8)), MLP)),
    ("compute nothing", _with(LLAMA, ATTENTION, _alter(MOE, zero_experts=8))),
    ("beside softmax scores", _with(LLAMA, ATTENTION, _alter(MOE, expert_bias=True))),
    ("the one expert", _with(LLAMA, ATTENTION, _alter(MOE, topk=1))),
    ("some linear layers", _with(LLAMA, _alter(ATTENTION, out_bias=True), MLP)),
    ("shared experts", _with(
        LLAMA, _alter(ATTENTION, qkv_bias=True, out_bias=True), _alter(MOE, bias=True, router_bias=True, shared_width=64)
    )),
    ("sparse attention without", _with(LLAMA, _alter(LATENT, q_rank=0, index_heads=4, index_dim=64, index_topk=64), MLP)),
    ("qkv_bias", _with(LLAMA, _alter(LATENT, qkv_bias=True), MLP)),
    ("gelu activation", _with(LLAMA, ATTENTION, MLP, activation="gelu")),
    ("gated beside plain", dataclasses.replace(
        LLAMA, layers=(Layer(blocks=(ATTENTION, MLP)), Layer(blocks=(ATTENTION, _alter(MLP, gated=False))))
    )),
    ("kv_heads 8 in some layers and 4", dataclasses.replace(
        LLAMA, layers=(Layer(blocks=(ATTENTION, MLP)), Layer(blocks=(_alter(ATTENTION, kv_heads=4), MLP)))
    )),
    ("windows of 64 and 128", dataclasses.replace(
        LLAMA, layers=tuple(Layer(blocks=(_alter(ATTENTION, window=w), MLP)) for w in (64, 128))
    )),
    ("attention in chunks", _with(LLAMA, _alter(ATTENTION, window=64), MLP, config={"attention_chunk_size": 64})),
    ("alibi", dataclasses.replace(LLAMA, position="alibi")),
    ("layer norms without bias", dataclasses.replace(LLAMA, norm="layernorm", norm_bias=False)),
    ("rotary base", dataclasses.replace(LLAMA, rope_base=10000.5)),
    ("residual streams", dataclasses.replace(LLAMA, streams=4)),
    ("unlike the last decoder layer", dataclasses.replace(DEEPSEEK, mtp=DEEPSEEK.layers[:1])),
    ("beside linear or sparse", dataclasses.replace(MODELS["deepseek-v3.2"], mtp=MODELS["deepseek-v3.2"].layers[-1:])),
]  # fmt: skip


@pytest.mark.parametrize(("reason", "model"), REFUSED)
def test_refuses_what_megatron_lacks(reason: str, model: Model) -> None:
    with pytest.raises(ExportError, match=re.escape(reason)):
        model_arguments(model)


def test_alternating_layers() -> None:
    assert flags_of(DEEPSEEK)["--moe-layer-freq"] == ("([0]*3+[1]*58)",)
    assert flags_of(MODELS["gpt-oss-20b"])["--window-attn-skip-freq"] == ("([1]*1+[0]*1)*12",)
    assert flags_of(MODELS["gpt-oss-20b"])["--window-size"] == ("127,0",)
    assert flags_of(MODELS["qwen3-next-80b-a3b"])["--linear-attention-freq"] == ("([1]*3+[0]*1)*12",)
    assert "--moe-layer-freq" not in flags_of(MIXTRAL)


def test_windows_that_hold_the_sequence_are_no_windows() -> None:
    assert "--window-size" not in flags_of(MODELS["gpt-oss-20b"], 128)
    assert "--window-size" in flags_of(MODELS["gpt-oss-20b"], 129)


@pytest.mark.parametrize("values", [[1], [0, 1], [1, 1, 0] * 4, [0] * 3 + [1] * 58, [1, 0, 0, 1, 1]])
def test_pattern_means_the_list(values: list[int]) -> None:
    assert eval(pattern(values)) == values  # Megatron evaluates it too


def test_hybrid_pattern_by_segments() -> None:
    model = MODELS["nemotron-3-nano-30b-a3b"].cut(8)
    assert hybrid_pattern(model) == "MEMEM*EM"
    assert hybrid_pattern(model, [3, 5]) == "MEM|EM*EM"
    depth = Layer(blocks=(model.layers[5].blocks[0], model.layers[1].blocks[0]))
    assert hybrid_pattern(dataclasses.replace(model, mtp=(depth, depth))) == "MEMEM*EM/*E/*E"
