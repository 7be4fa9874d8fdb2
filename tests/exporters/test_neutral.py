"""plan.json: what it holds, that it gives the plan back, and that a contradiction is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moeplan.costmodels.counts import parameter_count
from moeplan.errors import LayoutError, MoeplanError, SchemaError
from moeplan.exporters.neutral import PLAN, SCHEMA, Neutral, load_export, read_plan
from moeplan.exporters.write import export
from moeplan.planner.plan import Plan, price_plan
from tests.exporters.cases import layout_of, problem_of, unpriced

KEYS = [
    "schema", "moeplan", "target", "framework_version", "gpus", "nodes", "gpus_per_node", "model", "counts", "cluster",
    "workload", "layout", "stages", "predicted", "environment", "expects", "files", "remarks",
]  # fmt: skip


@pytest.fixture(scope="module")
def plan() -> Plan:
    problem = problem_of("deepseek-v3", "h100x256", 512, 4096, "fp8-cs")
    stages = "Et*3|" + "t*4|" * 14 + "ttmL"
    return price_plan(problem, layout_of(problem.model, 256, pp=16, ep=16, stages=stages, recompute=("mla_up_proj",)))


@pytest.fixture
def written(plan: Plan, tmp_path: Path) -> Path:
    export(plan, tmp_path / "launch", exporter=Neutral())
    return tmp_path / "launch" / PLAN


def test_what_it_holds(plan: Plan, written: Path) -> None:
    data = load_export(written)
    assert list(data) == KEYS
    assert (data["schema"], data["target"], data["gpus"], data["nodes"], data["gpus_per_node"]) == (
        SCHEMA,
        "plan-json",
        256,
        32,
        8,
    )
    assert data["counts"]["parameters"] == parameter_count(plan.problem.model).total == 671026404352
    assert [stage["layers"] for stage in data["stages"]] == [3] + [4] * 14 + [2]
    assert data["stages"][15] == {"rank": 15, "chunks": ["ttmL"], "layers": 2}
    assert len(data["predicted"]["peak_bytes"]) == 16
    assert data["predicted"]["step_s"] == pytest.approx(plan.step_s, rel=1e-4)


def test_the_documentation_names_every_key(written: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "export.md").read_text()
    data = load_export(written)
    for key in [*data, "limits", *data["counts"], *data["stages"][0], *data["predicted"], *data["expects"]]:
        assert f"`{key}`" in page, key


def test_gives_the_plan_back(plan: Plan, written: Path) -> None:
    found = read_plan(written)
    assert (found.model, found.workload, found.layout, found.world) == (
        plan.problem.model, plan.problem.workload, plan.layout, 256,
    )  # fmt: skip


BROKEN: list[tuple[dict[str, Any], dict[str, Any], str]] = [  # changes of the file, changes of its layout, complaint
    (
        {"gpus": 512},
        {},
        r"tp\*cp\*dp\*pp = 1\*1\*16\*16 = 256, but gpus is 512|nodes\*gpus_per_node = 32\*8 = 256, but gpus is 512",
    ),
    ({"nodes": 64}, {}, r"nodes\*gpus_per_node = 64\*8 = 512, but gpus is 256"),
    ({"gpus": 512, "nodes": 64}, {}, r"tp\*cp\*dp\*pp = 1\*1\*16\*16 = 256, but gpus is 512"),
    ({}, {"world": 512}, r"world is 512, but tp\*cp\*dp\*pp = 1\*1\*16\*16 = 256"),
    ({}, {"tp": 2}, r"dense and expert grids differ: tp\*cp\*dp = 2\*1\*16 = 32 ranks a stage, etp\*ep\*edp = 1\*16\*1 = 16"),
    ({"gpus": "256"}, {}, "key 'gpus': expected int"),
    ({"schema": "moeplan.plan/1"}, {}, "has schema 'moeplan.plan/1'"),
    ({"layout": None}, {}, "expected a mapping"),
]


@pytest.mark.parametrize(("changes", "layout", "message"), BROKEN)
def test_contradictions_are_named(changes: dict[str, Any], layout: dict[str, Any], message: str, written: Path) -> None:
    data = json.loads(written.read_text())
    data["layout"] |= layout
    written.write_text(json.dumps(data | changes))
    with pytest.raises(MoeplanError, match=message):
        read_plan(written)


def test_what_is_no_export_is_refused(written: Path) -> None:
    data = json.loads(written.read_text())
    del data["cluster"]
    written.write_text(json.dumps(data))
    with pytest.raises(SchemaError, match="missing key 'cluster'"):
        read_plan(written)
    for text, message in (("{", "not JSON"), ("[]", "is not a export|is not an export"), ("{}", "has no 'schema'")):
        written.write_text(text)
        with pytest.raises(SchemaError, match=message):
            load_export(written)


def test_a_layout_that_breaks_a_rule_is_refused() -> None:
    problem = problem_of("mixtral-8x7b", "h100x8", 64, 2048)
    broken = unpriced(problem, layout_of(problem.model, 8, vpp=2))
    with pytest.raises(LayoutError, match="vpp=2 with pp=1 .rule virtual-stages"):
        Neutral().check(broken, "")
