"""SkyPilot: a task for a number of nodes, each of which runs the node script from the synchronised directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from moeplan.exporters.base import Job
from moeplan.exporters.launchers.base import RUN_NODE, Launcher, Option, Size, kubernetes_name
from moeplan.exporters.launchers.kubernetes import dump
from moeplan.records import load_yaml


class SkyPilot(Launcher):
    """A task file; SkyPilot finds the machines."""

    name = "skypilot"
    file = "skypilot.yaml"
    start = "from this directory: `sky launch skypilot.yaml`"
    needs_node_script = True
    needs_variables = True
    options = (
        Option(name="accelerator", meaning="SkyPilot's name of the GPU", pattern=r"[A-Za-z0-9.-]+"),
        Option(name="image", meaning="a container image that holds the framework", pattern=r"[\w.\-/:@]+"),
    )

    def text(self, job: Job, values: Mapping[str, str], files: Mapping[str, str]) -> str:
        """The task; the first of SkyPilot's addresses is the master."""
        resources: dict[str, Any] = {"accelerators": f"{values['accelerator'] or accelerator(job.device)}:{job.per_node}"}
        if values["image"]:
            resources["image_id"] = f"docker:{values['image']}"
        run = [
            'MASTER_ADDR="$(sed -n 1p <<< "$SKYPILOT_NODE_IPS")" NODE_RANK="$SKYPILOT_NODE_RANK" \\',
            f"  bash {RUN_NODE}",
        ]
        task = {
            "name": kubernetes_name(job.name),
            "num_nodes": job.nodes,
            "resources": resources,
            "workdir": ".",
            "run": "\n".join(run) + "\n",
        }
        return dump([task], [f"{job.nodes} nodes of {job.per_node} GPUs"])

    def size(self, text: str) -> Size:
        """From the task."""
        task = yaml.safe_load(text)
        return Size(task["num_nodes"], int(task["resources"]["accelerators"].rpartition(":")[2]))


def accelerator(device: str) -> str:
    """SkyPilot's name of a device of the catalog."""
    names = load_yaml(Path(__file__).parent / "accelerators.yaml", "catalog file")
    return str(names["skypilot"].get(device, device))
