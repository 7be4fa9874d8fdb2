"""How many processes a launcher starts, and with which arguments: torchrun, Slurm, mpirun, DeepSpeed's, plain Python."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from moeplan.exporters.reading.shell import Started
from moeplan.exporters.reading.words import mark, shown, unknowns

_SLURM_NAMES = {
    "N": "nodes", "nodes": "nodes", "n": "ntasks", "ntasks": "ntasks", "ntasks-per-node": "ntasks-per-node",
    "gpus-per-node": "gpus-per-node", "gres": "gpus-per-node", "G": "gpus", "gpus": "gpus",
}  # fmt: skip
_SET_BY_SLURM = (
    "SLURM_JOB_ID", "SLURM_JOBID", "SLURM_JOB_NODELIST", "SLURM_NODELIST", "SLURM_PROCID", "SLURM_NODEID", "SLURM_LOCALID",
    "SLURM_JOB_NAME", "SLURM_SUBMIT_DIR", "SLURMD_NODENAME",
)  # fmt: skip
_FROM_SLURM = {
    "SLURM_NNODES": "nodes", "SLURM_JOB_NUM_NODES": "nodes", "SLURM_NTASKS": "ntasks", "SLURM_NPROCS": "ntasks",
    "SLURM_NTASKS_PER_NODE": "ntasks-per-node", "SLURM_GPUS_ON_NODE": "gpus-per-node", "SLURM_GPUS_PER_NODE": "gpus-per-node",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """A training command as its launcher starts it."""

    program: str
    """The script or module."""
    words: tuple[str, ...]
    """Its arguments."""
    world: int | None
    """Processes of the job; None where it is not known."""
    unknown: Mapping[str, str] = field(default_factory=dict)
    """What hides the number of processes, with what it is needed for."""
    remarks: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    line: int = 0


def slurm_request(text: str) -> dict[str, str]:
    """What the `#SBATCH` lines of a script ask for: nodes, ntasks, ntasks-per-node, gpus-per-node, gpus."""
    words = [w for line in re.findall(r"^\s*#SBATCH\s+(.*)$", text, re.MULTILINE) for w in line.split("#")[0].split()]
    return _slurm_options(words)


def slurm_variables(request: Mapping[str, str]) -> dict[str, str]:
    """The variables that Slurm sets in a job."""
    if not request:
        return {}
    known = {name: request[key] for name, key in _FROM_SLURM.items() if key in request}
    if "SLURM_NTASKS" not in known and {"nodes", "ntasks-per-node"} <= set(request):
        count = _product(request["nodes"], request["ntasks-per-node"])
        known |= {} if count is None else {"SLURM_NTASKS": str(count), "SLURM_NPROCS": str(count)}
    return {**{name: mark(name) for name in _SET_BY_SLURM}, **known}


def _slurm_options(words: Sequence[str]) -> dict[str, str]:
    out: dict[str, str] = {}
    for i, word in enumerate(words):
        match = re.fullmatch(r"--?([A-Za-z][\w-]*?)(?:=(.*))?", word)
        if match is None:
            match = re.fullmatch(r"-([NnG])(.+)", word)
        if match is None or match[1] not in _SLURM_NAMES:
            continue
        value = match[2] if match[2] is not None else (words[i + 1] if i + 1 < len(words) else "")
        key = _SLURM_NAMES[match[1]]
        if key.startswith("gpus"):
            value = value.rsplit(":", 1)[-1]
            if match[1] == "gres" and "gpu" not in word + value and not any("gpu" in w for w in words[i : i + 2]):
                continue
        out[key] = value
    return out


def launched(started: Started, request: Mapping[str, str]) -> Launch | None:
    """The training command that a program is; None where it is none. `request` is what `#SBATCH` lines ask for."""
    words = started.words
    base = words[0].rsplit("/", 1)[-1]
    if base.startswith("python"):
        launcher = next((i for i, w in enumerate(words) if w in ("torch.distributed.run", "torch.distributed.launch")), None)
        spread = launcher is not None
        first = launcher + 1 if launcher is not None else 1
    else:
        spread, first = True, 1
    place = _script_place(words, first)
    if place is None:
        return None
    program = words[place + 1] if words[place] == "-m" else words[place]
    arguments = words[place + (2 if words[place] == "-m" else 1) :]
    if arguments[:1] == ("--",):
        arguments = arguments[1:]
    unknown: dict[str, str] = {}
    remarks: list[str] = []
    if spread:
        world = _spread(base, words[first:place], request, unknown, remarks)
    else:
        world = _tasks(started, request, unknown)
    _compare(world, request, remarks)
    return Launch(
        program=shown(program),
        words=arguments,
        world=world,
        unknown=unknown,
        remarks=tuple(remarks),
        environment=started.environment,
        line=started.line,
    )


def _script_place(words: Sequence[str], first: int) -> int | None:
    """Where the script or the "-m" of a module stands."""
    for i in range(first, len(words)):
        bare = words[i].split("?")[0]
        if bare.endswith(".py") and not bare.startswith("-"):
            return i
        if words[i] == "-m" and i + 1 < len(words) and not words[i + 1].startswith("torch.distributed"):
            return i
        if not bare.startswith("-") and unknowns(bare) and i + 1 < len(words) and _is_model_flag(words[i + 1]):
            return i
    return None


def _is_model_flag(word: str) -> bool:
    from moeplan.exporters.reading.flags import catalog

    return word.partition("=")[0] in catalog().takes


def _options(words: Sequence[str]) -> dict[str, str]:
    """Options of a launcher, dashes and underscores alike."""
    out: dict[str, str] = {}
    for i, word in enumerate(words):
        if word.startswith("-"):
            name, equals, value = word.lstrip("-").partition("=")
            following = words[i + 1] if i + 1 < len(words) else ""
            out[name.replace("_", "-")] = value if equals else following
    return out


def _spread(
    base: str, words: Sequence[str], request: Mapping[str, str], unknown: dict[str, str], remarks: list[str]
) -> int | None:
    """Processes of torchrun, of DeepSpeed's launcher or of accelerate."""
    options = _options(words)
    if "num-processes" in options:
        return _number(options["num-processes"], "--num_processes", unknown)
    nodes = options.get("nnodes") or options.get("num-nodes") or "1"
    each = options.get("nproc-per-node") or options.get("num-gpus") or ("1" if base == "torchrun" else "")
    if ":" in nodes and not unknowns(nodes):
        remarks.append(f"--nnodes {nodes} is elastic: the larger number is taken")
        nodes = nodes.split(":")[1]
    if each in ("gpu", "auto", ""):
        asked = "gpus-per-node" in request
        remarks.append(f"GPUs of a node are not written out{', those of the #SBATCH lines are taken' if asked else ''}")
        each = request.get("gpus-per-node", mark("GPUs per node"))
    if base == "deepspeed" and "hostfile" in options and "num-nodes" not in options:
        nodes = mark("--hostfile")
    counts = _number(nodes, "the number of nodes", unknown), _number(each, "the processes of a node", unknown)
    return None if counts[0] is None or counts[1] is None else counts[0] * counts[1]


def _tasks(started: Started, request: Mapping[str, str], unknown: dict[str, str]) -> int | None:
    """Processes of a program that srun, mpirun or nothing starts."""
    before = list(started.before)
    names = [w.rsplit("/", 1)[-1] for w in before]
    if "srun" in names:
        at = len(names) - 1 - names[::-1].index("srun")
        options = {**request, **_slurm_options(before[at + 1 :])}
        if "ntasks-per-node" in options and ("nodes" in options or "ntasks" not in options):
            counts = [_number(options.get(k, "1"), f"--{k}", unknown) for k in ("nodes", "ntasks-per-node")]
            return None if counts[0] is None or counts[1] is None else counts[0] * counts[1]
        return _number(options.get("ntasks") or options.get("nodes") or "1", "--ntasks", unknown)
    if {"mpirun", "mpiexec", "horovodrun"} & set(names):
        for i, word in enumerate(before[:-1]):
            if word in ("-np", "-n", "--np", "-c"):
                return _number(before[i + 1], word, unknown)
        unknown["-np"] = "the number of processes"
        return None
    size = started.environment.get("WORLD_SIZE")
    return _number(size, "WORLD_SIZE", unknown) if size else 1


def _number(text: str, what: str, unknown: dict[str, str]) -> int | None:
    found = unknowns(text)
    for name in found:
        unknown[name] = what
    if not found and not re.fullmatch(r"\d{1,7}", text):
        unknown[text or what] = what
    return int(text) if not found and re.fullmatch(r"\d{1,7}", text) else None


def _product(*texts: str) -> int | None:
    counts = [_number(t, "", {}) for t in texts]
    out = 1
    for count in counts:
        if count is None:
            return None
        out *= count
    return out


def _compare(world: int | None, request: Mapping[str, str], remarks: list[str]) -> None:
    """A remark where Slurm is asked for other GPUs than are used."""
    asked = _product(request["gpus"]) if "gpus" in request else None
    if asked is None and {"nodes", "gpus-per-node"} <= set(request):
        asked = _product(request["nodes"], request["gpus-per-node"])
    if asked is not None and world is not None and asked != world:
        remarks.append(f"#SBATCH lines ask for {asked} GPUs, {world} processes are started")
