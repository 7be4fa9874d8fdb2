"""Ray Train: a Python script that starts one worker a GPU, each of which starts the process of its rank.

The process is a child of the worker, so that it has a main thread and a process group of its own; Ray gives ranks and
addresses, the workers agree on a free port.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

from moeplan.exporters.base import Job
from moeplan.exporters.launchers.base import Launcher, Option, Size
from moeplan.exporters.preflight import PREFLIGHT

_BODY = '''EXTRA = sys.argv[1:]  # of this process: the workers have others


def start_rank() -> None:
    """Start the process of this worker's rank and wait for it."""
    import torch.distributed as dist

    here = os.environ["here"] = DIRECTORY
    os.environ.update(ENVIRONMENT)
    for name, default in VARIABLES.items():
        if not os.environ.get(name):
            os.environ[name] = os.path.expandvars(default)
    if os.environ["LOCAL_RANK"] == "0" and os.environ.get("SKIP_PREFLIGHT") != "1":
        subprocess.run([sys.executable, os.path.join(here, PREFLIGHT)], check=True)
    port = [0]
    if dist.get_rank() == 0:
        with socket.socket() as free:
            free.bind(("", 0))
            port = [free.getsockname()[1]]
    dist.broadcast_object_list(port, src=0)
    command = [sys.executable, *map(os.path.expandvars, PROGRAM), *ARGUMENTS, *EXTRA]
    subprocess.run(command, env={**os.environ, "MASTER_PORT": str(port[0])}, check=True)


def main() -> None:
    """Place the workers node by node and run them."""
    from ray.train import ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    scaling = ScalingConfig(
        num_workers=NODES * PER_NODE, use_gpu=True, resources_per_worker={"GPU": 1}, placement_strategy="PACK"
    )
    # The workers only agree on a port; NCCL is for their children.
    TorchTrainer(start_rank, scaling_config=scaling, torch_config=TorchConfig(backend="gloo")).fit()


if __name__ == "__main__":
    main()
'''


class Ray(Launcher):
    """A script for the driver of a Ray cluster whose nodes all see the directory of the export."""

    name = "ray"
    file = "run_ray.py"
    start = "on a node of the Ray cluster: `python run_ray.py`"
    needs_node_script = False
    needs_variables = True
    options: tuple[Option, ...] = ()

    def text(self, job: Job, values: Mapping[str, str], files: Mapping[str, str]) -> str:
        """Constants, then a body that is the same for all jobs."""
        constants: dict[str, Any] = {
            "NODES": job.nodes,
            "PER_NODE": job.per_node,
            "PREFLIGHT": PREFLIGHT,
            "ENVIRONMENT": dict(job.environment),
            "VARIABLES": {v.name: v.default for v in job.variables},
            "PROGRAM": list(job.program),
            "ARGUMENTS": job.arguments,
        }
        lines = [
            "#!/usr/bin/env python3",
            f'"""Start {job.nodes} x {job.per_node} processes with Ray Train: python {self.file} [further arguments]"""',
            "",
            "import os",
            "import socket",
            "import subprocess",
            "import sys",
            "",
            "DIRECTORY = os.path.dirname(os.path.abspath(__file__))",
            *(f"{name} = {_literal(value)}" for name, value in constants.items()),
        ]
        return "\n".join(lines) + "\n" + _BODY

    def size(self, text: str) -> Size:
        """From the constants, as Python takes the script apart."""
        values = {
            node.targets[0].id: node.value.value
            for node in ast.parse(text).body
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and isinstance(node.value, ast.Constant)
        }
        nodes, each = values.get("NODES"), values.get("PER_NODE")
        return Size(nodes if isinstance(nodes, int) else 0, each if isinstance(each, int) else 0)


def _literal(value: Any) -> str:
    """A value as Python, lists and mappings with one entry a line."""
    if isinstance(value, dict):
        return "{\n" + "".join(f"    {k!r}: {v!r},\n" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[\n" + "".join(f"    {v!r},\n" for v in value) + "]"
    return repr(value)
