"""The space holds every layout once, and what is pinned."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplan.costmodels.layout import DEGREES, RECOMPUTE_MODULES, Layouts, names_of
from moeplan.costmodels.model_catalog import load_model
from moeplan.costmodels.stages import check_split, parse_split
from moeplan.planner import space
from moeplan.planner.problem import Problem
from tests.planner import brute, tiny

GRID = ("tp", "cp", "dp", "pp", "etp", "ep", "edp")


def rows_of(layouts: Layouts, *names: str) -> Counter[tuple[int, ...]]:
    return Counter(zip(*(getattr(layouts, name).tolist() for name in names), strict=True))


@given(st.integers(1, 5000))
def test_divisors(n: int) -> None:
    assert space.divisors(n) == [d for d in range(1, n + 1) if n % d == 0]


@pytest.mark.parametrize("gpus", [1, 2, 6, 8, 16, 24])
@pytest.mark.parametrize("model", [tiny.DENSE, tiny.MIXED], ids=["dense", "experts"])
def test_the_grid_is_every_pair_of_products(gpus: int, model: object) -> None:
    grid = space.degree_grid(tiny.problem(model, f"h100x{gpus}"))  # type: ignore[arg-type]
    wanted = Counter(
        (*dense, *expert)
        for dense in brute.factors(gpus, 4)
        for expert in (brute.factors(gpus // dense[3], 3) if model is tiny.MIXED else [(1, 1, gpus // dense[3])])
    )
    assert rows_of(grid, *GRID) == wanted
    np.testing.assert_array_equal(grid.sequence_parallel, grid.tp > 1)


def test_the_grid_keeps_to_conditions_on_degrees() -> None:
    free = rows_of(space.degree_grid(tiny.problem(tiny.MIXED, "h100x16")), *GRID)
    asked = tiny.problem(tiny.MIXED, "h100x16", pins="tp<=2 edp!=1", forbid="pp>4 dp=16 cp=4")
    wanted = Counter(
        g for g in free for tp, cp, dp, pp, _, _, edp in [g] if tp <= 2 and edp != 1 and pp <= 4 and dp != 16 and cp != 4
    )
    assert rows_of(space.degree_grid(asked), *GRID) == wanted and wanted


def test_a_grid_of_nothing() -> None:
    assert len(space.degree_grid(tiny.problem(tiny.MIXED, "h100x16", pins="tp=3"))) == 0


@pytest.mark.parametrize(
    ("pin", "field", "value"),
    [
        ("sharding=fsdp", "sharding", 2),
        ("dp_overlap=no", "dp_overlap", False),
        ("sequence_parallel=yes", "sequence_parallel", True),
        ("cuda_graphs=attn", "cuda_graphs", 1),
        ("optimizer_offload=0.25", "optimizer_offload", 0.25),
    ],
)
def test_pins_set_what_is_not_searched(pin: str, field: str, value: object) -> None:
    free, asked = (space.degree_grid(tiny.problem(tiny.MIXED, "h100x4", pins=p)) for p in ("", pin))
    assert field in (*space.NOT_SEARCHED, "optimizer_offload")
    assert getattr(asked, field).dtype == getattr(free, field).dtype
    assert set(getattr(asked, field).tolist()) == {value} != set(getattr(free, field).tolist())


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(1, 4))
def test_cross_is_the_product(values: list[int], rows: int) -> None:
    grid = space.degree_grid(tiny.problem(tiny.DENSE, "h100x8")).take(slice(0, rows))
    crossed = space.cross(grid, {"micro_batch": values})
    wanted = [(tp, m) for tp in grid.tp.tolist() for m in values]
    assert list(zip(crossed.tp.tolist(), crossed.micro_batch.tolist(), strict=True)) == wanted


@pytest.mark.parametrize("model", [tiny.DENSE, tiny.ODD, tiny.LATENT], ids=lambda m: m.name)
def test_splits_are_the_even_one_and_the_balanced_one_where_it_differs(model: object) -> None:
    problem = tiny.problem(model, "h100x8", batch=8)  # type: ignore[arg-type]
    layers, mtp = len(problem.model.layers), len(problem.model.mtp)
    grid = space.degree_grid(problem)
    rows = space.cross(grid, space.chunk_options(problem))
    assert rows_of(rows, "vpp", "split") == Counter({(v, s): len(grid) for v in range(1, layers + 3) for s in (0, 1)})
    rows = rows.take(rows.pp * rows.vpp <= layers + 2)
    kept = space.with_balanced_splits(problem, rows)
    for i in range(len(kept)):
        text, pp, vpp = kept.stages[int(kept.split[i])], int(kept.pp[i]), int(kept.vpp[i])
        assert not text or check_split(text, layers, mtp, pp, vpp) is None
        assert text in brute.splits(problem, pp * vpp)
    distinct = {
        (*(int(getattr(rows, n)[i]) for n in DEGREES), text)
        for i in range(len(rows))
        for text in brute.splits(problem, int(rows.pp[i] * rows.vpp[i]))
    }
    assert len(kept) == len(distinct)


@pytest.mark.parametrize("chunks", [1, 2, 4])
def test_the_text_of_the_even_split(chunks: int) -> None:
    problem = tiny.problem(tiny.DENSE, "h100x4")
    parts = parse_split(space.even_split(problem, chunks))
    assert [p.count("t") for p in parts] == [4 // chunks] * chunks
    assert space.even_split(problem, 3) == ""


def test_micro_batches_and_features() -> None:
    experts, plain = tiny.problem(tiny.MIXED, batch=12, era="te-2024"), tiny.problem(tiny.DENSE)
    assert space.batch_options(experts) == {"micro_batch": [1, 2, 3, 4, 6, 12]}
    assert space.feature_options(experts)["dispatcher"] == [1, 2] and not any(space.feature_options(experts)["ep_overlap"])
    newest = space.feature_options(tiny.problem(tiny.MIXED, era="latest"))
    assert len(set(zip(newest["dispatcher"], newest["ep_overlap"], strict=True))) == 8 == len(newest["tp_overlap"])
    assert sorted(space.feature_options(plain)["tp_overlap"]) == [False, True]


def named(problem: Problem) -> list[tuple[str, ...]]:
    return [names_of(mask, RECOMPUTE_MODULES) for mask in space.recompute_sets(problem)]


def test_recompute_sets_of_dense_models() -> None:
    assert named(tiny.problem(tiny.DENSE)) == [(), ("mlp",), ("full",)]


def test_recompute_sets_leave_out_what_moe_repeats_anyway() -> None:
    sets = named(tiny.problem(tiny.LATENT))
    assert len(sets) == len(set(sets)) == 8 * (4 + 1) + 1
    assert sets[0] == () and ("full",) in sets
    assert not [s for s in sets if "moe" in s and {"moe_act", "shared_experts"} & set(s)]
    inside = {
        frozenset(s) - {"moe_act", "shared_experts"} if "moe" in s else frozenset(s) for s in brute.recompute_sets(tiny.LATENT)
    }
    assert inside == {frozenset(s) for s in sets}


def test_a_pinned_recompute_set_is_in_the_space_once() -> None:
    assert ("core_attn",) in named(tiny.problem(tiny.DENSE, pins="recompute=core_attn"))
    assert named(tiny.problem(tiny.DENSE, pins="recompute=mlp")) == named(tiny.problem(tiny.DENSE))


@pytest.mark.parametrize("name", ["deepseek-v3", "llama3-8b", "nemotron-3-nano-30b-a3b", "qwen3-next-80b-a3b", "arctic"])
def test_recompute_sets_of_published_models_name_what_they_have(name: str) -> None:
    problem = tiny.problem(load_model(name))
    assert {frozenset(s) for s in named(problem)} <= {frozenset(s) for s in brute.recompute_sets(problem.model)}
