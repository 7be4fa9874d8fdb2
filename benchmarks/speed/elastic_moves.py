"""Seconds to place 16,384 GPUs on what they hold under another layout: `python -m benchmarks.speed.elastic_moves`.

DeepSeek-V3 on 2,048 nodes: holdings of both layouts, the gain of every pair of nodes and the best placement. The assignment
alone is set against scipy's on the same gains. Processor time of one thread.
"""

from __future__ import annotations

import time

from scipy.optimize import linear_sum_assignment

from moeplan.costmodels.layout import Layout
from moeplan.costmodels.model_catalog import load_model
from moeplan.costmodels.workload import Workload, load_era, load_precision
from moeplan.planner.elastic.assignment import best_outside
from moeplan.planner.elastic.holdings import holdings
from moeplan.planner.elastic.movement import movement
from moeplan.planner.elastic.overlap import node_gains

BASE = Layout(pp=16, dp=1024, ep=64, edp=16)
OTHERS = {
    "the same": BASE,
    "pp 32": Layout(pp=32, dp=512, ep=64, edp=8),
    "ep 32": Layout(pp=16, dp=1024, ep=32, edp=32),
    "tp 2, pp 8": Layout(tp=2, pp=8, dp=1024, ep=64, edp=32),
    "dp 960": Layout(pp=16, dp=960, ep=64, edp=15),
    "pp 8, vpp 4, ep 32": Layout(pp=8, vpp=4, dp=2048, ep=32, edp=64),
}
ALLOWED_S = 1.0


def main() -> None:
    """Print a line for each new layout."""
    model = load_model("deepseek-v3")
    workload = Workload(seq_len=4096, global_batch=8192, precision=load_precision("bf16"), era=load_era("latest"))
    for name, layout in OTHERS.items():
        started = time.process_time()
        old, new = holdings(model, workload, BASE), holdings(model, workload, layout)
        moved = movement(old, new)
        whole_s = time.process_time() - started
        gains = node_gains(old, new)
        times = []
        for assign in (best_outside, lambda g: linear_sum_assignment(g, maximize=True)):
            started = time.process_time()
            assign(gains)
            times.append(time.process_time() - started)
        print(
            f"{name:<19} {moved.moved_bytes / moved.need_bytes:6.1%} moved; {whole_s / ALLOWED_S:4.0%} of the second allowed; "
            f"assignment {times[0] / times[1]:.1f} times scipy's",
            flush=True,
        )


if __name__ == "__main__":
    main()
