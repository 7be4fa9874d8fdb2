"""The MoE layers that the ranks of the tests run: schedules x placements x chunks x loads."""

from __future__ import annotations

from dataclasses import dataclass

from moeplan.runtime.moe_tasks import WAYS
from moeplan.runtime.placement import Placement
from moeplan.runtime.reference import LayerShape

SHAPE = LayerShape(hidden=12, expert_hidden=10, experts=8, topk=3)
PLAIN = LayerShape(hidden=12, expert_hidden=7, experts=4, topk=2, gated=False, renormalised=False)
EVEN = LayerShape(hidden=16, expert_hidden=8, experts=8, topk=2)
# ep, esp, mp, replicas
PLACEMENTS = {
    2: [(2, 1, 1, 1), (1, 2, 2, 1), (2, 1, 2, 1), (1, 2, 1, 1), (1, 1, 1, 2)],
    4: [(2, 2, 2, 1), (2, 2, 1, 1), (2, 2, 4, 1), (4, 1, 2, 1), (1, 4, 2, 1), (2, 1, 2, 2), (1, 2, 2, 2)],
    8: [(2, 4, 2, 1), (4, 2, 4, 1), (2, 2, 4, 2)],
}
BALANCED = [(2, 4, 2, 1), (1, 2, 2, 1), (2, 1, 2, 1), (2, 2, 2, 1), (2, 2, 4, 1), (2, 2, 1, 1)]
CHUNKED = ("tutel", "tutel-improved", "pipemoe", "fsmoe-no-iio", "fsmoe")
DEGREES = {"fsmoe": (3, 2), "pipemoe": (2, 4), "tutel": (1, 3), "tutel-improved": (2, 1), "fsmoe-no-iio": (2, 2)}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One layer."""

    name: str
    placement: Placement
    schedule: str
    tokens: tuple[int, ...]
    shape: LayerShape = SHAPE
    degrees: tuple[int, int] = (1, 1)
    balanced: bool = False
    as_module: bool = False


def cases() -> list[Case]:
    out = []
    for lists in PLACEMENTS.values():
        for ep, esp, mp, replicas in lists:
            placement = Placement(ep=ep, esp=esp, mp=mp, replicas=replicas)
            groups = placement.world // mp
            at = f"ep{ep}-esp{esp}-mp{mp}-x{replicas}"
            for i, schedule in enumerate(WAYS):
                # Uneven, not divisible by mp; the last group has none where there are others.
                tokens = tuple(0 if g == groups - 1 > 0 and i % 2 else 7 + 4 * g for g in range(groups))
                out.append(
                    Case(
                        name=f"{schedule}-{at}",
                        placement=placement,
                        schedule=schedule,
                        tokens=tokens,
                        shape=PLAIN if i % 3 == 1 and 4 % ep == 0 else SHAPE,
                        degrees=DEGREES.get(schedule, (1, 1)),
                        as_module=schedule in ("s2", "fsmoe-no-iio"),
                    )
                )
                if (ep, esp, mp, replicas) not in BALANCED:
                    continue
                out.append(
                    Case(
                        name=f"{schedule}-{at}-balanced",
                        placement=placement,
                        schedule=schedule,
                        tokens=(64,) * groups,
                        shape=EVEN,
                        degrees=(2, 4) if schedule in CHUNKED else (1, 1),
                        balanced=True,
                    )
                )
    return out


CASES = cases()
