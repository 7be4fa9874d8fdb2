"""Parsing and formatting of sizes, durations and counts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplan.errors import UsageError
from moeplan.units import GIB, format_bytes, format_count, format_seconds, parse_bytes, parse_seconds


@pytest.mark.parametrize(
    ("text", "value"),
    [("80GiB", 80 * 2**30), ("1.5 TB", 1.5e12), ("0", 0), ("17", 17), (" 2 kib ", 2048), ("1e3MB", 1e9), (".5GiB", 2**29)],
)
def test_sizes(text: str, value: float) -> None:
    assert parse_bytes(text) == value


@pytest.mark.parametrize(("text", "value"), [("90s", 90), ("250ms", 0.25), ("2m", 120), ("2 min", 120), ("1h", 3600), ("3", 3)])
def test_durations(text: str, value: float) -> None:
    assert parse_seconds(text) == value


@pytest.mark.parametrize("text", ["", "GiB", "80 gigs", "-1GiB", "1,5GB", "nan", "inf", "0x10", "80GiB80", "1e999", "10s"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_bytes(text)
    assert f"'{text}'" in error.value.message and error.value.hint == "write it like 80GiB"


@pytest.mark.parametrize("text", ["", "soon", "-2s", "10GiB", "1e400s"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(UsageError, match="write it like 90s"):
        parse_seconds(text)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (80 * GIB, "80.0 GiB"), (-2 * GIB, "-2.0 GiB"), (2000 * GIB, "2.0 TiB")],
)
def test_sizes_for_people(value: float, text: str) -> None:
    assert format_bytes(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 s"), (12, "12.0 s"), (4.561e-3, "4.56 ms"), (0.999, "999 ms"), (1.0, "1.00 s"), (123.4, "123 s"),
        (3e-7, "0.300 us"), (86_400, "86,400 s"),
    ],
)  # fmt: skip
def test_durations_for_people(value: float, text: str) -> None:
    assert format_seconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(512, "512"), (9999, "9999"), (12_300, "12.3 k"), (1.2e6, "1.2 M"), (671e9, "671.0 B"), (1e12, "1.0 T")]
)
def test_counts_for_people(value: float, text: str) -> None:
    assert format_count(value) == text


@given(st.integers(0, 10**15))
def test_what_is_shown_is_close_to_what_is_meant(value: int) -> None:
    assert parse_bytes(format_bytes(value)) == pytest.approx(value, rel=0.051)
