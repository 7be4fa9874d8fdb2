"""Parts of a plan file as plain data and back: model, cluster, workload, layout, limits.

What a catalog holds stands there by name; all else stands there in full, so that a plan needs no file beside it. Reading
refuses unknown keys with the nearest name and says where a complaint comes from.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from moeplan.costmodels.hf_config import read_config
from moeplan.costmodels.layout import DEGREES, Layout
from moeplan.costmodels.model import Model
from moeplan.costmodels.model_catalog import load_model, named_model
from moeplan.costmodels.workload import Workload, load_era, load_precision
from moeplan.errors import MoeplanError, SchemaError
from moeplan.planner.problem import Problem, parse_condition
from moeplan.profiles.hardware import Cluster, load_cluster, named_cluster
from moeplan.records import from_mapping, to_mapping

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class _ModelPart:
    """A model in a plan file, where its name alone does not say it."""

    name: str
    source: str = ""
    config: Mapping[str, Any] | None = None
    """The published configuration; None: that of the catalog."""
    layers: int | None = None
    """Decoder layers, where the model was cut to its first ones."""
    mtp_layers: int | None = None
    """Prediction layers that are trained, where these are not all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Limits:
    """What a problem allows beside what the hardware does."""

    memory_bytes: float = 0.0
    pins: tuple[str, ...] = ()
    forbidden: tuple[str, ...] = ()


@contextmanager
def located(where: str) -> Iterator[None]:
    """Put `where` before the message of errors that do not begin with it."""
    try:
        yield
    except MoeplanError as error:
        if error.message.startswith(where):
            raise
        raise SchemaError(f"{where}: {error.message}", hint=error.hint) from None


def _known(find: Callable[[str], T | None], name: str) -> T | None:
    """What a catalog has under the name of a file, if anything; such a name may also be half of one ("h100")."""
    try:
        return find(name)
    except MoeplanError:
        return None


def model_data(model: Model) -> Any:
    """A model as plain data: its name where the catalog has it, else its configuration and what was left out of it."""
    published = _known(named_model, model.name)
    if published == model:
        return model.name
    config = None
    if published is None or dataclasses.replace(published, mtp=model.mtp) != model:
        config = json.loads(json.dumps(dict(model.config), default=str, skipkeys=True))
        try:
            published = read_config(config, name=model.name, source=model.source)
        except MoeplanError:  # put together in Python, not read: its plan can be looked at, but not loaded
            published = model
    return to_mapping(
        _ModelPart(
            name=model.name,
            source=model.source if config is not None else "",
            config=config,
            layers=len(model.layers) if len(model.layers) != len(published.layers) else None,
            mtp_layers=len(model.mtp) if len(model.mtp) != len(published.mtp) else None,
        )
    )


def read_model(data: Any, where: str) -> Model:
    """The inverse of `model_data`."""
    with located(f"{where}, key 'model'"):
        if isinstance(data, str):
            return load_model(data)
        part = from_mapping(_ModelPart, data, f"{where}, key 'model'")
        if part.config is None:
            model = load_model(part.name)
        else:
            model = read_config(part.config, name=part.name, source=part.source)
        if part.layers is not None:
            model = dataclasses.replace(model.cut(part.layers), name=model.name)
        if part.mtp_layers is not None:
            if not 0 <= part.mtp_layers <= len(model.mtp):
                raise SchemaError(f"mtp_layers is {part.mtp_layers}, {model.name} has {len(model.mtp)} prediction layers")
            model = dataclasses.replace(model, mtp=model.mtp[: part.mtp_layers])
        return model


def cluster_data(cluster: Cluster) -> Any:
    """A cluster as plain data: its shorthand or catalog name where that says it all, else every field."""
    return cluster.name if _known(named_cluster, cluster.name) == cluster else to_mapping(cluster)


def read_cluster(data: Any, where: str) -> Cluster:
    """The inverse of `cluster_data`."""
    with located(f"{where}, key 'cluster'"):
        return load_cluster(data) if isinstance(data, str) else from_mapping(Cluster, data, f"{where}, key 'cluster'")


def workload_data(workload: Workload) -> dict[str, Any]:
    """A workload as plain data, recipe and era by name."""
    return {**to_mapping(workload), "precision": workload.precision.name, "era": workload.era.name}


def read_workload(data: Any, where: str) -> Workload:
    """The inverse of `workload_data`."""
    here = f"{where}, key 'workload'"
    if not isinstance(data, Mapping):
        raise SchemaError(f"{here}: expected a mapping")
    values = dict(data)
    for name in ("precision", "era"):
        if name not in values:
            raise SchemaError(f"{here}: missing key '{name}'")
    with located(here):
        values["precision"] = to_mapping(load_precision(str(values["precision"])))
        values["era"] = to_mapping(load_era(str(values["era"])))
        return from_mapping(Workload, values, here)


def layout_data(layout: Layout) -> dict[str, Any]:
    """A layout with every degree written out, also those of 1."""
    degrees = {name: getattr(layout, name) for name in (*DEGREES, "micro_batch")}
    return {"world": layout.world, **degrees, **{k: v for k, v in to_mapping(layout).items() if k not in degrees}}


def read_layout(data: Any, where: str) -> Layout:
    """The inverse of `layout_data`; `world` must be what the degrees multiply to."""
    here = f"{where}, key 'layout'"
    if not isinstance(data, Mapping):
        raise SchemaError(f"{here}: expected a mapping")
    with located(here):
        layout = from_mapping(Layout, {k: v for k, v in data.items() if k != "world"}, here)
    if data.get("world") not in (None, layout.world):
        raise SchemaError(
            f"{here}: world is {data['world']}, but tp*cp*dp*pp = "
            f"{layout.tp}*{layout.cp}*{layout.dp}*{layout.pp} = {layout.world}"
        )
    return layout


def limits_data(problem: Problem) -> dict[str, Any]:
    """Memory limit and conditions as plain data; empty where there are none."""
    return to_mapping(
        _Limits(
            memory_bytes=float(problem.memory_limit_bytes),
            pins=tuple(c.text for c in problem.pins),
            forbidden=tuple(c.text for c in problem.forbidden),
        )
    )


def read_limits(data: Any, where: str) -> dict[str, Any]:
    """The fields of a problem that `limits_data` wrote."""
    with located(f"{where}, key 'limits'"):
        limits = from_mapping(_Limits, {} if data is None else data, f"{where}, key 'limits'")
        return {
            "memory_limit_bytes": limits.memory_bytes,
            "pins": tuple(parse_condition(c) for c in limits.pins),
            "forbidden": tuple(parse_condition(c) for c in limits.forbidden),
        }
