"""Chapters of docs/schedules.md: what each schedule is, then the model beside one publication after the other."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from benchmarks.accuracy.report import Section, Table
from benchmarks.schedules import published, readings
from benchmarks.schedules.iteration import SCHEDULES, Iteration, fitted_kappa, speedups, unequal_degrees
from benchmarks.schedules.published import MODELS, NAMES, TESTBEDS, fits_of, grid, model_runs
from moeplan.costmodels.moe.base import LayerSchedule
from moeplan.costmodels.moe.constants import Constants
from moeplan.costmodels.moe.megatron_overlap import PairSchedule
from moeplan.costmodels.moe.schedules import PAIR_SCHEDULES
from moeplan.costmodels.moe.schedules import SCHEDULES as ALL
from moeplan.costmodels.moe_choice import IDEAL
from moeplan.units import GB, MS, TERA, US

EQUATIONS = {
    "baseline": "G(BLM esp) + 2 A(ETM esp) + e + R(ETM esp), FLOP x 1",
    "replicated-baseline": "2 A(ETM) + e + R(ETM), FLOP / esp",
    "deepspeed": "2 A(ETM/mp) + G(ETM esp/mp) + e + R(ETM esp/mp) + G(ETM)",
    "s1": "2 A(y) + e + G(BLM), y = ETM esp/mp",
    "s2": "A(y) + e + A/p + G/p + (1 - 1/p) max(A, G), G of ETM, p = ranks",
    "hierarchical": "2 a + g + e + s (+ G(BLM))",
    "tutel": "T2(r) + R",
    "tutel-improved": "T2(r) + max(R, dense) - dense",
    "pipemoe": "T2(r) = max{d + e + q + (r-1) max(d, e, q), r (d+q) + R}, d = a + g, q = s + a",
    "lina": "none: all-to-alls first, R in pieces of 30 MB, simulated",
    "fsmoe-no-iio": "T2(r), R as partitioned",
    "fsmoe": "T(r) = max{2a+g+e+s + (r-1) max(a,g,e,s), 2a+g+s + (r-1)(max(a,g) + max(a,s)), 2ra + R}",
    "flowmoe": "max{t+d+e+c + (m-1) max(t,d,e,c), mt+e+c + (m-1) max(e,c), t+d + (m-1) max(t,d) + mc}",
    "shared-overlap": "max(a+g, x) + e + max(s+a, y), x and y the halves of the shared experts",
    "comet": "T(r) without start-ups, r the number of tiles",
    "1f1b-overlap": "recurrence of two micro-batches, one layer each",
    "1f1b-overlap-delayed": "the same, weight gradients after the backward dispatch",
}
"""Seconds of one direction. a, g, e, s are those of a chunk, A, G and R of whole buffers."""
FACTORS = {"a": 2.0, "b": 2.4}
"""k f at which table 2 was run, which the paper does not say: what fits it."""
OPERATIONS = ("AlltoAll", "AllGather", "ReduceScatter", "Experts", "AllReduce")


def schedules() -> Section:
    """Every schedule in a line."""
    every: tuple[LayerSchedule | PairSchedule, ...] = (*ALL, *PAIR_SCHEDULES)
    rows = [(f"`{s.name}`", s.title, EQUATIONS[s.name], s.source, _runs_on(s.name, s.runs_on)) for s in every]
    text = (
        "Of one MoE layer, one direction: B L tokens of width M in each tensor-parallel group of mp ranks; E experts with "
        "T slots each, E T = k f B L; experts cut among esp ranks, ep groups of which share them. A an all-to-all, G an "
        "all-gather, R an all-reduce, each alpha + beta x bytes; in r chunks a chunk takes a (all-to-all), g (gather), e "
        "(experts), s (reduce-scatter), and R is the gradient all-reduce that backward carries. Backward moves the same "
        "bytes and takes the experts' alpha and beta twice. `moeplan schedule` prices all of them for a layer.",
    )
    columns = ("schedule", "what it does", "seconds", "source", "runs on")
    return Section(title="The schedules", text=text, tables=(Table(columns=columns, rows=tuple(rows), wide=columns[1:]),))


def _runs_on(name: str, targets: tuple[str, ...]) -> str:
    return "nothing: an ideal" if name == IDEAL else ", ".join(targets) or "research code"


def constants() -> Section:
    """The fits of both testbeds."""
    rows = []
    for name in TESTBEDS:
        for operation, line in fits_of(name).given.items():
            scale, unit = (TERA, "TFLOP/s") if operation == "gemm" else (GB, "GB/s")
            rate = f"{1.0 / line.unit_s / scale:.3g} {unit}"
            rows.append((f"{NAMES[name]}, {operation}", f"{line.startup_s / US:.1f}", rate))
    text = (
        "FSMoE's figure 5, after the corrections listed at the end: A has 48 A6000 (mp = esp = 8, ep = 6), B has 32 RTX "
        "2080 Ti (mp = esp = 4, ep = 8), all in float32. `moeplan schedule --constants fsmoe-a` uses them.",
    )
    return Section(
        title="Constants", text=text, tables=(Table(columns=("testbed", "alpha, us", "1 / beta"), rows=tuple(rows)),)
    )


def predicted_breakdown() -> Mapping[tuple[str, str, str, str], float]:
    """Seconds of the cells of table 2 by the model."""
    out: dict[tuple[str, str, str, str], float] = {}
    for name in TESTBEDS:
        fits = fits_of(name)
        mp, given = fits.groups["mp"], fits.given
        for model in ("GPT2-XL", "Mixtral-7B"):
            sizes = MODELS[model]
            tokens, width = 4.0 * 1024.0, sizes["hidden"]
            token_bytes, flop = (
                tokens * width * fits.element_bytes,
                2.0 * sizes["gemms"] * tokens * width * sizes["expert_hidden"],
            )
            slot_bytes, slot_flop = FACTORS[name] * token_bytes, FACTORS[name] * flop / mp
            lines = fits.lines(gemms=sizes["gemms"], **fits.groups)
            sent = sizes["attention"] * width**2 / mp * fits.element_bytes
            for direction, passes in (("forward", 1.0), ("backward", 2.0)):
                cells = {
                    "AlltoAll": 2.0 * lines.exchange.time_s(slot_bytes / mp),
                    # Among esp around the experts, and among mp around attention.
                    "AllGather": lines.gather.time_s(slot_bytes) + lines.gather.time_s(token_bytes),
                    "ReduceScatter": lines.scatter.time_s(slot_bytes) + lines.scatter.time_s(token_bytes),
                    "Experts": passes * lines.experts.time_s(slot_flop),
                    "AllReduce": (passes - 1.0) * given["gradient-all-reduce"].time_s(sent),
                }
                paper = "GPT2-XL-MoE" if model == "GPT2-XL" else model
                out |= {(name, paper, direction, operation): float(seconds) for operation, seconds in cells.items()}
    return out


def breakdown() -> Section:
    """Table 2."""
    told, made = published.breakdown(), predicted_breakdown()
    rows = []
    for name, model, operation in dict.fromkeys((k[0], k[1], k[3]) for k in told if k[3] in OPERATIONS):
        cells = [f"{NAMES[name]}, {model}, {operation}"]
        for direction in ("forward", "backward"):
            key = (name, model, direction, operation)
            seen, ours = told[key], made[key]
            cells += [f"{seen / MS:.2f}", f"{ours / MS:.2f}", f"{ours / seen:.2f}"] if seen else ["0", "0", ""]
        rows.append(tuple(cells))
    ratios = [made[key] / seen for key, seen in told.items() if key[3] in OPERATIONS and seen]
    passes = [
        told[k[:2] + ("backward", "Experts")] / seen for k, seen in told.items() if k[2:] == ("forward", "Experts")
    ]  # fmt: skip
    text = (
        f"FSMoE's table 2, ms of one layer (B = 4, L = 1024). The paper does not print k f: {FACTORS['a']:g} on A and "
        f"{FACTORS['b']:g} on B fit. The {len(ratios)} cells lie at {min(ratios):.2f} to {max(ratios):.2f} of the published "
        f"values. Experts take {', '.join(f'{p:.2f}' for p in passes)} times as long backward, hence the factor 2. "
        "Attention, routing and ordering are no part of the model.",
    )
    columns = ("cell", *(f"{d} {what}" for d in ("forward", "backward") for what in ("published", "model", "ratio")))
    return Section(title="FSMoE: where the time goes", text=text, tables=(Table(columns=columns, rows=tuple(rows)),))


def calibrated(name: str) -> tuple[Constants, float]:
    """A testbed and its one fitted number, kappa."""
    told = {row["schedule"]: float(row["over_tutel"]) for row in published.table("table5") if row["testbed"] == name}
    fits = fits_of(name)
    return fits, fitted_kappa(grid(name), fits, told["fsmoe"])


def layers() -> Section:
    """Table 5, and the share of layers whose chunks differ by direction."""
    rows = []
    for name in TESTBEDS:
        told = {row["schedule"]: float(row["over_tutel"]) for row in published.table("table5") if row["testbed"] == name}
        fits, kappa = calibrated(name)
        ideal, real, padded = (
            speedups(work, fits, k) for work, k in ((grid(name), 0.0), (grid(name), kappa), (grid(name, 2.0), kappa))
        )
        for schedule in SCHEDULES:
            cells = (f"{told[schedule]:.2f}", f"{ideal[schedule]:.3f}", f"{real[schedule]:.3f}", f"{padded[schedule]:.3f}")
            rows.append((f"{NAMES[name]}, {schedule}, kappa = {kappa:.3f}", *cells))
    counts = [unequal_degrees(grid("b", star), fits_of("b"), tuple(range(1, 9))) for star in (1.0, 2.0)]
    few = [unequal_degrees(grid("b", star), fits_of("b"), (1, 2, 4, 8)) for star in (1.0, 2.0)]
    text = (
        f"FSMoE's table 5: mean speed-up over Tutel on {grid('a').batch.size} layers (3^6 x 2). With perfect overlap the "
        "model promises too much. One number a testbed mends it: kappa, the part of what overlap gains that is lost, T + "
        "kappa (serial - T), serial being the same layer in one chunk; it is fitted to the row of fsmoe alone, the other "
        "rows follow. k f is f, 1 where the paper drops no token (last column: 2). Attention takes 1 ms + beta x FLOP, "
        "twice backward, and gathers and scatters its tokens; r is 1, 2, 4 or 8.",
        f"The best numbers of chunks differ between forward and backward in {published.UNEQUAL} of {published.LAYERS} layers "
        f"(measured on B); the model has {counts[0]} or {counts[1]} with r in 1..8 (k f = 1 or 2 where no token is dropped), "
        f"{few[0]} or {few[1]} with r in 1, 2, 4, 8.",
    )
    columns = ("testbed, schedule", "published", "perfect overlap", "with kappa", "with kappa, k f = 2")
    return Section(title="FSMoE: 1458 layers", text=text, tables=(Table(columns=columns, rows=tuple(rows)),))


def real_models() -> Section:
    """Speed-ups on whole models."""
    machines = {name: calibrated(name) for name in TESTBEDS}
    rows = []
    for row in published.table("real_models"):
        ratios = []
        for name in row["testbeds"]:
            fits, kappa = machines[name]
            length = int(row["seq_len"]) if row["seq_len"] else None
            run = Iteration(work=model_runs(name, length), constants=fits, kappa=kappa)
            ratios += np.ravel(run.seconds(row["over"]) / run.seconds("fsmoe")).tolist()
        where = f"{' and '.join(NAMES[name] for name in row['testbeds'])}" + (
            f", L = {row['seq_len']}" if row["seq_len"] else ""
        )
        told = float(row["speedup"])
        rows.append(
            (f"{row['over']}, {where}", f"{told:.2f}", f"{np.mean(ratios):.2f}", f"{np.mean(ratios) / told - 1:+.1%}",
             f"{min(ratios):.2f} - {max(ratios):.2f}")
        )  # fmt: skip
    over = [
        ratio
        for name, (fits, kappa) in machines.items()
        for run in [Iteration(work=model_runs(name), constants=fits, kappa=kappa)]
        for ratio in np.ravel(run.seconds("replicated-baseline") / run.seconds("fsmoe")).tolist()
    ]
    low, high = published.DEEPSPEED_RANGE
    text = (
        "FSMoE over other schedules on GPT2-XL, Mixtral-7B and Mixtral-22B (the last on A only), section 6.4: B = 1, k = "
        "2, f = 1.2, L = 1024 on A and 256 on B; one layer of each by the model, with the kappa above. Nothing is fitted "
        f"here. Over DS-MoE the paper's range over all of them is {low:g} to {high:g}, the model's {min(over):.2f} to "
        f"{max(over):.2f}. The paper's DS-MoE is priced as `replicated-baseline`, whose redundant all-to-all explains its "
        "growth with L; PipeMoE+Lina as two streams with pieces of 30 MB that start with the backward. That one the model "
        "rates better than the paper measured: all layers but the largest have less than 30 MB of gradients, of which "
        "Lina cuts nothing, and nothing that priorities cost on real streams is in the model. Bars of the "
        "paper's figures 6 to 8 exist as pictures only; pipeline parallelism, numbers of GPUs and gates are not compared.",
    )
    columns = ("FSMoE over", "published", "model", "error", "range over models")
    return Section(title="FSMoE: whole models", text=text, tables=(Table(columns=columns, rows=tuple(rows)),))


def parm() -> Section:
    """S1 and S2 over the baselines, and over each other."""
    found = readings.parm()
    rows = []
    for name in ("baseline", "replicated-baseline", "deepspeed", "hierarchical"):
        r = found.ratios(name)
        rows.append((name, f"{r.min():.2f}", f"{np.median(r):.2f}", f"{r.max():.2f}"))
    wins = []
    for factor in (1.2, 2.4, 4.8):
        here = found.factor == factor
        first = (found.seconds["s1"] < found.seconds["s2"])[here & (found.mp > 1)].mean()
        inner = (found.seconds["hierarchical"] < found.dedicated_s)[here & (found.esp > 1)].mean()
        wins.append((f"{factor:g}", f"{first:.0%}", f"{inner:.0%}"))
    low, high = published.PARM_RANGE
    text = (
        f"Parm (INFOCOM 2024) reports {low} to {high} over DeepSpeed-MoE on 1296 layers; its tables, its grid and its fits "
        f"could not be had, so this is a reading, not a comparison: {found.mp.size} layers on 8 to 32 ranks of testbed B "
        "(mp and esp 1, 2, 4; experts of two GEMMs included). Which of its two baselines a ratio means must be said: "
        "`baseline` computes every token mp times, `replicated-baseline` does not.",
        "S1 wins over S2 only where slots are many (k f large), esp < mp, and the node's own links are slow: S1 iff A + G1 "
        "< O, at large size beta_g (1 - 1/(k f)) > beta_a esp/mp. FSMoE's hierarchical layout is the third candidate: it "
        "wins at large size where beta_a (1 - 1/esp) > beta_g.",
    )
    tables = (
        Table(columns=("min(S1, S2) quicker than", "least", "median", "most"), rows=tuple(rows)),
        Table(columns=("k f", "S1 before S2 (mp > 1)", "hierarchical before both (esp > 1)"), rows=tuple(wins)),
    )
    return Section(title="Parm: S1 and S2", text=text, tables=tables)


def pipemoe() -> Section:
    """The solver of PipeMoE beside enumeration."""
    solved = readings.pipemoe()
    worse = (solved.solver_s / solved.ours_s)[~solved.failed]
    longer, failed = np.count_nonzero(worse > 1.0 + 1e-9), np.count_nonzero(solved.failed)
    text = (
        f"PipeMoE (INFOCOM 2023) finds r with SLSQP. On {solved.failed.size} of its settings with its constants, enumeration "
        f"of r = 1..64 is never slower; the solver's answer takes longer in {longer}, by up to {worse.max() - 1.0:.0%}, and in "
        f"{failed} it fails (with a current SciPy).",
    )
    return Section(title="PipeMoE: enumeration instead of a solver", text=text)


def gradients() -> Section:
    """Gradient partitioning."""
    rows = [
        (g.name, *(f"{s / MS:.3f}" for s in (g.exposed_s, g.greedy_s, g.best_s)), f"{g.greedy_s / g.best_s - 1.0:.1%}")
        for g in readings.gradients()
    ]
    text = (
        "Two layers each, inputs from the tables above, ms. The paper's first step fills windows greedily, then "
        "differential evolution looks for more; moeplan takes the optimum. Two other programs, a MILP and a dynamic "
        "programme over quanta, agree with it.",
    )
    columns = ("instance", "all exposed", "first step", "optimum", "first step above it")
    return Section(title="FSMoE: gradient partitioning", text=text, tables=(Table(columns=columns, rows=tuple(rows)),))
