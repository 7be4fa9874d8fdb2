"""Seconds to simulate one step of a large pipeline: `python -m benchmarks.speed.simulation`.

64 stages and 256 micro-batches of Llama 3.1 405B, its layers repeated where more chunks than it has layers are asked for:
every pass of every chunk, then the memory curves of all stages. The trace file, with layers up to its limit, is timed apart.
"""

from __future__ import annotations

import argparse
import dataclasses
import time

from moeplan.costmodels.layout import Layout
from moeplan.costmodels.model import Model
from moeplan.costmodels.model_catalog import load_model
from moeplan.costmodels.stages import balanced_split
from moeplan.costmodels.timeline import StepTimeline, step_timeline
from moeplan.costmodels.trace import step_trace
from moeplan.costmodels.workload import Workload, load_era, load_precision
from moeplan.profiles.hardware import load_cluster
from moeplan.profiles.nominal import nominal
from moeplan.profiles.profile import Profile

STAGES, BATCHES, SEQUENCE = 64, 256, 8192


def case(vpp: int) -> tuple[Model, Profile, Workload, Layout]:
    """What is simulated with `vpp` chunks a stage."""
    model = load_model("llama-3.1-405b")
    copies = -(-STAGES * vpp // len(model.layers))
    model = dataclasses.replace(model, layers=model.layers * copies)
    workload = Workload(seq_len=SEQUENCE, global_batch=BATCHES, precision=load_precision("bf16"), era=load_era("latest"))
    split = balanced_split(model, SEQUENCE, STAGES * vpp)
    layout = Layout(tp=8, pp=STAGES, vpp=vpp, edp=8, sequence_parallel=True, stages=split)
    return model, nominal(load_cluster("h100x512")), workload, layout


def measure(vpp: int) -> tuple[StepTimeline, float]:
    """The simulated step, and the seconds that it took with all memory curves."""
    given = case(vpp)
    step_timeline(*given)  # fills what later runs find in caches
    started = time.perf_counter()
    timeline = step_timeline(*given)
    assert timeline.peak_bytes.min() > 0
    return timeline, time.perf_counter() - started


def main() -> None:
    """Print a line for each number of chunks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vpp", type=int, nargs="+", default=[1, 2, 4])
    for vpp in parser.parse_args().vpp:
        timeline, seconds = measure(vpp)
        _, profile, _, layout = case(vpp)
        started = time.perf_counter()
        size = sum(map(len, step_trace(timeline, profile, layout).pieces()))
        print(
            f"vpp {vpp}: {len(timeline.passes.rank):>7,} passes in {seconds:.2f} s; "
            f"trace of {size / 1e6:.0f} MB in {time.perf_counter() - started:.2f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
