"""The README of an elastic export: what runs on how many nodes, how to start it, what was assumed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moeplan._version import VERSION
from moeplan.exporters.base import Job
from moeplan.exporters.elastic.arguments import arguments_file
from moeplan.exporters.elastic.data import ELASTIC
from moeplan.exporters.elastic.launch import ENTRY
from moeplan.exporters.launchers.base import Launcher
from moeplan.exporters.preflight import PREFLIGHT
from moeplan.planner.elastic.elastic_plan import CountPlan, ElasticPlan
from moeplan.units import format_seconds

SURPLUS = {
    "idle": "wait in the entry script until the nodes change or the job ends",
    "reserve": "are a warm reserve of Megatron's in-process restart, which is experimental and needs nvidia-resiliency-ext",
    "exit": "are refused: the job does not start on other counts than the planned ones",
}
"""What ranks do that no layout has a place for."""


def readme_text(elastic: ElasticPlan, jobs: Sequence[Job], launchers: Sequence[Launcher], settings: Mapping[str, str]) -> str:
    """The text."""
    job, model = jobs[-1], elastic.counts[-1].plan.problem.model.name
    least, most = elastic.counts[0].nodes, elastic.counts[-1].nodes
    rows = "\n".join(map(_row, elastic.counts))
    variables = [
        f"`{v.name}`: {v.meaning}" + (f"; `{v.default}` if not set" if v.default else ", to be set by you")
        for v in job.variables
    ]
    return f"""# {model} on {least} to {most} nodes

Written by moeplan {VERSION} for Megatron-LM; class `{elastic.consistency}`. Seconds are predicted, not measured.

| nodes | train | share of time | layout | step | save every | arguments |
| --- | --- | --- | --- | --- | --- | --- |
{rows}

Goodput {elastic.goodput:.4g} samples/s in the long run; {elastic.best_single:.4g} with the best single layout.

## Start

{_list([f"`{known.file}`, {known.start}" for known in launchers])}

torchrun starts `{ENTRY}` on every rank. It looks the world size up in `{ELASTIC}` and becomes the training script
with the arguments of that count, to which those that you add on the command line are appended. A count between two planned ones
takes the layout of the lower one. Surplus ranks {SURPLUS[settings["surplus"]]}.
These variables may be set:

{_list(variables)}

`{PREFLIGHT}` compares a node with what the plans assumed; SKIP_PREFLIGHT=1 leaves it out.

## Policy

{_list(elastic.policy or ("none",))}

## What may differ between counts

{_list([f"{hazard.name}: {hazard.what}. {hazard.fix}" for hazard in elastic.hazards] or ["nothing that is known"])}

## Assumed

{_list(_assumed(elastic, settings))}
"""


def _row(count: CountPlan) -> str:
    saving = count.saving
    how = "asynchronous" if saving.asynchronous else "blocking"
    local = f", {saving.local_interval_steps} locally" if saving.local_interval_steps else ""
    cells = (
        count.nodes, count.uses, f"{count.share:.2%}", count.plan.layout.degrees(), format_seconds(count.plan.step_s),
        f"{saving.interval_steps} steps, {how}{local}", f"`{arguments_file(count)}`",
    )  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


def _assumed(elastic: ElasticPlan, settings: Mapping[str, str]) -> list[str]:
    notes = [
        "The global batch is that of the arguments on every count; a learning rate that follows it is yours to set."
        if elastic.consistency == "none"
        else "The global batch is the same on every count, and data depend on the samples consumed alone.",
        "Every node sees the directory CHECKPOINTS; training goes on from the last save there.",
        "torchrun stops all ranks when the nodes change: steps since the last save are done again, planned change or not.",
        "The node of the rendezvous stays; where it is lost, the job must be started again.",
    ]
    if elastic.reshardable:
        notes.append("Optimizer states are saved in the reshardable form, which takes longer and excludes local checkpoints.")
    if elastic.local_saves:
        notes.append(
            f"Local checkpoints go to `{settings['local_directory']}`, which outlives processes, by nvidia-resiliency-ext."
        )
    if elastic.consistency == "bitwise":
        notes.append("Deterministic mode runs without the fused cross entropy, slower than predicted.")
    return notes


def _list(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
