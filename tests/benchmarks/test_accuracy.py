"""The comparison with published runs: figures against sums done by hand, groups really left out, thresholds that fail."""

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from benchmarks import fit_spread
from benchmarks.accuracy import __main__ as command
from benchmarks.accuracy import fitting, rows, sections, study, suspicions
from benchmarks.accuracy.ablations import ABLATIONS, ablated, drop, effect
from benchmarks.accuracy.fitting import Parameters, Point
from benchmarks.accuracy.patching import replaced
from benchmarks.accuracy.report import Section, Table, markdown
from benchmarks.accuracy.scores import Ranking, error_figures, pooled_tau, rank_correlation, rankings, verdicts
from benchmarks.accuracy.spread import weighted_quantile
from benchmarks.accuracy.thresholds import Threshold, checks, load_thresholds
from benchmarks.accuracy.validation import leave_out
from moeplan.costmodels import routing
from moeplan.errors import SchemaError

ROOT = Path(__file__).parents[2]
IDS = (
    "mbridge-overlap-001", "mbridge-26.04-031", "mbridge-26.02-028", "narayanan21-005", "dgxc-v25.05-016", "simumax-038",
)  # fmt: skip
"""Rows that every ablation touches one of: experts over nodes, overlap, recompute, pipeline, tensor and context parallelism."""
SHIPPED = rows.published_rows()
BY_ID = {row["id"]: row for row in SHIPPED}
FEW = [BY_ID[name] for name in IDS]


def point(name: str = "p", measured_s: float = 1.0, **fields: object) -> Point:
    known: dict[str, object] = {
        "source": "s", "model": "m", "device": "H100", "precision": "bf16", "era": "e", "kind": "dense", "regime": "dense",
        "parts": {"layers/MLP GEMM": 0.5, "optimizer": 0.5}, "slopes": {"compute": 0.5},
    }  # fmt: skip
    return Point(id=name, measured_s=measured_s, **(known | fields))  # type: ignore[arg-type]


# -- the table -----------------------------------------------------------------------------------------------------------


def test_shipped_table_has_all_columns_and_sources() -> None:
    columns = set(SHIPPED[0])
    asked = {
        line.split("`")[1] for line in (ROOT / "docs" / "runs.md").read_text(encoding="utf-8").splitlines() if "| `" in line
    }
    assert (asked - {"gpu", "era", "other"}) <= columns  # `gpu` stands beside num_gpus; no published row names an era itself
    readme = (ROOT / "benchmarks" / "accuracy" / "README.md").read_text(encoding="utf-8")
    own = {"id", "source", "source_ref", "measured_step_s", "peak_mem_gib", "config_level", "step_time_s"}
    assert own <= columns and all(f"`{name}`" in readme for name in own)
    assert len(BY_ID) == len(SHIPPED)
    for row in SHIPPED:
        assert row["source"] and row["source_ref"], f"{row['id']} has no source"
        assert rows.family(row) in rows.FAMILIES and f"`{rows.family(row)}" in readme, (
            f"{row['id']}: family without attribution"
        )
        assert not row["measured_step_s"] or float(row["measured_step_s"]) > 0


@pytest.mark.parametrize(
    ("cells", "name"),
    [
        ({"measured_step_s": ""}, "not measured"),
        ({"notes": "known regression in this release"}, "regression"),
        ({"notes": "DIGITISED FROM A FIGURE; flags assumed"}, "digitised by eye"),
        ({"source": "a chart (values read off the bars by eye)"}, "digitised by eye"),
        ({"gpu": ""}, "not priced"),
        ({}, ""),
    ],
)
def test_rows_are_left_out_by_rule(cells: dict[str, str], name: str) -> None:
    assert rows.results([{**FEW[-1], **cells}])[0].excluded == name


@pytest.mark.parametrize(
    ("cells", "kind"),
    [
        (
            {"id": "mlperf-1", "notes": "max_memory_allocated on the logging rank (first pipeline stage)"},
            "allocated, first stage",
        ),
        ({"id": "swift-1", "notes": "the trainer log value (torch max reserved), rounded"}, "reserved pool"),
        ({"id": "titan-1", "notes": ""}, "allocated, fullest rank"),
        ({"id": "simumax-1", "notes": "peak = max over ranks; reserved max 70.88 GiB"}, "allocated, fullest rank"),
    ],
)
def test_memory_is_compared_with_the_same_quantity(cells: dict[str, str], kind: str) -> None:
    assert rows.memory_kind(cells) == kind


def test_the_first_stage_is_priced_alone() -> None:
    two_stages, one = rows.results([BY_ID["simumax-006"], BY_ID["simumax-038"]])
    assert rows.first_stage_peak_bytes(one.run) == pytest.approx(one.priced.peak_bytes)
    assert 0 < rows.first_stage_peak_bytes(two_stages.run) <= two_stages.priced.peak_bytes


def test_what_became_of_a_run() -> None:
    ran, both, failed = rows.results(
        [FEW[-1], {**FEW[-1], "notes": "later iterations OOM"}, {**FEW[-1], "notes": "OOM", "measured_step_s": ""}]
    )
    assert [rows.outcome(r) for r in (ran, both, failed)] == ["ran", "", "out of memory"]
    small = rows.results([{**FEW[-1], "source": "an A100 of 40 GB"}])[0]  # 104 GiB do not fit into 40
    said = verdicts([ran, both, failed, small])
    assert (said.ran, said.ran_said_to_fit, said.failed, said.failed_said_not_to_fit) == (2, 1, 1, 0)
    assert said.wrong == (failed, small) and said.ran_share == 0.5


def test_the_device_is_the_one_that_the_source_names() -> None:
    result = rows.results([{**FEW[-1], "source": "H100 80GB, RDMA 400 Gb/s"}])[0]
    assert rows.device_bytes(result, 80e9) == 80e9 and rows.device_bytes(result, 40e9) == 80 * 2**30


# -- figures -------------------------------------------------------------------------------------------------------------


def test_errors_by_hand() -> None:
    figures = error_figures([1.05, 0.92, 1.3, 1.0])
    assert figures.rows == 4
    assert figures.median == pytest.approx(0.065)  # of 0, 0.05, 0.08, 0.3
    assert figures.mean == pytest.approx(0.1075)
    assert figures.within == 0.75
    assert figures.bias == pytest.approx(0.025)  # of -0.08, 0, 0.05, 0.3


def test_rank_correlation_by_hand() -> None:
    assert rank_correlation([1, 2, 3, 4], [10, 30, 20, 40]) == pytest.approx(4 / 6)  # five pairs agree, one does not
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == -1
    assert rank_correlation([1, 2, 3], [1, 1, 1]) == 0
    groups = [Ranking(family="f", question="q", layouts=n, tau=t) for n, t in ((4, 1.0), (3, -1.0))]
    assert pooled_tau(groups) == pytest.approx((6 * 1 - 3 * 1) / 9) and pooled_tau([]) == 0


def test_only_layouts_of_one_question_are_ranked() -> None:
    base = {**BY_ID["simumax-011"], "gbs": "32"}
    some = [{**base, "id": f"simumax-{tp}", "tp": tp, "measured_step_s": t} for tp, t in (("1", "1"), ("2", "2"), ("4", "3"))]
    other = [{**some[2], "gbs": "64"}, {**some[0], "source": "another release"}, {**some[0], "model": "Llama3-8B"}]
    results = rows.compared(rows.results([*some, *other]))
    assert len(results) == 6
    assert [g.layouts for g in rankings(results, least=2)] == [3] and rankings(results) == []
    twice = rows.compared(rows.results([some[0], some[0], some[1]]))
    assert [g.layouts for g in rankings(twice, least=2)] == [2]


def test_quantile_by_hand() -> None:
    values = np.array([0.0, 1.0, 2.0, 3.0])
    assert weighted_quantile(values, np.ones(4), 0.5) == 1.0
    assert weighted_quantile(values, np.array([1.0, 1.0, 1.0, 7.0]), 0.5) == 3.0


# -- fits and cross-validation ---------------------------------------------------------------------------------------------


def test_errors_follow_the_slopes() -> None:
    some = [point(measured_s=1.2), point(measured_s=1.2, slopes={})]
    assert fitting.errors(some, fitting.IN_USE) == pytest.approx([math.log(1.2)] * 2)
    assert fitting.errors(some, {"compute": 1.44}) == pytest.approx([0.0, math.log(1.2)])  # slope 0.5: the root of 1.44


def test_fit_by_hand() -> None:
    in_use = {"compute": 0.85}
    assert fitting.fit([], in_use) == pytest.approx({"compute": 1.0})
    assert fitting.fit([], {"compute": 0.5}) == pytest.approx({"compute": 1.7})  # back to the prior, 0.85
    # Many runs outweigh the prior, and one far off does not bend them; its group counts once, however large it is.
    alike = [point(measured_s=1.05, slopes={"compute": 1.0}, model=f"m{i}") for i in range(50)]
    assert fitting.fit(alike, in_use)["compute"] == pytest.approx(1.05, abs=1e-3)
    far = [point(measured_s=9.0, slopes={"compute": 1.0})] * 9
    assert fitting.fit([*alike, *far], in_use)["compute"] == pytest.approx(1.05, abs=5e-3)
    # Where the objective is least its gradient is zero.
    some = [point(measured_s=s, slopes={"compute": 0.7}, model=str(s)) for s in (0.9, 1.1, 1.3)]
    change = math.log(fitting.fit(some, {"compute": 0.8})["compute"])
    left = np.log([0.9, 1.1, 1.3]) - 0.7 * change
    pulls = left / fitting.ROBUST**2 / np.sqrt(1 + (left / fitting.ROBUST) ** 2)
    assert 0.7 * pulls.sum() + (math.log(0.85 / 0.8) - change) / fitting.SPREAD**2 == pytest.approx(0, abs=1e-6)


def test_slopes_are_what_a_new_price_shows() -> None:
    known = rows.results(FEW)
    points = fitting.points(known, fitting.slopes(known))
    assert all(p.slopes and set(p.slopes) <= set(fitting.shares_in_use()) for p in points)
    assert all(-1.001 < sum(p.slopes.values()) < -0.2 for p in points)  # most of a step is compute, and a faster one is shorter
    with fitting.shares_changed(lambda shares: {kind: 0.9 * share for kind, share in shares.items()}):
        slower = rows.results(FEW)
    predicted = fitting.errors(points, dict.fromkeys(fitting.shares_in_use(), 0.9))
    measured = np.log([r.measured_s / r.predicted_s for r in slower])
    assert predicted == pytest.approx(measured, abs=0.01)


def test_versions_and_shorter_runs_of_a_model_are_one() -> None:
    ids = ("dgxc-v25.05-016", "simumax-038", "mlperf-v5.0-010", "simumax-025")
    names = [p.model for p in fitting.points(rows.results([BY_ID[i] for i in ids]))]
    models = {BY_ID[i]["model"] for i in ids}
    assert len(models) >= 3 and names[2] == names[3]


def test_cross_validation_leaves_the_group_out() -> None:
    points = [point(f"{s}{i}", source=s, measured_s=t) for s, t in (("a", 1.0), ("b", 1.5), ("c", 4.0)) for i in range(2)]
    seen: list[set[str]] = []

    def fit(some: Sequence[Point]) -> Parameters:
        seen.append({p.source for p in some})
        return {"mean": float(np.mean([p.measured_s for p in some]))}

    def errors(some: Sequence[Point], parameters: Parameters) -> fitting.Floats:
        return np.log([p.measured_s / parameters["mean"] for p in some])

    left = leave_out(points, lambda p: p.source, fit=fit, errors=errors)
    assert seen == [{"b", "c"}, {"a", "c"}, {"a", "b"}]
    assert left.parameters["b"] == {"mean": 2.5}
    assert left.errors == pytest.approx(np.log([1 / 2.75, 1 / 2.75, 1.5 / 2.5, 1.5 / 2.5, 4 / 1.25, 4 / 1.25]))


def test_nothing_fitted_is_faster() -> None:
    dense = [BY_ID["dgxc-v25.05-016"]]
    known = rows.results(dense)[0].predicted_s
    with fitting.unfitted():
        bare = rows.results(dense)[0].predicted_s
    assert bare < known == rows.results(dense)[0].predicted_s
    assert len(fitting.fitted_numbers()) >= len(fitting.shares_in_use())


# -- ablations -----------------------------------------------------------------------------------------------------------


def test_parts_dropped_by_hand() -> None:
    parts = {"layers/a": 3.0, "head/b": 1.0, "pipeline bubble": 2.0, "optimizer": 5.0}
    assert drop(parts, ("optimizer",)) == {"layers/a": 3.0, "head/b": 1.0, "pipeline bubble": 2.0}
    assert drop(parts, ("layers/a",)) == {"head/b": 1.0, "pipeline bubble": 0.5, "optimizer": 5.0}


@pytest.mark.parametrize("ablation", ABLATIONS, ids=lambda a: a.name)
def test_every_ablation_touches_a_row_and_leaves_no_trace(ablation: object) -> None:
    known = fitting.points(rows.results(FEW))
    without = ablated(FEW, known, ablation)  # type: ignore[arg-type]
    changes = [b.predicted_s / a.predicted_s for a, b in zip(known, without, strict=True)]
    assert max(abs(c - 1) for c in changes) > 1e-3
    assert [p.parts for p in fitting.points(rows.results(FEW))] == [p.parts for p in known]


def test_effect_by_hand() -> None:
    known = [point(measured_s=1.0), point(measured_s=1.0, parts={"layers/MLP GEMM": 1.0})]
    optimizer = next(a for a in ABLATIONS if a.name == "optimizer")
    found = effect([], known, optimizer)
    assert found.touched == 1
    assert found.on_touched == pytest.approx(100 * math.log(2)) and found.overall == pytest.approx(50 * math.log(2))


def test_replacing_what_is_not_there_is_refused() -> None:
    with pytest.raises(LookupError, match="no module of moeplan"), replaced("no_such_name", object(), None):
        pass
    with replaced("all_to_all_copies", routing.all_to_all_copies, None):
        assert routing.all_to_all_copies is None
    assert callable(routing.all_to_all_copies)


# -- thresholds and page -------------------------------------------------------------------------------------------------


def test_thresholds_bound_both_ways() -> None:
    high = Threshold(figure="f", at_most=5.0, goal="3")
    both = Threshold(figure="f", at_least=70.0, at_most=90.0, goal="80")
    assert high.met(5.0) and not high.met(5.1) and high.demand == "at most 5"
    assert both.met(80.0) and not both.met(69.0) and not both.met(91.0) and both.demand == "70 to 90"
    assert [c.met for c in checks({"f": 6.0}, [high, both])] == [False, False]
    with pytest.raises(SchemaError, match="no figure 'f'"):
        checks({"g": 1.0}, [high])
    with pytest.raises(SchemaError, match="bounds nothing"):
        Threshold(figure="f", goal="")


def _table(path: Path, some: Sequence[dict[str, str]]) -> Path:
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, list(SHIPPED[0]))
    writer.writeheader()
    writer.writerows(some)
    path.write_text(stream.getvalue(), encoding="utf-8")
    return path


def test_the_command_fails_below_a_threshold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = _table(tmp_path / "runs.csv", FEW)
    monkeypatch.setattr(command, "TABLE", table)
    bounds, target = tmp_path / "bounds.yaml", tmp_path / "page.md"
    where = ["--runs", str(table), "--thresholds", str(bounds), "--page", str(target)]
    bounds.write_text("thresholds:\n- {figure: 'step time, all: median error', at_most: 0.0, goal: '0'}\n", encoding="utf-8")
    assert command.main([*where, "--no-ablations"]) == 1
    assert "missed: step time, all: median error" in capsys.readouterr().err and not target.exists()
    bounds.write_text("thresholds:\n- {figure: 'step time, all: median error', at_most: 1000, goal: '0'}\n", encoding="utf-8")
    monkeypatch.setattr(command, "ABLATIONS", ABLATIONS[-2:])
    assert command.main(where) == 0
    page = target.read_text(encoding="utf-8")
    assert "Written by `python -m benchmarks.accuracy`" in page and "What each effect is worth" in page
    assert command.main(["--runs", str(tmp_path / "none.csv")]) == 1
    assert "does not exist" in capsys.readouterr().err


def test_shipped_thresholds_name_figures_with_goals(tmp_path: Path) -> None:
    names = {t.figure for t in load_thresholds()}
    some = [*FEW, *(r for r in SHIPPED if rows.family(r) == "folding" and r["gbs"] == "256"), BY_ID["nemo-24.07-002"]]
    known = study.study(_table(tmp_path / "runs.csv", some), ())
    assert study.inside_left_out(fit_spread.load(tmp_path / "runs.csv"), known.by_model, ["one"] * 3) == (False,) * 3
    assert names <= set(study.figures(known)) and all(t.goal for t in load_thresholds())
    text = markdown("t", command.chapters(known, checks(study.figures(known), load_thresholds())))
    assert "MoE Parallel Folding" in text and "| H100 |" in text


def test_markdown_by_hand() -> None:
    table = Table(columns=("name", "figure", "text"), rows=(("a|b", "1", "x"),), wide=("text",))
    text = markdown("Title", [Section(title="Part", text=("One.\n- item",), tables=(table,))])
    assert text == ("# Title\n\n## Part\n\nOne.\n- item\n\n| name | figure | text |\n|---|---:|---|\n| a\\|b | 1 | x |\n")


def test_the_page_is_generated_and_whole() -> None:
    page = (ROOT / "docs" / "accuracy.md").read_text(encoding="utf-8")
    assert page.startswith("# Accuracy\n\nWritten by `python -m benchmarks.accuracy`")
    for title in ("Figures, thresholds and goals", "Peak memory", "Intervals", "What each effect is worth"):
        assert f"\n## {title}\n" in page
    assert page.endswith(command.REMARKS.read_text(encoding="utf-8")), "docs/accuracy.md is stale: run `make accuracy`"


# -- suspicions ----------------------------------------------------------------------------------------------------------


def test_suspicions_name_parts_inputs_and_doubts() -> None:
    base = {**BY_ID["mbridge-26.02-028"], "notes": "source header prints PP=41, a typo", "recompute": ""}
    again = {**base, "id": "mbridge-x", "source": "another release", "measured_step_s": "1.0"}
    first, second = rows.results([base, again])
    said = "; ".join(suspicions.suspicions(first, [first, second]))
    for text in ("mostly ", "assumed: recompute", "a typo", "measured elsewhere: 1 s"):
        assert text in said
    assert suspicions.worst([first, second], 1) == [second]
    assert sections.percent(0.1234, sign=True) == "+12.3 %"
