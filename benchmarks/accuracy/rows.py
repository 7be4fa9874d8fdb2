"""The published runs beside this file, priced, and the rules by which a row is compared or left out.

The rules were stated before any error was looked at and look only at what a source says of its own row, never at how far off
the prediction is. Times in seconds, memory in bytes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moeplan.costmodels.layout import Layouts
from moeplan.costmodels.memory import reserve_bytes
from moeplan.costmodels.price import Pricing
from moeplan.costmodels.uncertainty import regime
from moeplan.planner.estimate import PricedRun, price_runs, profile_of, read_table
from moeplan.planner.problem import Problem
from moeplan.planner.runs import Run
from moeplan.units import GIB

TABLE = Path(__file__).parent / "published_runs.csv"
"""The runs that are shipped; README.md beside it says where they come from."""

FAMILIES = {
    "dgxc": "NVIDIA DGX Cloud benchmarking",
    "folding": "MoE Parallel Folding (paper)",
    "foundry": "MosaicML llm-foundry",
    "hf": "Hugging Face transformers",
    "korthikanti22": "selective recompute (paper)",
    "llama3": "Llama 3 production runs (paper)",
    "mbridge": "NVIDIA Megatron-Bridge",
    "mcore": "Megatron-LM READMEs",
    "mlperf": "MLPerf Training 5.0, 5.1",
    "narayanan21": "Megatron-LM 2021 (paper)",
    "nemo": "NVIDIA NeMo documentation",
    "pai": "Pai-Megatron-Patch user report",
    "simumax": "SimuMax validation, 8 GPUs",
    "swift": "ms-swift examples, real data",
    "titan": "torchtitan, FSDP, 500 W H100",
}
"""What the first part of a row's id stands for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Exclusion:
    """A reason, stated in advance, not to compare a row's step time."""

    name: str
    demands: str
    """What the rule looks at, a sentence for the page."""
    applies: Callable[[Mapping[str, str]], bool]


def _says(row: Mapping[str, str], pattern: str) -> bool:
    return re.search(pattern, "; ".join(row.get(k, "") for k in ("source", "notes")), re.IGNORECASE) is not None


EXCLUSIONS = (
    Exclusion(
        name="not measured",
        demands="the source gives no time, tokens or TFLOP/s from which a step time follows",
        applies=lambda row: not row.get("measured_step_s"),
    ),
    Exclusion(
        name="regression",
        demands="the source itself calls the figure a known regression of that release",
        applies=lambda row: _says(row, r"known regression"),
    ),
    Exclusion(
        name="digitised by eye",
        demands="the figure was read off a chart, and the source does not print the layer count and flags",
        applies=lambda row: _says(row, r"digiti[sz]ed|by eye"),
    ),
)
NOT_PRICED = "not priced"
"""What is said of rows that `moeplan estimate --runs` calls unsupported."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """One row of the table with its prediction."""

    row: Mapping[str, str]
    priced: PricedRun
    excluded: str
    """Why the step time is not compared: the name of an `Exclusion` or `NOT_PRICED`; empty: it is."""

    @property
    def run(self) -> Run:
        """What was priced; only for rows that could be."""
        assert self.priced.run is not None
        return self.priced.run

    @property
    def family(self) -> str:
        """Where the row comes from: what stands before the first dash of its id."""
        return family(self.row)

    @property
    def kind(self) -> Literal["dense", "MoE"]:
        """Whether the model has routed experts."""
        return "dense" if self.run.model.moe is None else "MoE"

    @property
    def device(self) -> str:
        """The device, or the measured machine whose own curves priced it."""
        return self.run.cluster.machine or self.run.cluster.device.name

    @property
    def regime(self) -> str:
        """Which interval applies."""
        return regime(self.run.model, profile_of(self.run.cluster), self.run.workload)

    @property
    def measured_s(self) -> float:
        """The step time to compare with."""
        return float(self.row["measured_step_s"])

    @property
    def predicted_s(self) -> float:
        """The predicted step time."""
        assert self.priced.cost is not None
        return float(self.priced.cost.total)

    @property
    def covered(self) -> bool:
        """Whether the measured step time lies inside the interval that was predicted."""
        return self.priced.low_s <= self.measured_s <= self.priced.high_s


def family(row: Mapping[str, str]) -> str:
    """The family of a row."""
    return row["id"].split("-")[0]


def exclusion(row: Mapping[str, str], priced: PricedRun) -> str:
    """Why a row's step time is not compared; empty if it is."""
    return next((e.name for e in EXCLUSIONS if e.applies(row)), NOT_PRICED if priced.cost is None else "")


def published_rows(path: Path = TABLE) -> list[dict[str, str]]:
    """Rows of the table."""
    return read_table(path)


def results(rows: Sequence[Mapping[str, str]]) -> list[Result]:
    """All rows with their predictions, in their order."""
    return [Result(row=r, priced=p, excluded=exclusion(r, p)) for r, p in zip(rows, price_runs(rows), strict=True)]


def compared(all_results: Sequence[Result]) -> list[Result]:
    """Results whose step time is compared."""
    return [r for r in all_results if not r.excluded]


# -- memory --------------------------------------------------------------------------------------------------------------


MemoryKind = Literal["allocated, fullest rank", "allocated, first stage", "reserved pool"]
REPEATED = "memory measured once for this topology"
"""Note of rows whose peak is that of another row, run once for several batch sizes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """A measured peak with the prediction of the same quantity."""

    result: Result
    kind: MemoryKind
    predicted_bytes: float
    measured_bytes: float
    repeated: bool
    """The measurement stands in the table once more."""


def memory_kind(row: Mapping[str, str]) -> MemoryKind:
    """What a row's peak is the peak of, after its notes.

    torchtitan logs the reserved pool too, but there the prediction itself is of pools that do not share memory.
    """
    notes = row.get("notes", "")
    if "max reserved" in notes:
        return "reserved pool"
    return "allocated, first stage" if re.search(r"logging rank|rank-0", notes) else "allocated, fullest rank"


def memories(all_results: Sequence[Result]) -> list[Memory]:
    """Every measured peak of a row that can be priced and was not read off a chart."""
    out = []
    for r in all_results:
        if not r.row.get("peak_mem_gib") or r.priced.run is None or r.excluded == "digitised by eye":
            continue
        kind = memory_kind(r.row)
        if kind == "allocated, first stage":
            predicted = first_stage_peak_bytes(r.run)
        else:
            predicted = r.priced.peak_bytes
        if kind == "reserved pool":  # what is lost between blocks, without what stands outside the allocator
            predicted += float(reserve_bytes(predicted) - reserve_bytes(0.0))
        measured, repeated = float(r.row["peak_mem_gib"]) * GIB, REPEATED in r.row.get("notes", "")
        out.append(Memory(result=r, kind=kind, predicted_bytes=predicted, measured_bytes=measured, repeated=repeated))
    return out


def first_stage_peak_bytes(run: Run) -> float:
    """Peak allocation on the first pipeline rank."""
    layouts = Layouts.of([run.layout])
    parts = Pricing(run.model, profile_of(run.cluster), run.workload, layouts, every_rank=True).peak_memory()
    return float(parts.total[0, 0])


# -- out of memory -------------------------------------------------------------------------------------------------------


def says_out_of_memory(row: Mapping[str, str]) -> bool:
    """Whether the source reports that the run went out of memory."""
    return re.search(r"\bOOM\b|out of memory", row.get("notes", ""), re.IGNORECASE) is not None


def outcome(result: Result) -> Literal["ran", "out of memory", ""]:
    """What became of a run; empty where the source reports both a time and a failure, or neither, or the row is not priced."""
    if result.priced.run is None or result.excluded == "digitised by eye":
        return ""
    failed, timed = says_out_of_memory(result.row), bool(result.row.get("measured_step_s"))
    if failed == timed:
        return ""
    return "out of memory" if failed else "ran"


def device_bytes(result: Result, nominal_bytes: float) -> float:
    """Memory of the row's device: what its source names ("A100 40GB") where that is not the usual part."""
    named = re.search(r"\b(\d+) ?GB\b", result.row.get("source", ""))
    if named is None or abs(int(named[1]) * GIB / nominal_bytes - 1.0) < 0.1:
        return nominal_bytes
    return float(int(named[1]) * GIB)


def said_to_fit(result: Result) -> bool:
    """The planner's verdict on the row's layout: peak and reserve within the device's memory (`Problem.excess_bytes`)."""
    run = result.run
    asked = Problem(model=run.model, profile=profile_of(run.cluster), workload=run.workload, extend_positions=True)
    excess = asked.excess_bytes(result.priced.peak_bytes)
    return float(excess) <= device_bytes(result, asked.device_bytes) - asked.device_bytes
