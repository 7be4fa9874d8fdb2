"""The check that every export carries: are the nodes what the plan assumed?

`expectations` says what a plan assumed of a node; it stands in `plan.json`. `preflight.py` in an export is a copy of
`preflight_script.py`, which compares it with the node that it runs on, before the expensive job starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from moeplan.planner.plan import Plan
from moeplan.units import GB

PREFLIGHT = "preflight.py"
"""Name of the script in an export."""


def expectations(plan: Plan, requirements: Sequence[str]) -> dict[str, Any]:
    """What a plan assumes of each node."""
    cluster = plan.problem.profile.cluster
    device = cluster.device
    return {
        "gpus_per_node": min(cluster.gpus_per_node, cluster.gpus),
        "gpu": device.name.split("-")[0],
        "vendor": device.vendor,
        "memory_bytes": round(device.memory_bytes),
        "nics_per_node": cluster.nics_per_node if cluster.nodes > 1 else 0,
        "nic_gbit_per_s": round(cluster.scale_out.bytes_per_s * 8 / GB, 1),
        "libraries": list(requirements),
    }


def preflight_text() -> str:
    """The script, as it is written into an export."""
    return files("moeplan.exporters").joinpath("preflight_script.py").read_text(encoding="utf-8")
