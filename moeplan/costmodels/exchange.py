"""Communication inside one layer: tensor-, context- and expert-parallel, for one micro-batch of one rank.

Tensor parallelism with sequence sharding gathers a block's input and scatters its output, and in the backward pass gathers
the output's gradient, scatters the input's and gathers the input again for the weight gradient (arXiv:2205.05198). Context
parallelism passes keys and values around a ring while attention works on the block at hand (arXiv:2310.01889). Expert
parallelism dispatches tokens to experts and combines them, once in each direction. Each function gives what stays exposed
after the overlap that the layout's features allow; the shares are in `constants.py`. Units: seconds, [n].
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moeplan.costmodels.activations import rank_tokens, shard
from moeplan.costmodels.collectives import all_gather_s, all_reduce_s, all_to_all_s, group, reduce_scatter_s
from moeplan.costmodels.constants import OVERLAP
from moeplan.costmodels.kernels import PassTimes
from moeplan.costmodels.layout import Layouts
from moeplan.costmodels.model import Attention, Block, LatentAttention, Model, Moe
from moeplan.costmodels.routing import all_to_all_copies, deduplicated_copies
from moeplan.costmodels.workload import Workload
from moeplan.profiles.profile import Profile

RING_JOIN_BYTES = 10.0
"""Bytes per output element to join one ring step: read its bf16 output, rescale and add to the fp32 sum (read and write)."""


def tensor_exchange(block: Block, model: Model, profile: Profile, workload: Workload, layouts: Layouts) -> PassTimes:
    """Exposed tensor-parallel communication of one block; routed experts have none of their own here."""
    out = PassTimes()
    if isinstance(block, Moe) and not block.shared_width:
        return out
    where = group(profile, layouts.tp, 1)
    width = model.hidden
    if isinstance(block, LatentAttention):  # the compressed queries and keys are gathered, not the hidden state
        width = (block.q_rank or model.hidden) + block.kv_rank + block.rope_dim
    buffer = 2.0 * rank_tokens(workload, layouts)
    gathered, scattered = buffer * width, buffer * model.hidden
    into, back = all_gather_s(profile, gathered, where), reduce_scatter_s(profile, scattered, where)
    forward = into + back
    backward = all_gather_s(profile, scattered, where) + reduce_scatter_s(profile, gathered, where) + into
    reduced = all_reduce_s(profile, scattered, where)
    exposed = profile.exposed * np.where(layouts.tp_overlap, OVERLAP.tensor_exposed, 1.0) * (layouts.tp > 1)
    out.add(
        "tensor-parallel exchange",
        exposed * np.where(layouts.sequence_parallel, forward, reduced),
        exposed * np.where(layouts.sequence_parallel, backward, reduced),
    )
    return out


def exchanges_heads(block: Attention, seq_len: int) -> bool:
    """Whether context parallelism exchanges heads by an all-to-all: Transformer Engine has no ring for windows and sinks."""
    return block.sinks or 0 < block.window < seq_len


def context_exchange(
    block: Block, profile: Profile, workload: Workload, layouts: Layouts, core_forward: Any, core_backward: Any
) -> PassTimes:
    """What context parallelism costs beside the attention core, given the core's own seconds.

    A ring: each of cp - 1 further steps launches its kernels, joins its output to what is there, and waits for keys and values
    that the step before did not hide. An all-to-all: queries, keys and values give up their share of the sequence for a share
    of the heads before the core, the output takes it back after, and nothing hides either.
    """
    out = PassTimes()
    if isinstance(block, Attention) and exchanges_heads(block, workload.seq_len):
        once = _head_exchange_s(block, profile, workload, layouts)
        out.add("context-parallel exchange", once, once)
        return out
    match block:
        case Attention():
            width: Any = _key_value_width(block, layouts)
            curve, joined = profile.attention(block.head_dim, block.v_head_dim), block.heads * block.v_head_dim
        case LatentAttention():
            width = block.key_value_size / layouts.tp
            curve, joined = profile.attention(block.nope_dim + block.rope_dim, block.v_dim), block.heads * block.v_dim
        case _:  # linear attention and Mamba pass only a small recurrent state on
            return out
    where = group(profile, layouts.cp, layouts.tp)
    rate = np.where(where.domains > 1, profile.scale_out_bytes_per_s, profile.scale_up_bytes_per_s)
    step = 2.0 * rank_tokens(workload, layouts) * width / rate
    join = curve.launch_s + profile.stream_s(RING_JOIN_BYTES * rank_tokens(workload, layouts) * joined / layouts.tp)
    forward = join + profile.exposed * np.maximum(step - core_forward / layouts.cp, 0.0)
    backward = join + profile.exposed * np.maximum(2.0 * step - core_backward / layouts.cp, 0.0)
    out.add("context-parallel exchange", (layouts.cp - 1) * forward, (layouts.cp - 1) * backward)
    return out


def _key_value_width(block: Attention, layouts: Layouts) -> Any:
    """Key and value elements of a token on a rank; a rank holds at least one head of them."""
    return np.maximum(block.kv_heads / layouts.tp, 1.0) * (block.head_dim + block.v_head_dim)


def _head_exchange_s(block: Attention, profile: Profile, workload: Workload, layouts: Layouts) -> Any:
    """Seconds of an all-to-all of queries, keys and values and one of the output."""
    where = group(profile, layouts.cp, layouts.tp)
    before = block.heads * block.head_dim / layouts.tp + _key_value_width(block, layouts)
    after = block.heads * block.v_head_dim / layouts.tp
    copies = all_to_all_copies(1.0, where.ranks, where.local)  # every element goes to one rank
    seconds: Any = 0.0
    for width in (before, after):
        buffer = 2.0 * rank_tokens(workload, layouts) * width
        seconds = seconds + all_to_all_s(profile, buffer * copies.scale_out, buffer * copies.scale_up, where)
    return profile.exposed * np.where(layouts.cp > 1, seconds, 0.0)


def exposed_expert_exchange_s(block: Moe, model: Model, profile: Profile, workload: Workload, layouts: Layouts) -> Any:
    """Exposed seconds of dispatch and combine of routed experts in each direction, without a schedule of their own."""
    full = expert_exchange_s(block, model, profile, workload, layouts)
    return profile.exposed * np.where(layouts.ep_overlap, OVERLAP.expert_exposed, 1.0) * full


def expert_exchange_s(block: Moe, model: Model, profile: Profile, workload: Workload, layouts: Layouts) -> Any:
    """Seconds of one dispatch and one combine without any overlap."""
    exchange, gather, scatter = expert_exchange_parts(block, model, profile, workload, layouts)
    return exchange + gather + scatter


def expert_exchange_parts(
    block: Moe, model: Model, profile: Profile, workload: Workload, layouts: Layouts
) -> tuple[Any, Any, Any]:
    """Seconds of a dispatch and a combine among ep, of the gather of the rows among etp, and of the scatter of their sums."""
    tokens = rank_tokens(workload, layouts) / shard(layouts)
    inner, topk = block.latent or model.hidden, block.active_experts
    token_bytes = 2.0 * tokens * inner * workload.imbalance
    where = group(profile, layouts.ep, layouts.etp)
    plain = all_to_all_copies(topk, where.ranks, where.local)
    once = deduplicated_copies(topk, where.ranks, where.local, block.groups, block.group_topk)
    alltoall = 2.0 * all_to_all_s(profile, token_bytes * plain.scale_out, token_bytes * plain.scale_up, where)
    both = group(profile, layouts.ep * layouts.etp, 1)
    everywhere = 2.0 * tokens * inner * layouts.ep * layouts.etp
    gathered = all_gather_s(profile, everywhere, both) + reduce_scatter_s(profile, everywhere, both)
    gathers = layouts.dispatches_with("allgather")  # over all ep * etp ranks at once
    seconds = np.where(gathers, gathered, alltoall)
    for library in ("deepep", "hybridep"):
        fast = profile.dispatch_s(library, token_bytes * once.scale_up, token_bytes * once.scale_out, tokens)
        seconds = np.where(layouts.dispatches_with(library), fast, seconds)
    # Experts cut over etp ranks gather the rows of all of them, and scatter their sums.
    rows = 2.0 * tokens * topk * inner * layouts.etp * workload.imbalance
    lanes = group(profile, layouts.etp, 1)
    shared = ~gathers & (layouts.etp > 1)
    return (
        seconds * ((gathers | (layouts.ep > 1)) & (layouts.ep * layouts.etp > 1)),
        all_gather_s(profile, rows, lanes) * shared,
        reduce_scatter_s(profile, rows, lanes) * shared,
    )
