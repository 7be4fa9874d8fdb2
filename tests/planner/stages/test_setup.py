"""Stage problems say of a split what its price says: seconds of the passes, and whether it fits."""

from __future__ import annotations

import random

import numpy as np
import pytest

from moeplan.costmodels.layout import Layouts
from moeplan.costmodels.price import Pricing
from moeplan.costmodels.stages import check_split
from moeplan.planner.problem import Problem
from moeplan.planner.stages.problem import StageProblem
from moeplan.planner.stages.setup import Form, forms, least_rest_s, split_text
from tests.exporters.cases import layout_of, problem_of

CASES = [
    ("deepseek-v3", 512, 4096, dict(tp=2, pp=8, ep=16)),
    ("deepseek-v3", 512, 4096, dict(tp=2, pp=4, vpp=4, ep=16, recompute=("full",))),
    ("deepseek-v3", 512, 4096, dict(pp=16, vpp=2, ep=8, recompute=("mla_up_proj",))),
    ("mixtral-8x7b", 64, 4096, dict(pp=4, ep=8)),
    ("mixtral-8x7b", 512, 4096, dict(pp=4, vpp=3, ep=8)),
    ("qwen3-235b-a22b", 256, 4096, dict(tp=2, pp=8, vpp=5, ep=8)),
    ("nemotron-3-nano-30b-a3b", 128, 8192, dict(pp=4, ep=8)),
    ("qwen3-8b", 256, 4096, dict(pp=2, vpp=2)),
    ("deepseek-v3", 512, 4096, dict(pp=16, vpp=2, ep=8, recompute=("full",), recompute_layers="1")),
    ("nemotron-3-nano-30b-a3b", 128, 8192, dict(pp=4, ep=8, recompute=("full",), recompute_layers="3")),
]


def case(index: int) -> tuple[Problem, Layouts, list[Form]]:
    name, batch, seq_len, fields = CASES[index]
    problem = problem_of(name, "h100x128", batch, seq_len)
    rows = Layouts.of([layout_of(problem.model, 128, **fields)])
    return problem, rows, list(forms(problem, rows))


def random_sizes(rng: random.Random, stages: StageProblem) -> list[int]:
    """Layers of each chunk: as few as may be, then the others anywhere."""
    sizes = list(stages.fewest)
    while sum(sizes) < len(stages.kinds):
        chunk = rng.randrange(stages.chunks)
        sizes[chunk] += sizes[chunk] < stages.most[chunk]
    return sizes


def priced(problem: Problem, rows: Layouts, texts: list[str]) -> Pricing:
    many = rows.take(np.zeros(len(texts), np.int64)).with_columns(split=np.arange(len(texts)), stages=tuple(texts))
    return Pricing(problem.model, problem.profile, problem.workload, many, every_rank=True, exact=True)


@pytest.mark.parametrize("index", range(len(CASES)))
def test_spans_and_memory_are_those_of_the_price(index: int) -> None:
    problem, rows, found = case(index)
    assert [form.alone for form in found] == ([False, True] if problem.model.mtp else [False])
    rng = random.Random(index)
    for form in found:
        stages = form.stages
        sizes = [random_sizes(rng, stages) for _ in range(12)]
        texts = [split_text(problem, size, form.alone) for size in sizes]
        x = rows.row(0)
        for text in texts:
            assert check_split(text, len(problem.model.layers), len(problem.model.mtp), x.pp, x.vpp) is None
        pricing = priced(problem, rows, texts)
        time = dict(pricing.step_cost().time)
        passes = sum(seconds for name, seconds in time.items() if "/" in name) + time["pipeline bubble"]
        assert stages.exact_spans(sizes) == pytest.approx(passes, rel=1e-9)
        assert (stages.spans(sizes) <= passes * (1 + 1e-9)).all()
        assert stages.excess_bytes(sizes) + stages.limit_bytes == pytest.approx(pricing.peak_bytes(), rel=1e-9)
        assert (least_rest_s(problem, rows)[0] + stages.spans(sizes) <= pricing.step_cost().time.total * (1 + 1e-9)).all()
