"""Profile files: a profile as YAML and back, every price the same.

The file holds the cluster (by name where the catalog has it, else in full), every curve with its error, samples, valid range
and source, what a step sustains of them, and where each comes from. Numbers are in base units, as the ends of their keys say
(seconds, bytes, FLOP and their rates), because these survive the way through text digit by digit. Unknown keys are refused
with the nearest name, other schema versions altogether.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moeplan._version import VERSION
from moeplan.errors import ClusterError, MoeplanError, SchemaError
from moeplan.profiles.curves import (
    AttentionCurve,
    CollectiveCurve,
    DispatchCurve,
    GemmCurve,
    GroupedGemmCurve,
    QuantizedGemmCurve,
    StreamCurve,
)
from moeplan.profiles.hardware import Cluster, Link, load_cluster, named_cluster
from moeplan.profiles.nominal import nominal
from moeplan.profiles.origin import CalibratedOn, MeasuredOn, Origin
from moeplan.profiles.profile import ALL_TO_ALL_SHARE, OVERLAP_LOSS, RING_SHARE, SEND_SHARE, Profile
from moeplan.records import check_schema, dump_yaml, from_mapping, load_yaml, sha256_of, to_mapping
from moeplan.units import GB

SCHEMA = "moeplan.profile/1"
SAME_HOSTS = (
    "device", "gpus_per_node", "domain_gpus", "scale_up", "scale_out", "nics_per_node", "oversubscription", "pcie",
)  # fmt: skip
"""What two clusters share if the curves of one hold for the other."""

_OPERATIONS = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all")
_DISPATCHES = tuple(
    f"{library}-{phase}{reach}"
    for library in ("deepep", "hybridep")
    for phase in ("dispatch", "combine")
    for reach in ("", "-scale-out")
)
_DIRECTIONS = ("", "-dgrad", "-wgrad")
_AS_THEY_ARE = ("ring_share", "all_to_all_share", "send_share", "hop_s", "host_copies", "multi_node", "streams")
"""Fields that a file holds as the profile does."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Contents:
    """The keys of a profile file; those of a `Profile` but for what YAML cannot say."""

    schema: str
    moeplan: str = ""
    """Version that wrote the file."""
    name: str
    cluster: Any
    """Name of the catalog, shorthand, or every field of a `Cluster`."""
    sustained: Mapping[str, float] = field(default_factory=dict)
    host: float = 1.0
    exposed: float = 1.0
    overlap_loss: float = OVERLAP_LOSS
    calibrated_on: tuple[CalibratedOn, ...] = ()
    measured_on: MeasuredOn | None = None
    ring_share: float = RING_SHARE
    all_to_all_share: float = ALL_TO_ALL_SHARE
    send_share: float = SEND_SHARE
    hop_s: float = 0.0
    host_copies: Mapping[str, float] = field(default_factory=dict)
    stream_bytes_per_s: float
    gemms: Mapping[str, GemmCurve]
    quantized_gemms: Mapping[str, QuantizedGemmCurve] = field(default_factory=dict)
    grouped: Mapping[str, GroupedGemmCurve]
    attentions: Mapping[str, AttentionCurve]
    collectives: Mapping[str, Mapping[str, CollectiveCurve]]
    multi_node: Mapping[str, Mapping[str, CollectiveCurve]] = field(default_factory=dict)
    dispatches: Mapping[str, DispatchCurve]
    streams: Mapping[str, StreamCurve] = field(default_factory=dict)
    origins: Mapping[str, Origin] = field(default_factory=dict)


def profile_text(profile: Profile) -> str:
    """Text of the profile file."""
    quantized = {k: c for k, c in profile.gemms.items() if isinstance(c, QuantizedGemmCurve)}
    contents = _Contents(
        schema=SCHEMA,
        moeplan=VERSION,
        name=profile.name,
        cluster=cluster_data(profile.cluster),
        sustained=profile.sustained,
        host=profile.host,
        exposed=profile.exposed,
        overlap_loss=profile.overlap_loss,
        calibrated_on=profile.calibrated_on,
        measured_on=profile.measured_on,
        **{name: getattr(profile, name) for name in _AS_THEY_ARE},
        stream_bytes_per_s=profile.stream_bytes_per_s,
        gemms={k: c for k, c in profile.gemms.items() if k not in quantized},
        quantized_gemms=quantized,
        grouped=profile.grouped,
        attentions=profile.attentions,
        collectives={op: {str(n): curve for n, curve in curves.items()} for op, curves in profile.collectives.items()},
        dispatches=profile.dispatches,
        origins=profile.origins,
    )
    factors = {name: getattr(profile, name) for name in ("host", "exposed", "overlap_loss")}
    data = {**to_mapping(contents), **factors}  # those of their default stand there too
    return dump_yaml({f.name: data[f.name] for f in dataclasses.fields(_Contents) if f.name in data})


def load_profile(path: Path) -> Profile:
    """The profile of a file; another schema version, unknown keys and curves that are missing are refused."""
    where = f"profile '{path}'"
    remedy = "write it anew with `moeplan calibrate`"
    data = check_schema(load_yaml(path, "profile"), SCHEMA, where, "profile", version=VERSION, remedy=remedy)
    try:
        contents = from_mapping(_Contents, data, where)
        _check_curves(contents, where)
        profile = _profile_of(contents, where)
    except MoeplanError as error:
        if error.message.startswith(where):
            raise
        raise SchemaError(f"{where}: {error.message}", hint=error.hint) from None
    return dataclasses.replace(profile, path=str(path.resolve()), sha256=sha256_of(path, "profile"))


def _profile_of(contents: _Contents, where: str) -> Profile:
    return Profile(
        cluster=read_cluster(contents.cluster, f"{where}, key 'cluster'"),
        name=contents.name,
        stream_bytes_per_s=contents.stream_bytes_per_s,
        gemms={**contents.gemms, **contents.quantized_gemms},
        grouped=contents.grouped,
        attentions=contents.attentions,
        collectives={op: {int(n): curve for n, curve in curves.items()} for op, curves in contents.collectives.items()},
        dispatches=contents.dispatches,
        sustained=contents.sustained,
        host=contents.host,
        exposed=contents.exposed,
        overlap_loss=contents.overlap_loss,
        origins=contents.origins,
        calibrated_on=contents.calibrated_on,
        measured_on=contents.measured_on,
        **{name: getattr(contents, name) for name in _AS_THEY_ARE},
    )


def _check_curves(contents: _Contents, where: str) -> None:
    """Refuse a file without the curves that every price needs, or with keys that no curve can have."""
    precisions = {**contents.gemms, **contents.quantized_gemms}
    needed = {
        "gemms": (("bf16",), contents.gemms),
        "grouped": (tuple(p + way for p in precisions for way in _DIRECTIONS), contents.grouped),
        "collectives": (_OPERATIONS, contents.collectives),
        "dispatches": (_DISPATCHES, contents.dispatches),
    }
    for key, (names, curves) in needed.items():
        missing = [name for name in names if name not in curves]
        if missing:
            raise SchemaError(f"{where}, key '{key}': no curve for {', '.join(missing)}", hint=f"it has {', '.join(curves)}")
    if not any(size.isdecimal() for size in contents.attentions):
        raise SchemaError(f"{where}, key 'attentions': no curve of an equal head size", hint="name one like 128")
    for size in contents.attentions:
        if re.fullmatch(r"[1-9]\d*(/[1-9]\d*)?", size) is None:
            raise SchemaError(f"{where}, key 'attentions': '{size}' is not a head size", hint="write 128 or 192/128")
    for op, groups in contents.multi_node.items():
        for group in groups:
            ranks, _, domains = group.partition("/")
            if not (ranks.isdecimal() and domains.isdecimal() and int(ranks) >= int(domains) >= 2 and op in _OPERATIONS):
                raise SchemaError(f"{where}, key 'multi_node.{op}': '{group}' is not a group", hint="write ranks/domains: 16/2")
    for op, sizes in contents.collectives.items():
        for size in sizes:
            if not size.isdecimal() or int(size) < 2:
                raise SchemaError(f"{where}, key 'collectives.{op}': '{size}' is not a count of ranks, 2 at least")
        if not sizes:
            raise SchemaError(f"{where}, key 'collectives.{op}': no curve at all", hint="give one by count of ranks")


def cluster_data(cluster: Cluster) -> Any:
    """A cluster as plain data: its shorthand or catalog name where that says it all, else every field."""
    try:
        known = named_cluster(cluster.name)
    except MoeplanError:  # the name of a file may be half of a shorthand ("h100")
        known = None
    return cluster.name if known == cluster else to_mapping(cluster)


def read_cluster(data: Any, where: str) -> Cluster:
    """The inverse of `cluster_data`; complaints begin with `where`."""
    try:
        return load_cluster(data) if isinstance(data, str) else from_mapping(Cluster, data, where)
    except MoeplanError as error:
        if error.message.startswith(where):
            raise
        raise SchemaError(f"{where}: {error.message}", hint=error.hint) from None


def on_cluster(profile: Profile, cluster: Cluster) -> Profile:
    """The profile on another count of the same hosts; `ClusterError` where device or links are others."""
    mine = profile.cluster
    for name in SAME_HOSTS:
        own, other = getattr(mine, name), getattr(cluster, name)
        if own != other:
            raise ClusterError(
                f"the profile was made for {mine.name} with {name} {_shown(own)}, {cluster.name} has {_shown(other)}",
                hint="leave the cluster out, or name one that differs in its count of GPUs alone",
            )
    return dataclasses.replace(profile, cluster=dataclasses.replace(cluster, machine=mine.machine))


def _shown(value: Any) -> str:
    if isinstance(value, Link):
        return f"{value.name} ({value.bytes_per_s / GB:g} GB/s, {value.latency_s * 1e6:g} us)"
    return str(getattr(value, "name", value))


_CURVES = (
    "stream_bytes_per_s", "gemms", "grouped", "attentions", "collectives", "dispatches", "sustained", "host", "exposed",
    "overlap_loss", *_AS_THEY_ARE,
)  # fmt: skip


def is_nominal(profile: Profile) -> bool:
    """Whether a profile is what `nominal` gives for its cluster, not one that a file holds or that was changed since."""
    if profile.path:
        return False
    try:
        usual = nominal(profile.cluster)
    except ClusterError:  # a device that nobody measured
        return False
    return all(getattr(profile, name) == getattr(usual, name) for name in _CURVES)
