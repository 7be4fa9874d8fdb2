"""What a tune leaves behind: the plan that won, with what was measured, and the table of its trials.

The plan file is that of any plan, so that `explain` and `export` read it; the measured step time stands in its remarks, and
with all trials under `tune` in its provenance. Units: seconds, bytes.
"""

from __future__ import annotations

import time
from typing import Any

from moeplan.planner.measurement import called
from moeplan.planner.plan import price_plan
from moeplan.runtime.journal import Entry
from moeplan.runtime.tune import Tuned
from moeplan.units import format_seconds


def winner_data(tuned: Tuned) -> dict[str, Any] | None:
    """The fastest plan as a plan file holds it; None: none ran."""
    best = tuned.best
    if best is None or best.outcome is None:
        return None
    ran = sum(e.outcome is not None and e.outcome.kind == "done" for e in tuned.entries)
    said = (
        f"measured by moeplan tune: {format_seconds(best.outcome.step_s)} a step, the median of {best.outcome.steps}; "
        f"the fastest of {ran} plan{'s' * (ran != 1)} that ran"
    )
    problem = tuned.plan.problem
    plan = price_plan(problem, best.layout, certificate=tuned.plan.certificate, remarks=(*problem.model.remarks, said))
    data = plan.to_data()
    data["provenance"]["tune"] = {
        "when": time.strftime("%Y-%m-%d"),
        "measured_step_s": best.outcome.step_s,
        "measured_peak_bytes": best.outcome.peak_bytes,
        "ended": tuned.verdict,
        "trials": [trial_data(e) for e in sorted(tuned.entries, key=lambda e: e.trial) if e.trial],
    }
    return data


def trial_data(entry: Entry) -> dict[str, Any]:
    """A trial, or a candidate that was not tried, in plain words and numbers."""
    found = entry.outcome
    return {
        "trial": entry.trial or None,
        "layout": called(entry.layout),
        "predicted_s": round(entry.predicted_s, 6),
        "expected_s": round(entry.expected_s, 6) or None,
        "predicted_peak_bytes": round(entry.predicted_bytes),
        "outcome": found.kind if found is not None else entry.phase,
        "measured_s": round(found.step_s, 6) if found is not None and found.step_s else None,
        "measured_peak_bytes": round(found.peak_bytes) if found is not None and found.peak_bytes else None,
        "message": found.message if found is not None else entry.why,
    }
