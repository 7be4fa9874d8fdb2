"""What may be behind a large error, found by rule: nothing here is a diagnosis, all of it is a place to look at.

The largest parts of the predicted step, inputs that the source does not give, curves scaled from another device, doubts that
the source itself notes, and other measurements of the same layout.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from benchmarks.accuracy.rows import Result
from moeplan.planner.estimate import profile_of

MATTERING = 0.15
"""Share of the step from which a part is named."""
DIFFERENCE = 0.10
"""Difference between measurements of one layout that is worth a word."""
_DOUBTS = (
    r"typo|assumed|probably|differs|no matching|next release|real (SFT|C4|data|training)|not forced|not printed|not stated"
)
_HARMLESS = ("offload",)
"""Assumptions that hardly ever matter."""


def worst(results: Sequence[Result], count: int = 10) -> list[Result]:
    """The results with the largest |log(predicted / measured)|, worst first."""
    return sorted(results, key=lambda r: -abs(np.log(r.predicted_s / r.measured_s)))[:count]


def suspicions(result: Result, everyone: Sequence[Result]) -> list[str]:
    """What is suspected of one row."""
    found = [_parts(result), _assumed(result), _scaled(result), _doubts(result), _elsewhere(result, everyone)]
    return [text for text in found if text]


def _parts(result: Result) -> str:
    assert result.priced.cost is not None
    shares = sorted(result.priced.cost.shares().items(), key=lambda item: -item[1])[:3]
    named = [
        f"{100 * share:.0f} % {name.split('/', 1)[-1]}" for i, (name, share) in enumerate(shares) if not i or share >= MATTERING
    ]
    return "mostly " + ", ".join(named)


def _assumed(result: Result) -> str:
    """Blank cells that a default stands for."""
    remarks = [r.split(":")[0] for r in result.run.remarks if "assumed" in r]
    names = [name for name in remarks if name not in _HARMLESS]
    return f"assumed: {', '.join(names)}" if names else ""


def _scaled(result: Result) -> str:
    """Curves that were not measured on the device."""
    origins = profile_of(result.run.cluster).origins
    wanted = [f"gemm/{result.run.workload.precision.gemm}"]
    if result.run.model.moe is not None:
        wanted.append(f"grouped_gemm/{result.run.workload.precision.gemm}")
    scaled = [f"{key} of {origins[key].device}" for key in wanted if key in origins and not origins[key].measured]
    return f"scaled curve: {', '.join(scaled)}" if scaled else ""


def _doubts(result: Result) -> str:
    """What the source's own notes leave open."""
    notes = re.split(r";\s*", result.row.get("notes", ""))
    doubts = [n.strip() for n in notes if re.search(_DOUBTS, n, re.IGNORECASE)]
    return f"source: {'; '.join(doubts)}" if doubts else ""


def _elsewhere(result: Result, everyone: Sequence[Result]) -> str:
    """Other measurements of the same model, devices, batch and degrees, where they differ."""
    others = [r.measured_s for r in everyone if r is not result and same_question(r, result)]
    if not others or max(abs(s / result.measured_s - 1.0) for s in others) < DIFFERENCE:
        return ""
    low, high = min(others), max(others)
    seconds = f"{low:.3g}" if high / low < 1.01 else f"{low:.3g} to {high:.3g}"
    return f"same degrees measured elsewhere: {seconds} s"


def same_question(one: Result, other: Result) -> bool:
    """Whether two rows ran the same model with the same degrees on the same devices."""

    def question(r: Result) -> tuple[object, ...]:
        run = r.run
        work, lay = run.workload, run.layout
        sizes = (work.seq_len, work.global_batch, work.precision.name)
        return (run.model.name, run.cluster.device.name, run.cluster.gpus, *sizes, lay.tp, lay.cp, lay.pp, lay.ep, lay.sharding)

    return question(one) == question(other)
