"""Seconds of one generalised layer, forward and backward, as FSMoE compares schedules: attention, its communication, MoE layer.

Attention takes 1 ms + beta x FLOP forward and twice that backward; it gathers and scatters the tokens in each direction. The
gradients of the layer before travel in the backward of the dense part, in the MoE layer, or exposed, as the schedule says; what
each window takes of them is the best of all, nothing, and what fits the dense part. Every overlapped phase loses kappa of what
overlap gains: T + kappa (serial - T), serial in one chunk. FSMoE (ASPLOS 2025, arXiv 2501.10714), section 6. Units: seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from benchmarks.schedules.published import Workload
from moeplan.costmodels.moe.base import LayerSchedule, imperfect_s
from moeplan.costmodels.moe.constants import Constants
from moeplan.costmodels.moe.lina import pieces_of
from moeplan.costmodels.moe.schedules import find_schedule
from moeplan.costmodels.moe.two_stream import two_streams
from moeplan.costmodels.simulate import simulate
from moeplan.costmodels.tasks import parse_graph
from moeplan.planner.layers.study import DEGREES, Question, best

ATTENTION_S = 1e-3
"""What attention takes beside its GEMMs."""
SCHEDULES = ("tutel", "tutel-improved", "fsmoe-no-iio", "fsmoe")
"""Schedules of table 5, in its order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Iteration:
    """Layers on a testbed, numbers or arrays."""

    work: Workload
    constants: Constants
    kappa: float = 0.0

    def question(self, gradient_bytes: Any = 0.0) -> Question:
        """The MoE layer; its backward carries `gradient_bytes`."""
        layer = self.work.layer(self.constants)
        groups = {name: getattr(layer, name) for name in ("mp", "esp", "ep")}
        return Question(
            layer=layer,
            lines=self.constants.lines(gemms=layer.gemms, **groups),
            schedules=(),
            kappa=self.kappa,
            gradient_bytes=gradient_bytes,
            gradient=self.constants.given["gradient-all-reduce"],
        )

    @property
    def gradient_bytes(self) -> Any:
        """Gradients of a layer that a rank all-reduces."""
        return self.work.gradient_elements * self.constants.element_bytes / self.constants.groups["mp"]

    def dense_s(self) -> tuple[Any, Any]:
        """Attention with its gather and scatter, forward and backward."""
        given, groups = self.constants.given, self.constants.groups
        token_bytes = self.work.tokens * self.work.hidden * self.constants.element_bytes
        around = given["all-gather"].time_s(token_bytes) + given["reduce-scatter"].time_s(token_bytes)
        forward = ATTENTION_S + given["gemm"].unit_s * self.work.attention_flop / groups["mp"]
        return forward + around, 2.0 * forward + around

    def seconds(self, name: str) -> Any:
        """Forward and backward of the layer under a schedule of `SCHEDULES`, a serial one, or "lina"."""
        schedule = find_schedule(name)
        if name == "lina":
            return self._lina_s()
        dense_forward, dense_backward = self.dense_s()
        forward, _ = best(self.question(), schedule, "forward")
        if name in ("fsmoe", "fsmoe-no-iio"):
            return dense_forward + forward + self._partitioned_s(schedule, dense_backward)
        backward, _ = best(self.question(), schedule, "backward")
        gradient_s = self.question(self.gradient_bytes).gradient_s()
        beside = dense_backward + gradient_s
        if name == "tutel-improved":
            beside = imperfect_s(np.maximum(dense_backward, gradient_s), beside, self.kappa)
        return dense_forward + forward + backward + beside

    def _partitioned_s(self, schedule: LayerSchedule, dense_s: Any) -> Any:
        """Backward with the gradients cut between the dense part and the MoE layer."""
        line, everything = self.constants.given["gradient-all-reduce"], self.gradient_bytes
        fits = np.clip((dense_s - line.startup_s) / line.unit_s, 0.0, everything)
        found: Any = np.inf
        for here in (fits, 0.0 * fits, everything + 0.0 * fits):
            beside_s = self.question(here).gradient_s()
            dense = imperfect_s(np.maximum(dense_s, beside_s), dense_s + beside_s, self.kappa)
            moe, _ = best(self.question(everything - here), schedule, "backward")
            found = np.minimum(found, dense + moe)
        return found

    def _lina_s(self) -> Any:
        """PipeMoE with Lina's gradients: pieces of at most 30 MB from the start of the backward on."""
        shapes = np.broadcast_shapes(*(np.shape(getattr(self.work, name)) for name in self.work.__slots__))
        values = {name: np.broadcast_to(getattr(self.work, name), shapes).ravel() for name in self.work.__slots__}
        rows = [
            replace(self, work=Workload(**{k: float(v[i]) for k, v in values.items()})) for i in range(values["hidden"].size)
        ]
        return np.reshape([row.lina_once_s() for row in rows], shapes)

    def lina_once_s(self) -> float:
        """The same for one layer, simulated."""
        pipemoe = find_schedule("pipemoe")
        dense_forward, dense_backward = self.dense_s()
        forward, _ = best(self.question(), pipemoe, "forward")
        pieces = int(pieces_of(self.gradient_bytes))
        question = self.question(self.gradient_bytes)
        size, piece_s = question.layer.size, float(question.gradient_s(pieces))
        serial_s = dense_backward + pieces * piece_s
        serial_s += pipemoe.serial_seconds(1, pipemoe.parts(size, question.lines, 1, "backward"), size)
        spans = []
        for degree in DEGREES:
            parts = {**pipemoe.parts(size, question.lines, degree, "backward"), "R": piece_s, "N": dense_backward}
            spans.append(simulate(parse_graph(lina_graph(degree, pieces)), parts).makespan_s)
        return float(dense_forward + forward + imperfect_s(min(spans), serial_s, self.kappa))


def lina_graph(degree: int, pieces: int) -> str:
    """The dense backward N, then two streams of `degree` chunks; pieces of gradients yield to all-to-alls that are ready."""
    text = f"N1@compute {two_streams(degree)} "
    for i in range(1, degree + 1):
        text = text.replace(f"D{i}@inter+intra ", f"D{i}@inter+intra<N1 ")
    return text + " ".join(f"R{i}@inter+intra!-1" for i in range(1, pieces + 1))


def speedups(work: Workload, constants: Constants, kappa: float) -> dict[str, float]:
    """Mean speed-up over Tutel of the schedules of table 5."""
    run = Iteration(work=work, constants=constants, kappa=kappa)
    tutel = run.seconds("tutel")
    return {name: float(np.mean(tutel / run.seconds(name))) for name in SCHEDULES}


def fitted_kappa(work: Workload, constants: Constants, speedup: float) -> float:
    """The kappa at which FSMoE's mean speed-up over Tutel is `speedup`; the more of it, the less overlap brings."""
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2.0
        run = Iteration(work=work, constants=constants, kappa=middle)
        too_quick = float(np.mean(run.seconds("tutel") / run.seconds("fsmoe"))) > speedup
        low, high = (middle, high) if too_quick else (low, middle)
    return high


def unequal_degrees(work: Workload, constants: Constants, degrees: tuple[int, ...]) -> int:
    """Layers whose best number of chunks under FSMoE differs by direction, without gradients."""
    question = replace(Iteration(work=work, constants=constants).question(), degrees=degrees)
    fsmoe = find_schedule("fsmoe")
    forward, backward = (best(question, fsmoe, direction)[1] for direction in ("forward", "backward"))
    return int(np.count_nonzero(forward != backward))
