"""What people see of elastic plans: layouts by node count, moves between them, the policy, and when to save."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from moeplan.cli.render import console
from moeplan.cli.render_pareto import scatter
from moeplan.planner.elastic.availability import Availability
from moeplan.planner.elastic.checkpoint import Saving
from moeplan.planner.elastic.elastic_plan import CountPlan, ElasticPlan
from moeplan.planner.elastic.replay import Replayed
from moeplan.planner.plan_data import layout_data
from moeplan.records import to_mapping
from moeplan.units import format_bytes, format_duration, format_seconds

MOST_ROWS = 16
"""Changes that are shown."""
CLOSED = 1e-6
"""Part of the goodput by which a choice may be worse than the best without a word."""


def saving_text(saving: Saving) -> str:
    """When to save, for a line of text."""
    steps = f"every {saving.interval_steps} step{'s' * (saving.interval_steps != 1)} ({format_duration(saving.interval_s)})"
    how = "asynchronous" if saving.asynchronous else "blocking"
    durable = f", durable after {format_duration(saving.persist_s)}" if saving.asynchronous else ""
    return f"{steps}, {how}, stall {format_seconds(saving.stall_s)}{durable}"


def saving_lines(saving: Saving, availability: Availability) -> Iterator[Text]:
    """Checkpoint advice of a plan."""
    yield Text(f"checkpoints (torch_dist): {saving_text(saving)}")
    yield Text(
        f"expected goodput {saving.efficiency:.1%}, where a node fails every {format_duration(availability.node_mtbf_s)} "
        "and is replaced at once; `moeplan elastic` for plans with fewer nodes"
    )


def saving_data(saving: Saving, availability: Availability) -> dict[str, Any]:
    """The same for machines."""
    return {
        "format": "torch_dist",
        "asynchronous": saving.asynchronous,
        "interval_steps": saving.interval_steps,
        "interval_s": saving.interval_s,
        "stall_s": saving.stall_s,
        "persist_s": saving.persist_s,
        "node_mtbf_s": availability.node_mtbf_s,
        "goodput": saving.efficiency,
    }


def data(found: ElasticPlan, replays: Sequence[Replayed] = ()) -> dict[str, Any]:
    """The whole plan for machines."""
    counts = [
        {
            "nodes": c.nodes,
            "uses": c.uses,
            "pi": c.share,
            "goodput_share": kept,
            "layout": layout_data(c.plan.layout),
            "global_batch": c.plan.problem.workload.global_batch,
            "opt_instances": c.instances,
            "step_s": c.plan.step_s,
            "samples_per_s": samples_per_s(c),
            "saving": to_mapping(c.saving),
        }
        for c, kept in zip(found.counts, kept_shares(found), strict=True)
    ]
    transitions = [
        {
            "from": t.before,
            "to": t.after,
            "kind": t.kind,
            "moved_bytes": t.moved_bytes,
            "lost_bytes": t.lost_bytes,
            "rollback": t.rollback,
            "seconds": dict(t.seconds),
        }
        for t in found.transitions
    ]
    return {
        "consistency": found.consistency,
        "hazards": [to_mapping(h) for h in found.hazards],
        "counts": counts,
        "transitions": transitions,
        "checkpoint": {
            "format": "torch_dist",
            "reshardable_optimizer": found.reshardable,
            "async": all(c.saving.asynchronous for c in found.counts),
            "local": found.local_saves,
        },
        "availability": to_mapping(found.availability),
        "goodput": found.goodput,
        "goodput_at_most": found.at_most,
        "best_single": found.best_single,
        "steps_up": [one.data() for one in found.steps_up],
        "policy": list(found.policy),
        "replay": [to_mapping(r) for r in replays],
    }


def show(found: ElasticPlan, replays: Sequence[Replayed] = ()) -> None:
    """Print layouts by count, changes, throughput over nodes, the policy, hazards, and what a history gives."""
    out = console()
    out.print(Text(_title(found), style="bold"))
    out.print(_counts_table(found))
    if len(found.counts) > 1:
        out.print()
        out.print(_changes_table(found))
        out.print()
        rates = [samples_per_s(c) for c in found.counts]
        nodes = [c.nodes for c in found.counts]
        for line in scatter("samples/s over nodes", nodes, rates, str, float, out.width, value="{:.3g}".format):
            out.print(line)
    out.print()
    for sentence in found.policy:
        out.print(f"- {sentence}", style=None)
    for line in (*_goodput_lines(found), *_hazard_lines(found)):
        out.print(line)
    if replays:
        out.print()
        out.print(_replay_table(replays))


def _title(found: ElasticPlan) -> str:
    problem = found.counts[-1].plan.problem
    cluster, work = problem.profile.cluster, problem.workload
    nodes = "/".join(dict.fromkeys(str(found.counts[i].nodes) for i in (0, -1)))
    node = f"{min(cluster.gpus, cluster.gpus_per_node)} {cluster.device.name.upper()}"
    return f"{problem.model.name} on {nodes.replace('/', ' to ')} nodes of {node}, {work.global_batch} x {work.seq_len} tokens"


def samples_per_s(count: CountPlan) -> float:
    """Samples per second while a count runs."""
    return count.plan.problem.workload.global_batch / count.plan.step_s


def kept_shares(found: ElasticPlan) -> list[float]:
    """What each count contributes of all samples that are kept."""
    parts = [c.share * samples_per_s(c) * c.saving.pace for c in found.counts]
    return [part / sum(parts) for part in parts]


def _table(heading: str) -> Table:
    return Table(title=heading, title_justify="left", box=None, pad_edge=False, header_style="dim")


def _counts_table(found: ElasticPlan) -> Table:
    table = _table(f"layouts by nodes, class '{found.consistency}'")
    for name in ("nodes", "spares"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("layout", overflow="fold", min_width=22)
    table.add_column("recompute", overflow="fold")
    for name in ("micro", "step", "samples/s", "time", "goodput", "save every", "moved from below", "from above"):
        table.add_column(name, justify="right")
    arrivals = {(t.before, t.after): t.moved_bytes for t in found.transitions}
    nodes = [c.nodes for c in found.counts]
    for i, (count, kept) in enumerate(zip(found.counts, kept_shares(found), strict=True)):
        below = arrivals.get((nodes[i - 1], count.nodes)) if i else None
        above = arrivals.get((nodes[i + 1], count.nodes)) if i + 1 < len(nodes) else None
        replicas = f" x{count.instances} optimizer" if count.instances > 1 else ""
        table.add_row(
            str(count.nodes),
            str(count.nodes - count.uses or "-"),
            count.plan.layout.degrees() + replicas,
            count.plan.layout.recompute_text().replace("none", "-"),
            str(count.plan.layout.micro_batch),
            format_seconds(count.plan.step_s),
            f"{samples_per_s(count):.3g}",
            f"{count.share:.2%}",
            f"{kept:.2%}",
            f"{count.saving.interval_steps} steps",
            *("-" if moved is None else format_bytes(moved) for moved in (below, above)),
        )
    return table


def _changes_table(found: ElasticPlan) -> Table:
    """Changes between different layouts, or restarts where there is but one; those of the most likely counts."""
    layouts = {c.nodes: (c.plan.layout, c.uses) for c in found.counts}
    moves = [t for t in found.transitions if layouts[t.before] != layouts[t.after]]
    moves = moves or [t for t in found.transitions if any(t.seconds.values())]
    left_out = max(0, len(moves) - MOST_ROWS)
    more = f" ({left_out} more between fewer nodes in --json)" if left_out else ""
    table = _table(f"changes of layout, seconds without progress{more}")
    table.add_column("nodes", no_wrap=True)
    table.add_column("", no_wrap=True)
    parts = [p for p in found.transitions[0].seconds if any(t.seconds[p] for t in moves)]
    for name in (*parts, "in all", "moved", "lost"):
        table.add_column(name, justify="right", no_wrap=True)
    for t in moves[left_out:]:
        table.add_row(
            f"{t.before} -> {t.after}",
            t.kind + (", rollback" if t.rollback else ""),
            *(f"{t.seconds[p]:.1f}" if t.seconds[p] else "-" for p in parts),
            f"{sum(t.seconds.values()):.0f}",
            format_bytes(t.moved_bytes),
            format_bytes(t.lost_bytes) if t.lost_bytes else "-",
        )
    return table


def _replay_table(replays: Sequence[Replayed]) -> Table:
    table = _table("the recorded history")
    table.add_column("job", no_wrap=True)
    for name in ("goodput, samples/s", "beside rigid", "waits", "changes and failures", "changes"):
        table.add_column(name, justify="right", no_wrap=True)
    rigid = next((r for r in replays if r.name == "rigid"), None)
    for r in replays:
        table.add_row(
            r.name,
            f"{r.goodput:.4g}",
            f"{r.goodput / rigid.goodput - 1:+.1%}" if rigid is not None and rigid.goodput else "-",
            f"{r.waiting_share:.1%}",
            f"{r.changing_share:.1%}",
            str(r.changes),
        )
    return table


def _goodput_lines(found: ElasticPlan) -> Iterator[Text]:
    a = found.availability
    fastest = max(samples_per_s(c) for c in found.counts)
    job = f", the job every {format_duration(1.0 / a.job_rate)}" if a.job_rate else ""
    notice = f", {format_duration(a.notice_s)} of notice" if a.notice_s else ""
    yield Text(
        f"a node fails every {format_duration(a.node_mtbf_s)}{job}, is back after {format_duration(a.repair_s)}{notice}",
        style="dim",
    )
    gain = f", {found.goodput / found.best_single - 1:+.1%} beside the best single layout" if found.best_single else ""
    share = found.goodput / fastest
    left = found.at_most / found.goodput - 1.0
    unproven = f", at most {left:.2%} below the best choice of so many layouts" if left > CLOSED else ""
    yield Text(
        f"goodput {found.goodput:.4g} samples/s while it runs, {share:.1%} of the fastest count{gain}{unproven}", style="bold"
    )
    forms = "fully reshardable" if found.reshardable else "of one layout (only dp changes)"
    local = ", with node-local saves between" if found.local_saves else ""
    yield Text(f"checkpoints: torch_dist, optimizer states {forms}{local}; {saving_text(found.counts[-1].saving)}")


def _hazard_lines(found: ElasticPlan) -> Iterator[Text]:
    if found.hazards:
        yield Text("what can make results differ all the same:")
    for h in found.hazards:
        yield Text(f"  {h.name}: {h.what}; fix: {h.fix}", style="yellow")
