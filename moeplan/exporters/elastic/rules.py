"""What an elastic plan must be for files to be written of it; one that breaks a rule is refused with all rules that it breaks.

The rules are those of Megatron-LM's checkpoints and launcher (0.19.2: `checkpointing.py`, `determinism.py`, the groups of
`nvidia_resiliency_ext`), and what a consistency class promises. Rules of each layout are the exporter's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from moeplan.costmodels.stages import chunk_letters
from moeplan.errors import ExportError
from moeplan.exporters.megatron_layout import passed_flags
from moeplan.planner.elastic.elastic_plan import CountPlan, ElasticPlan

SHARDED_BY = ("tp", "pp", "vpp", "stages", "ep", "etp")
"""Fields of a layout that decide which parameters a rank's optimizer states are of."""
BATCH_FLAGS = ("--decrease-batch-size-if-needed", "--rampup-batch-size", "--step-batch-size-schedule")
"""Flags by which the global batch comes to depend on the ranks or on time."""
STATE_FLAGS = ("--finetune", "--no-save-optim", "--no-load-optim", "--no-save-rng", "--no-load-rng")
"""Flags that leave out what a transition must carry over."""
RANDOM_FLAGS = ("--moe-input-jitter-eps", "--data-parallel-random-init")
"""Flags that draw from streams which Megatron seeds by pipeline rank."""

Complaint = tuple[str, str]
"""A reason and what to try."""


@dataclass(frozen=True, slots=True)
class Rule:
    """A named rule."""

    name: str
    complaints: Callable[[ElasticPlan, Mapping[str, str]], Iterator[Complaint]]
    """What of a plan with its settings breaks it."""


def check_elastic(elastic: ElasticPlan, settings: Mapping[str, str]) -> None:
    """Refuse a plan that breaks a rule, naming every one."""
    found = [(rule.name, *complaint) for rule in RULES for complaint in rule.complaints(elastic, settings)]
    if found:
        reasons = "; ".join(f"{reason} (rule {name})" for name, reason, _ in found)
        hint = "; ".join(dict.fromkeys(hint for _, _, hint in found if hint))
        raise ExportError(f"no files can be written of this elastic plan: {reasons}", hint=hint or None)


def gpus_per_node(count: CountPlan) -> int:
    """Processes of a node."""
    cluster = count.plan.problem.profile.cluster
    return min(cluster.gpus_per_node, cluster.gpus)


def differing(elastic: ElasticPlan, *fields: str) -> dict[str, list[object]]:
    """Those of some fields of a layout that differ between counts, with the values of all counts."""
    values = {name: [_value(count, name) for count in elastic.counts] for name in fields}
    return {name: found for name, found in values.items() if len(set(found)) > 1}


def _value(count: CountPlan, field: str) -> object:
    """A field of the layout of a count; a split as its chunks, however it was given."""
    x = count.plan.layout
    return "|".join(chunk_letters(count.plan.problem.model, x.pp, x.vpp, x.stages)) if field == "stages" else getattr(x, field)


def said(values: Mapping[str, list[object]]) -> str:
    """Differing fields for a message: \"pp 4/8, ep 8/16\"."""
    return ", ".join(f"{name} {'/'.join(dict.fromkeys(map(str, found)))}" for name, found in values.items())


def _counts(elastic: ElasticPlan, settings: Mapping[str, str]) -> Iterator[Complaint]:
    nodes = [count.nodes for count in elastic.counts]
    if not nodes or nodes != sorted(set(nodes)):
        yield f"the node counts {nodes} do not ascend", ""
    for count in elastic.counts:
        ranks = count.uses * gpus_per_node(count)
        if not 1 <= count.uses <= count.nodes or ranks != count.plan.layout.world:
            yield (
                f"{count.nodes} nodes: {count.uses} that train are {ranks} ranks, the layout has {count.plan.layout.world}",
                "",
            )
    for what, found in (
        ("GPUs of a node", {gpus_per_node(count) for count in elastic.counts}),
        ("models", {count.plan.problem.model.name for count in elastic.counts}),
        ("devices", {count.plan.problem.profile.cluster.device.name for count in elastic.counts}),
    ):
        if len(found) > 1:
            yield f"the counts have different {what}: {', '.join(sorted(map(str, found)))}", ""


def _batch(elastic: ElasticPlan, settings: Mapping[str, str]) -> Iterator[Complaint]:
    if elastic.consistency == "none":
        return
    batches = {count.nodes: count.plan.problem.workload.global_batch for count in elastic.counts}
    if len(set(batches.values())) > 1:
        said = ", ".join(f"{batch} on {nodes} nodes" for nodes, batch in batches.items())
        yield f"class '{elastic.consistency}' keeps the global batch, which is {said}", "choose the class 'none'"
    for count, flag in _passed(elastic, BATCH_FLAGS):
        hint = f"remove {flag} from the script, or choose the class 'none'"
        yield f"{flag} of the imported script changes the global batch on {count.nodes} nodes", hint


def _state(elastic: ElasticPlan, settings: Mapping[str, str]) -> Iterator[Complaint]:
    for count, flag in _passed(elastic, STATE_FLAGS):
        yield f"{flag} of the imported script loses state at a transition to {count.nodes} nodes", f"remove {flag}"


def _sharded(elastic: ElasticPlan, settings: Mapping[str, str]) -> Iterator[Complaint]:
    whole = [count.nodes for count in elastic.counts if count.plan.layout.sharding == "fsdp"]
    if whole:
        on = ", ".join(map(str, whole))
        yield f"sharding fsdp on {on} nodes writes fsdp_dtensor checkpoints, not torch_dist ones", "use --forbid sharding=fsdp"
    differ = differing(elastic, "sharding")
    if differ:
        yield f"optimizer states are kept in different forms: {said(differ)}", "pin the sharding"


def _reshardable(elastic: ElasticPlan, settings: Mapping[str, str]) -> Iterator[Complaint]:
    differ = differing(elastic, *SHARDED_BY)
    optimizer = any(count.plan.layout.sharding == "optimizer" for count in elastic.counts)
    if differ and optimizer and not elastic.reshardable:
        yield (
            f"layouts differ in {said(differ)}, but checkpoints are not written in the reshardable format",
            "plan with reshardable checkpoints, without which only dp may change",
        )
    if elastic.local_saves and (elastic.reshardable or differ):
        why = "the reshardable format" if elastic.reshardable else f"layouts that differ in {said(differ)}"
        yield f"local checkpoints exclude {why}", "plan without local checkpoints, or with one layout but for dp"


def _local(elastic: ElasticPlan, settings: Mapping[str, str]) -> Iterator[Complaint]:
    for count in elastic.counts:
        steps = count.saving.local_interval_steps
        if bool(steps) != elastic.local_saves:
            how = "are" if elastic.local_saves else "are not"
            yield f"local checkpoints {how} used, but {count.nodes} nodes save one every {steps} steps", ""


def _instances(elastic: ElasticPlan, settings: Mapping[str, str]) -> Iterator[Complaint]:
    for count in elastic.counts:
        x, r = count.plan.layout, count.instances
        if r > 1 and x.sharding != "optimizer":
            yield f"{r} optimizer replicas on {count.nodes} nodes need a sharded optimizer, not '{x.sharding}'", ""
        elif x.dp * x.cp % r or x.edp % r:
            yield f"{r} optimizer replicas on {count.nodes} nodes do not divide dp*cp = {x.dp * x.cp} and edp = {x.edp}", ""


def _bitwise(elastic: ElasticPlan, settings: Mapping[str, str]) -> Iterator[Complaint]:
    if elastic.consistency != "bitwise":
        return
    for count in elastic.counts:
        if count.plan.layout.tp_overlap:
            yield f"tp_overlap on {count.nodes} nodes is off in deterministic mode", "use --pin tp_overlap=false"
    if differ := differing(elastic, "tp", "pp"):
        for _, flag in _passed(elastic, RANDOM_FLAGS):
            yield f"{flag} draws random numbers, whose state is not loaded where {said(differ)} differ", f"remove {flag}"


def _spares(elastic: ElasticPlan, settings: Mapping[str, str]) -> Iterator[Complaint]:
    spare = [str(count.nodes) for count in elastic.counts if count.uses < count.nodes]
    if spare and settings["surplus"] == "exit":
        yield f"{', '.join(spare)} nodes leave some idle, which surplus=exit forbids", "use surplus=idle or surplus=reserve"


def _passed(elastic: ElasticPlan, names: tuple[str, ...]) -> Iterator[tuple[CountPlan, str]]:
    """Those of some flags that the imported script of a count passes on."""
    for count in elastic.counts:
        given = {flag[0] for flag in passed_flags(count.plan)[0]}
        yield from ((count, name) for name in names if name in given)


RULES = (
    Rule("counts", _counts),
    Rule("batch", _batch),
    Rule("state", _state),
    Rule("sharding", _sharded),
    Rule("reshardable", _reshardable),
    Rule("local", _local),
    Rule("instances", _instances),
    Rule("bitwise", _bitwise),
    Rule("spares", _spares),
)
"""In the order in which they are reported."""
