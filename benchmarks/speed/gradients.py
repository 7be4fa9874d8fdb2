"""Seconds to partition the gradients of many layers: `python -m benchmarks.speed.gradients`.

Layers of FSMoE with random fits of their operations, in 4 or 8 numbers of chunks, and gradients that about fill the windows,
where the choice is hardest. Equal ones, and unequal ones: the mixed-integer programme with each solver that is there, and the
dynamic programme.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable, Sequence
from unittest import mock

import numpy as np

from moeplan.costmodels.moe.base import AlphaBeta
from moeplan.costmodels.moe.fsmoe import inter_node_s, three_stream_s
from moeplan.costmodels.moe.gradients import BackwardLayer, Partition, Slot, partition
from moeplan.planner.partition import gradients_by_milp

LINE = AlphaBeta(startup_s=0.511e-3, unit_s=1.238e-9)
"""All-reduce among 48 A6000 (FSMoE, arXiv 2501.10714, figure 5)."""
DEGREES = {4: (1, 2, 4, 8), 8: tuple(range(1, 9))}


def random_layer(rng: np.random.Generator, degrees: Sequence[int]) -> BackwardLayer:
    """A layer whose operations take 0.02 to 0.5 ms to start and 0.2 to 10 ms in all."""
    r = np.array(degrees, float)
    parts = {kind: (rng.uniform(0.02, 0.5) + rng.uniform(0.2, 10.0) / r) * 1e-3 for kind in "DGES"}
    parts["C"] = parts["D"]
    moe = Slot(alone_s=tuple(three_stream_s(r, parts).tolist()), busy_s=tuple(inter_node_s(r, parts).tolist()))
    return BackwardLayer(dense_s=rng.uniform(1.0, 15.0) * 1e-3, moe=moe, gradient_bytes=rng.uniform(0.2, 2.0) * 1e7)


def instances(count: int, chunkings: int, equal: bool, repeats: int) -> list[list[BackwardLayer]]:
    """`repeats` models of `count` layers."""
    rng = np.random.default_rng(0)
    degrees = DEGREES[chunkings]
    if equal:
        return [[random_layer(rng, degrees)] * count for _ in range(repeats)]
    return [[random_layer(rng, degrees) for _ in range(count)] for _ in range(repeats)]


def with_cbc(layers: Sequence[BackwardLayer], line: AlphaBeta) -> Partition | None:
    """The programme with the solver that PuLP brings."""
    with mock.patch("pulp.listSolvers", lambda onlyAvailable: ["PULP_CBC_CMD"]):
        return gradients_by_milp(layers, line)


def seconds(
    solve: Callable[[Sequence[BackwardLayer], AlphaBeta], Partition | None], models: list[list[BackwardLayer]]
) -> np.ndarray:
    """Seconds of each model; refuses an answer that is not the optimum."""
    out = []
    for layers in models:
        started = time.perf_counter()
        found = solve(layers, LINE)
        out.append(time.perf_counter() - started)
        assert found is not None and found.total_s <= partition(layers, LINE).total_s * (1.0 + 1e-7)
    return np.array(out)


def main() -> None:
    """Print the median and the longest time of each way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=20)
    asked = parser.parse_args()
    ways = {"dynamic programme": partition, "MILP, CBC": with_cbc}
    if importlib.util.find_spec("highspy") is not None:
        ways["MILP, HiGHS"] = gradients_by_milp
    for chunkings in DEGREES:
        for equal in (True, False):
            models = instances(asked.layers, chunkings, equal, asked.repeats)
            kind = f"{asked.layers} {'equal' if equal else 'unequal'} layers, {chunkings} chunkings"
            for name, solve in ways.items():
                took = seconds(solve, models) * 1e3
                print(f"{kind:>33}, {name:<17}: median {np.median(took):5.0f} ms, longest {took.max():5.0f} ms", flush=True)


if __name__ == "__main__":
    main()
