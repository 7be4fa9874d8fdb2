"""A file of samples loses nothing that was measured, whatever ended its writer."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from moeplan.errors import FileError, SchemaError
from moeplan.profiles.samples import Environment, Sample, SampleLog, load_samples, samples_path

WHERE = Environment(
    moeplan="1", torch="2.9", backend="cuda", communication="nccl 2.29", device="NVIDIA H100", memory_bytes=8e10, processors=132
)
GEMM = Sample(
    op="gemm", key="bf16", sizes={"m": 1, "n": 2, "k": 3}, seconds=0.1 + 0.2, spread=0.01, times_s=(0.3, 1 / 3), outliers=1
)
RING = Sample(op="all_gather", key="bf16", sizes={"message_bytes": 65536}, group="16/2", seconds=1e-5, spread=0.0, how="nccl")


def written(path: Path) -> Path:
    log = SampleLog(path, WHERE)
    for sample in (GEMM, RING):
        log.add(sample)
    return path


def test_round_trip_digit_by_digit(tmp_path: Path) -> None:
    assert load_samples(written(tmp_path / "a")) == (WHERE, [GEMM, RING])


def test_the_file_beside_a_profile() -> None:
    assert samples_path(Path("x/profile.yaml")) == Path("x/profile.samples.jsonl")


def test_repeats_are_one_case() -> None:
    again = dataclasses.replace(GEMM, seconds=1.0, sizes={"k": 3, "n": 2, "m": 1})
    assert again.case == GEMM.case != RING.case


def test_a_line_cut_short_is_left_out_and_another_run_goes_on(tmp_path: Path) -> None:
    path = written(tmp_path / "a")
    whole = path.read_text()
    path.write_text(whole[:-9])
    assert load_samples(path) == (WHERE, [GEMM])
    SampleLog(path, WHERE, resume=True).add(RING)
    assert load_samples(path) == (WHERE, [GEMM, RING])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is not a file of samples"),
        ('{"schema": "moeplan.samples/9"}\n', "has schema 'moeplan.samples/9'"),
        ("not json\n", "line 1: not JSON"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "a").write_text(text)
    with pytest.raises(SchemaError, match=said):
        load_samples(tmp_path / "a")


def test_a_bad_line_is_named(tmp_path: Path) -> None:
    path = written(tmp_path / "a")
    path.write_text(path.read_text().replace('"seconds": 1e-05', '"second": 1e-05'))
    with pytest.raises(SchemaError, match="line 3: unknown key 'second'"):
        load_samples(path)


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="cannot write samples"):
        SampleLog(tmp_path / "no" / "a", WHERE)
