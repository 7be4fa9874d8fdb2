"""Seconds from a question to a proven answer on one core: `python -m benchmarks.speed.solving`.

All degrees, splits and recompute are free, as `moeplan solve` asks it without options; the first of `--repeat` runs finds no
cache filled. The clock is that of the wall, as a user waits; the goals are for two cores.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass

from moeplan.costmodels.model_catalog import load_model
from moeplan.costmodels.workload import Workload, load_era, load_precision
from moeplan.planner.problem import Problem
from moeplan.planner.solve import Solution, Splits, solve
from moeplan.profiles.hardware import load_cluster
from moeplan.profiles.nominal import nominal


@dataclass(frozen=True, slots=True)
class Question:
    """A question and the seconds that its answer may take."""

    model: str
    cluster: str
    batch: int
    precision: str
    allowed_s: float

    def problem(self) -> Problem:
        """The question as `solve` takes it."""
        workload = Workload(
            seq_len=4096, global_batch=self.batch, precision=load_precision(self.precision), era=load_era("latest")
        )
        return Problem(model=load_model(self.model), profile=nominal(load_cluster(self.cluster)), workload=workload)


QUESTIONS = (
    Question("mixtral-8x22b", "h100x128", 512, "bf16", 3.0),
    Question("qwen3-235b-a22b", "h100x256", 2048, "bf16", 3.0),
    Question("deepseek-v3", "h100x2048", 15360, "fp8-cs", 10.0),
    Question("kimi-k2", "h100x16384", 32768, "fp8-cs", 30.0),
)


def measure(question: Question) -> tuple[Solution, float]:
    """The answer and its seconds."""
    problem = question.problem()
    started = time.perf_counter()
    solution = solve(problem, splits=Splits())
    return solution, time.perf_counter() - started


def main() -> None:
    """Print a line for each question."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3)
    repeat = parser.parse_args().repeat
    for question in QUESTIONS:
        runs = [measure(question) for _ in range(repeat)]
        solution, seconds = runs[0][0], [s for _, s in runs]
        proof = solution.plans[0].certificate
        assert proof is not None
        median = statistics.median(seconds)
        print(
            f"{question.model} on {question.cluster}: {solution.status}, gap {proof.gap:.1%}, "
            f"{proof.opened} stage problems opened; {median:.1f} s, first {seconds[0]:.1f} s: "
            f"{median / question.allowed_s:.0%} of the {question.allowed_s:.0f} s allowed",
            flush=True,
        )


if __name__ == "__main__":
    main()
