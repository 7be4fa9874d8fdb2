"""Every layout of a problem by plain loops, as an oracle for the search.

Nothing here uses `planner/space.py`, `bounds.py` or `search.py`: degrees are all factors that multiply to the number of GPUs,
recompute sets are all subsets of what the model has, and each candidate is checked and priced for itself.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from moeplan.costmodels.constants import MEMORY
from moeplan.costmodels.layout import Layout, Layouts
from moeplan.costmodels.model import LatentAttention, Mlp, Model, Moe
from moeplan.costmodels.price import Pricing
from moeplan.costmodels.stages import balanced_split, parse_split
from moeplan.planner.constraints import RULES, violations
from moeplan.planner.plan import price_plan
from moeplan.planner.problem import Problem

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
    rows = Layouts.of(layouts)
    broken = [rule.broken(problem, rows) for rule in RULES]
    return [x for i, x in enumerate(layouts) if not any(b[i] for b in broken)]


class Prices:
    """All layouts of a problem that the framework takes, with step time and peak memory.

    No rule is broken by what is not recomputed, so layouts refused without recompute are refused with it.
    """

    def __init__(self, problem: Problem, **fixed: Any) -> None:
        base = accepted(problem, list(without_recompute(problem, **fixed)))
        sets, extra = recompute_sets(problem.model), inside_layers(problem)
        self.layouts = accepted(problem, [replace(x, recompute=s, **more) for x in base for s in sets for more in extra])
        pricing = Pricing(problem.model, problem.profile, problem.workload, Layouts.of(self.layouts), exact=True)
        self.step_s, self.peak_bytes = pricing.step_seconds().tolist(), pricing.peak_bytes().tolist()

    def limit(self, share: float) -> float:
        """Device bytes into which just that share of the layouts fits; the least that any needs at a share of 0."""
        needs = sorted(map(needed_bytes, self.peak_bytes))
        return needs[int(share * (len(needs) - 1))] * (1 + 1e-12)

    def best(self, device_bytes: float, keep: int, meets: Meets = lambda _: True) -> list[float]:
        """The `keep` least step times of plans that differ in degrees or micro-batch and fit."""
        rows = zip(self.layouts, self.step_s, self.peak_bytes, strict=True)
        return least(((x, s) for x, s, peak in rows if needed_bytes(peak) <= device_bytes and meets(x)), keep)


def one_by_one(problem: Problem) -> list[tuple[Layout, float, float]]:
    """All layouts that the framework takes with time and memory, each checked and priced alone, as a plan."""
    found = []
    for base in without_recompute(problem):
        if violations(problem, base):
            continue
        for names, more in itertools.product(recompute_sets(problem.model), inside_layers(problem)):
            layout = replace(base, recompute=names, **more)
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


def needed_bytes(peak: float) -> float:
    """A peak allocation with context, communicators and fragmentation."""
    return peak * (1 + MEMORY.fragmentation) + MEMORY.context_bytes + MEMORY.communicator_bytes


def identity(x: Layout) -> Identity:
    """What tells plans apart."""
    return (x.tp, x.cp, x.pp, x.vpp, x.dp, x.ep, x.etp, x.micro_batch)
