"""The arguments of one node count: those that an export of its plan has, and what being elastic adds.

Checkpoints are `torch_dist`; optimizer states can be loaded under other degrees only with the reshardable format, which must
be on when they are written. Local checkpoints have a directory for each count, so that none is loaded under another layout.
The class `bitwise` runs Megatron's deterministic mode, which refuses the fused cross entropy (determinism.py of 0.19.2).
"""

from __future__ import annotations

from collections.abc import Mapping

from moeplan._version import VERSION
from moeplan.exporters import megatron
from moeplan.exporters.base import Flag, Job, arguments_text, plain_name
from moeplan.exporters.flag_facts import load_facts
from moeplan.planner.elastic.elastic_plan import CountPlan, ElasticPlan

FACTS = load_facts("megatron_elastic")
"""The flags that are added here."""
DETERMINISTIC = {"NCCL_ALGO": "Ring", "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
"""Variables of Megatron's deterministic mode; it refuses other values."""
_FUSED_LOSS = ("--cross-entropy-loss-fusion", "--cross-entropy-fusion-impl")
_OF_THE_ENTRY = ("--save", "--load", "--persistent-save-interval")
"""What the entry script says, and another name of the interval."""


def arguments_file(count: CountPlan) -> str:
    """Name of the argument file of a count."""
    return f"nodes-{count.nodes}.args"


def sections(
    elastic: ElasticPlan, count: CountPlan, version: str, settings: Mapping[str, str], per_node: int
) -> dict[str, list[Flag]]:
    """All flags of a count by section; `ExportError` where Megatron cannot run its plan."""
    bitwise = elastic.consistency == "bitwise"
    replaced = {*FACTS.flags, *_OF_THE_ENTRY, *(_FUSED_LOSS if bitwise else ())}
    plain = megatron.arguments(count.plan, version)
    kept = {heading: [flag for flag in flags if flag[0] not in replaced] for heading, flags in plain.items()}
    added: dict[str, list[Flag]] = {
        "checkpoints: the entry script adds --save and --load": _saving(elastic, count, settings),
        "local checkpoints": _local(count, settings, per_node) if elastic.local_saves else [],
        "same results, bit for bit": [("--deterministic-mode",)] if bitwise else [],
    }
    if count.plan.layout.sharding == "optimizer":
        added["optimizer replicas"] = [("--num-distributed-optimizer-instances", str(count.instances))]
    FACTS.check([flag for flags in added.values() for flag in flags], version)
    return {heading: flags for heading, flags in {**kept, **added}.items() if flags}


def environment(elastic: ElasticPlan, count: CountPlan) -> dict[str, str]:
    """Environment variables that the arguments require."""
    return {**megatron.environment(count.plan), **(DETERMINISTIC if elastic.consistency == "bitwise" else {})}


def text(job: Job, count: CountPlan, version: str) -> str:
    """The argument file of a count."""
    spare = count.nodes - count.uses
    heading = [
        f"{job.name} on {count.nodes} nodes of {job.per_node} {plain_name(job.device)}"
        + (f", of which {spare} spare" if spare else "")
        + f": {count.plan.layout.degrees()}",
        f"written by moeplan {VERSION} for Megatron-LM with megatron-core {version}; {count.uses * job.per_node} ranks",
    ]
    return arguments_text(job, heading)


def copies(nodes: int) -> int:
    """Nodes that hold each local checkpoint: 2 or 3, where groups of so many fill the nodes; 1 where neither does."""
    return next((factor for factor in (2, 3) if nodes % factor == 0), 1)


def _saving(elastic: ElasticPlan, count: CountPlan, settings: Mapping[str, str]) -> list[Flag]:
    flags: list[Flag] = [
        ("--ckpt-format", "torch_dist"),
        ("--ckpt-fully-parallel-load",),
        ("--save-interval", str(count.saving.interval_steps)),
    ]
    if elastic.reshardable:
        flags.append(("--dist-ckpt-optim-fully-reshardable",))
    if count.saving.asynchronous:
        flags += [("--async-save",), ("--use-persistent-ckpt-worker",), ("--async-strategy", settings["async_strategy"])]
    return flags


def _local(count: CountPlan, settings: Mapping[str, str], per_node: int) -> list[Flag]:
    flags: list[Flag] = [
        ("--non-persistent-save-interval", str(count.saving.local_interval_steps)),
        ("--non-persistent-ckpt-type", "local"),
        ("--non-persistent-local-ckpt-dir", f"{settings['local_directory']}/nodes-{count.nodes}"),
    ]
    if (held := copies(count.uses)) > 1:
        flags += [("--replication",), ("--replication-jump", str(per_node)), ("--replication-factor", str(held))]
    return flags
