"""Collectives between real processes: every operation and group gives samples, and a slow one is seen."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moeplan.profiles import bench_collectives
from moeplan.profiles.bench_collectives import FULLEST, GroupBench, _slowest, skewed
from moeplan.profiles.bench_deepep import copies
from moeplan.profiles.bench_overlap import _orders
from moeplan.profiles.fitting import fit
from moeplan.profiles.samples import Sample
from moeplan.records import from_mapping
from tests.profiles.launching import scene

OPS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "all_to_all_skewed", "send")
SIZES = {65536.0, 262144.0}


def samples(part: dict[str, Any]) -> list[Sample]:
    return [from_mapping(Sample, each, "worker") for each in part["samples"]]


def sizes(found: list[Sample], op: str, group: str) -> set[float]:
    return {s.sizes["message_bytes"] for s in found if (s.op, s.group) == (op, group)}


@pytest.mark.parametrize("op", OPS)
def test_every_operation_between_two_ranks(op: str) -> None:
    found = samples(scene("two", 2).said[0]["all"])
    assert sizes(found, op, "2/1") == SIZES
    for sample in found:
        assert sample.seconds > 0 and len(sample.times_s) >= 3 and sample.how


@pytest.mark.parametrize("op", OPS)
def test_every_operation_between_four_ranks(op: str) -> None:
    assert sizes(samples(scene("four", 4, 2).said[0]["one domain"]), op, "4/1") == SIZES


@pytest.mark.parametrize("group", ["2/1", "2/2", "4/2"])
@pytest.mark.parametrize("op", ["all_reduce", "all_to_all", "send"])
def test_groups_within_and_across_nodes(op: str, group: str) -> None:
    found = samples(scene("four", 4, 2).said[0]["two domains"])
    assert sizes(found, op, group) == SIZES
    beside = {s.how for s in found if s.group == group}
    assert beside == ({"gloo"} if group == "4/2" else {"gloo, 2 groups at once"})


def test_ranks_without_a_group_wait() -> None:
    part = scene("four", 4, 2).said[0]["some ranks idle"]
    assert part["ended"] == "complete" and sizes(samples(part), "all_gather", "2/1") == SIZES


def test_a_slowed_collective_shows_in_its_samples_only() -> None:
    found = samples(scene("two", 2).said[0]["slowed"])
    assert {s.op for s in found} == {"all_gather", "all_to_all"}
    for sample in found:
        assert (sample.seconds >= 0.2) == (sample.op == "all_to_all"), sample
    curves = fit([s for s in found if s.op == "all_to_all"]).collectives
    assert curves["all_to_all"][2].seconds(65536.0) >= 0.2


@pytest.mark.parametrize("key", ["all_to_all+gemm", "all_gather+gemm"])
def test_overlap_is_measured_alone_and_together(key: str) -> None:
    found, *again = [s for s in samples(scene("two", 2).said[0]["all"]) if (s.op, s.key) == ("overlap", key)]
    assert len(again) <= 1
    assert set(found.sizes) == {"alone_compute_s", "alone_comm_s"} and min(found.sizes.values()) > 0
    assert "torch.mm" in found.how and found.how.startswith("gloo")
    assert fit([found]).overlap_loss is not None


def test_what_cannot_run_is_skipped_with_its_reason_on_all_ranks() -> None:
    for said in scene("two", 2).said:
        skipped = dict(said["all"]["skipped"])
        assert skipped["deepep"] == "DeepEP is not installed"
        assert "barter" in skipped["barter"] and "only a gemm" in skipped["overlap"]
        assert said["all"]["ended"] == "complete"


def test_deepep_counts_what_leaves_a_rank() -> None:
    """Every one of 16 tokens of 32 bfloat16 goes to the one other rank."""
    found = samples(scene("two", 2).said[0]["deepep"])
    assert [s.key for s in found][:2] == ["dispatch", "combine"]
    assert {s.sizes["message_bytes"] for s in found} == {16 * 32 * 2.0} and {s.how for s in found} == {"DeepEP 1.0"}


def test_copies_of_tokens() -> None:
    """Two domains of two ranks; rank 1 is in the first one."""
    reached = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1], [0, 0, 0, 1]], dtype=torch.bool)
    assert copies(reached, 1, domains=1) == 1 + 2 + 1
    assert copies(reached, 1, domains=2) == 0 + 1 + 1


@given(st.integers(4, 10**6), st.integers(2, 64))
def test_skewed_counts(share: int, ranks: int) -> None:
    counts = skewed(share, ranks)
    assert len(counts) == ranks and counts == sorted(counts) and min(counts) >= 1
    assert abs(sum(counts) - share * ranks) <= ranks
    assert counts[-1] == pytest.approx(FULLEST * share, abs=1)


def test_the_slowest_rank_of_each_repeat_counts() -> None:
    assert _slowest([[1.0, 5.0], [3.0, 2.0], [0.0, 0.0]]) == [3.0, 5.0]


class FakeCuda:
    """Events and streams that only write down what was asked of them; a run takes a millisecond."""

    def __init__(self, asked: list[str]) -> None:
        self.asked = asked
        fake = self

        class Event:
            def __init__(self, enable_timing: bool = False) -> None:
                self.asks = 2

            def record(self) -> None:
                asked.append("event")

            def query(self) -> bool:
                self.asks -= 1
                return self.asks < 0

            def elapsed_time(self, other: Any) -> float:
                return float(fake.asked.count("run"))

        class Stream:
            def __init__(self, name: Any) -> None:
                self.name = name

            def wait_stream(self, other: Any) -> None:
                asked.append(f"{self.name} waits for {other.name}")

        self.Event, self.Stream = Event, Stream

    def _sleep(self, cycles: int) -> None:
        self.asked.append("pause")

    def current_stream(self, device: Any) -> Any:
        return self.Stream("current")

    @contextlib.contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        self.asked.append(f"on {stream.name}")
        yield
        self.asked.append("off")


def test_gpus_are_timed_by_events_behind_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(bench_collectives, "_cuda", FakeCuda(asked))
    monkeypatch.setattr(bench_collectives.dist, "all_reduce", lambda _: asked.append("together"))
    bench = object.__new__(GroupBench)
    bench.world, bench._signal = types.SimpleNamespace(device=torch.device("cuda")), torch.zeros(1)  # type: ignore[assignment]

    def start() -> tuple[()]:
        asked.append("run")
        return ()

    assert bench._batch_s(start, 3) == pytest.approx(3e-3)
    assert asked == ["pause", "together", "event", "run", "run", "run", "event"]
    asked.clear()
    assert bench._batch_s(start, 1000) == pytest.approx(1.0), "a longer batch is measured in part"
    assert asked.count("run") < 1000


def test_both_orders_of_overlap_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    fake = FakeCuda(asked)
    for name in ("Stream", "stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))

    class Work:
        def wait(self) -> None:
            asked.append("comm done")

    def comm() -> list[Work]:
        asked.append("comm")
        return [Work()]

    def compute() -> tuple[()]:
        asked.append("compute")
        return ()

    (_, comm_first), (_, compute_first) = _orders(torch.device("cuda"), comm, compute)
    assert len(comm_first()) == 1 and asked == ["comm", "compute"]
    asked.clear()
    assert compute_first() == ()
    assert asked == ["cuda waits for current", "compute", "on cuda", "comm", "comm done", "off", "current waits for cuda"]
