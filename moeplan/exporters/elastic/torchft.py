"""Launch file of torchft: replica groups that come and go without a restart of the others.

A replica group holds the model once: the ranks of one dense data-parallel replica, or of as many as the experts spread over,
    group = pp * lcm(tp * cp, etp * ep)  ranks.
Counts may then differ in the number of groups only. Megatron-LM has no torchft, so the training script is the user's: it builds
the Manager with what the variables say. FIXED_WITH_SPARES keeps the global batch (groups beyond the fewest planned contribute
zeros); DYNAMIC lets it vary with the groups, which is the class `none`. Options are those of torchft 0.2.0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from moeplan.errors import ExportError
from moeplan.exporters.base import Job
from moeplan.exporters.elastic.rules import SHARDED_BY, differing, gpus_per_node, said
from moeplan.exporters.launchers.base import Launcher, Option, Size, number_in
from moeplan.planner.elastic.elastic_plan import ElasticPlan

LIGHTHOUSE_PORT = 29510
"""Where torchft's lighthouse listens unless told otherwise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Groups:
    """Replica groups of an elastic plan."""

    ranks: int
    """Ranks of a group."""
    least: int
    """Groups of the smallest count."""
    most: int
    """Groups of the largest count."""
    mode: str
    """torchft's word for what happens to the global batch."""


def groups_of(elastic: ElasticPlan) -> Groups:
    """The replica groups; refuses counts that differ in more than their number."""
    differ = differing(elastic, *SHARDED_BY, "cp", "micro_batch")
    if differ:
        raise ExportError(
            f"launcher 'torchft' adds and drops replicas of one layout, but layouts differ in {said(differ)}",
            hint="plan with these fields pinned, or use another launcher",
        )
    x, each = elastic.counts[0].plan.layout, gpus_per_node(elastic.counts[0])
    ranks = x.pp * math.lcm(x.tp * x.cp, x.etp * x.ep)
    if ranks % each and each % ranks:
        raise ExportError(
            f"a replica group of torchft has {ranks} ranks, which neither fill nor divide nodes of {each}",
            hint="use another launcher",
        )
    worlds = [count.plan.layout.world for count in elastic.counts]
    return Groups(
        ranks=ranks,
        least=worlds[0] // ranks,
        most=worlds[-1] // ranks,
        mode="DYNAMIC" if elastic.consistency == "none" else "FIXED_WITH_SPARES",
    )


class TorchFt(Launcher):
    """A lighthouse that counts the groups, and torchrun once for each of them."""

    name = "torchft"
    file = "run_torchft.sh"
    start = "`bash run_torchft.sh lighthouse` on a node that stays, then on every node as its first lines say"
    needs_node_script = False
    needs_variables = False
    options = (
        Option(name="group_restarts", meaning="a number of restarts of one group", default="1000", pattern=r"[0-9]{1,9}"),
    )

    def __init__(self, groups: Groups) -> None:
        """`groups`: what is started."""
        self.groups = groups

    def text(self, job: Job, values: Mapping[str, str], files: Mapping[str, str]) -> str:
        """A script for the lighthouse and for all nodes."""
        it = self.groups
        spares = "the others are spares" if it.mode == "FIXED_WITH_SPARES" else "all that are there count"
        starts = _several_nodes if it.ranks > job.per_node else _one_node
        return f"""#!/usr/bin/env bash
# {it.least} to {it.most} replica groups of {it.ranks} ranks; {it.least} hold the global batch, {spares}.
# Once, on a node that stays: bash {self.file} lighthouse
# On every node: NODE_RANK=<0, 1, ...> TORCHFT_LIGHTHOUSE=http://<that node>:{LIGHTHOUSE_PORT} bash {self.file} [arguments]
set -euo pipefail
if [[ "${{1:-}}" == lighthouse ]]; then
  exec torchft_lighthouse --min_replicas {it.least} --join_timeout_ms 60000 --quorum_tick_ms 100 --heartbeat_timeout_ms 5000
fi
: "${{TORCHFT_SCRIPT:?set TORCHFT_SCRIPT to a training script that builds the Manager of torchft}}"
: "${{TORCHFT_LIGHTHOUSE:?set TORCHFT_LIGHTHOUSE to the address of the lighthouse}}"
: "${{NODE_RANK:?set NODE_RANK to 0, 1, ...}}"
# for the script: Manager(min_replica_size=MIN_REPLICA_SIZE, world_size_mode=WorldSizeMode[WORLD_SIZE_MODE], ...)
export NUM_REPLICA_GROUPS={it.most} MIN_REPLICA_SIZE={it.least} WORLD_SIZE_MODE={it.mode}
{starts(it.ranks, job.per_node, values["group_restarts"])}"""

    def size(self, text: str) -> Size:
        """From the groups and the processes of each."""
        groups = number_in(text, r"NUM_REPLICA_GROUPS=(\d+) ")
        nodes, each = number_in(text, r"--nnodes (\d+) "), number_in(text, r"--nproc-per-node (\d+) ")
        slots = number_in(text, r"slot < (\d+);") or 1
        return Size(groups * nodes // slots, each * slots)


def _several_nodes(ranks: int, per_node: int, restarts: str) -> str:
    nodes = ranks // per_node
    return f""": "${{GROUP_ADDR:?set GROUP_ADDR to the first of the {nodes} nodes of the group}}"
export REPLICA_GROUP_ID=$((NODE_RANK / {nodes}))
exec torchrun \\
  --nnodes {nodes} --nproc-per-node {per_node} --node-rank $((NODE_RANK % {nodes})) \\
  --master-addr "$GROUP_ADDR" --master-port 29500 --max-restarts {restarts} \\
  "$TORCHFT_SCRIPT" "$@"
"""


def _one_node(ranks: int, per_node: int, restarts: str) -> str:
    slots = per_node // ranks
    return f"""for ((slot = 0; slot < {slots}; slot++)); do
  REPLICA_GROUP_ID=$((NODE_RANK * {slots} + slot)) \\
  CUDA_VISIBLE_DEVICES="$(seq -s, $((slot * {ranks})) $((slot * {ranks} + {ranks} - 1)))" \\
  torchrun \\
    --nnodes 1 --nproc-per-node {ranks} --node-rank 0 \\
    --master-addr 127.0.0.1 --master-port $((29600 + slot)) --max-restarts {restarts} \\
    "$TORCHFT_SCRIPT" "$@" &
done
wait
"""
