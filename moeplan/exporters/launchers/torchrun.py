"""torchrun, static: the script is started once on every node, with its rank and the address of the first one.

Static ranks keep neighbouring nodes neighbours: with rendezvous the nodes are numbered as they arrive, which tears groups apart
that were planned for one rack. The other launchers that have nodes to number start this script.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from moeplan.exporters.base import Job
from moeplan.exporters.launchers.base import RUN_NODE, Launcher, Option, Size, quoted_program
from moeplan.exporters.preflight import PREFLIGHT


def prelude(job: Job) -> str:
    """Bash that sets variables, environment and `arguments`, and checks the node."""
    sets = [
        f'export {v.name}="${{{v.name}:-{v.default}}}"' if v.default else f': "${{{v.name}:?set {v.name} to {v.meaning}}}"'
        for v in job.variables
    ]
    return "\n".join(
        [
            'here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"',
            *sets,
            f"# environment variables and arguments both stand in {job.arguments_file}",
            f"source <(grep '^export ' \"$here/{job.arguments_file}\")",
            f"eval \"arguments=($(grep -v -e '^export ' -e '^#' \"$here/{job.arguments_file}\" | tr '\\n' ' '))\"",
            f'[[ "${{SKIP_PREFLIGHT:-0}}" == 1 ]] || python3 "$here/{PREFLIGHT}"',
        ]
    )


def read_torchrun(text: str) -> dict[str, str]:
    """The options of the one torchrun command in a script, as a shell takes it apart."""
    commands = [line for line in text.replace("\\\n", " ").splitlines() if line.startswith("exec torchrun ")]
    words = shlex.split(commands[0]) if len(commands) == 1 else []
    return {word: value for word, value in zip(words, words[1:], strict=False) if word.startswith("--")}


class Torchrun(Launcher):
    """One call a node, by hand or by another launcher."""

    name = "torchrun"
    file = RUN_NODE
    start = f"on every node: `NODE_RANK=<0, 1, ...> MASTER_ADDR=<first node> bash {RUN_NODE}`"
    needs_node_script = False
    needs_variables = False
    options = (Option(name="port", meaning="a port of the first node", default="29500", pattern=r"[0-9]{2,5}"),)

    def text(self, job: Job, values: Mapping[str, str], files: Mapping[str, str]) -> str:
        """A script that starts one node; operators of Kubernetes give rank and address in PET_*."""
        own = 'MASTER_ADDR="${MASTER_ADDR:-127.0.0.1}" NODE_RANK="${NODE_RANK:-0}"'
        last = job.nodes - 1
        shared = (
            'NODE_RANK="${NODE_RANK:-${PET_NODE_RANK:-}}" MASTER_ADDR="${MASTER_ADDR:-${PET_MASTER_ADDR:-}}"\n'
            f': "${{MASTER_ADDR:?set MASTER_ADDR to the first node}}" "${{NODE_RANK:?set NODE_RANK to 0..{last}}}"'
        )
        example = f"NODE_RANK=0..{last} MASTER_ADDR=<first node> bash {RUN_NODE}"
        return f"""#!/usr/bin/env bash
# Start one node of {job.nodes}: {example} [further arguments]
set -euo pipefail
{prelude(job)}
{own if job.nodes == 1 else shared}
exec torchrun \\
  --nnodes {job.nodes} --nproc-per-node {job.per_node} --node-rank "$NODE_RANK" \\
  --master-addr "$MASTER_ADDR" --master-port "${{MASTER_PORT:-{values["port"]}}}" \\
  {quoted_program(job.program)} "${{arguments[@]}}" "$@"
"""

    def size(self, text: str) -> Size:
        """From torchrun's own options."""
        options = read_torchrun(text)
        return Size(int(options.get("--nnodes", 0)), int(options.get("--nproc-per-node", 0)))


class Rendezvous(Launcher):
    """The same call on every node, which find each other at an address."""

    name = "rendezvous"
    file = "run_rendezvous.sh"
    start = "on every node: `RDZV_ENDPOINT=<first node> bash run_rendezvous.sh`"
    needs_node_script = False
    needs_variables = False
    options = ()

    def text(self, job: Job, values: Mapping[str, str], files: Mapping[str, str]) -> str:
        """A script for all nodes; RDZV_ID tells two jobs apart that meet at one address."""
        return f"""#!/usr/bin/env bash
# Start each of {job.nodes} nodes: RDZV_ENDPOINT=<first node>[:port] bash {self.file} [further arguments]
# Nodes are numbered as they arrive. Where a plan wants neighbours, number them yourself with {RUN_NODE}.
set -euo pipefail
{prelude(job)}
: "${{RDZV_ENDPOINT:?set RDZV_ENDPOINT to the first node}}"
exec torchrun \\
  --nnodes {job.nodes} --nproc-per-node {job.per_node} --rdzv-backend c10d --rdzv-id "${{RDZV_ID:-{job.name}}}" \\
  --rdzv-endpoint "$RDZV_ENDPOINT" \\
  {quoted_program(job.program)} "${{arguments[@]}}" "$@"
"""

    def size(self, text: str) -> Size:
        """From torchrun's own options."""
        options = read_torchrun(text)
        return Size(int(options.get("--nnodes", 0)), int(options.get("--nproc-per-node", 0)))
