"""Models by name or by file.

A catalog model is one YAML file in `catalog/models/`: the published configuration in its own keys, and where it was
published. A user's file is a published `config.json`, a directory that holds one, or YAML with the same keys or in the
catalog's own form. A name may end in "-NL-proxy": the model cut to its first N layers, as published runs name them.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moeplan.costmodels.hf_config import read_config
from moeplan.costmodels.model import Model
from moeplan.errors import FileError, SchemaError, UnknownNameError, nearest_hint
from moeplan.records import from_mapping, load_yaml, read_text

MODELS = Path(__file__).parent / "catalog" / "models"
_PROXY = re.compile(r"(?P<name>.+)-(?P<layers>\d+)l-proxy", re.IGNORECASE)
_SUFFIXES = (".json", ".yaml", ".yml")


@dataclass(frozen=True, kw_only=True, slots=True)
class CatalogModel:
    """One file of the model catalog."""

    name: str
    """Published name in lower case; the name of the file."""
    aliases: tuple[str, ...] = ()
    """Other published spellings; letter case, "-", "_" and spaces make no difference."""
    source: str
    """Repository or paper where the configuration is published."""
    note: str = ""
    """How the entry differs from its source, and how it was checked."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The published configuration, less what neither the reader nor an exporter uses."""


def load_model(ref: str) -> Model:
    """The model of a catalog name (or alias), a `config.json`, a directory that holds one, or a YAML file."""
    if "/" in ref or "\\" in ref or ref.lower().endswith(_SUFFIXES):
        return _load_file(Path(ref))
    if model := named_model(ref):
        return model
    if ref and os.path.isdir(ref):
        return _load_file(Path(ref))
    if proxy := _PROXY.fullmatch(ref):
        return load_model(proxy["name"]).cut(int(proxy["layers"]))
    raise UnknownNameError("model", ref, model_names(), hint=_hint(ref))


def named_model(name: str) -> Model | None:
    """The catalog's model of a name or alias, cut if it ends in "-NL-proxy"; None if there is none, files are not looked at."""
    if proxy := _PROXY.fullmatch(name):
        whole = named_model(proxy["name"])
        return None if whole is None else whole.cut(int(proxy["layers"]))
    known = _index().get(_fold(name))
    if known is None:
        return None
    entry = catalog_model(known)
    return read_config(entry.config, name=entry.name, source=entry.source)


def model_names() -> list[str]:
    """The names of the catalog, sorted."""
    return sorted(path.stem for path in MODELS.glob("*.yaml"))


def model_aliases() -> dict[str, tuple[str, ...]]:
    """The aliases of every name of the catalog, without reading whole files."""
    return {name: _aliases(MODELS / f"{name}.yaml") for name in model_names()}


@functools.cache
def catalog_model(name: str) -> CatalogModel:
    """The catalog's file of a name in `model_names`."""
    path = MODELS / f"{name}.yaml"
    return from_mapping(CatalogModel, load_yaml(path, "catalog model"), f"catalog model '{name}'")


def _aliases(path: Path) -> tuple[str, ...]:
    """The aliases on a catalog file's second line, which is cheaper to read than the file."""
    with path.open(encoding="utf-8") as stream:
        stream.readline()
        listed = re.fullmatch(r"aliases: \[(.*)\]\n", stream.readline())
    return tuple(listed[1].split(", ")) if listed and listed[1] else ()


@functools.cache
def _index() -> dict[str, str]:
    """Folded name or alias to name."""
    return {_fold(alias): name for name, aliases in model_aliases().items() for alias in (name, *aliases)}


def _fold(name: str) -> str:
    return re.sub(r"[-_ ]", "", name.lower())


def _hint(ref: str) -> str:
    known = {*model_names(), *(alias for aliases in model_aliases().values() for alias in aliases)}
    return f"{nearest_hint(ref, known)} A path needs a '/' or ends in .json or .yaml"


def _load_file(path: Path) -> Model:
    """The model of a user's file; it is named after the file, or after the directory of a `config.json`."""
    if os.path.isdir(path):
        path = path / "config.json"
    if not os.path.exists(path):
        known = _index().get(_fold(path.name))
        hint = f"the catalog knows it as '{known}'" if known else None
        raise FileError(f"model file '{path}' does not exist", hint=hint)
    data = _parse_json(path) if path.suffix.lower() == ".json" else load_yaml(path, "model file")
    if not isinstance(data, Mapping):
        raise SchemaError(f"model file '{path}': expected the keys of a config.json, found {type(data).__name__}")
    name = path.resolve().parent.name if path.name == "config.json" else path.stem
    if isinstance(data.get("config"), Mapping):
        entry = from_mapping(CatalogModel, {"name": name, "source": str(path), **data}, f"model file '{path}'")
        return read_config(entry.config, name=entry.name, source=entry.source)
    return read_config(data, name=name or path.stem, source=str(path))


def _parse_json(path: Path) -> Any:
    text = read_text(path, "model file")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise SchemaError(f"model file '{path}', line {error.lineno}: not valid JSON: {error.msg}") from None
    except RecursionError:
        raise SchemaError(f"model file '{path}': not valid JSON: nested too deeply") from None
