"""Parts of a plan file as plain data and back: model, cluster, workload, layout, limits.

What a catalog holds stands there by name; all else stands there in full, so that a plan needs no file beside it. Reading
refuses unknown keys with the nearest name and says where a complaint comes from.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from moeplan.costmodels.hf_config import read_config
from moeplan.costmodels.layout import DEGREES, Layout
from moeplan.costmodels.model import Model
from moeplan.costmodels.model_catalog import load_model, named_model
from moeplan.costmodels.workload import Workload, load_era, load_precision
from moeplan.errors import FileError, MoeplanError, SchemaError
from moeplan.planner.problem import Problem, parse_condition
from moeplan.profiles.hardware import Cluster
from moeplan.profiles.nominal import nominal
from moeplan.profiles.profile import Profile
from moeplan.profiles.profile_file import cluster_data as cluster_data
from moeplan.profiles.profile_file import is_nominal, load_profile, on_cluster
from moeplan.profiles.profile_file import read_cluster as cluster_of
from moeplan.records import from_mapping, sha256_of, to_mapping

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
    target: str = "megatron"


@contextmanager
def located(where: str) -> Iterator[None]:
    """Put `where` before the message of errors that do not begin with it."""
    try:
        yield
    except MoeplanError as error:
        if error.message.startswith(where):
            raise
        raise SchemaError(f"{where}: {error.message}", hint=error.hint) from None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Imported:
    """What a plan file says of the script that it was read from."""

    file: str = ""
    framework: str = ""
    environment: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    unknown: tuple[str, ...] = ()
    passed_through: tuple[str, ...] = ()


def read_imported(data: Any, where: str) -> Mapping[str, Any]:
    """The script that a plan was read from, empty if from none; refuses flags that no shell could read."""
    if not data:
        return {}
    at = f"{where}, key 'provenance', key 'imported'"
    found = from_mapping(_Imported, data, at)
    for text in (*found.unknown, *found.passed_through):
        try:
            shlex.split(text)
        except ValueError as error:
            raise SchemaError(f"{at}: {text!r}: {str(error).lower()}") from None
    return dict(data)


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


def read_cluster(data: Any, where: str) -> Cluster:
    """The inverse of `cluster_data`."""
    return cluster_of(data, f"{where}, key 'cluster'")


def profile_data(profile: Profile) -> dict[str, Any]:
    """What a plan says about its profile: the name, and the file unless it is the nominal one."""
    if is_nominal(profile):
        return {"profile": profile.name}
    return {"profile": profile.name, "profile_file": profile.path, "profile_sha256": profile.sha256}


def profile_remarks(profile: Profile) -> tuple[str, ...]:
    """What is to be said about a plan that was not priced with the nominal profile."""
    if is_nominal(profile):
        return ()
    file = f" of '{Path(profile.path).name}' (sha256 {profile.sha256[:12]})" if profile.path else ", which no file holds"
    return (f"priced with the profile '{profile.name}'{file}, not with the nominal one",)


def read_profile(said: Any, cluster: Cluster, plan_file: Path) -> Profile:
    """The profile that the provenance of a plan names, on the plan's cluster: nominal, or that very file, or an error."""
    where = f"plan file '{plan_file}', key 'provenance'"
    if not isinstance(said, Mapping) or not {"profile_file", "profile_sha256"} & set(said):
        return nominal(cluster)
    file, sha256 = said.get("profile_file"), said.get("profile_sha256")
    if not isinstance(file, str) or not isinstance(sha256, str):
        raise SchemaError(f"{where}: profile_file and profile_sha256 are text, found {file!r} and {sha256!r}"[:200])
    nominally = "to price it with the nominal profile, take both keys out of its provenance"
    if not file:
        raise SchemaError(
            f"{where}: the plan was priced with the profile '{said.get('profile')}', which no file holds", hint=nominally
        )
    found = []
    with located(where):
        for path in dict.fromkeys((Path(file), plan_file.parent / Path(file).name)):
            try:
                there = sha256_of(path, "profile")
            except FileError:
                continue
            if there == sha256:
                return on_cluster(load_profile(path), cluster)
            found.append(f"'{path}' has sha256 {there[:12]}")
        raise SchemaError(
            f"the plan was priced with '{file}', sha256 {sha256[:12]}; {' and '.join(found) or 'it is not there'}",
            hint=f"put that file there or beside the plan, or solve again; {nominally}",
        )


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
    values = {k: v for k, v in data.items() if k != "world"}
    if type(count := values.get("recompute_layers")) is int:  # a lone number is none to YAML only in quotes
        values["recompute_layers"] = str(count)
    with located(here):
        layout = from_mapping(Layout, values, here)
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
            target=problem.target,
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
            "target": limits.target,
        }
