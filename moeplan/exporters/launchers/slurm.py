"""Slurm: a batch script that asks for whole nodes and starts the node script once on each."""

from __future__ import annotations

from collections.abc import Mapping

from moeplan.exporters.base import Job
from moeplan.exporters.launchers.base import RUN_NODE, Launcher, Option, Size, number_in


class Slurm(Launcher):
    """One task a node; the first node of the list is the master."""

    name = "slurm"
    file = "run_slurm.sbatch"
    start = "from this directory: `sbatch run_slurm.sbatch`"
    needs_node_script = True
    needs_variables = False
    options = (
        Option(
            name="time", meaning="a time limit ([days-]hours:minutes:seconds)", default="01:00:00",
            pattern=r"([0-9]+-)?[0-9]+(:[0-9]{2}){0,2}",
        ),
        Option(name="partition", meaning="a partition of Slurm", pattern=r"[\w.,-]+"),
        Option(name="account", meaning="an account of Slurm", pattern=r"[\w.-]+"),
    )  # fmt: skip

    def text(self, job: Job, values: Mapping[str, str], files: Mapping[str, str]) -> str:
        """The batch script; variables of the job are checked before Slurm has to start anything on other nodes."""
        own = "".join(f"#SBATCH --{name}={values[name]}\n" for name in ("partition", "account") if values[name])
        needed = [v for v in job.variables if not v.default]
        sets = "".join(f': "${{{v.name}:?set {v.name} to {v.meaning}}}"\n' for v in needed)
        names = " ".join(["MASTER_ADDR", *(v.name for v in needed)])
        return f"""#!/usr/bin/env bash
#SBATCH --job-name={job.name}
#SBATCH --nodes={job.nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={job.per_node}
#SBATCH --exclusive
#SBATCH --time={values["time"]}
{own}# Submit from this directory: sbatch {self.file} [further arguments]
set -euo pipefail
{sets}# sed reads all lines: a reader that leaves after the first would break the pipe, and with it the job
MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)"
export {names}
# Slurm runs a copy of this file, so the launch script is looked for where the job was submitted.
srun --kill-on-bad-exit=1 bash -c 'NODE_RANK="$SLURM_NODEID" exec bash "$SLURM_SUBMIT_DIR/{RUN_NODE}" "$@"' launch "$@"
"""

    def size(self, text: str) -> Size:
        """From the directives."""
        return Size(number_in(text, r"^#SBATCH --nodes=(\d+)$"), number_in(text, r"^#SBATCH --gpus-per-node=(\d+)$"))
