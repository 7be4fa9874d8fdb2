"""What the papers published: tables with their sources, the grids of layers, the sizes of the models that were run.

Tables are CSV beside this file; constants of the testbeds are shipped with moeplan. Sizes of GPT2-XL and Mixtral are those of
their published configurations, as FSMoE prints none. Units: ms in the files, seconds here.
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moeplan.costmodels.moe.constants import Constants, load_constants
from moeplan.planner.layers.study import Layer
from moeplan.units import MS

HERE = Path(__file__).parent
VECTORS = HERE.parents[1] / "tests" / "costmodels" / "moe"
"""Vectors that the tests of the schedules use too."""
TESTBEDS = ("a", "b")
NAMES = {"a": "A", "b": "B"}
LAYERS, UNEQUAL = 1458, 912
"""Layers of FSMoE's grid (table 4), and those of them whose best chunks differ by direction on testbed B (section 2.3)."""
FLOWMOE_LAYERS = 675
"""Layers of FlowMoE's grid."""
DEEPSPEED_RANGE = (1.28, 3.01)
"""Speed-up of FSMoE over DeepSpeed-MoE on whole models (section 6.4)."""
PARM_RANGE = (1.13, 5.77)
"""Speed-up over DeepSpeed-MoE on 1296 layers (abstract)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """Layers with their dense part, one iteration of each; numbers or arrays."""

    batch: Any
    seq_len: Any
    hidden: Any
    expert_hidden: Any
    factor: Any
    """k f: slots over tokens."""
    gemms: Any
    attention: Any
    """Weights of the attention over hidden squared: 4, less with grouped queries."""

    @property
    def tokens(self) -> Any:
        """B L."""
        return self.batch * self.seq_len

    @property
    def attention_flop(self) -> Any:
        """Forward FLOP of the attention, all positions."""
        return 2.0 * self.tokens * self.hidden * (self.attention * self.hidden + 2.0 * self.seq_len)

    @property
    def gradient_elements(self) -> Any:
        """Gradients that are all-reduced: those of the attention, as no expert has a copy."""
        return self.attention * self.hidden**2

    def layer(self, constants: Constants) -> Layer:
        """The MoE layer on a testbed, tokens split around it as FSMoE's are."""
        return Layer(
            tokens=self.tokens, hidden=self.hidden, expert_hidden=self.expert_hidden, topk=1, capacity_factor=self.factor,
            gemms=self.gemms, element_bytes=constants.element_bytes, sequence_parallel=True, **constants.groups,
        )  # fmt: skip


def fits_of(name: str) -> Constants:
    """Constants of FSMoE's testbed a or b."""
    return load_constants(f"fsmoe-{name}")


def grid(name: str, star: float = 1.0) -> Workload:
    """FSMoE's 1458 layers of a testbed (table 4), [layers]; `star` is k f where the paper drops no token."""
    lengths = (512, 1024, 2048) if name == "a" else (256, 512, 1024)
    heads = (8, 16, 32)  # change nothing here: neither communication nor experts see them
    rows = itertools.product((1, 2, 4), heads, lengths, (1024, 2048, 4096), (2, 3, 4), (1.2, 2.4, star), (2, 3))
    batch, _, seq_len, hidden, ratio, factor, gemms = (np.array(column, np.float64) for column in zip(*rows, strict=True))
    return Workload(
        batch=batch, seq_len=seq_len, hidden=hidden, expert_hidden=ratio * hidden, factor=factor, gemms=gemms, attention=4.0
    )


def flowmoe_grid() -> int:
    """Layers of FlowMoE's grid: B x L x M x H x f."""
    sizes = (512, 1024, 2048, 4096, 8192)
    return len(list(itertools.product((2, 4, 8), (512, 1024, 2048), sizes, sizes, (1.0, 1.1, 1.2))))


MODELS: Mapping[str, Mapping[str, Any]] = {
    "GPT2-XL": {"hidden": 1600, "expert_hidden": 6400, "gemms": 2, "attention": 4.0},
    "Mixtral-7B": {"hidden": 4096, "expert_hidden": 14336, "gemms": 3, "attention": 2.5},
    "Mixtral-22B": {"hidden": 6144, "expert_hidden": 16384, "gemms": 3, "attention": 2.0 + 2.0 / 6.0},
}
"""Sizes of the layers of the models that FSMoE ran."""
RUN = {"a": ("GPT2-XL", "Mixtral-7B", "Mixtral-22B"), "b": ("GPT2-XL", "Mixtral-7B")}
"""Models by testbed."""


def model_runs(name: str, seq_len: int | None = None) -> Workload:
    """The models of a testbed as section 6.4 runs them: one sequence, k = 2, f = 1.2; [models]."""
    rows = [MODELS[model] for model in RUN[name]]
    columns = {key: np.array([row[key] for row in rows], np.float64) for key in rows[0]}
    length = float(seq_len or {"a": 1024, "b": 256}[name])
    return Workload(batch=1.0, seq_len=length, factor=2.4, **columns)


def table(name: str) -> list[dict[str, str]]:
    """Rows of a table beside this file."""
    return _rows(HERE / f"{name}.csv")


def vectors(name: str) -> dict[str, Any]:
    """Columns of a file of vectors, numbers where every row has one."""
    rows = _rows(VECTORS / f"{name}.csv")
    return {key: _numbers([row[key] for row in rows]) for key in rows[0]}


def breakdown() -> dict[tuple[str, str, str, str], float]:
    """FSMoE's table 2: seconds by testbed, model, direction, operation."""
    return {
        (row["testbed"], row["model"], row["direction"], row["operation"]): float(row["ms"]) * MS for row in table("table2")
    }


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def _numbers(texts: list[str]) -> Any:
    try:
        return np.array([float(text) for text in texts])
    except ValueError:
        return texts
