"""What a launch script breaks, what the framework changes in it without a word, and what it leaves on the table.

Every finding has its fix. What another choice would bring is priced as `estimate` prices it, where the cluster is known: the
share of the step that it saves, by itself. Kernels, data and the network are not looked at.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from moeplan.costmodels.layout import Layout
from moeplan.errors import nearest
from moeplan.exporters.lint_errors import ERRORS
from moeplan.exporters.lint_rules import CHANGES, SLOW, Run, Severity
from moeplan.exporters.reading.flags import catalog
from moeplan.exporters.reading.imported import Imported
from moeplan.exporters.reading.words import shown
from moeplan.planner.constraints import Violation, violations
from moeplan.planner.plan import price_plan
from moeplan.planner.problem import Problem
from moeplan.profiles.hardware import Cluster, load_cluster

WORTHWHILE = 0.01
"""Least share of the step that a choice must save to be a finding."""
_OWN_PROGRAMS = ("pretrain_gpt.py", "pretrain_hybrid.py", "pretrain_mamba.py")
"""Programs whose flags are those of Megatron's parser and no others."""
_FIXES = {
    "moe-sequence-parallel": "--sequence-parallel",
    "quantized-ddp": "--use-distributed-optimizer",
    "moments-ddp": "--use-distributed-optimizer",
    "offload-sharding": "--use-distributed-optimizer",
    "deepep-group": "--moe-token-dispatcher-type alltoall",
    "expert-bias": "--expert-tensor-parallel-size 1",
    "global-batch": "--global-batch-size with a multiple of micro-batch x dp",
    "overlap-pipeline": "--num-virtual-stages-per-pipeline-rank 2",
    "tensor-overlap": "--sequence-parallel",
}
"""Flags that mend a broken rule of layouts."""
_FLAGS = {
    "global-batch": "--global-batch-size",
    "pipeline-split": "--pipeline-model-parallel-size",
    "virtual-stages": "--num-virtual-stages-per-pipeline-rank",
    "interleaving": "--global-batch-size",
    "experts": "--expert-model-parallel-size",
    "expert-bias": "--expert-tensor-parallel-size",
    "moe-sequence-parallel": "--tensor-model-parallel-size",
    "deepep-group": "--moe-token-dispatcher-type",
}
"""The flag whose line a broken rule is shown with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that is wrong, or could be better."""

    severity: Severity
    """"error": Megatron refuses it; "change": it does something else than is written; "slow": it costs time."""
    rule: str
    message: str
    fix: str = ""
    """Flags to add or to change."""
    flag: str = ""
    line: int = 0
    """Line of the file; 0: no line says it."""
    saves: float | None = None
    """Share of the step time that the fix saves by itself; None where it was not priced."""


def lint(imported: Imported, cluster: Cluster | None = None) -> list[Finding]:
    """All findings: errors, then silent changes, then what costs time, by what it costs."""
    problem = imported.problem(cluster or _assumed(imported))
    broken = violations(problem, imported.layout)
    ours = imported.framework.startswith("Megatron-LM")
    errors = [
        Finding(
            severity="error",
            rule=v.rule,
            message=v.reason,
            fix=(_FIXES.get(v.rule) if ours else "") or v.hint or "change the degrees",
            **_place(imported, _FLAGS.get(v.rule, "")),
        )
        for v in broken
    ]
    run = Run(imported, problem.profile.cluster.device.capability_number or 9.0)
    rule, fix = ("pipeline-split", "choose numbers that divide the layers") if ours else ("framework", "")
    errors += [Finding(severity="error", rule=rule, message=fault, fix=fix) for fault in imported.faults]
    if not ours:  # the rest is about its flags
        return errors
    errors += _rows(run, ERRORS) + list(_values(imported))
    changes = list(_words(imported)) + _rows(run, CHANGES)
    errors += [f for f in changes if f.severity == "error"]
    slow = list(_choices(imported, problem, priced=cluster is not None and not broken))
    slow += _rows(run, SLOW)
    slow.sort(key=lambda f: -(f.saves or 0.0))
    return errors + [f for f in changes if f.severity != "error"] + slow


def broken_rules(imported: Imported, cluster: Cluster | None = None) -> list[Violation]:
    """The rules of layouts that a run breaks."""
    return violations(imported.problem(cluster or _assumed(imported)), imported.layout)


def _assumed(imported: Imported) -> Cluster:
    """GPUs on which the rules are checked where none are named: the oldest that know the precision."""
    least = imported.workload.precision.min_capability
    return load_cluster(f"{'b200' if least >= 10 else 'h100'}x{imported.world}")


def _place(imported: Imported, flag: str) -> dict[str, Any]:
    given = imported.flags.last.get(flag)
    return {"flag": flag, "line": given.line if given is not None else 0}


def _rows(run: Run, checks: Any) -> list[Finding]:
    return [
        Finding(
            severity=check.severity,
            rule=check.rule,
            message=check.message(run),
            fix=check.fix,
            **_place(run.imported, check.flag),
        )
        for check in checks
        if check.applies(run)
    ]


def _values(imported: Imported) -> Iterator[Finding]:
    """Values that the parser refuses, also where a later occurrence overrides them."""
    listed = yaml.safe_load((Path(__file__).parent / "flags" / "megatron.yaml").read_text(encoding="utf-8"))["flags"]
    for g in dict.fromkeys(imported.flags.given):
        kind, known = catalog().takes.get(g.flag), listed.get(g.flag, {}).get("values")
        wrong = [v for v in g.values if known is not None and v not in map(str, known)]
        place: dict[str, Any] = {"flag": g.flag, "line": g.line}
        if wrong:
            message = f"{g.flag} takes {', '.join(map(str, known))}, not {', '.join(map(shown, wrong))}"
            yield Finding(severity="error", rule="flag-value", message=message, fix="choose one of them", **place)
        elif kind in ("value", "list") and not g.values and g.flag not in ("--data-path", "--spec"):
            yield Finding(severity="error", rule="flag-value", message=f"{g.flag} has no value", fix="give it one", **place)


def _words(imported: Imported) -> Iterator[Finding]:
    """Flags that the parser does not know, that do nothing, or that stand more than once."""
    known, own = catalog(), imported.program.rsplit("/", 1)[-1] in _OWN_PROGRAMS
    for g in imported.flags.last.values():
        place: dict[str, Any] = {"flag": g.flag, "line": g.line}
        if g.flag in known.gone:
            message = f"{g.flag} is no flag of Megatron-Core {known.version}: {known.gone[g.flag]}"
            yield Finding(severity="error", rule="flag-gone", message=message, fix="replace it", **place)
        elif g.flag in known.idle and imported.kind != "log":
            message = f"{g.flag} does nothing: {known.idle[g.flag]}"
            yield Finding(severity="change", rule="flag-idle", message=message, fix="drop it", **place)
        elif g.flag not in known.takes:
            close = nearest(g.flag[2:], [flag[2:] for flag in known.takes], 1)
            near = f"--{close[0]}" if close and close[0][0] == g.flag[2] else ""
            yield Finding(
                severity="error" if own else "change",
                rule="flag-unknown",
                message=f"{g.flag} is no flag of Megatron-Core {known.version}" + ("" if own else "; it is kept as it stands"),
                fix=f"{near}?" if near else "is it one of your own?",
                **place,
            )
    if imported.flags.stray:
        message = f"words that belong to no flag: {' '.join(map(shown, imported.flags.stray[:8]))}"
        yield Finding(severity="error" if own else "change", rule="stray-words", message=message, fix="drop or quote them")
    for g in dict.fromkeys(imported.flags.given):
        last = imported.flags.last[g.flag]
        if last.values != g.values:
            yield Finding(
                severity="change", rule="flag-twice", message=f"{g} is overridden by {last}", fix="keep one of them",
                flag=g.flag, line=g.line,
            )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Choice:
    """Another choice for the same run."""

    rule: str
    message: str
    fix: str
    flag: str
    layout: Layout
    default: bool
    """It is a default of Megatron that nobody chose, so it is a finding without a price too."""


def _choices(imported: Imported, problem: Problem, *, priced: bool) -> Iterator[Finding]:
    """What other choices of single features bring; of several dispatchers the best."""
    now = price_plan(problem, imported.layout).step_s if priced else 0.0
    best: dict[str, Finding] = {}
    for choice in _alternatives(imported, problem):
        if violations(problem, choice.layout):
            continue
        saves = 1 - price_plan(problem, choice.layout).step_s / now if priced else None
        if saves is None and not choice.default or saves is not None and saves < WORTHWHILE:
            continue
        found = Finding(
            severity="slow", rule=choice.rule, message=choice.message, fix=choice.fix, saves=saves,
            **_place(imported, choice.flag),
        )  # fmt: skip
        if choice.rule not in best or (saves or 0.0) > (best[choice.rule].saves or 0.0):
            best[choice.rule] = found
    yield from best.values()


def _alternatives(imported: Imported, problem: Problem) -> Iterator[_Choice]:
    x, model = imported.layout, problem.model

    def other(**fields: Any) -> Layout:
        return dataclasses.replace(x, **fields)

    if model.moe is not None:
        yield from _expert_choices(imported, x)
    if not x.dp_overlap and x.dp * x.cp > 1:
        gather = " --overlap-param-gather" if x.sharding != "ddp" else ""
        yield _Choice(
            "gradient-overlap", "gradients are reduced after the backward pass, not during it",
            f"--overlap-grad-reduce{gather}", "--overlap-grad-reduce", other(dp_overlap=True), True,
        )  # fmt: skip
    if x.sharding == "ddp" and x.dp * x.cp > 1:
        yield _Choice(
            "optimizer-shards", "every rank keeps all optimizer states and updates all weights", "--use-distributed-optimizer",
            "--use-distributed-optimizer", other(sharding="optimizer"), True,
        )  # fmt: skip
    if x.tp > 1 and not x.tp_overlap:
        flags = "--tp-comm-overlap" if x.sequence_parallel else "--sequence-parallel --tp-comm-overlap"
        yield _Choice(
            "tensor-overlap-off", "tensor-parallel exchange does not overlap its GEMMs", flags, "--tensor-model-parallel-size",
            other(tp_overlap=True, sequence_parallel=True), False,
        )  # fmt: skip
    if not x.cuda_graphs:
        scopes = ("attn", "moe_router", "moe_preprocess") if model.moe is not None else ("attn", "mlp")
        yield _Choice(
            "graphs-off", "kernels are launched one by one",
            f"--cuda-graph-impl transformer_engine --cuda-graph-modules {' '.join(scopes)}", "--cuda-graph-impl",
            other(cuda_graphs=scopes), False,
        )  # fmt: skip


def _expert_choices(imported: Imported, x: Layout) -> Iterator[_Choice]:
    flag = "--moe-token-dispatcher-type"
    if x.etp * x.ep > 1:
        unsaid = x.dispatcher == "allgather"
        message = (
            "every rank gathers the tokens of all" if unsaid else f"the dispatcher is {x.dispatcher}"
        ) + (", Megatron's default" if flag not in imported.flags.last else "")  # fmt: skip
        for name in ("alltoall", "deepep", "hybridep"):
            if name != x.dispatcher:
                fix = f"{flag} alltoall" if name == "alltoall" else f"{flag} flex --moe-flex-dispatcher-backend {name}"
                layout = dataclasses.replace(x, dispatcher=name)
                yield _Choice("dispatcher", message, fix, flag, layout, unsaid and name == "alltoall")
    stage = x.tp * x.cp * x.dp
    if x.etp > 1 and stage % x.ep == 0:
        said = "--expert-tensor-parallel-size" in imported.flags.last
        yield _Choice(
            "expert-tensor-size", f"experts are cut over etp={x.etp}{'' if said else ', which follows tp'}",
            "--expert-tensor-parallel-size 1", "--expert-tensor-parallel-size",
            dataclasses.replace(x, etp=1, edp=stage // x.ep), not said,
        )  # fmt: skip
    if not x.ep_overlap and x.ep > 1:
        yield _Choice(
            "expert-overlap-off", "the exchange of tokens is not overlapped",
            "--overlap-moe-expert-parallel-comm --delay-wgrad-compute", "--overlap-moe-expert-parallel-comm",
            dataclasses.replace(x, ep_overlap=True, shared_overlap=False), False,
        )  # fmt: skip
    if not x.shared_overlap and not x.ep_overlap:
        yield _Choice(
            "shared-overlap-off", "shared experts run before or after the exchange of tokens, not beside it",
            "--moe-shared-expert-overlap", "--moe-shared-expert-overlap", dataclasses.replace(x, shared_overlap=True), False,
        )  # fmt: skip
