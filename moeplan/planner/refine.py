"""Refining a plan: the same degrees, with layers split over the stages by what they really cost.

The search takes splits that balance FLOP. Here the seconds and bytes of each layer kind under the plan's own layout decide
(`partition.py`), and the head, the embedding and prediction layers stay where they are. A refined plan is taken only if its
price is lower, it fits, and the framework accepts it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from moeplan.costmodels.layout import Layouts
from moeplan.costmodels.memory import micro_batches
from moeplan.costmodels.peak import in_flight
from moeplan.costmodels.price import Pricing
from moeplan.costmodels.stages import format_split, rank_contents
from moeplan.planner.constraints import violations
from moeplan.planner.partition import StageProblem, split_by_milp, split_by_programme
from moeplan.planner.plan import Plan, price_plan


def refined(plans: Sequence[Plan]) -> tuple[Plan, ...]:
    """The plans with their layers split anew, the one that takes least GPU time first."""
    return tuple(sorted(map(refine, plans), key=lambda plan: plan.layout.world * plan.step_s))


def refine(plan: Plan) -> Plan:
    """The plan with the best split of its layers, or the plan itself if no other is better."""
    x, model = plan.layout, plan.problem.model
    if x.pp == 1 or x.pp * x.vpp > len(model.layers) + 1:
        return plan
    problem = stage_problem(plan)
    sizes = split_by_programme(problem) if x.vpp == 1 else split_by_milp(problem)
    if sizes is None:
        return plan
    chunks = ["t" * size for size in sizes]
    chunks[0] = "E" + chunks[0]
    chunks[-1] += "m" * len(model.mtp) + "L"
    layout = dataclasses.replace(x, stages=format_split(chunks))
    if layout.stages == x.stages or violations(plan.problem, layout):
        return plan
    gain = price_plan(plan.problem, layout)
    if gain.step_s >= plan.step_s or gain.excess_bytes > 0:
        return plan
    change = gain.step_s / plan.step_s - 1
    remark = f"layers split over the stages by their cost: {change:+.1%} against {x.stages or 'the even split'}"
    return dataclasses.replace(gain, certificate=plan.certificate, runners_up=plan.runners_up, remarks=(*plan.remarks, remark))


def stage_problem(plan: Plan) -> StageProblem:
    """The split of a plan's layers as a problem of its own; what does not move is what its stages have beside the layers."""
    asked, x = plan.problem, plan.layout
    one = Layouts.of([x])
    costs = Pricing(asked.model, asked.profile, asked.workload, one).kind_costs()
    seconds, states, saved = (table[:, 0] for table in (costs.seconds, costs.state_bytes, costs.saved_bytes))
    batches = float(micro_batches(asked.workload, one)[0])
    held = [float(in_flight(x.pp, x.vpp, rank, batches)) for rank in range(x.pp)]
    counts = rank_contents(asked.model, x.pp, x.vpp, x.stages)[:, : len(asked.model.kinds)]
    of_layer = asked.model.kind_of_layer
    return StageProblem(
        ranks=x.pp,
        chunks_per_rank=x.vpp,
        layer_s=[float(seconds[k]) for k in of_layer],
        layer_state_bytes=[float(states[k]) for k in of_layer],
        layer_saved_bytes=[float(saved[k]) for k in of_layer],
        fixed_s=[plan.stage_s[r] - float(counts[r] @ seconds) for r in range(x.pp)],
        base_bytes=[float(s.parts.total) - float(counts[s.rank] @ (states + held[s.rank] * saved)) for s in plan.stages],
        in_flight=held,
        limit_bytes=asked.peak_limit_bytes,
    )
