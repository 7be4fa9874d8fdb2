"""One MoE layer of a model under a schedule of its own, priced from the profile's curves.

The parts of r chunks are what the curves say of 1/r of a rank's tokens: dispatch and combine (a each), gather and
reduce-scatter among the etp ranks (g, s), experts with their permutes (e). `costmodels/moe/` has the makespans: FSMoE's three
streams where the exchange crosses nodes, and the two streams of Tutel where it does not, since then gathers and exchange share
the links. S1 sends each row to all etp shards of its experts in one all-to-all over ep x etp ranks; its closing gather is free,
because sequence parallelism leaves every rank its own tokens. Overlap is imperfect: T + kappa (serial - T), with the profile's
kappa and the serial time of one chunk. What stays beyond the experts' own time is the exposed exchange. More chunks mean more
launches. Units: seconds, [n]. Not valid for tensor parallelism without sequence parallelism: S2 and the baselines are for that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeplan.costmodels.activations import rank_tokens, shard
from moeplan.costmodels.collectives import all_to_all_s, group
from moeplan.costmodels.constants import HOST
from moeplan.costmodels.exchange import expert_exchange_parts
from moeplan.costmodels.kernels import dense_times, routed_times, visible_host_s
from moeplan.costmodels.layout import Layouts
from moeplan.costmodels.model import Model, Moe
from moeplan.costmodels.moe.base import imperfect_s
from moeplan.costmodels.moe.fsmoe import three_stream_s
from moeplan.costmodels.moe.two_stream import two_stream_s
from moeplan.costmodels.moe_choice import BEST, CHUNKED, DEGREES, IDEAL, NAMES, MoeChoice, parse_choices
from moeplan.costmodels.routing import all_to_all_copies
from moeplan.costmodels.workload import Workload
from moeplan.profiles.profile import Profile

GATED_FIRST = 2.0 / 3.0
"""Share of a gated feed-forward that its first products take; half of a plain one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkTimes:
    """Seconds of the parts of one of `chunks` chunks, [n]."""

    chunks: int
    exchange_s: Any
    """All-to-all among ep, one way."""
    gather_s: Any
    scatter_s: Any
    fused_s: Any
    """All-to-all over ep x etp ranks to every shard, one way."""
    forward_s: Any
    """Experts and permutes."""
    backward_s: Any
    across: Any
    """Whether the exchange crosses scale-up domains."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Exposed:
    """What schedules leave exposed of the exchange, and in how many chunks they work, [n] each."""

    forward_s: Any
    backward_s: Any
    forward_chunks: Any
    backward_chunks: Any


@dataclass(frozen=True, slots=True)
class RoutedLayer:
    """One kind of MoE block under folded layouts."""

    block: Moe
    model: Model
    profile: Profile
    workload: Workload
    layouts: Layouts

    def chunk(self, chunks: int) -> ChunkTimes:
        """The parts of one of `chunks` chunks."""
        block, profile, workload = self.block, self.profile, self.workload
        part = self.layouts.with_columns(cp=self.layouts.cp * chunks)
        both, gather, scatter = expert_exchange_parts(block, self.model, profile, workload, part)
        times = routed_times(block, self.model, profile, workload, part)
        tokens = rank_tokens(workload, part) / shard(part)
        everyone = group(profile, part.ep * part.etp, 1)
        copies = all_to_all_copies(1.0, everyone.ranks, everyone.local)
        rows = 2.0 * tokens * block.active_experts * part.etp * (block.latent or self.model.hidden) * workload.imbalance
        fused = all_to_all_s(profile, rows * copies.scale_out, rows * copies.scale_up, everyone)
        return ChunkTimes(
            chunks=chunks,
            exchange_s=both / 2.0,
            gather_s=gather,
            scatter_s=scatter,
            fused_s=np.where(everyone.ranks > 1, fused, 0.0),
            forward_s=_without_router(times.forward),
            backward_s=_without_router(times.backward),
            across=group(profile, part.ep, part.etp).domains > 1,
        )


def _without_router(parts: dict[str, Any]) -> Any:
    return sum(seconds for name, seconds in parts.items() if name != "router")


def makespans(name: str, chunk: ChunkTimes, one: ChunkTimes, kappa: float) -> tuple[Any, Any]:
    """Seconds of the exchange and the experts, forward and backward, under the named schedule with chunks like `chunk`.

    `one`: all in one chunk, which is how long it takes where nothing overlaps.
    """
    count, out = chunk.chunks, []
    for experts, undivided in ((chunk.forward_s, one.forward_s), (chunk.backward_s, one.backward_s)):
        parts = {"D": chunk.exchange_s, "G": chunk.gather_s, "E": experts, "S": chunk.scatter_s, "C": chunk.exchange_s}
        if name == "s1":
            out.append(2.0 * chunk.fused_s + experts)
            continue
        if name == IDEAL:
            out.append(np.maximum(2.0 * chunk.exchange_s + chunk.gather_s + chunk.scatter_s, experts))
            continue
        two = two_stream_s(count, parts)
        whole = two if name == "tutel" else np.where(chunk.across, three_stream_s(count, parts), two)
        serial = 2.0 * one.exchange_s + one.gather_s + undivided + one.scatter_s
        out.append(imperfect_s(whole, np.maximum(serial, whole), kappa))
    return out[0], out[1]


def exposed(question: RoutedLayer, there_s: Any, back_s: Any, launches_s: Any) -> Exposed:
    """What each layout's own schedule leaves exposed; `there_s` forward and `back_s` backward where it has none.

    `launches_s`: host seconds of a forward in one chunk, [n].
    """
    n = len(question.layouts)
    forward, backward = (np.array(np.broadcast_to(plain, n)) for plain in (there_s, back_s))
    chunks_forward, chunks_backward = np.ones(n), np.ones(n)
    kind = moe_blocks(question.model).index(question.block)
    hosts = np.broadcast_to(launches_s, n)
    for code, text in enumerate(question.layouts.schedules):
        rows = np.flatnonzero(question.layouts.schedule == code)
        if not text or not len(rows):
            continue
        some = dataclasses.replace(question, layouts=question.layouts.take(rows))
        found = _best(some, hosts[rows]) if text == BEST else _chosen(some, _of_kind(parse_choices(text), kind))
        forward[rows], backward[rows] = found.forward_s, found.backward_s
        chunks_forward[rows], chunks_backward[rows] = found.forward_chunks, found.backward_chunks
    return Exposed(forward_s=forward, backward_s=backward, forward_chunks=chunks_forward, backward_chunks=chunks_backward)


def moe_blocks(model: Model) -> list[Moe]:
    """The distinct MoE blocks of a model, in the order of a layout's choices."""
    return [b for b in model.blocks if isinstance(b, Moe)]


def _of_kind(choices: Sequence[MoeChoice], kind: int) -> MoeChoice:
    return choices[kind] if kind < len(choices) else choices[-1]


def _chosen(question: RoutedLayer, choice: MoeChoice) -> Exposed:
    """What one choice leaves exposed under every layout."""
    whole, kappa = question.chunk(1), question.profile.overlap_loss
    factor = question.profile.exposed
    forward = makespans(choice.name, question.chunk(choice.forward), whole, kappa)[0] - whole.forward_s
    backward = makespans(choice.name, question.chunk(choice.backward), whole, kappa)[1] - whole.backward_s
    return Exposed(
        forward_s=factor * np.maximum(forward, 0.0),
        backward_s=factor * np.maximum(backward, 0.0),
        forward_chunks=choice.forward,
        backward_chunks=choice.backward,
    )


@dataclass(frozen=True, slots=True)
class Option:
    """One schedule with the chunks that suit each direction best, [n]."""

    name: str
    exposed: Exposed
    cost_s: Any
    """Exposed exchange and what launching the chunks lengthens, both directions."""


def options(question: RoutedLayer, launches_s: Any, names: Sequence[str] = NAMES) -> list[Option]:
    """Every schedule at its best numbers of chunks, forward and backward apart, under every layout."""
    parts = {degree: question.chunk(degree) for degree in DEGREES}
    whole, factor, kappa = parts[1], question.profile.exposed, question.profile.overlap_loss
    launches = launches_s, launches_s * HOST.backward
    out = []
    for name in names:
        degrees = DEGREES if name in CHUNKED else (1,)
        found = []
        both = zip(*(makespans(name, parts[r], whole, kappa) for r in degrees), strict=True)
        for took, experts, launch in zip(both, (whole.forward_s, whole.backward_s), launches, strict=True):
            left = [factor * np.maximum(seconds - experts, 0.0) for seconds in took]
            cost = [x + visible_host_s(experts + x, launch * r) for x, r in zip(left, degrees, strict=True)]
            # [degrees, n]
            table, costs = (np.stack(np.broadcast_arrays(*values)) for values in (left, cost))
            best = np.argmin(costs, axis=0)[None]
            found.append((*(np.take_along_axis(t, best, axis=0)[0] for t in (table, costs)), np.asarray(degrees)[best[0]]))
        (forward, forward_cost, r_forward), (backward, backward_cost, r_backward) = found
        exposed_ = Exposed(forward_s=forward, backward_s=backward, forward_chunks=r_forward, backward_chunks=r_backward)
        out.append(Option(name, exposed_, forward_cost + backward_cost))
    return out


def _best(question: RoutedLayer, launches_s: Any) -> Exposed:
    """What the quickest schedule leaves exposed under every layout."""
    found = options(question, launches_s)
    first = np.argmin(np.stack([o.cost_s for o in found]), axis=0)

    def chosen(field: str) -> Any:
        return np.choose(first, [getattr(o.exposed, field) for o in found])

    return Exposed(**{f.name: chosen(f.name) for f in dataclasses.fields(Exposed)})


def resolved(question: RoutedLayer, launches_s: Any, names: Sequence[str] = NAMES) -> MoeChoice:
    """The quickest of the named choices for the one layout of a question; FSMoE in single chunks is the plain schedule."""
    best = min(options(question, launches_s, names), key=lambda o: float(o.cost_s[0]))
    return MoeChoice(best.name, int(best.exposed.forward_chunks[0]), int(best.exposed.backward_chunks[0]))


def shared_gain_s(question: RoutedLayer) -> tuple[Any, Any]:
    """Seconds of the exchange that shared experts on a stream of their own hide, forward and backward, [n] each.

    Their first products run beside the dispatch, the last beside the combine; kappa of what would overlap does not.
    """
    asked = (question.block, question.model, question.profile, question.workload, question.layouts)
    times = dense_times(*asked)
    both, gather, scatter = expert_exchange_parts(*asked)
    there, back = both / 2.0 + gather, both / 2.0 + scatter
    kept = question.profile.exposed * (1.0 - question.profile.overlap_loss)
    first = GATED_FIRST if question.block.gated else 0.5
    forward, backward = sum(times.forward.values()), sum(times.backward.values())
    return (
        kept * (np.minimum(first * forward, there) + np.minimum((1.0 - first) * forward, back)),
        kept * (np.minimum((1.0 - first) * backward, there) + np.minimum(first * backward, back)),
    )
