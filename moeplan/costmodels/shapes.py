"""Shapes of a model's kernels as one rank runs them, as plain data for the benches of `profiles`.

Every dense weight at tensor-parallel 1, 2, 4, 8 (n over tp where its output features are cut, k where its input features are);
the experts of a rank at the usual expert-parallel sizes with the rows that balanced routing of one micro-batch gives them; the
attention cores with heads over tp. What does not divide is left out. Counts come from `counts.block_weights`.
"""

from __future__ import annotations

from collections.abc import Iterator

from moeplan.costmodels.counts import Shard, Weight, block_weights, mtp_weights
from moeplan.costmodels.model import Attention, LatentAttention, Model, Moe
from moeplan.profiles.cases import MODEL_ROWS, AttentionShape, GemmShape, GroupedShape, ModelShapes

TENSOR_PARALLEL = (1, 2, 4, 8)
"""Ways to cut a dense weight."""
EXPERT_PARALLEL = (1, 8, 32, 64)
"""Ways to place experts."""


def model_shapes(model: Model) -> ModelShapes:
    """The distinct shapes of all blocks, prediction layers and the output head included."""
    return ModelShapes(
        name=model.name,
        gemms=tuple(dict.fromkeys(_gemms(model))),
        grouped=tuple(dict.fromkeys(_grouped(model))),
        attentions=tuple(dict.fromkeys(_attentions(model))),
    )


def _gemms(model: Model) -> Iterator[GemmShape]:
    weights = [w for block in model.blocks for w in block_weights(block, model.hidden) if not w.shard.is_expert]
    head = Weight("head", model.vocab, model.hidden, Shard.COLUMN)
    seen = set()
    for tp in TENSOR_PARALLEL:
        for weight in (*weights, *(mtp_weights(model) if model.mtp else ()), head):
            out_ways, inp_ways = (tp if weight.shard is shard else 1 for shard in (Shard.COLUMN, Shard.ROW))
            if weight.gemm and weight.out % out_ways == 0 == weight.inp % inp_ways:
                size = weight.out // out_ways, weight.inp // inp_ways
                if size not in seen:
                    seen.add(size)
                    yield GemmShape(n=size[0], k=size[1], tp=tp)


def _grouped(model: Model) -> Iterator[GroupedShape]:
    for block in model.blocks:
        if isinstance(block, Moe):
            experts = [w for w in block_weights(block, model.hidden) if w.gemm and w.shard.is_expert]
            for ep in EXPERT_PARALLEL:
                local = block.experts // ep
                if local and block.experts % ep == 0:
                    rows = max(1, round(MODEL_ROWS * block.active_experts / local))
                    for weight in experts:
                        yield GroupedShape(groups=local, m=rows, n=weight.out, k=weight.inp)


def _attentions(model: Model) -> Iterator[AttentionShape]:
    for tp in TENSOR_PARALLEL:
        for block in model.blocks:
            if isinstance(block, LatentAttention):
                qk_dim, v_dim, kv_heads = block.nope_dim + block.rope_dim, block.v_dim, block.heads
            elif isinstance(block, Attention):
                qk_dim, v_dim, kv_heads = block.head_dim, block.v_head_dim, block.kv_heads
            else:
                continue
            # A rank has at least one key / value head: beyond their number they are copied.
            if block.heads % tp == 0 and (kv_heads % tp == 0 or tp % kv_heads == 0):
                yield AttentionShape(
                    heads=block.heads // tp, kv_heads=max(1, kv_heads // tp), qk_dim=qk_dim, v_dim=v_dim, tp=tp
                )
