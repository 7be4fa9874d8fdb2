"""Published models written out by hand, one of every kind that Megatron knows."""

from __future__ import annotations

import dataclasses

from moeplan.costmodels.model import Attention, Block, LatentAttention, Layer, LinearAttention, Mamba, Mlp, Model, Moe


def _layers(count: int, mixer: Block, moe: Block, dense: Block | None = None, first: int = 0) -> tuple[Layer, ...]:
    """`count` layers of one mixer, the `first` of them dense."""
    sparse = (Layer(blocks=(mixer, moe)),) * (count - first)
    return (Layer(blocks=(mixer, dense)),) * first + sparse if dense else sparse


def _gqa(heads: int, kv_heads: int, head_dim: int = 128, **rest: object) -> Attention:
    return Attention(heads=heads, kv_heads=kv_heads, head_dim=head_dim, v_head_dim=head_dim, **rest)  # type: ignore[arg-type]


def _deepseek_v3() -> Model:
    mixer = LatentAttention(heads=128, q_rank=1536, kv_rank=512, nope_dim=128, rope_dim=64, v_dim=128)
    moe = Moe(
        experts=256, topk=8, width=2048, shared_width=2048, expert_bias=True, score="sigmoid", groups=8, group_topk=4,
        scaling=2.5, pre_softmax=True,
    )  # fmt: skip
    layers = _layers(61, mixer, moe, Mlp(width=18432), 3)
    return Model(
        name="deepseek-v3", hidden=7168, vocab=129280, layers=layers, mtp=layers[-1:], max_positions=163840, norm_eps=1e-6
    )


def _deepseek_v32() -> Model:
    base = _deepseek_v3()
    mixer = LatentAttention(
        heads=128, q_rank=1536, kv_rank=512, nope_dim=128, rope_dim=64, v_dim=128, index_heads=64, index_dim=128,
        index_topk=2048,
    )  # fmt: skip
    layers = tuple(Layer(blocks=(mixer, layer.blocks[1])) for layer in base.layers)
    return dataclasses.replace(base, name="deepseek-v3.2", layers=layers, mtp=())


def _gpt_oss() -> Model:
    moe = Moe(experts=32, topk=4, width=2880, bias=True, router_bias=True)
    layers = tuple(
        Layer(blocks=(_gqa(64, 8, 64, qkv_bias=True, out_bias=True, sinks=True, window=0 if i % 2 else 128), moe))
        for i in range(24)
    )
    return Model(
        name="gpt-oss-20b", hidden=2880, vocab=201088, layers=layers, max_positions=131072, rope_base=150000.0,
        activation="swigluoai",
    )  # fmt: skip


def _glm_air() -> Model:
    moe = Moe(experts=128, topk=8, width=1408, shared_width=1408, expert_bias=True, score="sigmoid")
    layers = _layers(46, _gqa(96, 8, qkv_bias=True), moe, Mlp(width=10944), 1)
    return Model(
        name="glm-4.5-air", hidden=4096, vocab=151552, layers=layers, mtp=layers[-1:], max_positions=131072,
        rope_base=1e6, rope_fraction=0.5,
    )  # fmt: skip


def _qwen3_next() -> Model:
    full = _gqa(16, 2, 256, qk_norm="head", gate=True)
    linear = LinearAttention(variant="gdn", key_heads=16, value_heads=32, key_dim=128, value_dim=128, conv=4)
    moe = Moe(experts=512, topk=10, width=512, shared_width=512, shared_gate=True)
    layers = tuple(Layer(blocks=(full if i % 4 == 3 else linear, moe)) for i in range(48))
    return Model(
        name="qwen3-next-80b-a3b", hidden=2048, vocab=151936, layers=layers, max_positions=262144, rope_base=1e7,
        rope_fraction=0.25, norm_eps=1e-6,
    )  # fmt: skip


def _nemotron_3() -> Model:
    moe = Moe(experts=128, topk=6, width=1856, gated=False, shared_width=3712, expert_bias=True, score="sigmoid", scaling=2.5)
    blocks: dict[str, Block] = {"M": Mamba(version=2, inner=4096, state=128, heads=64, groups=8), "*": _gqa(32, 2), "E": moe}
    layers = tuple(Layer(blocks=(blocks[c],)) for c in "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME")
    return Model(
        name="nemotron-3-nano-30b-a3b", hidden=2688, vocab=131072, layers=layers, max_positions=262144,
        activation="relu2", position="none",
    )  # fmt: skip


MODELS = {
    model.name: model
    for model in (
        _deepseek_v3(),
        _deepseek_v32(),
        Model(
            name="deepseek-v2-lite", hidden=2048, vocab=102400, max_positions=163840, norm_eps=1e-6,
            layers=_layers(
                27, LatentAttention(heads=16, q_rank=0, kv_rank=512, nope_dim=128, rope_dim=64, v_dim=128),
                Moe(experts=64, topk=6, width=1408, shared_width=2816, pre_softmax=True), Mlp(width=10944), 1,
            ),
        ),
        Model(
            name="mixtral-8x7b", hidden=4096, vocab=32000, max_positions=32768, rope_base=1e6,
            layers=_layers(32, _gqa(32, 8), Moe(experts=8, topk=2, width=14336)),
        ),
        Model(
            name="qwen3-30b-a3b", hidden=2048, vocab=151936, max_positions=40960, rope_base=1e6, norm_eps=1e-6,
            layers=_layers(48, _gqa(32, 4, qk_norm="head"), Moe(experts=128, topk=8, width=768)),
        ),
        Model(
            name="qwen2-57b-a14b", hidden=3584, vocab=151936, max_positions=32768, rope_base=1e6, norm_eps=1e-6,
            layers=_layers(
                28, _gqa(28, 4, qkv_bias=True),
                Moe(experts=64, topk=8, width=2560, shared_width=20480, shared_gate=True, pre_softmax=True),
            ),
        ),
        _gpt_oss(),
        _glm_air(),
        Model(
            name="llama3-8b", hidden=4096, vocab=128256, max_positions=8192, rope_base=500000.0,
            layers=_layers(32, _gqa(32, 8), Mlp(width=14336)),
        ),
        Model(
            name="nemotron-4-15b", hidden=6144, vocab=256000, max_positions=4096, norm="layernorm", activation="relu2",
            rope_fraction=0.5, layers=_layers(32, _gqa(48, 8), Mlp(width=24576, gated=False)),
        ),
        Model(
            name="gpt-3-175b", hidden=12288, vocab=50257, max_positions=4096, norm="layernorm", activation="gelu",
            position="learned", tied=True,
            layers=_layers(96, _gqa(96, 96, qkv_bias=True, out_bias=True), Mlp(width=49152, gated=False, bias=True)),
        ),
        _qwen3_next(),
        _nemotron_3(),
    )
}  # fmt: skip


def launch_arguments(model_flags: list[tuple[str, ...]], *extra: str) -> list[str]:
    """A whole command line around the flags of a model; later flags win."""
    words = [word for flag in model_flags for word in flag]
    rest = (
        "--tokenizer-type NullTokenizer --mock-data --seq-length 4096 --micro-batch-size 1 --global-batch-size 256 --lr 1e-4 "
        "--train-iters 10 --bf16 --use-distributed-optimizer"
    )
    if "--num-experts" in words:
        rest += " --moe-grouped-gemm --moe-token-dispatcher-type alltoall"
    return [*words, *rest.split(), *(word for text in extra for word in text.split())]
