"""What it costs to go from one layout to another: seconds without progress, by part.

    C(l -> l') = detect [no notice] + drain + group + move + warm + lost
Through storage, as processes that restart do it: a planned move drains by writing a checkpoint and reads it back; a failure
goes back to the last one. Live, where processes outlive a change: state crosses the fabric (`movement.py`), and a failure goes
back only if it took the last copy of something. The loss of a spare costs nothing by itself. Units: seconds, bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from moeplan.planner.elastic.availability import Availability
from moeplan.planner.elastic.checkpoint import Saving
from moeplan.planner.elastic.counts import SizedLayout, node_gpus
from moeplan.planner.elastic.holdings import Holdings, holdings
from moeplan.planner.elastic.movement import SLOWNESS, Movement, fewest_holders, lost_bytes, move_seconds, movement
from moeplan.planner.elastic.saves import Overheads, checkpoint_bytes, node_bytes_per_s

PARTS = ("detect", "drain", "group", "move", "warm", "lost")
"""Parts of the seconds of a change."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """One change of layout, or a restart of the same one."""

    moved_bytes: float
    lost_bytes: float
    rollback: bool
    seconds: Mapping[str, float]
    """Seconds without progress by part, see `PARTS`."""


class Changes:
    """Costs of changes between layouts.

    What a pair moves takes a while to work out: `mean_s` counts no seconds for it until it was asked for by `learn`.
    """

    def __init__(self, overheads: Overheads, availability: Availability) -> None:
        self.overheads, self.availability = overheads, availability
        self._held: dict[SizedLayout, Holdings] = {}
        self._moved: dict[tuple[SizedLayout, SizedLayout, int], tuple[Movement, float]] = {}
        self._holders: dict[SizedLayout, int] = {}
        self._fixed: dict[SizedLayout, tuple[float, float]] = {}

    def mean_s(self, before: SizedLayout, after: SizedLayout, saving: Saving, nodes: int, then: int) -> float:
        """Mean seconds of going from `nodes` nodes to `then`, or of a failure that leaves the count as it is."""
        planned_s = 0.0 if before is after else sum(self._planned_s(before, after, saving).values())
        if then > nodes:
            return planned_s
        if then == nodes:
            return sum(self._failed_s(before, after, saving, 0).values())
        left = nodes - then
        idle = ((nodes - before.nodes) / nodes) ** left  # only spares leave
        if self.noticed(before, saving):
            struck = self._planned_s(before, after, saving)
        else:
            struck = self._failed_s(before, after, saving, min(left, before.nodes))
        return (1.0 - idle) * sum(struck.values()) + idle * planned_s

    def worst(
        self, before: SizedLayout, after: SizedLayout, saving: Saving, nodes: int, then: int
    ) -> tuple[Literal["planned", "unplanned"], Change]:
        """Going from `nodes` nodes to `then` where the nodes that leave are in use."""
        if then > nodes and before is after:
            return "planned", Change(moved_bytes=0.0, lost_bytes=0.0, rollback=False, seconds=dict.fromkeys(PARTS, 0.0))
        dead = min(nodes - then, before.nodes)
        if then > nodes or self.noticed(before, saving):
            moved = self._movement(before, after, 0 if then > nodes else dead)[0]
            seconds = self._planned_s(before, after, saving)
            return "planned", Change(moved_bytes=moved.moved_bytes, lost_bytes=0.0, rollback=False, seconds=seconds)
        moved, lost = self._movement(before, after, dead)
        return "unplanned", Change(
            moved_bytes=moved.moved_bytes,
            lost_bytes=lost,
            rollback=self._goes_back(before, dead),
            seconds=self._failed_s(before, after, saving, dead),
        )

    def noticed(self, one: SizedLayout, saving: Saving) -> bool:
        """Whether the warning is long enough to end a step, and to write a checkpoint where there is no other way."""
        return 0.0 < self.availability.notice_s >= one.step_s + self._drain_s(saving)

    def most_s(self, one: SizedLayout, saving: Saving) -> float:
        """More seconds than any change to or from a layout takes."""
        o, problem = self.overheads, one.problem
        move_s = o.storage_s(problem)
        if o.live:  # no node takes more than the whole state
            move_s = max(move_s, SLOWNESS * checkpoint_bytes(problem) / node_bytes_per_s(problem))
        fixed_s = o.detect_s + o.grouping_s(one.layout) + o.warm_s
        return fixed_s + self._drain_s(saving) + move_s + saving.lost_s + one.step_s

    def _planned_s(self, before: SizedLayout, after: SizedLayout, saving: Saving) -> dict[str, float]:
        """Seconds of a move between two steps."""
        return self._seconds(after, drain=self._drain_s(saving), move=self._move_s(before, after, 0, back=False))

    def _failed_s(self, before: SizedLayout, after: SizedLayout, saving: Saving, dead: int) -> dict[str, float]:
        """Seconds of going on after `dead` nodes failed, 0: the job alone."""
        back = self._goes_back(before, dead)
        move_s = self._move_s(before, after, dead, back=back)
        return self._seconds(
            after, detect=self.overheads.detect_s, move=move_s, lost=saving.lost_s if back else 0.5 * before.step_s
        )

    def learn(self, before: SizedLayout, after: SizedLayout, nodes: int, then: int) -> bool:
        """Work out what the changes between two counts move, where that decides their seconds; False if it was known."""
        left = max(0, nodes - then)
        wanted = {0} if before is not after else set()
        wanted |= {min(left, before.nodes)} if left and before.nodes + left > nodes else set()
        new = [
            d for d in wanted if self.overheads.live and not self._loses(before, d) and (before, after, d) not in self._moved
        ]
        for dead in new:
            self._movement(before, after, dead)
        return bool(new)

    def _seconds(self, after: SizedLayout, **parts: float) -> dict[str, float]:
        fixed = {"group": self._of(after)[0], "warm": self.overheads.warm_s}
        return dict.fromkeys(PARTS, 0.0) | fixed | parts

    def _of(self, one: SizedLayout) -> tuple[float, float]:
        """Seconds to build the groups of a layout, and to read its checkpoint."""
        if one not in self._fixed:
            self._fixed[one] = self.overheads.grouping_s(one.layout), self.overheads.storage_s(one.problem)
        return self._fixed[one]

    def _drain_s(self, saving: Saving) -> float:
        """Seconds until a checkpoint is written, which live moves need not."""
        return 0.0 if self.overheads.live else saving.persist_s

    def _move_s(self, before: SizedLayout, after: SizedLayout, dead: int, *, back: bool) -> float:
        if back or not self.overheads.live:
            return self._of(after)[1]
        known = self._moved.get((before, after, dead))
        return 0.0 if known is None else move_seconds(known[0], after.problem.profile.cluster)

    def _goes_back(self, before: SizedLayout, dead: int) -> bool:
        """Whether training goes on from the last checkpoint."""
        return not self.overheads.live or not dead or self._loses(before, dead)

    def _loses(self, one: SizedLayout, dead: int) -> bool:
        """Whether so many failed nodes can take the last copy of something."""
        if dead and one not in self._holders:
            self._holders[one] = fewest_holders(self._holdings(one))
        return bool(dead) and self._holders[one] <= dead

    def _movement(self, before: SizedLayout, after: SizedLayout, dead: int) -> tuple[Movement, float]:
        """What a change moves, and what is lost with `dead` neighbouring nodes, those whose loss is greatest."""
        key = before, after, dead
        if key not in self._moved:
            old, new = self._holdings(before), self._holdings(after)
            lost, gone = _worst_loss(old, dead)
            alive = [node not in gone for node in range(old.nodes)] if dead else None
            self._moved[key] = movement(old, new, alive=alive), lost
        return self._moved[key]

    def _holdings(self, one: SizedLayout) -> Holdings:
        if one not in self._held:
            problem = one.problem
            self._held[one] = holdings(
                problem.model, problem.workload, one.layout, instances=one.instances, node_gpus=node_gpus(problem)
            )
        return self._held[one]


def _worst_loss(held: Holdings, dead: int) -> tuple[float, range]:
    """Most bytes that the loss of neighbouring nodes takes, and the nodes."""
    sets = [range(first, first + dead) for first in range(0, held.nodes - dead + 1, max(1, dead))] if dead else [range(0)]
    losses = [lost_bytes(held, gone) for gone in sets]
    return max(zip(losses, sets, strict=True), key=lambda pair: pair[0])
