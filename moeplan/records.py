"""Frozen dataclasses to and from YAML.

`from_mapping(cls, data, where)` builds a (nested) frozen dataclass from plain YAML data: an unknown key is refused with the
nearest known name, a missing one and a wrong type are named with their place. `to_mapping` is the inverse. `load_yaml` and
`save_text` are the only places that open a user's files; a file is written whole or not at all.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import tempfile
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin

import yaml

from moeplan.errors import FileError, SchemaError, nearest

T = TypeVar("T")
_MOST = 10**300
_Dumper: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_SafeLoader):  # type: ignore[misc]
    """YAML as it is, but a key that stands twice is refused: the first would be lost without a word."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"key '{key.value}' stands twice", key.start_mark)
                seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


def read_text(path: Path, what: str) -> str:
    """The text of a user's file; `what` names its role in the error ("plan file")."""
    try:
        return path.read_text(encoding="utf-8-sig")  # Windows programs put a mark before the text
    except FileNotFoundError:
        raise FileError(f"{what} '{path}' does not exist") from None
    except IsADirectoryError:
        raise FileError(f"{what} '{path}' is a directory", hint="give the path of a file") from None
    except UnicodeDecodeError:
        raise FileError(f"cannot read {what} '{path}': not UTF-8 text", hint="save it as UTF-8") from None
    except (OSError, ValueError) as error:
        raise FileError(f"cannot read {what} '{path}': {getattr(error, 'strerror', None) or error}") from None


def sha256_of(path: Path, what: str) -> str:
    """SHA-256 of a user's text file, as `sha256sum` prints it."""
    read_text(path, what)  # says what is wrong with the file
    return hashlib.sha256(path.read_bytes()).hexdigest()


def parse_yaml(text: str, where: str) -> Any:
    """Plain data of YAML text; a syntax error names the place and line."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or "malformed"
        raise SchemaError(f"{where}{line}: not valid YAML: {problem}") from None


def load_yaml(path: Path, what: str) -> Any:
    """Plain data of a user's YAML file."""
    return parse_yaml(read_text(path, what), f"{what} '{path}'")


def dump_yaml(data: Any, *, compact: bool = True) -> str:
    """YAML text of plain data, keys in the order given; `compact` puts mappings and lists of plain values on one line."""
    style = None if compact else False
    return str(yaml.dump(data, Dumper=_Dumper, sort_keys=False, default_flow_style=style, width=110, allow_unicode=True))


def save_text(path: Path, text: str | Iterable[str], what: str) -> None:
    """Write a text, or its pieces one after the other, to `path` whole or not at all: a temporary file, then a rename.

    What is no file, like /dev/null or a pipe, is written as it stands: a rename would replace it.
    """
    pieces = [text] if isinstance(text, str) else text
    try:
        if path.exists() and not path.is_file():
            with path.open("w", encoding="utf-8") as stream:
                stream.writelines(pieces)
            return
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        hint = "choose a directory that exists and is writable"
        raise FileError(f"cannot write {what} '{path}': {error.strerror}", hint=hint) from None
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.writelines(pieces)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException as error:  # an interrupt must not leave the temporary file behind either
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise FileError(f"cannot write {what} '{path}': {error.strerror}") from None
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def from_mapping(cls: type[T], data: Any, where: str) -> T:
    """Build the dataclass `cls` from plain data; every complaint starts with `where`."""
    if not isinstance(data, Mapping):
        names = ", ".join(f.name for f in dataclasses.fields(cls) if f.init)  # type: ignore[arg-type]
        raise SchemaError(f"{where}: expected a mapping with the keys {names}, found {_kind(data)}")
    hints = _type_hints(typing.cast(Any, cls))
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    for key in data:
        if key not in fields:
            close = nearest(str(key), fields, 1)
            hint = f"did you mean '{close[0]}'?" if close else "known keys: " + ", ".join(fields)
            raise SchemaError(f"{where}: unknown key '{key}'", hint=hint)
    values: dict[str, Any] = {}
    for name, field in fields.items():
        if name in data:
            values[name] = _convert(hints[name], data[name], f"{where}, key '{name}'")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise SchemaError(f"{where}: missing key '{name}'")
    return cls(**values)


def check_schema(data: Any, schema: str, where: str, what: str, *, version: str, remedy: str) -> Mapping[str, Any]:
    """The mapping of a file whose 'schema' is the one that is read.

    `what` names the kind of file ("plan"), `version` that of moeplan, `remedy` what to do about another schema.
    """
    if not isinstance(data, Mapping) or "schema" not in data:
        raise SchemaError(f"{where} is not a {what}: it has no 'schema'", hint=f"{what}s begin with 'schema: {schema}'")
    if data["schema"] != schema:
        raise SchemaError(f"{where} has schema '{data['schema']}', this moeplan {version} reads '{schema}'", hint=remedy)
    return data


def to_mapping(record: Any) -> dict[str, Any]:
    """Plain data of a dataclass; fields that equal their default are left out."""
    out: dict[str, Any] = {}
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if field.init and (value != default or type(value) is not type(default)):
            out[field.name] = plain(value)
    return out


def plain(value: Any) -> Any:
    """A value as plain data: dataclasses to mappings, tuples to lists, numpy scalars to Python ones."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_mapping(value)
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(v) for v in value]
    if hasattr(value, "tolist"):
        return value.tolist()
    return value


@functools.cache
def _type_hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {value!r}"[:80]


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin = get_origin(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        options = get_args(hint)
        if value is None and type(None) in options:
            return None
        return _convert(next(o for o in options if o is not type(None)), value, where)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise SchemaError(f"{where}: expected a list, found {_kind(value)}")
        return tuple(_convert(get_args(hint)[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise SchemaError(f"{where}: expected a mapping, found {_kind(value)}")
        return {str(k): _convert(get_args(hint)[1], v, f"{where}.{k}") for k, v in value.items()}
    if origin is typing.Literal:
        if value not in get_args(hint):
            raise SchemaError(f"{where}: expected one of {', '.join(map(str, get_args(hint)))}, found {_kind(value)}")
        return value
    if dataclasses.is_dataclass(hint):
        return from_mapping(typing.cast(type, hint), value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        if abs(value) > _MOST:
            raise SchemaError(f"{where}: {_kind(value)} is too large")
        return float(value)
    if not isinstance(value, hint) or (hint in (int, float) and isinstance(value, bool)):
        raise SchemaError(f"{where}: expected {hint.__name__}, found {_kind(value)}")
    return value
