"""`moeplan profile show`."""

from __future__ import annotations

import datetime
import io
import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from moeplan.cli import render_profile
from moeplan.cli.plot_terminal import Axis, plot
from moeplan.cli.profile_views import View, matching, panels, views
from moeplan.profiles.hardware import load_cluster
from moeplan.profiles.nominal import nominal
from moeplan.profiles.profile import Profile
from moeplan.profiles.profile_file import load_profile
from moeplan.profiles.samples import Sample, load_samples, samples_path
from tests.cli.conftest import Moeplan
from tests.profiles.imports.tables import gemm_s, tree

SHOW = ("profile", "show")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A profile with samples beside it."""
    from moeplan.cli import cli

    folder = tmp_path_factory.mktemp("profiles")
    path = folder / "h200.yaml"
    # from the top: a command that is called by itself keeps the names of its help option
    arguments = ["profile", "import", "--from", "aiconfigurator", "--cluster", "h200x64", str(tree(folder)), "-o", str(path)]
    assert cli.main(arguments, standalone_mode=False) == 0
    return path


@pytest.fixture(scope="module")
def shown(measured: Path) -> list[View]:
    return views(load_profile(measured), load_samples(samples_path(measured))[1])


def of(shown: list[View], name: str) -> View:
    return next(view for view in shown if view.name == name)


# ---------------------------------------------------------------- views


def test_samples_meet_their_curve(shown: list[View]) -> None:
    view = of(shown, "gemm/fp8")
    assert len(view.samples) == 36
    for i, sample in enumerate(view.samples):
        assert view.work[i] == 2 * sample.sizes["m"] * sample.sizes["n"] * sample.sizes["k"]
        assert view.measured_s[i] == pytest.approx(gemm_s("fp8", **sample.sizes), rel=1e-5)
        assert view.curve_s[i] == pytest.approx(float(view.curve.seconds(**sample.sizes)))
        assert view.rate[i] == pytest.approx(view.work[i] / view.measured_s[i] / 1e12)
    assert view.residuals == pytest.approx(np.array(view.curve.residuals), abs=2e-3)


def test_rates_of_collectives_are_those_of_the_bus(shown: list[View]) -> None:
    for op, factor in (("all_reduce", 1.75), ("all_gather", 0.875), ("all_to_all", 0.875)):
        view = of(shown, f"collectives/{op} of 8")
        assert view.factor == factor and view.panel == op and view.label == "8 ranks"
        assert view.rate == pytest.approx(factor * view.work / view.measured_s / 1e9)


def test_every_kind_of_sample_finds_its_curve() -> None:
    profile = nominal(load_cluster("h100x16"))
    sizes = {"message_bytes": 2.0**20, "tokens": 64.0}
    samples = [
        Sample(op="grouped_gemm", key="bf16-dgrad", sizes={"groups": 8, "m": 64, "n": 512, "k": 512}, seconds=1e-4, spread=0.0),
        Sample(op="attention", key="128", sizes={"flop": 1e12, "io_bytes": 1e8}, seconds=2e-3, spread=0.0),
        Sample(op="attention-backward", key="128", sizes={"flop": 1e12, "io_bytes": 1e8}, seconds=6e-3, spread=0.0),
        Sample(op="all_reduce", key="bf16", sizes=sizes, group="4/1", seconds=1e-4, spread=0.0),
        Sample(op="deepep", key="dispatch", sizes=sizes, group="8/1", seconds=1e-4, spread=0.0),
        Sample(op="deepep", key="combine", sizes=sizes, group="16/2", seconds=1e-4, spread=0.0),
    ]
    found = {view.name: view for view in views(profile, samples) if view.samples}
    assert set(found) == {
        "grouped_gemm/bf16-dgrad", "attention/128", "attention/128 backward", "collectives/all_reduce of 4",
        "dispatch/deepep-dispatch", "dispatch/deepep-combine-scale-out",
    }  # fmt: skip
    there, back = found["attention/128"], found["attention/128 backward"]
    curve = profile.attention(128, 128)
    assert back.curve_s[0] == curve.backward_seconds(1e12, 1e8) and there.curve_s[0] == curve.seconds(1e12, 1e8)
    assert found["dispatch/deepep-dispatch"].curve_s[0] == profile.dispatches["deepep-dispatch"].seconds(2.0**20, 64.0)


def test_names_that_users_mean(shown: list[View]) -> None:
    assert [view.name for view in matching(shown, "gemm/bf16")] == ["gemm/bf16"]
    assert [view.name for view in matching(shown, "all_reduce of 8")] == ["collectives/all_reduce of 8"]
    assert {view.name for view in matching(shown, "FP8")} == {"gemm/fp8", "grouped_gemm/fp8"}
    assert not matching(shown, "gemm/fp16")


def test_every_curve_of_a_profile_has_a_line() -> None:
    for name in ("h100x64", "gb200x72", "mi300xx8"):
        profile = nominal(load_cluster(name))
        curves = views(profile)
        assert {view.name for view in curves} >= {n for n in profile.origins if not n.startswith("rates/")}
        assert sum(map(len, panels(curves).values())) == len(curves)
        for view in curves:
            assert np.all(np.isfinite(view.line_rate)) and np.all(view.line_rate > 0) and np.all(np.diff(view.line_work) > 0)


# ---------------------------------------------------------------- terminal


@pytest.mark.parametrize("width", [80, 100, 120, 160, 200])
def test_nothing_is_cut_at_any_width(shown: list[View], measured: Path, width: int) -> None:
    profile = load_profile(measured)
    console = Console(width=width, force_terminal=False, record=True, file=io.StringIO())
    for table in (*render_profile.curve_tables(shown, width, profile), render_profile.links_table(profile)):
        console.print(table)
    for part in render_profile.plots(render_profile.chosen_panels(shown), width):
        console.print(part)
    text = console.export_text()
    assert "…" not in text and max(map(len, text.splitlines())) <= width
    assert ("measured range" in text) >= (width >= 160) and "TFLOP/s over FLOP" in text


def test_plot_puts_samples_and_lines_where_they_belong() -> None:
    """A curve that rises by one decade over two: its line ends at the top right, a sample far below lies by itself."""
    profile = nominal(load_cluster("h100x8"))
    slow = Sample(op="gemm", key="bf16", sizes={"m": 8192, "n": 8192, "k": 8192}, seconds=1.0, spread=0.0)
    view = of(views(profile, [slow]), "gemm/bf16")
    lines = [line.plain for line in plot([view], 60)]
    assert lines[0] == "dense GEMM  TFLOP/s over FLOP" and lines[-1] == "a bf16" and max(map(len, lines)) <= 60
    body = lines[1:-3]
    assert len(body) == render_profile.HEIGHT
    top, bottom = body[0], next(line for line in reversed(body) if line[7:].strip())
    assert top.rstrip().endswith("a")
    assert "•" in "".join(body) and "●" not in "".join(body)
    assert any("•" in line for line in body[2:]) and bottom[7:].strip()


def test_axes_have_round_ticks() -> None:
    axis = Axis(np.array([3e9, 4e12]))
    ticks = axis.ticks(4)
    assert 1 <= len(ticks) <= 4 and all(0 <= axis.share(t) <= 1 for t in ticks)
    assert len(Axis(np.array([5.0, 5.0])).ticks(5)) >= 1  # one value alone has an axis too


def test_one_curve_in_full(moeplan: Moeplan, measured: Path) -> None:
    end = moeplan(*SHOW, measured, "--curve", "gemm/fp8-blockwise")
    assert end.code == 0 and end.out.startswith("gemm/fp8-blockwise\n")
    for text in (
        "cast ps",
        "m 64-8192",
        "sglang 0.5.14",
        "m = n = k",
        "curve over measured: median",
        "samples by their distance",
    ):
        assert text in end.out
    (row,) = [line for line in end.out.splitlines() if line.startswith("TFLOP/s  ")]
    assert abs(float(re.sub(r"[^\d.]", "", row)) - 1000) < 60  # 1100 TFLOP/s, 1.1 times as long


def test_residuals_without_samples(moeplan: Moeplan, measured: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone.yaml"
    alone.write_text(measured.read_text())
    end = moeplan(*SHOW, alone, "--curve", "gemm/bf16")
    assert "curve over measured: median" in end.out and "samples by their distance" not in end.out and "•" not in end.out
    end = moeplan(*SHOW, alone, "--curve", "grouped_gemm/bf16")
    assert "residuals were not kept" in end.out


def test_the_whole_profile(moeplan: Moeplan, measured: Path) -> None:
    end = moeplan(*SHOW, measured)
    assert end.code == 0
    for text in (
        "imported",
        "(today)",
        "NVIDIA H200",
        "dense GEMM",
        "≈ b200-simumax",
        "public",
        "overlap loss",
        "scale-out",
        "•",
    ):
        assert text in end.out
    assert "note: the tables hold no backward pass" in end.err
    assert "grouped GEMM, bf16  TFLOP/s" not in end.out  # it has no samples, others do


def test_nominal_and_calibrated_profiles(moeplan: Moeplan, tmp_path: Path) -> None:
    end = moeplan(*SHOW, "--cluster", "h200x64")
    assert end.code == 0 and "nominal: from public measurements" in end.out and "grouped GEMM, bf16  TFLOP/s" in end.out
    from dataclasses import replace

    from moeplan.profiles.origin import CalibratedOn

    said = CalibratedOn(rows=("a", "b"), error_before=0.2, error_after=0.05)
    path = tmp_path / "ours.yaml"
    replace(nominal(load_cluster("h100x16")), calibrated_on=(said,), host=1.4).save(path)
    end = moeplan(*SHOW, path)
    assert "calibrated on 2 training runs: mean error 20.0% before, 5.0% after" in end.out and "host time x1.40" in end.out


def test_age() -> None:
    now = datetime.datetime(2026, 3, 10, 12, tzinfo=datetime.UTC)
    assert render_profile.age("2026-03-10T09:00:00+00:00", now) == "2026-03-10 09:00 (today)"
    assert render_profile.age("2026-03-09T09:00:00", now) == "2026-03-09 09:00 (1 day ago)"
    assert render_profile.age("2025-03-10T12:00:00+00:00", now) == "2025-03-10 12:00 (365 days ago)"
    assert render_profile.age("some day", now) == "some day"


# ---------------------------------------------------------------- JSON and page


def test_json(moeplan: Moeplan, measured: Path) -> None:
    end = moeplan(*SHOW, measured, "--json")
    data = json.loads(end.out)
    assert data["cluster"] == "H200x64" and data["measured_on"]["backend"] == "import"
    curves = {curve["name"]: curve for curve in data["curves"]}
    assert curves["gemm/bf16"]["form"] == "GemmCurve" and curves["gemm/bf16"]["samples_at_hand"] == 36
    assert curves["gemm/bf16"]["origin"]["measured"] and "points" not in curves["gemm/bf16"]
    end = moeplan(*SHOW, measured, "--json", "--curve", "gemm/bf16")
    (curve,) = json.loads(end.out)["curves"]
    point = curve["points"][0]
    assert point["measured_s"] == pytest.approx(gemm_s("bfloat16", **point["sizes"]), rel=1e-5)


class Page(HTMLParser):
    """Tags of a page, and whether they close."""

    VOID = {"meta", "circle", "path", "rect", "i"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID or tag == "circle":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        if tag != "i":
            assert self.open.pop() == tag


def test_page(moeplan: Moeplan, measured: Path, shown: list[View], tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    end = moeplan(*SHOW, measured, "--html", path)
    assert end.code == 0 and f"page written to {path}" in end.err and end.out == ""
    text = path.read_text()
    page = Page()
    page.feed(text)
    assert not page.open and not page.addresses and "<script" not in text and "prefers-color-scheme: dark" in text
    pictures = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]
    lines = sum(len(p.findall("path[@class]")) for p in pictures)
    assert lines > len(shown)
    dots = [c for p in pictures for c in p.findall("circle")]
    assert len(dots) == 2 * sum(len(view.samples) for view in shown)  # in the plot, and among the residuals
    for picture in pictures:
        height = float(picture.attrib["viewBox"].split()[3])
        assert all(
            0 <= float(c.attrib["cx"]) <= 480 and 0 <= float(c.attrib["cy"]) <= height for c in picture.findall("circle")
        )
    assert "measured" in (dots[0].findtext("title") or "")


def test_page_escapes_what_others_wrote(tmp_path: Path, moeplan: Moeplan) -> None:
    from dataclasses import replace

    usual = nominal(load_cluster("h100x8"))
    origins = {**usual.origins, "gemm/bf16": replace(usual.origins["gemm/bf16"], note="<script>alert(1)</script>")}
    path, page = tmp_path / "odd.yaml", tmp_path / "odd.html"
    replace(usual, name="<b>", origins=origins).save(path)
    assert moeplan(*SHOW, path, "--html", page).code == 0
    assert "<script" not in page.read_text() and "<b>" not in page.read_text()


# ---------------------------------------------------------------- bad input


def test_bad_input(moeplan: Moeplan, measured: Path, tmp_path: Path) -> None:
    end = moeplan(*SHOW)
    assert end.code == 2 and "give either a profile file or --cluster" in end.err
    end = moeplan(*SHOW, measured, "--cluster", "h200x8")
    assert end.code == 2
    end = moeplan(*SHOW, measured, "--curve", "gem/bf16")
    assert end.code == 2 and "unknown curve 'gem/bf16'" in end.err and "gemm/bf16" in end.err
    end = moeplan(*SHOW, measured, "--html", tmp_path / "no" / "page.html")
    assert end.code == 1 and "there is no directory" in end.err
    end = moeplan(*SHOW, tmp_path / "none.yaml")
    assert end.code == 1 and "does not exist" in end.err
    other = tmp_path / "other.yaml"
    other.write_text("schema: moeplan.profile/9\n")
    end = moeplan(*SHOW, other)
    assert end.code == 1 and "moeplan.profile/9" in end.err


def test_samples_of_another_run(moeplan: Moeplan, measured: Path, tmp_path: Path) -> None:
    path = tmp_path / "copy.yaml"
    path.write_text(measured.read_text())
    lines = samples_path(measured).read_text().splitlines(True)
    samples_path(path).write_text("".join(lines[:-1]))
    end = moeplan(*SHOW, path)
    assert end.code == 0 and "has changed since the profile was made from it" in end.err
    samples_path(path).write_text("".join([*lines[:3], "nonsense\n"]))
    end = moeplan(*SHOW, path)
    assert end.code == 1 and "line 4: not JSON" in end.err
    plain: Profile = nominal(load_cluster("h200x64"))
    plain.save(path)
    samples_path(path).write_text("".join(lines))
    end = moeplan(*SHOW, path)
    assert end.code == 0 and "is not used" in end.err
