"""The README of an export: what was planned, how to start it, what was assumed."""

from __future__ import annotations

from collections.abc import Sequence

from moeplan._version import VERSION
from moeplan.exporters.base import Exporter, Job
from moeplan.exporters.launchers.base import Launcher
from moeplan.exporters.neutral import PLAN
from moeplan.exporters.preflight import PREFLIGHT
from moeplan.planner.plan import Plan
from moeplan.units import format_bytes, format_seconds

README = "README.md"
"""Name of the file."""


def readme_text(plan: Plan, exporter: Exporter, version: str, job: Job | None, launchers: Sequence[Launcher]) -> str:
    """The text."""
    problem, x, workload = plan.problem, plan.layout, plan.problem.workload
    cluster = problem.profile.cluster
    target = f"{exporter.title} {version}" if version else exporter.title
    scaled = [name for name, origin in problem.profile.origins.items() if not origin.measured]
    assumed = [
        *exporter.notes(plan, version),
        f"Routing imbalance {workload.imbalance:g} (1: none), capacity factor {workload.capacity_factor:g} (0: no drops).",
        f"{len(scaled)} of {len(problem.profile.origins)} curves were not measured on {cluster.device.name} but scaled.",
        "Host memory, file systems and network health are not checked.",
    ]
    return f"""# {problem.model.name} on {cluster.name}

Written by moeplan {VERSION} for {target}.

- Layout: {x.degrees()}, micro-batch {x.micro_batch}, recompute {x.recompute_text()}, dispatcher {x.dispatcher}
- Ranks: {x.world} on {cluster.nodes} node(s)
- Workload: {workload.global_batch} sequences of {workload.seq_len} tokens, {workload.precision.name}, era {workload.era.name}
- Predicted step: {format_seconds(plan.step_s)} (80 % of runs: {format_seconds(plan.low_s)} to {format_seconds(plan.high_s)})
- Predicted peak memory: {format_bytes(plan.peak_bytes)} on stage {plan.fullest.rank}, of {format_bytes(problem.device_bytes)}

{_start(job, launchers)}`{PLAN}` holds the plan for programs. `{PREFLIGHT}` compares a node with what the plan assumed (GPUs,
adapters, libraries); {"launch files run it first, SKIP_PREFLIGHT=1 leaves it out" if job else "run it before training"}.

## Assumed

{_list(assumed)}

## Remarks

{_list(plan.remarks or ["none"])}
"""


def _start(job: Job | None, launchers: Sequence[Launcher]) -> str:
    if job is None:
        return "## Files\n\n"
    variables = [
        f"`{v.name}`: {v.meaning}" + (f"; `{v.default}` if not set" if v.default else ", to be set by you")
        for v in job.variables
    ]
    return f"""## Start

{_list([f"`{known.file}`, {known.start}" for known in launchers])}

Arguments that you add on the command line of a script override those of `{job.arguments_file}`, which also holds the
environment that they require. These variables may be set:

{_list(variables)}

## Required environment

{_list([f"`{name}={value}`" for name, value in job.environment.items()])}

## Files

"""


def _list(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
