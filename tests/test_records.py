"""Dataclasses to plain data and back; files read with clear complaints and written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplan.errors import FileError, SchemaError
from moeplan.records import dump_yaml, from_mapping, load_yaml, parse_yaml, plain, save_text, to_mapping


@dataclass(frozen=True, kw_only=True, slots=True)
class Wheel:
    """A part."""

    size: int
    kind: Literal["front", "back"] = "back"


@dataclass(frozen=True, kw_only=True, slots=True)
class Cart:
    """A whole."""

    name: str
    wheels: tuple[Wheel, ...] = ()
    load: float = 0.0
    owner: str | None = None
    notes: Mapping[str, float] = field(default_factory=dict)
    open: bool = False


wheels = st.builds(Wheel, size=st.integers(), kind=st.sampled_from(["front", "back"]))
finite = st.floats(allow_nan=False, allow_infinity=False)
carts = st.builds(
    Cart,
    name=st.text(), wheels=st.lists(wheels, max_size=3).map(tuple), load=finite, owner=st.none() | st.text(),
    notes=st.dictionaries(st.text(), finite, max_size=3), open=st.booleans(),
)  # fmt: skip


@given(carts)
def test_there_and_back_through_yaml(cart: Cart) -> None:
    assert from_mapping(Cart, parse_yaml(dump_yaml(to_mapping(cart)), "cart"), "cart") == cart


def test_defaults_are_left_out() -> None:
    assert to_mapping(Cart(name="a", wheels=(Wheel(size=2),))) == {"name": "a", "wheels": [{"size": 2}]}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"nam": "a"}, "cart: unknown key 'nam' (did you mean 'name'?)"),
        ({"name": "a", "colour": 1}, "cart: unknown key 'colour' (known keys: name, wheels, load, owner, notes, open)"),
        ({}, "cart: missing key 'name'"),
        (None, "cart: expected a mapping with the keys name, wheels, load, owner, notes, open, found nothing"),
        ([1], "found list [1]"),
        ({"name": 3}, "cart, key 'name': expected str, found int 3"),
        ({"name": "a", "open": 1}, "cart, key 'open': expected bool, found int 1"),
        ({"name": "a", "load": True}, "cart, key 'load': expected float, found bool True"),
        ({"name": "a", "load": 10**400}, "is too large"),
        ({"name": "a", "wheels": {"size": 1}}, "cart, key 'wheels': expected a list, found dict"),
        ({"name": "a", "wheels": [{"size": 1}, {"size": 1.5}]}, "key 'wheels'[1], key 'size': expected int, found float 1.5"),
        ({"name": "a", "wheels": [{"size": 1, "kind": "left"}]}, "expected one of front, back, found str 'left'"),
        ({"name": "a", "notes": 3}, "cart, key 'notes': expected a mapping, found int 3"),
        ({"name": "a", "notes": {"x": "y"}}, "cart, key 'notes'.x: expected float"),
    ],
)
def test_complaints(data: Any, message: str) -> None:
    with pytest.raises(SchemaError) as error:
        from_mapping(Cart, data, "cart")
    assert message in str(error.value)


def test_whole_numbers_serve_as_floats() -> None:
    load = from_mapping(Cart, {"name": "a", "load": 3}, "cart").load
    assert load == 3.0 and isinstance(load, float)


def test_plain_data() -> None:
    assert plain({"a": np.float64(1.5), "b": (np.int64(2), {3})}) == {"a": 1.5, "b": [2, [3]]}
    assert plain(np.arange(3)) == [0, 1, 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: [1", "line 3: not valid YAML"),
        ("a: 1\na: 2", "line 2: not valid YAML: key 'a' stands twice"),
        ("\t", "not valid YAML"),
    ],
)
def test_malformed_yaml(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(SchemaError) as error:
        load_yaml(path, "cart file")
    assert str(error.value).startswith(f"cart file '{path}'") and message in str(error.value)


def test_merged_keys_are_no_duplicates() -> None:
    assert parse_yaml("base: &b {a: 1}\nmine: {<<: *b, c: 2}", "x")["mine"] == {"a": 1, "c": 2}


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes("é".encode("latin-1"))
    for name, message in (("none", "does not exist"), (".", "is a directory"), ("latin", "not UTF-8"), ("n\0", "null byte")):
        with pytest.raises(FileError, match=message):
            load_yaml(tmp_path / name, "cart file")


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes(b"\xef\xbb\xbfa: 1\n")
    assert load_yaml(tmp_path / "x.yaml", "x") == {"a": 1}


def test_writing(tmp_path: Path) -> None:
    path = tmp_path / "out.txt"
    save_text(path, "one", "cart file")
    save_text(path, "zwei €", "cart file")
    assert path.read_text(encoding="utf-8") == "zwei €" and os.listdir(tmp_path) == ["out.txt"]
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "out.txt"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        save_text(path, "\ud800", "cart file")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["out.txt"]
    with pytest.raises(FileError, match="cannot write cart file .*choose a directory that exists"):
        save_text(tmp_path / "none" / "out.txt", "x", "cart file")
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileError, match="cannot write cart file"):
        save_text(tmp_path / "folder", "x", "cart file")
    assert sorted(os.listdir(tmp_path)) == ["folder", "out.txt"]


def test_pieces_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "out.txt"

    def failing() -> Iterator[str]:
        yield "first\n"
        raise SchemaError("stop")

    with pytest.raises(SchemaError, match="stop"):
        save_text(path, failing(), "table")
    assert os.listdir(tmp_path) == []
    save_text(path, iter(["a\n", "b\n"]), "table")
    assert path.read_text() == "a\nb\n" and os.listdir(tmp_path) == ["out.txt"]


def test_a_device_or_a_pipe_is_written_and_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    save_text(pipe, ["a", "b"], "table")
    assert os.read(reader, 10) == b"ab" and pipe.is_fifo() and os.listdir(tmp_path) == ["pipe"]
    os.close(reader)
    save_text(Path(os.devnull), "x", "table")
    assert Path(os.devnull).is_char_device()
