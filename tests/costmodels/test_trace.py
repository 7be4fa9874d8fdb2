"""Trace files: valid JSON, slices that nest and never cross, arrows that pair up, memory that peaks where the plan does."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from moeplan.costmodels.layout import Layout
from moeplan.costmodels.timeline import StepTimeline, step_timeline
from moeplan.costmodels.trace import COMPUTE, STREAMS, Trace, step_trace
from moeplan.errors import FileError
from moeplan.units import GIB
from tests.conftest import TINY_LATENT, TINY_MOE, TWO_NODES, workload_of

LAYOUTS = {
    "1f1b": Layout(pp=4, dp=4, ep=4, dispatcher="alltoall"),
    "interleaved": Layout(pp=2, vpp=2, tp=2, dp=4, ep=8, sequence_parallel=True, dispatcher="alltoall", recompute=("full",)),
    "fsdp": Layout(dp=16, ep=8, edp=2, dispatcher="deepep", sharding="fsdp"),
}


@pytest.fixture(params=LAYOUTS, scope="module")
def traced(request: pytest.FixtureRequest) -> tuple[StepTimeline, Trace]:
    layout = LAYOUTS[request.param]
    timeline = step_timeline(TINY_LATENT, TWO_NODES, workload_of(), layout, slow={0: 1.3}, load_spread=0.2)
    return timeline, step_trace(timeline, TWO_NODES, layout)


def events_of(trace: Trace) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads("".join(trace.pieces()))["traceEvents"]
    return found


def by_thread(trace: Trace) -> dict[tuple[int, int], list[dict[str, Any]]]:
    """Complete events of each thread by their start, and as the file has them where they begin together."""
    out = defaultdict(list)
    for event in events_of(trace):
        if event["ph"] == "X":
            out[event["pid"], event["tid"]].append(event)
    return {key: sorted(events, key=lambda e: float(e["ts"])) for key, events in out.items()}


def test_slices_nest(traced: tuple[StepTimeline, Trace]) -> None:
    for (_, stream), events in by_thread(traced[1]).items():
        open_ends: list[float] = []
        for event in events:
            end = event["ts"] + event["dur"]
            while open_ends and open_ends[-1] <= event["ts"] + 1e-6:
                open_ends.pop()
            assert event["dur"] >= 0 and event["ts"] >= 0
            assert not open_ends or (stream == COMPUTE and end <= open_ends[-1] + 1e-6), event
            open_ends.append(end)
        assert len(open_ends) <= 3


def test_every_pass_is_there_with_its_layers(traced: tuple[StepTimeline, Trace]) -> None:
    timeline, trace = traced
    passes = [e for e in events_of(trace) if e.get("cat") in ("forward", "backward")]
    assert len(passes) == len(timeline.passes.rank) and not trace.remark
    assert sum(e["dur"] for e in passes) / 1e6 == pytest.approx(timeline.busy_s.sum(), rel=1e-4)
    layers = [e for e in events_of(trace) if e["ph"] == "X" and e["name"].startswith("layer ")]
    assert len(layers) == 2 * len(TINY_LATENT.layers) * timeline.batches


def test_arrows_pair_up(traced: tuple[StepTimeline, Trace]) -> None:
    timeline, trace = traced
    starts = {e["id"]: e for e in events_of(trace) if e["ph"] == "s"}
    ends = {e["id"]: e for e in events_of(trace) if e["ph"] == "f"}
    assert starts.keys() == ends.keys() and len(starts) == (timeline.passes.source >= 0).sum()
    assert all(starts[i]["ts"] <= ends[i]["ts"] and starts[i]["pid"] != ends[i]["pid"] for i in starts)
    slices = {(e["pid"], e["tid"], e["ts"]) for e in events_of(trace) if e["ph"] == "X"}
    assert all((e["pid"], e["tid"], e["ts"]) in slices for e in (*starts.values(), *ends.values()))


def test_memory_peaks_where_the_plan_does(traced: tuple[StepTimeline, Trace]) -> None:
    timeline, trace = traced
    peaks: dict[int, float] = defaultdict(float)
    for event in events_of(trace):
        if event["ph"] == "C":
            peaks[event["pid"]] = max(peaks[event["pid"]], event["args"]["GiB"])
    assert [peaks[r] for r in range(timeline.ranks)] == pytest.approx((timeline.peak_bytes / GIB).tolist(), abs=1e-6)


def test_names_of_processes_and_threads(traced: tuple[StepTimeline, Trace]) -> None:
    timeline, trace = traced
    names = {(e["pid"], e["tid"], e["name"]): e["args"] for e in events_of(trace) if e["ph"] == "M"}
    for rank in range(timeline.ranks):
        assert names[rank, 0, "process_name"]["name"].startswith(f"stage {rank}: ")
        assert [names[rank, i, "thread_name"]["name"] for i in range(len(STREAMS))] == list(STREAMS)


def test_too_many_layers_are_left_out() -> None:
    layout = LAYOUTS["1f1b"]
    timeline = step_timeline(TINY_MOE, TWO_NODES, workload_of(), layout)
    whole, some, none = (step_trace(timeline, TWO_NODES, layout, most) for most in (200_000, 500, 0))
    counts = [len(events_of(trace)) for trace in (whole, some, none)]
    assert not whole.remark and counts[2] < counts[1] <= counts[2] + 500 < counts[0]
    assert some.remark.startswith("layers are shown inside ") and "of 128 passes" in some.remark
    assert none.remark.startswith("layers are shown inside 0 of 128 passes")


def test_every_event_is_what_viewers_read(traced: tuple[StepTimeline, Trace]) -> None:
    timeline, trace = traced
    needed = {"X": {"ts", "dur"}, "s": {"ts", "id"}, "f": {"ts", "id", "bp"}, "C": {"ts", "args"}, "M": {"args"}}
    for event in events_of(trace):
        assert {"name", "ph", "pid"} | needed[event["ph"]] <= event.keys()
        assert 0 <= event["pid"] < timeline.ranks and event["ph"] in "MC" or event["cat"] and 0 <= event["tid"] < len(STREAMS)
        assert all(isinstance(event[key], (int, float)) for key in ("ts", "dur") if key in event)
        assert event.get("bp", "e") == "e"


def test_the_file_is_json_and_whole(
    traced: tuple[StepTimeline, Trace], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, trace = traced
    path, reports = tmp_path / "trace.json", list[tuple[int, int]]()
    monkeypatch.setattr("moeplan.costmodels.trace.BLOCK", 100)
    trace.save(path, lambda done, most: reports.append((done, most)))
    data = json.loads(path.read_text())
    assert data["displayTimeUnit"] == "ms" and data["traceEvents"] == events_of(trace)
    assert [p.name for p in tmp_path.iterdir()] == ["trace.json"]
    done, most = zip(*reports, strict=True)
    assert list(done) == sorted(done) and done[-1] == len(data["traceEvents"]) <= most[-1] <= 1.5 * done[-1]
    with pytest.raises(FileError, match="cannot write trace"):
        trace.save(tmp_path / "none" / "trace.json")
