"""Ten problems that can be searched exhaustively: models of the catalog, most of them cut, on few GPUs or in little memory.

Memory is limited where all would go without a pipeline, micro-batches and virtual stages where there are too many splits.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

from moeplan.costmodels.model_catalog import load_model
from moeplan.costmodels.workload import Workload, load_era, load_precision
from moeplan.planner.problem import Problem, parse_condition
from moeplan.profiles.hardware import load_cluster
from moeplan.profiles.nominal import nominal
from moeplan.profiles.profile import Profile
from moeplan.units import GIB


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A problem by the names of what it is about."""

    model: str
    layers: int = 0
    """Layers that are kept; 0: all."""
    cluster: str
    batch: int
    seq_len: int = 4096
    precision: str = "bf16"
    era: str = "hybridep-2025"
    pins: str = ""
    """Conditions with blanks between."""
    memory_gib: float = 0.0
    """Device memory that a plan may use; 0: all."""

    def name(self) -> str:
        """The model, with the layers that are kept."""
        return f"{self.model}, {self.layers} layers" if self.layers else self.model

    def problem(self) -> Problem:
        """The problem."""
        model = load_model(self.model)
        work = Workload(
            seq_len=self.seq_len,
            global_batch=self.batch,
            precision=load_precision(self.precision),
            era=load_era(self.era),
        )
        return Problem(
            model=model.cut(self.layers) if self.layers else model,
            profile=_profile(self.cluster),
            workload=work,
            pins=tuple(map(parse_condition, f"{self.pins} optimizer_offload=0".split())),
            memory_limit_bytes=self.memory_gib * GIB,
        )


@functools.cache
def _profile(cluster: str) -> Profile:
    return nominal(load_cluster(cluster))


QUESTIONS = (
    Question(model="llama3-70b", layers=10, cluster="a100x32", batch=64, pins="vpp<=3", memory_gib=20),
    Question(model="gpt-3-175b", layers=8, cluster="a100x32", batch=64, seq_len=2048, era="te-2024", memory_gib=30),
    Question(model="mixtral-8x7b", layers=12, cluster="h100x8", batch=32, pins="micro_batch<=2 vpp<=3", memory_gib=44),
    Question(
        model="mixtral-8x22b", layers=10, cluster="h100x32", batch=64, pins="cp=1 tp<=4 micro_batch<=4 vpp<=3", memory_gib=30
    ),
    Question(model="qwen3-30b-a3b", layers=12, cluster="h100x16", batch=64, pins="cp=1 tp<=2 etp=1 vpp<=2", memory_gib=20),
    Question(model="gpt-oss-20b", layers=8, cluster="h100x8", batch=64, pins="vpp<=3", memory_gib=24),
    Question(model="deepseek-v2-lite", layers=10, cluster="h100x16", batch=64, pins="tp=1 cp=1 etp=1 vpp<=2", memory_gib=20),
    Question(
        model="deepseek-v3",
        layers=8,
        cluster="h100x64",
        batch=128,
        pins="cp<=2 tp<=4 etp=1 micro_batch<=2 vpp<=2",
        memory_gib=50,
    ),
    Question(model="glm-4.5-air", layers=8, cluster="h100x32", batch=64, pins="etp<=2 micro_batch<=2 vpp<=2", memory_gib=24),
    Question(model="jamba-v0.1", layers=8, cluster="h100x16", batch=64, pins="vpp<=3", memory_gib=40),
)
"""Dense models, models with experts, with dense layers first, with prediction layers, and a hybrid."""

PIPELINED = tuple(replace(question, pins=f"{question.pins} pp>1".strip()) for question in QUESTIONS)
"""The same where a pipeline must be, which bounds tell less of."""
