"""Schedules of MoE layers chosen per second on one core: `python -m benchmarks.speed.schedules`.

Each layer is priced forward and backward in the layouts without overlap (baseline, DeepSpeed, S1, S2, hierarchical) and in
FSMoE's three streams at 1, 2, 4 and 8 chunks, in double precision. Sizes are random; lines of FSMoE's testbed A (48 A6000).
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from moeplan.costmodels.moe.base import AlphaBeta, Lines, MoeSize
from moeplan.costmodels.moe.choice import CANDIDATES, best_choice

LINES = Lines(
    exchange=AlphaBeta(startup_s=2.87e-4, unit_s=5.80e-10),
    fused_exchange=AlphaBeta(startup_s=4.0e-4, unit_s=5.80e-10),
    gather=AlphaBeta(startup_s=3.37e-4, unit_s=5.87e-11),
    scatter=AlphaBeta(startup_s=3.95e-4, unit_s=5.54e-11),
    reduce=AlphaBeta(startup_s=7.32e-4, unit_s=1.14e-10),
    mp_gather=AlphaBeta(startup_s=3.37e-4, unit_s=5.87e-11),
    experts=AlphaBeta(startup_s=1.28e-4, unit_s=4.58e-14),
)


def layers(count: int, seed: int = 0) -> tuple[MoeSize, np.ndarray]:
    """`count` random layers, and the gradient all-reduce of each."""
    rng = np.random.default_rng(seed)
    token_bytes = rng.uniform(1e6, 1e8, count)
    slot_bytes = token_bytes * rng.choice([1.0, 1.2, 2.0, 2.4, 4.0], count)
    size = MoeSize(
        token_bytes=token_bytes,
        slot_bytes=slot_bytes,
        expert_flop=slot_bytes * rng.uniform(1e3, 1e4, count),
        mp_ranks=rng.choice([1, 2, 4, 8], count),
        esp_ranks=rng.choice([1, 2, 4, 8], count),
        ep_ranks=rng.choice([2, 4, 8, 16], count),
    )
    return size, rng.uniform(0.0, 2e-2, count)


def choose(count: int) -> tuple[float, np.ndarray]:
    """Seconds for `count` layers, forward and backward, and how often each schedule is the quickest forward."""
    size, gradient_s = layers(count)
    started = time.perf_counter()
    forward, _, forward_s = best_choice(size, LINES, "forward")
    _, _, backward_s = best_choice(size, LINES, "backward", gradient_s=gradient_s)
    seconds = time.perf_counter() - started
    assert np.isfinite(forward_s).all() and (backward_s >= forward_s).all()
    return seconds, np.bincount(forward, minlength=len(CANDIDATES))


def main() -> None:
    """Print seconds for growing numbers of layers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    for count in parser.parse_args().counts:
        seconds, wins = choose(count)
        shares = ", ".join(f"{s.name} {n / count:.1%}" for s, n in zip(CANDIDATES, wins, strict=True) if n)
        print(f"{count:>9,} layers, both directions: {seconds:.2f} s; quickest forward: {shares}", flush=True)


if __name__ == "__main__":
    main()
