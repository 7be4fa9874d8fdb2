"""Launch files that start any number of nodes within the span of an elastic plan: torchrun, Slurm, Kubernetes.

Every node runs the same script; torchrun numbers the nodes anew whenever one leaves or comes, and starts the entry script on
all ranks, which picks the arguments. A change of the nodes takes one of torchrun's restarts, as a failure does. The node that
the rendezvous is on must stay: where it is lost, whoever starts the job has to start it again. Workers of every round meet at a
store of their own: agents of torch 2.13 keep the address of the first round's, where nodes that came back are awaited in vain.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from moeplan.errors import ExportError
from moeplan.exporters.base import Job
from moeplan.exporters.elastic.data import ELASTIC
from moeplan.exporters.launchers.base import RUN_NODE, Launcher, Option, Size, number_in
from moeplan.exporters.launchers.kubernetes import PyTorchJob, dump, load
from moeplan.exporters.launchers.slurm import Slurm
from moeplan.exporters.launchers.torchrun import read_torchrun
from moeplan.exporters.preflight import PREFLIGHT

ENTRY = "elastic_entry.py"
"""Name of the script that torchrun starts."""
RESTARTS = "1000"
"""Changes of the nodes and failures together that a job outlives by default."""
RENDEZVOUS = "join_timeout=604800,last_call_timeout=30,keep_alive_interval=5,keep_alive_max_attempt=3"
"""Nodes below the smallest count wait a week instead of 10 minutes; a start waits half a minute for more nodes, as long as
torchrun gives workers to end; a silent node is lost after 15 s, which is what plans count for detection."""
CONFIG_MAP_BYTES = 1 << 20
"""Most that a ConfigMap of Kubernetes holds."""
_RESTARTS = Option(
    name="restarts",
    meaning="a number of restarts, which changes of the nodes take too",
    default=RESTARTS,
    pattern=r"[0-9]{1,9}",
)
_RENDEZVOUS = Option(
    name="rdzv_conf",
    meaning="torchrun's settings of the rendezvous, NAME=VALUE,...",
    default=RENDEZVOUS,
    pattern=r"\w+=\w+(,\w+=\w+)*",
)


def variables_text(job: Job) -> str:
    """Bash that sets the variables of a job, or asks for them."""
    return "\n".join(
        f'export {v.name}="${{{v.name}:-{v.default}}}"' if v.default else f': "${{{v.name}:?set {v.name} to {v.meaning}}}"'
        for v in job.variables
    )


class ElasticTorchrun(Launcher):
    """One call a node; the nodes meet at an address."""

    name = "torchrun"
    file = RUN_NODE
    start = f"on every node: `RDZV_ENDPOINT=<a node that stays>:29500 bash {RUN_NODE}`"
    needs_node_script = False
    needs_variables = False
    options = (_RESTARTS, _RENDEZVOUS)

    def __init__(self, least: int) -> None:
        """`least`: the fewest nodes that a layout is planned for."""
        self.least = least

    def text(self, job: Job, values: Mapping[str, str], files: Mapping[str, str]) -> str:
        """A script for all nodes; operators of Kubernetes give the address in PET_RDZV_ENDPOINT."""
        return f"""#!/usr/bin/env bash
# Start one of {self.least} to {job.nodes} nodes: RDZV_ENDPOINT=<a node that stays>[:port] bash {RUN_NODE} [further arguments]
# The planned counts, and what other counts do, stand in {ELASTIC}. RDZV_ID tells two jobs apart that meet at one address.
set -euo pipefail
here="$(cd "$(dirname "${{BASH_SOURCE[0]}}")" && pwd)"
{variables_text(job)}
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # a store for every round
[[ "${{SKIP_PREFLIGHT:-0}}" == 1 ]] || python3 "$here/{PREFLIGHT}" --plan "$here/{ELASTIC}"
RDZV_ENDPOINT="${{RDZV_ENDPOINT:-${{PET_RDZV_ENDPOINT:-}}}}"
: "${{RDZV_ENDPOINT:?set RDZV_ENDPOINT to a node that stays}}"
exec torchrun \\
  --nnodes {self.least}:{job.nodes} --nproc-per-node {job.per_node} --max-restarts {values["restarts"]} \\
  --rdzv-backend c10d --rdzv-id "${{RDZV_ID:-{job.name}}}" --rdzv-endpoint "$RDZV_ENDPOINT" \\
  --rdzv-conf {values["rdzv_conf"]} \\
  "$here/{ENTRY}" "$@"
"""

    def size(self, text: str) -> Size:
        """From torchrun's own options; no nodes where the span is another one."""
        options = read_torchrun(text)
        least, _, most = options.get("--nnodes", "").partition(":")
        spans = least == str(self.least) and most.isdigit()
        return Size(int(most) if spans else 0, int(options.get("--nproc-per-node", 0)))


class ElasticSlurm(Slurm):
    """An allocation of any planned size, which lives on when a node is lost."""

    def __init__(self, least: int) -> None:
        """`least`: the fewest nodes that a layout is planned for."""
        self.least = least

    def text(self, job: Job, values: Mapping[str, str], files: Mapping[str, str]) -> str:
        """The batch script; an allocation never grows, so that a job that is started again may get more nodes."""
        own = "".join(f"#SBATCH --{name}={values[name]}\n" for name in ("partition", "account") if values[name])
        needed = [v for v in job.variables if not v.default]
        sets = "".join(f': "${{{v.name}:?set {v.name} to {v.meaning}}}"\n' for v in needed)
        names = " ".join(v.name for v in needed)
        return f"""#!/usr/bin/env bash
#SBATCH --job-name={job.name}
#SBATCH --nodes={self.least}-{job.nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={job.per_node}
#SBATCH --exclusive
#SBATCH --no-kill
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --time={values["time"]}
{own}# Submit from this directory: sbatch {self.file} [further arguments]
set -euo pipefail
{sets}# sed reads all lines: a reader that leaves after the first would break the pipe, and with it the job
RDZV_ENDPOINT="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p):29500"
RDZV_ID="$SLURM_JOB_ID"
export RDZV_ENDPOINT RDZV_ID {names}
# Slurm runs a copy of this file, so the launch script is looked for where the job was submitted.
srun --no-kill --kill-on-bad-exit=0 --wait=0 \\
  bash -c 'exec bash "$SLURM_SUBMIT_DIR/{RUN_NODE}" "$@"' launch "$@"
"""

    def size(self, text: str) -> Size:
        """From the directives."""
        return Size(
            number_in(text, rf"^#SBATCH --nodes={self.least}-(\d+)$"), number_in(text, r"^#SBATCH --gpus-per-node=(\d+)$")
        )


class ElasticPyTorchJob(PyTorchJob):
    """Kubeflow's training operator 1 with workers that may come and go."""

    options: tuple[Option, ...] = (*PyTorchJob.options, _RESTARTS)

    def __init__(self, least: int) -> None:
        """`least`: the fewest nodes that a layout is planned for."""
        self.least = least

    def text(self, job: Job, values: Mapping[str, str], files: Mapping[str, str]) -> str:
        """The job of the largest count without a master; the operator gives the address of the first worker."""
        size = sum(len(text.encode()) for text in files.values())
        if size > CONFIG_MAP_BYTES:
            raise ExportError(
                f"the files of {self.file} have {size} bytes, a ConfigMap holds {CONFIG_MAP_BYTES}",
                hint="plan fewer node counts, or use another launcher",
            )
        documents = list(yaml.safe_load_all(super().text(job, values, files)))
        spec = documents[-1]["spec"]
        worker = {**spec["pytorchReplicaSpecs"]["Master"], "replicas": job.nodes, "restartPolicy": "OnFailure"}
        documents[-1]["spec"] = {
            "nprocPerNode": spec["nprocPerNode"],
            "elasticPolicy": {
                "rdzvBackend": "c10d",
                "minReplicas": self.least,
                "maxReplicas": job.nodes,
                "maxRestarts": int(values["restarts"]),
            },
            "pytorchReplicaSpecs": {"Worker": worker},
        }
        return dump(documents, [f"{self.least} to {job.nodes} pods of {job.per_node} GPUs; kubectl apply -f {self.file}"])

    def size(self, text: str) -> Size:
        """As of one layout, and the policy must span the same pods."""
        policy: dict[str, Any] = load(text, "PyTorchJob")["spec"]["elasticPolicy"]
        found = super().size(text)
        agree = (policy["minReplicas"], policy["maxReplicas"]) == (self.least, found.nodes)
        return found if agree else Size(0, found.per_node)
