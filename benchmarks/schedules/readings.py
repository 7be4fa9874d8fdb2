"""Readings of the model beside other publications: Parm's S1 and S2, PipeMoE's solver, FSMoE's gradient partitioning.

Parm's grid of 1296 layers and its fits are not public: a grid of the same kind with the constants of FSMoE's testbed B stands
in, the cluster of the same group. PipeMoE's constants and solver are public; the solver's answers are stored vectors.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.schedules.published import fits_of, vectors
from moeplan.costmodels.moe.base import AlphaBeta, Lines, MoeSize
from moeplan.costmodels.moe.choice import best_degree
from moeplan.costmodels.moe.gradients import BackwardLayer, Slot, exposed_s, greedy, partition
from moeplan.costmodels.moe.schedules import find_schedule
from moeplan.planner.layers.study import Layer, Question, study
from moeplan.units import MS

FP32 = 4
LAYOUTS = ("baseline", "replicated-baseline", "deepspeed", "s1", "s2", "hierarchical")
FREE = AlphaBeta(startup_s=0.0, unit_s=0.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Parm:
    """A grid of layers under the serial layouts, [layers]."""

    mp: Any
    esp: Any
    factor: Any
    """k f"""
    seconds: Mapping[str, Any]
    """Forward and backward by layout."""

    @property
    def dedicated_s(self) -> Any:
        """The quicker of S1 and S2."""
        return np.minimum(self.seconds["s1"], self.seconds["s2"])

    def ratios(self, over: str) -> Any:
        """How much quicker than `over` the quicker of S1 and S2 is, where any rank shares tokens or experts."""
        return (self.seconds[over] / self.dedicated_s)[(self.mp > 1) | (self.esp > 1)]


def parm() -> Parm:
    """S1, S2 and their rivals on testbed B: groups of Parm's experiments, sizes as in FSMoE's grid."""
    rows = itertools.product(
        (8, 16, 32), (1, 2, 4), (1, 2, 4), (1, 4), (512, 1024), (1024, 2048, 4096), (1, 4), (1.2, 2.4, 4.8)
    )
    columns = (np.array(column, np.float64) for column in zip(*rows, strict=True))
    ranks, mp, esp, batch, seq_len, hidden, ratio, factor = columns
    constants = fits_of("b")
    layer = Layer(
        tokens=batch * seq_len, hidden=hidden, expert_hidden=ratio * hidden, topk=1, capacity_factor=factor, gemms=2, mp=mp,
        esp=esp, ep=ranks / esp, element_bytes=FP32,
    )  # fmt: skip
    lines = constants.lines(gemms=2, mp=mp, esp=esp, ep=layer.ep)
    question = Question(layer=layer, lines=lines, schedules=tuple(find_schedule(name) for name in LAYOUTS))
    return Parm(mp=mp, esp=esp, factor=factor, seconds={row.schedule.name: row.total_s for row in study(question)})


@dataclass(frozen=True, kw_only=True, slots=True)
class Solved:
    """Seconds of PipeMoE's layers, [settings]: enumerated by the model, as stored with the vectors, by the public solver."""

    ours_s: Any
    stored_s: Any
    solver_s: Any
    failed: Any
    """Whether the solver found nothing."""


def pipemoe() -> Solved:
    """Enumeration of r = 1..64 on the published constants, beside the answers of the published SLSQP solver."""
    at, fits = vectors("pipemoe_goldens"), vectors("pipemoe_solver_constants")
    by_name = dict(zip(fits["name"], zip(fits["alpha_s"], fits["beta_s_per_byte"], strict=True), strict=True))
    gemm = next(value for name, value in by_name.items() if name.startswith("GEMM"))
    pairs = np.array([by_name[f"AlltoAll 100GbIB {ranks:.0f} GPUs"] for ranks in at["P"]])
    tokens = at["B"] * at["L"]
    slots = at["k"] * at["f"] * tokens * at["M"]
    size = MoeSize(
        token_bytes=tokens * at["M"] * FP32,
        slot_bytes=slots * FP32,
        expert_flop=2.0 * 2.0 * slots * at["H"],
        mp_ranks=1,
        esp_ranks=1,
        ep_ranks=at["P"],
    )
    exchange = AlphaBeta(startup_s=pairs[:, 0], unit_s=pairs[:, 1])
    # The published slope is over 4 bytes for each MAC, which is 2 FLOP; an expert has two GEMMs.
    experts = AlphaBeta(startup_s=2.0 * gemm[0], unit_s=gemm[1] * FP32 / 2.0)
    lines = Lines(
        exchange=exchange, fused_exchange=exchange, gather=FREE, scatter=FREE, reduce=FREE, mp_gather=FREE, experts=experts
    )
    _, ours_s = best_degree(find_schedule("pipemoe"), size, lines, "forward", range(1, 65))
    failed = at["r_ref"] < 0
    return Solved(ours_s=ours_s, stored_s=at["t_exh_ms"] * MS, solver_s=np.abs(at["t_ref_ms"]) * MS, failed=failed)


@dataclass(frozen=True, kw_only=True, slots=True)
class Gradients:
    """One instance of gradient partitioning, seconds."""

    name: str
    exposed_s: float
    greedy_s: float
    """The paper's first step."""
    best_s: float
    """The optimum of the model."""
    stored_s: float
    """The optimum stored with the vectors, of two other programs."""


def gradients() -> list[Gradients]:
    """The instances of the vectors: two layers each, sizes of GPT2-XL and Mixtral on both testbeds."""
    at = vectors("fsmoe_gradient_partition_goldens")
    out = []
    degrees = np.array((1, 2, 4, 8))
    fsmoe = find_schedule("fsmoe")
    for i, testbed_name in enumerate(at["testbed"]):
        row = {key: values[i] for key, values in at.items()}
        names = {"D": "a", "G": "g", "E": "e_bwd", "S": "s", "C": "a"}
        parts = {kind: (row[f"{n}_alpha"] + row[f"{n}_betan"] / degrees) * MS for kind, n in names.items()}
        size = MoeSize(token_bytes=0.0, slot_bytes=0.0, expert_flop=0.0, mp_ranks=1, esp_ranks=1, ep_ranks=1)
        alone, busy = fsmoe.seconds(degrees, parts, size), degrees * (parts["D"] + parts["C"])
        moe = Slot(alone_s=tuple(alone.tolist()), busy_s=tuple(busy.tolist()))
        sent = row["grad_elems_per_layer"] * FP32
        layers = [BackwardLayer(dense_s=row["dense_bwd_ms"] * MS, moe=moe, gradient_bytes=sent)] * int(row["n_layers"])
        line = AlphaBeta(startup_s=row["ar_alpha"] * MS, unit_s=row["ar_beta"] * MS / FP32)
        out.append(
            Gradients(
                name=f"{testbed_name}, {row['model'].removesuffix('-like')}, B = {row['B']:.0f}",
                exposed_s=exposed_s(layers, line),
                greedy_s=greedy(layers, line).total_s,
                best_s=partition(layers, line).total_s,
                stored_s=row["t_dp_ms"] * MS,
            )
        )
    return out
