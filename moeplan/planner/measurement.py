"""What to measure in order to tell two plans apart.

The kind of part that adds most to the uncertainty of their difference, as a microbenchmark: the operation, with its shape or
group and the size of its message, as each of the two layouts has it. Where nothing but the floor is left, the plans themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from moeplan.costmodels.activations import rank_tokens, routed_rows, shard
from moeplan.costmodels.collectives import group
from moeplan.costmodels.counts import Shard, Weight, block_weights, scan_channels
from moeplan.costmodels.layout import Layout, Layouts
from moeplan.costmodels.memory import mean_parameters, micro_batches
from moeplan.costmodels.model import Attention, Block, LatentAttention, LinearAttention, Mamba
from moeplan.planner.problem import Problem
from moeplan.units import format_bytes, format_count

REPEAT = "repeat"
"""Kind of a measurement where no part stands out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """What would tell two plans apart."""

    kind: str
    """Kind of part, see `moeplan.costmodels.uncertainty.KINDS`, or "repeat"."""
    run: str
    """What to run, in words."""
    against: str
    """The other plan, by degrees and micro-batch."""
    share: float
    """Share of the variance of the difference that it takes away."""


def measurement(problem: Problem, first: Layout, second: Layout, variances: Mapping[str, float], floor: float) -> Measurement:
    """The most telling measurement, given what each kind adds to the variance of the difference beside `floor`."""
    kind = max(variances, key=lambda name: variances[name])
    whole = sum(variances.values()) + floor
    if variances[kind] < floor:
        run = f"run both plans for some fifty steps on the same {first.world} GPUs; no microbenchmark tells them apart"
        return Measurement(kind=REPEAT, run=run, against=called(second), share=round(floor / whole, 3))
    name, say = _CASES[kind]
    cases = dict.fromkeys(say(_Case(problem, layout)) for layout in (first, second))
    cases.pop("", None)
    run = f"measure {name}" + (f": {'; and '.join(cases)}" if cases else "")
    return Measurement(kind=kind, run=run, against=called(second), share=round(variances[kind] / whole, 3))


def called(layout: Layout) -> str:
    """A layout in a few words."""
    return f"{layout.degrees()}, micro-batch {layout.micro_batch}"


class _Case:
    """Sizes of one layout's operations."""

    def __init__(self, problem: Problem, layout: Layout) -> None:
        self.problem, self.x, self.model, self.workload = problem, layout, problem.model, problem.workload
        self.one = Layouts.of([layout])
        self.tokens = float(rank_tokens(self.workload, self.one)[0])
        self.own_tokens = self.tokens / float(shard(self.one)[0])
        """Tokens of a tensor-parallel rank where they are sharded."""

    def blocks(self) -> list[Block]:
        """Blocks of all layer kinds."""
        return [block for layer in self.model.kinds for block in layer.blocks]

    def largest(self) -> Weight:
        """The dense weight with most elements."""
        weights = (w for b in self.blocks() for w in block_weights(b, self.model.hidden) if w.gemm and not w.shard.is_expert)
        return max(weights, key=lambda w: w.out * w.inp)

    def local(self, ranks: int, stride: int) -> int:
        """Ranks of a group in one scale-up domain."""
        return int(group(self.problem.profile, ranks, stride).local)


def _dense_gemm(c: _Case) -> str:
    w = c.largest()
    out = w.out / (c.x.tp if w.shard is Shard.COLUMN else 1)
    inp = w.inp / (c.x.tp if w.shard is Shard.ROW else 1)
    return f"{c.tokens:g} x {inp:g} by {inp:g} x {out:g} in {c.workload.precision.name}, forward and both gradients"


def _attention(c: _Case) -> str:
    block = next((b for b in c.blocks() if isinstance(b, (Attention, LatentAttention))), None)
    if block is None:
        return ""
    size = block.nope_dim + block.rope_dim if isinstance(block, LatentAttention) else block.head_dim
    sequences = c.tokens * c.x.cp / c.workload.seq_len
    return (
        f"{sequences:g} x {c.workload.attended_len} tokens, {block.heads / c.x.tp:g} heads of {size}"
        + (f", over {c.x.cp} ranks" if c.x.cp > 1 else "")
        + ", forward and backward"
    )


def _scan(c: _Case) -> str:
    block = next((b for b in c.blocks() if isinstance(b, (Mamba, LinearAttention))), None)
    return "" if block is None else f"{c.tokens:g} tokens of {scan_channels(block, c.model.hidden) / c.x.tp:g} channels"


def _expert_gemm(c: _Case) -> str:
    block = c.model.moe
    if block is None:
        return ""
    local, width = block.experts / c.x.ep, block.width / c.x.etp * (2 if block.gated else 1)
    rows = float(routed_rows(block, c.workload, c.one)[0]) / local
    inner = block.latent or c.model.hidden
    return (
        f"{local:g} groups of {rows:.4g} x {inner} by {inner} x {width:g} in {c.workload.precision.name}, "
        "forward and both gradients"
    )


def _permute(c: _Case) -> str:
    block = c.model.moe
    if block is None:
        return ""
    return f"{float(routed_rows(block, c.workload, c.one)[0]):.5g} rows of {block.latent or c.model.hidden} elements"


def _expert_exchange(c: _Case) -> str:
    block, x = c.model.moe, c.x
    if block is None or x.ep * x.etp == 1:
        return ""
    inner = block.latent or c.model.hidden
    where = f"over {x.ep} ranks, {c.local(x.ep, x.etp)} of them in a scale-up domain"
    lanes = f", experts cut over {x.etp}" if x.etp > 1 else ""
    message = f"{c.own_tokens:g} tokens of {inner} elements ({format_bytes(2.0 * c.own_tokens * inner)} in bf16)"
    return f"{x.dispatcher} {where}{lanes}, {message} to {block.active_experts:g} experts each"


def _tensor_exchange(c: _Case) -> str:
    if c.x.tp == 1:
        return ""
    under = " under a running GEMM" if c.x.tp_overlap else ""
    return f"{format_bytes(2.0 * c.tokens * c.model.hidden)} over {c.x.tp} ranks{under}"


def _context_exchange(c: _Case) -> str:
    return "" if c.x.cp == 1 else f"{c.tokens:g} tokens a rank around {c.x.cp} ranks"


def _data_exchange(c: _Case) -> str:
    held = mean_parameters(c.model, c.one)
    grids = [(c.x.dp * c.x.cp, float(held.dense[0]))]
    if c.model.moe is not None:
        grids.append((c.x.edp, float(held.expert[0])))
    said = [f"{format_bytes(c.workload.gradient_bytes * n)} of gradients over {ranks} ranks" for ranks, n in grids if ranks > 1]
    return " and ".join(said)


def _sends(c: _Case) -> str:
    return "" if c.x.pp == 1 else f"{format_bytes(2.0 * c.own_tokens * c.model.hidden)} to the next of {c.x.pp} stages"


def _element_wise(c: _Case) -> str:
    return f"{c.own_tokens:g} tokens of {c.model.hidden} elements"


def _recompute(c: _Case) -> str:
    return f"{'+'.join(c.x.recompute)} for {c.tokens:g} tokens" if c.x.recompute else ""


def _bubble(c: _Case) -> str:
    if c.x.pp == 1:
        return ""
    batches = float(micro_batches(c.workload, c.one)[0])
    return f"{c.x.pp} stages of {c.x.vpp} chunks with {batches:g} micro-batches"


def _once(c: _Case) -> str:
    held = mean_parameters(c.model, c.one)
    return f"{format_count(float(held.dense[0]) + float(held.expert[0]))} parameters a rank over {c.x.dp * c.x.cp} ranks"


def _host(c: _Case) -> str:
    covered = "+".join(c.x.cuda_graphs)
    return f"one layer on a {c.problem.profile.cluster.device.host} host" + (f", CUDA graphs over {covered}" if covered else "")


_CASES: Mapping[str, tuple[str, Callable[[_Case], str]]] = {
    "dense GEMM": ("the dense GEMM", _dense_gemm),
    "attention core": ("attention", _attention),
    "state scan": ("the state scan", _scan),
    "expert GEMM": ("the grouped GEMM of the experts", _expert_gemm),
    "element-wise": ("norm and gated activation", _element_wise),
    "permute": ("permute and un-permute", _permute),
    "expert all-to-all": ("the expert all-to-all, dispatch and combine", _expert_exchange),
    "tensor-parallel exchange": ("all-gather and reduce-scatter", _tensor_exchange),
    "context-parallel exchange": ("the ring of keys and values", _context_exchange),
    "host launches": ("the time in which the host launches the kernels", _host),
    "recompute": ("the forward of what is recomputed", _recompute),
    "pipeline bubble": ("the idle time of the pipeline", _bubble),
    "pipeline sends": ("a send", _sends),
    "data-parallel exchange": ("reduce-scatter and all-gather behind a backward pass", _data_exchange),
    "once a step": ("the optimizer step", _once),
}
"""How each kind of part is measured, and its size under a layout; no size: the layout has no such part."""
