"""Every layout of a problem by plain loops, as an oracle for the search.

Nothing here uses `planner/space.py`, `bounds.py` or `search.py`: degrees are all factors that multiply to the number of GPUs,
recompute sets are all subsets of what the model has, whole layers in any number of layers of a chunk, and each candidate is
checked and priced for itself, with each share of the optimizer on the host.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from moeplan.costmodels.constants import MEMORY
from moeplan.costmodels.layout import Layout, Layouts
from moeplan.costmodels.model import LatentAttention, Mlp, Model, Moe
from moeplan.costmodels.price import Pricing
from moeplan.costmodels.stages import balanced_split, parse_split
from moeplan.planner.constraints import RULES, violations
from moeplan.planner.plan import price_plan
from moeplan.planner.problem import Problem

SHARES = (0.0, 0.5, 1.0)
"""Shares of the optimizer that are offloaded here; the search counts in hundredths unless it is told."""

Identity = tuple[int, ...]
Meets = Callable[[Layout], bool]


def factors(n: int, count: int) -> list[tuple[int, ...]]:
    """Every way to write `n` as an ordered product of `count` whole numbers."""
    if count == 1:
        return [(n,)]
    return [(a, *rest) for a in range(1, n + 1) if n % a == 0 for rest in factors(n // a, count - 1)]


def splits(problem: Problem, chunks: int) -> list[str]:
    """The even split, and the balanced one where it is another."""
    layers = len(problem.model.layers)
    if chunks > layers + 2:
        return [""]
    balanced = balanced_split(problem.model, problem.workload.seq_len, chunks)
    even = ["t" * (layers // chunks)] * chunks
    even[0] = "E" + even[0]
    even[-1] += "m" * len(problem.model.mtp) + "L"
    return [""] if layers % chunks == 0 and parse_split(balanced) == tuple(even) else ["", balanced]


def recompute_sets(model: Model) -> list[tuple[str, ...]]:
    """Every subset of the modules that the model has (fused attention has no scores to recompute), and whole layers."""
    has = {
        "layernorm": any(isinstance(b, (Moe, LatentAttention)) for b in model.blocks),
        "mla_up_proj": any(isinstance(b, LatentAttention) for b in model.blocks),
        "mlp": any(isinstance(b, Mlp) for b in model.blocks),
        "moe": model.moe is not None,
        "moe_act": model.moe is not None,
        "shared_experts": model.moe is not None and model.moe.shared_width > 0,
    }
    names = [name for name, there in has.items() if there]
    subsets = [c for n in range(len(names) + 1) for c in itertools.combinations(names, n)]
    return [*subsets, ("full",)]


def recomputes(problem: Problem) -> list[dict[str, Any]]:
    """Every set of modules in all layers, and whole layers in fewer."""
    some = [{"recompute": ("full",), "recompute_layers": str(k)} for k in range(1, len(problem.model.layers) + 1)]
    return [*({"recompute": names} for names in recompute_sets(problem.model)), *some]


def features(problem: Problem) -> list[dict[str, Any]]:
    """Dispatchers and overlaps that the software era offers; tensor overlap for dense models."""
    if problem.model.moe is None:
        return [{"tp_overlap": tp} for tp in (False, True)]
    era = problem.workload.era
    overlaps = (False, True) if era.ep_overlap else (False,)
    return [{"dispatcher": d, "ep_overlap": overlap} for d in era.dispatchers for overlap in overlaps]


def inside_layers(problem: Problem) -> list[dict[str, Any]]:
    """How MoE layers can run beside dispatcher and expert overlap: shared experts apart, and for research every schedule."""
    out: list[dict[str, Any]] = [{}]
    if problem.model.moe is not None and problem.model.moe.shared_width:
        out.append({"shared_overlap": True})
    if problem.target == "research" and problem.model.moe is not None:
        out += [{"moe_schedule": f"fsmoe {f}/{b}"} for f in (1, 2, 4, 8) for b in (1, 2, 4, 8)]
        out += [{"moe_schedule": text} for text in ("s1", "tutel 2/2", "tutel 4/8")]
    return out


def without_recompute(problem: Problem, **fixed: Any) -> Iterator[Layout]:
    """Every layout that the degree identities allow, nothing recomputed; `fixed` are fields that all have."""
    world, batch, layers = problem.profile.cluster.gpus, problem.workload.global_batch, len(problem.model.layers)
    for tp, cp, dp, pp in factors(world, 4):
        experts = factors(tp * cp * dp, 3) if problem.model.moe is not None else [(1, 1, tp * cp * dp)]
        for etp, ep, edp in experts:
            for vpp in range(1, layers + 3):
                for stages in splits(problem, pp * vpp):
                    for micro in (m for m in range(1, batch + 1) if batch % m == 0):
                        for chosen in features(problem):
                            values = {"sequence_parallel": tp > 1, **chosen, **fixed}
                            yield Layout(
                                tp=tp, cp=cp, pp=pp, vpp=vpp, dp=dp, ep=ep, etp=etp, edp=edp, micro_batch=micro,
                                stages=stages, **values,
                            )  # fmt: skip


def size_of_space(problem: Problem) -> int:
    """Layouts before any rule: degrees, virtual stages with two splits each, micro-batches, features; one recompute set."""
    world, batch = problem.profile.cluster.gpus, problem.workload.global_batch
    grids = sum(len(factors(tp * cp * dp, 3)) if problem.model.moe is not None else 1 for tp, cp, dp, _ in factors(world, 4))
    micro = sum(batch % m == 0 for m in range(1, batch + 1))
    open_schedules = len(problem.workload.era.dispatchers) if problem.target == "research" else 0
    return grids * 2 * (len(problem.model.layers) + 2) * micro * (len(features(problem)) + open_schedules)


def accepted(problem: Problem, layouts: list[Layout]) -> list[Layout]:
    """Those that break no rule."""
    if not layouts:
        return []
    broken = broken_by(problem, Layouts.of(layouts))
    return [x for x, no in zip(layouts, broken, strict=True) if not no]


def broken_by(problem: Problem, rows: Layouts) -> Any:
    """Whether each layout breaks a rule."""
    return functools.reduce(np.logical_or, [rule.broken(problem, rows) for rule in RULES])


class Prices:
    """All layouts of a problem that the framework takes, with step time and peak memory.

    No rule is broken by what is not recomputed, so layouts refused without recompute are refused with it. An offload changes
    the optimizer's time and the states alone.
    """

    def __init__(self, problem: Problem, **fixed: Any) -> None:
        base = accepted(problem, list(without_recompute(problem, **fixed)))
        sets, extra = recomputes(problem), inside_layers(problem)
        self.layouts = accepted(problem, [replace(x, **s, **more) for x in base for s in sets for more in extra])
        rows = Layouts.of(self.layouts)
        pricing = Pricing(problem.model, problem.profile, problem.workload, rows, exact=True)
        step_s, peak = pricing.step_seconds(), pricing.peak_bytes()
        self.step_s, self.peak_bytes = step_s.tolist(), peak.tolist()
        given = problem.model, problem.profile, problem.workload
        self.offloaded: list[tuple[Any, Any]] = []
        for share in SHARES[1:] if "optimizer_offload" not in fixed else ():
            moved = rows.with_columns(optimizer_offload=np.full(len(rows), share))
            at, before = Pricing(*given, moved), Pricing(*given, rows).step_seconds()
            fits = np.where(broken_by(problem, moved), np.inf, at.peak_bytes())
            self.offloaded.append((step_s + at.step_seconds() - before, fits))

    def limit(self, share: float) -> float:
        """Device bytes into which just that share of the layouts fits without offload; the least that any needs at 0."""
        needs = sorted(map(needed_bytes, self.peak_bytes))
        return needs[int(share * (len(needs) - 1))] * (1 + 1e-12)

    @property
    def least_bytes(self) -> Any:
        """The least device bytes that each layout needs, with whatever share of the optimizer on the host."""
        return needed_bytes(np.min([self.peak_bytes, *(p for _, p in self.offloaded)], axis=0))

    def best(self, device_bytes: float, keep: int, meets: Meets = lambda _: True) -> list[float]:
        """The `keep` least step times of plans that differ in degrees or micro-batch and fit."""
        step_s, peaks = (np.stack(rows) for rows in zip((self.step_s, self.peak_bytes), *self.offloaded, strict=True))
        step_s = np.where(needed_bytes(peaks) <= device_bytes, step_s, np.inf)
        best: dict[Identity, float] = {}
        for place in np.argsort(step_s, axis=None):
            share, i = divmod(int(place), len(self.layouts))
            x = self.layouts[i]
            if len(best) == keep or step_s[share, i] == np.inf:
                break
            if identity(x) not in best and meets(replace(x, optimizer_offload=SHARES[share]) if share else x):
                best[identity(x)] = float(step_s[share, i])
        return list(best.values())


def one_by_one(problem: Problem) -> list[tuple[Layout, float, float]]:
    """All layouts that the framework takes with time and memory, each checked and priced alone, as a plan."""
    found = []
    for base in without_recompute(problem):
        if violations(problem, base):
            continue
        for some, more, share in itertools.product(recomputes(problem), inside_layers(problem), SHARES[::2]):
            layout = replace(base, optimizer_offload=share, **some, **more)
            if not violations(problem, layout):
                plan = price_plan(problem, layout)
                found.append((layout, plan.step_s, plan.peak_bytes))
    return found


def least(found: Any, keep: int) -> list[float]:
    """The `keep` least times of pairs of layout and time, one for each plan."""
    best: dict[Identity, float] = {}
    for layout, step_s in found:
        best[identity(layout)] = min(step_s, best.get(identity(layout), step_s))
    return sorted(best.values())[:keep]


def needed_bytes(peak: Any) -> Any:
    """A peak allocation with context, communicators and fragmentation."""
    return peak * (1 + MEMORY.fragmentation) + MEMORY.context_bytes + MEMORY.communicator_bytes


def identity(x: Layout) -> Identity:
    """What tells plans apart."""
    return (x.tp, x.cp, x.pp, x.vpp, x.dp, x.ep, x.etp, x.micro_batch)
