"""Output of nccl-tests (and rccl-tests) as samples of collectives.

Read are the lines "# Rank ... on HOST device N [..] NAME", which tell ranks and hosts, and the rows of the table: size, count,
type, [redop, root], then time (us), algbw, busbw (GB/s), #wrong, out-of-place and in-place. The out-of-place time counts. Sizes
are those of curves.py, the larger buffer of a rank. Prefixes of mpirun and srun, lines of NCCL, and several runs are fine.
What contradicts itself is refused with its line: a time that is not size / algbw, a busbw of another operation or group.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from moeplan.errors import ClusterError, FileError, UnknownNameError
from moeplan.profiles.hardware import Cluster, load_device
from moeplan.profiles.links import collective_curves, link_law
from moeplan.profiles.origin import MeasuredOn, Origin
from moeplan.profiles.profile import Profile
from moeplan.profiles.samples import Sample
from moeplan.records import read_text
from moeplan.units import GB, US

OPERATIONS = {
    "all_reduce": "all_reduce", "all_gather": "all_gather", "reduce_scatter": "reduce_scatter", "alltoall": "all_to_all",
    "sendrecv": "send",
}  # fmt: skip
"""Names of programs without "_perf", and the operation of a sample."""
LEAST_BYTES = 4096.0
"""Messages below this tell the latency only, which those above tell as well."""
TOLERANCE = 0.02
"""What rounding may make of size / time / algbw and of busbw / algbw."""
MOST_SHARE = 1.05
"""A link that attains more of its raw rate is another one."""
_PREFIX = re.compile(r"^(\[\d+,\d+\]<std\w+>:|\s*\d+:\s)")
_RANK = re.compile(r"#\s*Rank\s+(\d+)\s+(?:Group\s+(\d+)\s+)?Pid\s+\d+\s+on\s+(\S+)\s+device\s+(\d+)\s+\[[^]]*\]\s*(.*)")
_TEST = re.compile(r"\b(\w+)_perf\b")
_LIBRARY = re.compile(r"nccl-library=(\d+)|NCCL version (\d+\.\d+\.\d+)|RCCL version[ :]+(\d+\.\d+\.\d+)")
_COLUMNS = ("time", "algbw", "busbw", "#wrong") * 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One message size of a test."""

    line: int
    message_bytes: float
    dtype: str
    seconds: float
    bus_share: float
    """Bus bandwidth over algorithm bandwidth; 0: too slow to tell."""


@dataclass(kw_only=True, slots=True)
class Run:
    """One run of a program of nccl-tests."""

    path: Path
    line: int
    """Line at which it begins."""
    program: str = ""
    """Name of the program without "_perf"; empty: not said."""
    library: str = ""
    ranks: dict[int, tuple[int, str, int, str]] = field(default_factory=dict)
    """Group, host, number on that host and name of each rank's device."""
    columns: tuple[str, ...] = _COLUMNS
    """Names of the columns from the first time on."""
    rows: list[Row] = field(default_factory=list)

    @property
    def members(self) -> list[tuple[int, str, int, str]]:
        """The ranks of one group, in their order; all groups work at once and are alike."""
        return [place for _, place in sorted(self.ranks.items()) if place[0] == min(p[0] for p in self.ranks.values())]


def read_runs(path: Path, op: str = "") -> list[Run]:
    """The runs of a file; `op`, the name of a program without "_perf", decides where given."""
    if op and op not in OPERATIONS:
        raise UnknownNameError("operation of nccl-tests", op, OPERATIONS)
    text = read_text(path, "nccl-tests output")
    if text.lstrip().startswith(("{", "[{")):
        raise FileError(f"nccl-tests output '{path}' is JSON", hint="give the text that the program prints")
    runs = [run for run in _parse(path, text) if run.rows]
    if not runs:
        raise FileError(f"nccl-tests output '{path}' has no row of results", hint="give what all_reduce_perf prints")
    for run in runs:
        run.program = op or run.program or _named(path.name)
        if not run.program:
            names = ", ".join(OPERATIONS)
            raise FileError(f"{_place(run)}: which operation it is the output does not say", hint=f"give --op, one of {names}")
    useful = [run for run in runs if run.program in OPERATIONS]
    if not useful:
        names = ", ".join(dict.fromkeys(run.program for run in runs))
        raise FileError(f"nccl-tests output '{path}' is of {names}", hint=f"a profile holds {', '.join(OPERATIONS)}")
    for run in useful:
        _check(run)
    return useful


def _parse(path: Path, text: str) -> Iterator[Run]:
    run, program, library = Run(path=path, line=1), "", ""
    for number, raw in enumerate(text.splitlines(), 1):
        line = _PREFIX.sub("", raw)
        if found := _LIBRARY.search(line):
            library = _version(*found.groups())
        if re.match(r"#\s*(nThread|Collective test starting)", line) and (run.ranks or run.rows):
            yield run
            run = Run(path=path, line=number, program=program)
        run.library = library
        if found := _RANK.search(line):
            rank, group, host, device, name = found.groups()
            if int(rank) in run.ranks:
                raise _broken(path, number, f"rank {rank} stands twice", "give every run a file of its own")
            run.ranks[int(rank)] = (int(group or 0), host, int(device), name.strip())
        elif re.match(r"#\s+size\s+count", line):
            words = line.split()
            run.columns = tuple(words[words.index("time") :]) if "time" in words else _COLUMNS
        elif re.match(r"\s*(\d\S*\s+\d+\s|\d+\s*$)", line):
            row = _row(path, number, line.split(), run.columns)
            if row.message_bytes > 0:  # else it was smaller than an element for each rank
                run.rows.append(row)
        elif found := _TEST.search(line):
            program = found[1]
            run.program = run.program if run.rows else program  # behind the rows it announces the next run
    yield run


def _row(path: Path, number: int, words: list[str], columns: tuple[str, ...]) -> Row:
    head, tail = words[: len(words) - len(columns)], words[-len(columns) :]
    if not 3 <= len(head) <= 5:
        raise _broken(path, number, f"{len(words)} columns, {3 + len(columns)} to {5 + len(columns)} are expected")
    start = 0 if tail[0] != "N/A" else columns.index("time", 1) if "time" in columns[1:] else 0
    try:
        size, (time_us, algbw, busbw) = float(head[0]), (float(tail[columns.index(n, start)]) for n in _COLUMNS[:3])
        wrong = [float(w) for name, w in zip(columns, tail, strict=True) if name == "#wrong" and w != "N/A"]
    except ValueError:
        raise _broken(path, number, f"'{' '.join(words)}' is not a row of results") from None
    if any(wrong):
        raise _broken(
            path, number, f"{max(wrong):g} wrong values: the results of this run are not right", "mend the cluster first"
        )
    if not time_us > 0.0:
        raise _broken(path, number, f"a time of {time_us:g} us")
    rate = size / (time_us * US) / GB
    if abs(rate - algbw) > 0.01 + TOLERANCE * algbw:
        raise _broken(path, number, f"{size:.0f} bytes in {time_us:g} us are {rate:.2f} GB/s, algbw is {algbw:g}")
    share = busbw / algbw if algbw >= 1.0 else 0.0
    return Row(line=number, message_bytes=size, dtype=head[2], seconds=time_us * US, bus_share=share)


def _check(run: Run) -> None:
    """Refuse a run whose ranks are not known or do not agree with its rows."""
    missing = sorted(set(range(max(run.ranks, default=0) + 1)) - set(run.ranks))
    if missing:
        raise FileError(
            f"{_place(run)}: no line '# Rank {missing[0]} ... on HOST device N'",
            hint="keep the lines above the table: they tell how many ranks there are, and where",
        )
    groups = [place[0] for place in run.ranks.values()]
    sizes = sorted({groups.count(group) for group in groups})
    if sizes != [max(sizes[0], 2)]:
        found = " and ".join(map(str, sizes))
        raise FileError(f"{_place(run)}: groups of {found} ranks", hint="equal groups of 2 ranks or more are needed")
    ranks = sizes[0]
    factor = {"all_reduce": 2.0 * (ranks - 1.0) / ranks, "sendrecv": 1.0}.get(run.program, (ranks - 1.0) / ranks)
    for row in run.rows:
        if ranks == len(groups) and row.bus_share and abs(row.bus_share / factor - 1.0) > TOLERANCE:
            what = f"busbw is {row.bus_share:.3g} of algbw, {factor:.3g} is that of {run.program} among {ranks} ranks"
            raise _broken(run.path, row.line, what, "name the operation with --op")


def collective_samples(runs: Sequence[Run], cluster: Cluster) -> list[Sample]:
    """Samples of the runs, repeats taken together; `cluster` tells which hosts form a scale-up domain."""
    rows: dict[tuple[str, str, float], list[tuple[Run, Row]]] = defaultdict(list)
    for run in runs:
        group = f"{len(run.members)}/{_domains(run, cluster)}"
        for row in run.rows:
            if row.message_bytes >= LEAST_BYTES:
                rows[OPERATIONS[run.program], group, row.message_bytes].append((run, row))
    if not rows:
        raise FileError(f"{_place(runs[0])}: no message of {LEAST_BYTES:.0f} bytes or more", hint="measure up to -e 512M")
    samples = []
    for (op, group, size), repeats in sorted(rows.items()):
        times = [row.seconds for _, row in repeats]
        middle = float(np.median(times))
        words = dict.fromkeys(", ".join(filter(None, ("nccl-tests", t.library, row.dtype))) for t, row in repeats)
        spread = (max(times) - min(times)) / 2.0 / middle
        sizes, how = {"message_bytes": size}, "; ".join(words)
        sample = Sample(
            op=op, key="bf16", sizes=sizes, group=group, seconds=middle, spread=spread, times_s=tuple(times), how=how
        )
        samples.append(sample)
    return samples


def with_collectives(profile: Profile, samples: Sequence[Sample], device: str = "") -> Profile:
    """The profile with its collectives replaced by measured ones, and what links attain of their rates along with them.

    `device` is the name that the output gives; it must not be another one of the catalog.
    """
    cluster = profile.cluster
    found = _known(device)
    if found and found != cluster.device.name:
        raise ClusterError(
            f"the output is of {device}, {cluster.name} has {cluster.device.name}", hint="name the cluster it ran on"
        )
    told: list[str] = []
    inside, across = collective_curves(samples, told)
    collectives = {op: {**profile.collectives[op], **inside.get(op, {})} for op in profile.collectives}
    multi_node = {op: {**profile.multi_node.get(op, {}), **across.get(op, {})} for op in {**profile.multi_node, **across}}
    law = link_law(samples, collectives, told)
    out, up = cluster.scale_out_bytes_per_s_per_gpu, cluster.scale_up.bytes_per_s
    rates = {
        "ring": (law.ring_bytes_per_s, out, law.source, law.error),
        "all_to_all": (law.all_to_all_bytes_per_s, out, law.source, law.error),
        "send": (law.send_bytes_per_s, up, law.send_source, law.send_error),
    }
    origins: dict[str, Origin] = dict(profile.origins)
    if profile.measured_on is None:
        origins = {what: replace(o, note=f"not measured in this run, nominal: {o.note}") for what, o in origins.items()}
    shares: dict[str, Any] = {}
    for table, curves in (("collectives", inside), ("multi_node", across)):
        for op, by_group in curves.items():
            for group, curve in by_group.items():
                origins[f"{table}/{op} of {group}"] = Origin(cluster.device.name, True, curve.source, curve.error)
    for name, (rate, raw, source, error) in rates.items():
        if rate is not None:
            shares[f"{name}_share"] = rate / raw
            origins[f"links/{name}"] = Origin(cluster.device.name, True, source, error)
            if rate > MOST_SHARE * raw:
                told.append(
                    f"{name}: {rate / GB:.0f} GB/s of a link of {raw / GB:.0f}: is {cluster.name} the cluster it ran on?"
                )
    run = profile.measured_on or MeasuredOn(when="", device=device, backend="import", software="", samples=0)
    run = replace(run, remarks=(*run.remarks, *told))
    return replace(
        profile, collectives=collectives, multi_node=multi_node, hop_s=law.hop_s or profile.hop_s, origins=origins,
        measured_on=run, **shares,
    )  # fmt: skip


def _known(device: str) -> str:
    """Name in the catalog of a device that a driver names; empty: it is not there."""
    try:
        return load_device(device).name
    except UnknownNameError:
        return ""


def _domains(run: Run, cluster: Cluster) -> int:
    """Scale-up domains that the ranks of a group span; of racks, hosts next to each other share one."""
    places = run.members
    hosts = list(dict.fromkeys(place[1] for place in run.ranks.values()))
    most = max(sum(place[1] == host for place in run.ranks.values()) for host in hosts)
    node, domain = cluster.gpus_per_node, cluster.domain_gpus
    if most > node:
        raise ClusterError(
            f"{_place(run)}: {most} ranks on one host, {cluster.name} has {node} GPUs a node", hint="name the cluster it ran on"
        )
    if domain >= node:
        return len({hosts.index(place[1]) // (domain // node) for place in places})
    return len({(place[1], place[2] // domain) for place in places})


def _named(name: str) -> str:
    """The program that a file's name tells, or nothing."""
    plain = re.sub(r"[^a-z]", "", name.lower())
    return next((program for program in OPERATIONS if program.replace("_", "") in plain), "")


def _version(number: str | None, nccl: str | None, rccl: str | None) -> str:
    if number:
        return f"nccl {int(number) // 10000}.{int(number) // 100 % 100}.{int(number) % 100}"
    return f"nccl {nccl}" if nccl else f"rccl {rccl}"


def _place(run: Run) -> str:
    return f"nccl-tests output '{run.path}', run at line {run.line}"


def _broken(path: Path, line: int, what: str, hint: str = "is the file whole?") -> FileError:
    return FileError(f"nccl-tests output '{path}', line {line}: {what}", hint=hint)
