"""Reading a table of training runs: one row, one layout.

The columns are those of a table of published runs (docs/runs.md lists them). A blank cell takes a stated default and the row
becomes `partial`; what cannot be priced is `unsupported` with the reason, never a guess. Defaults follow what the sources of
such rows did: bf16 gradients in Megatron-Bridge recipes and MLPerf, fp32 elsewhere, interleaving over all layers of a stage
where a pipelined run does not say, etp = tp before expert folding existed, the dispatcher of the software release.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from moeplan.costmodels.layout import Layout
from moeplan.costmodels.model import Model
from moeplan.costmodels.model_catalog import load_model
from moeplan.costmodels.stages import balanced_split, check_split
from moeplan.costmodels.workload import Era, Workload, era_at, load_era, load_precision
from moeplan.errors import MoeplanError
from moeplan.planner import cells
from moeplan.planner.cells import Unsupported, month_of
from moeplan.profiles.hardware import Cluster, load_cluster

T = TypeVar("T")

REQUIRED_COLUMNS = ("id", "model", "gpu", "num_gpus", "seq_len", "gbs", "tp", "pp")
"""Columns without which no row can be priced."""

PACKED_TOKENS = 512
"""Length of a fine-tuning example where it is packed and not told: a few hundred tokens in common instruction sets."""

MLPERF_VOCABULARY = 32_768
"""MLPerf trains Llama 3.1 405B with the tokenizer of Mixtral 8x22B."""

SURPLUS = "cells without a column"
"""Key of what a row has beyond the columns of its table."""

_FOLDING = "2025-01"
"""Month from which Megatron-Core folds expert parallelism freely over the dense grid (arXiv:2504.14960)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One row that can be priced."""

    id: str
    model: Model
    cluster: Cluster
    workload: Workload
    layout: Layout
    remarks: tuple[str, ...]
    """Defaults that stand for blank cells; none: the row is `ok`."""


def read_run(row: Mapping[str, str]) -> Run:
    """The run of one row; raises `Unsupported` with the reason where it cannot be priced."""
    try:
        return _Reader(row).run()
    except Unsupported:
        raise
    except MoeplanError as error:
        raise Unsupported(str(error)) from None


class _Reader:
    """Cells of one row, and what had to be assumed."""

    def __init__(self, row: Mapping[str, str]) -> None:
        self.row = {k: (v or "").strip() for k, v in row.items() if k}
        self.remarks: list[str] = []
        self.other = self.row.get("other", "")
        self.notes = self.other + "; " + self.row.get("notes", "")

    def run(self) -> Run:
        if surplus := self.row.get(SURPLUS):
            raise Unsupported(f"the row has more cells than the table has columns: '{surplus}'")
        for name in ("model", "gpu", "num_gpus", "seq_len", "gbs"):
            if not self.row.get(name):
                raise Unsupported(f"{name} is not given")
        if re.search(r"task=lora|\blora\b", self.notes, re.IGNORECASE):
            raise Unsupported("adapter fine-tuning (LoRA) is not modelled, only training of all weights")
        era = self._era()
        model = self._model()
        cluster = self._cluster()
        workload = self._workload(era, model)
        layout = self._layout(model, cluster, workload)
        return Run(
            id=self.row.get("id", ""),
            model=model,
            cluster=cluster,
            workload=workload,
            layout=layout,
            remarks=tuple(self.remarks),
        )

    def _assume(self, what: str, value: T) -> T:
        self.remarks.append(f"{what}: assumed {value if value != () else 'none'}")
        return value

    def _integer(self, name: str, default: int | None = None) -> int:
        text = self.row.get(name, "")
        if text:
            return cells.whole_number(name, text)
        if default is None:
            raise Unsupported(f"{name} is not given")
        return self._assume(name, default)

    def _switch(self, name: str, default: bool, matters: bool) -> bool:
        """Yes or no; a blank is worth a remark where it `matters`."""
        if text := self.row.get(name, ""):
            return cells.switch(name, text)
        if matters:
            self._assume(name, "yes" if default else "no")
        return default

    def _noted(self, result: tuple[T, str]) -> T:
        """The value of a cell; its remark, if any, is kept."""
        if result[1]:
            self.remarks.append(result[1])
        return result[0]

    def _era(self) -> Era:
        text = " ".join(self.row.get(k, "") for k in ("era", "source", "source_ref", "id"))
        if name := self.row.get("era"):
            return load_era(name)
        if framework := cells.other_framework(text + self.notes):
            return load_era(framework)
        month = month_of(text)
        if month is None:
            return load_era(self._assume("era", load_era("latest").name))
        return era_at(month)

    @property
    def _month(self) -> str:
        return month_of(" ".join(self.row.get(k, "") for k in ("source", "source_ref", "id"))) or "2026-06"

    def _model(self) -> Model:
        model = _model(self.row["model"])
        if re.search(r"\bMTP ?= ?0\b|\b(no|w/o|without) MTP\b|\bMTP (off|disabled)", self.notes, re.IGNORECASE):
            model = replace(model, mtp=())
        if "mlperf" in self.row.get("source", "").lower() and model.name.startswith("llama3.1-405b"):
            model = replace(model, vocab=MLPERF_VOCABULARY)
        return model

    def _cluster(self) -> Cluster:
        gpu, gpus = self.row["gpu"], self._integer("num_gpus")
        if machine := cells.measured_machine(gpu, self.row.get("source", "")):
            return replace(_cluster(gpu, gpus), machine=machine)
        gpu = cells.device_variant(gpu, self.row.get("source", ""))
        usual = _cluster(gpu, 1)
        domain = self._integer("gpus_per_node", usual.domain_gpus)
        if domain == usual.domain_gpus:
            return _cluster(gpu, gpus)
        if usual.domain_gpus == usual.gpus_per_node:  # a domain is a host: hosts of another size
            nics = max(1, usual.nics_per_node * domain // usual.gpus_per_node)
            return replace(usual, gpus_per_node=domain, nics_per_node=nics, domain_gpus=domain, gpus=min(domain, gpus)).resized(
                gpus
            )
        return replace(usual, domain_gpus=domain).resized(gpus)

    def _workload(self, era: Era, model: Model) -> Workload:
        name = self.row.get("precision") or self._assume("precision", "bf16")
        precision = load_precision(name)
        if name.lower() == "fp8":
            self.remarks.append("precision: fp8 does not say how it scales, assumed per-tensor scaling")
        source = self.row.get("source", "").lower()
        tuned = re.search(r"mlperf|megatron-bridge|nemo|dgx cloud", source) is not None
        # FSDP reduces in the precision of the forward, but for torchtitan's.
        sharded = self._sharding()[0] == "fsdp" and "torchtitan" not in source
        gradient = 2 if (tuned or sharded) and "FP32" not in self.notes else 4
        moments = 2 if re.search(r"adam_moments=bfloat16|BF16 Adam moments", self.notes) else 4
        padded = "rank_capacity_factor" in self.other
        drop = cells.capacity_factor(self.other) if model.moe is not None else 0.0
        unforced = r"real (routing|SFT|data|C4)|unforced|not forced|without forc|natural routing"
        real = model.moe is not None and re.search(unforced, self.notes, re.IGNORECASE) is not None
        return Workload(
            seq_len=self._integer("seq_len"),
            global_batch=self._integer("gbs"),
            precision=precision,
            era=era,
            gradient_bytes=gradient,
            moment_bytes=moments,
            imbalance=self._assume("routing imbalance of real data", 1.1) if real and not drop else 1.0,
            capacity_factor=0.0 if padded else drop,
            document_len=self._packed_documents(),
        )

    def _packed_documents(self) -> int:
        """Length of packed documents: fine-tuning examples are short."""
        packed = re.search(r"task=sft|packing|packed", self.notes) and "mock data" not in self.notes
        return self._assume("packed documents of fine-tuning, tokens", PACKED_TOKENS) if packed else 0

    def _layout(self, model: Model, cluster: Cluster, workload: Workload) -> Layout:
        if not self.row.get("dp_type") and "fsdp=" not in self.other:
            self._assume("dp_type", "dist-opt")
        sharding = self._noted(self._sharding())
        degree = 1 if sharding == "fsdp" else None
        tp, pp = self._integer("tp", degree), self._integer("pp", degree)
        cp = self._integer("cp", 1)
        if cluster.gpus % (tp * cp * pp):
            raise Unsupported(f"tp*cp*pp = {tp}*{cp}*{pp} = {tp * cp * pp} does not divide {cluster.gpus} GPUs")
        dp = cluster.gpus // (tp * cp * pp)
        ep, etp = self._expert_degrees(model, tp, degree)
        if tp * cp * dp % (etp * ep):
            raise Unsupported(f"etp*ep = {etp}*{ep} = {etp * ep} does not divide the {tp * cp * dp} GPUs of a stage")
        split, vpp = self._split(model, workload, pp)
        micro = self._micro_batch(workload, dp)
        return Layout(
            tp=tp, cp=cp, pp=pp, vpp=vpp, dp=dp, ep=ep, etp=etp, edp=tp * cp * dp // (etp * ep),
            micro_batch=micro,
            sequence_parallel=self._switch("sequence_parallel", tp > 1, tp > 1),
            sharding=sharding,  # type: ignore[arg-type]
            recompute=self._listed("recompute"),
            dispatcher=self._dispatcher(model, workload.era) if model.moe else "none",  # type: ignore[arg-type]
            ep_overlap=self._switch("a2a_overlap", False, ep > 1),
            tp_overlap=workload.era.overlaps and self._tp_overlap(model, tp),
            dp_overlap=workload.era.overlaps and "no overlap" not in self.other,
            cuda_graphs=self._listed("cuda_graphs"),
            optimizer_offload=self._offload(),
            stages=split,
        )  # fmt: skip

    def _sharding(self) -> tuple[str, str]:
        """What data parallelism shards, and a remark."""
        kind, remark = cells.sharding(self.row.get("dp_type") or "dist-opt")
        return "fsdp" if "fsdp=" in self.other else kind, remark

    def _expert_degrees(self, model: Model, tp: int, default: int | None) -> tuple[int, int]:
        if model.moe is None:
            return 1, 1
        ep = self._integer("ep", default)
        given = self.row.get("etp")
        etp = self._integer("etp") if given else self._assume("etp", tp if self._month < _FOLDING else 1)
        if model.moe.experts % ep:
            raise Unsupported(f"ep={ep} does not divide the {model.moe.experts} experts of {model.name}")
        return ep, etp

    def _split(self, model: Model, workload: Workload, pp: int) -> tuple[str, int]:
        layers = len(model.layers)
        # Whole chunks of one layer, or with the embedding and the head in slots of their own.
        slots = layers if layers % pp == 0 else layers + 2
        whole = slots // pp if slots % pp == 0 else 1
        vpp = self._integer("vpp", whole if pp > 1 else 1)
        if pp == 1:
            vpp = 1
        if written := cells.written_split(self.other):
            problem = check_split(written, layers, len(model.mtp), pp, vpp)
            if problem:
                raise Unsupported(f"pp_layout '{written}' does not fit: {problem}")
            return written, vpp
        if layers % (pp * vpp) == 0:
            return "", vpp
        if pp * vpp > layers + 2:
            raise Unsupported(f"pp*vpp = {pp}*{vpp} = {pp * vpp} chunks exceed the {layers} layers of {model.name}")
        if not re.search(r"ASYM_PP", self.other):
            self.remarks.append(f"pipeline split: {layers} layers over {pp * vpp} chunks, assumed the balanced one")
        return balanced_split(model, workload.seq_len, pp * vpp), vpp

    def _micro_batch(self, workload: Workload, dp: int) -> int:
        micro = self._integer("mbs", 1)
        if workload.global_batch % (micro * dp):
            raise Unsupported(f"global batch {workload.global_batch} is not a multiple of mbs*dp = {micro}*{dp} = {micro * dp}")
        return micro

    def _listed(self, name: str) -> tuple[str, ...]:
        """Modules that are recomputed, or scopes that CUDA graphs cover."""
        text = self.row.get(name, "")
        if not text:
            return self._assume("CUDA graphs" if name == "cuda_graphs" else name, ())
        return self._noted(cells.recompute_modules(text)) if name == "recompute" else cells.graph_scopes(text)

    def _dispatcher(self, model: Model, era: Era) -> str:
        text = self.row.get("dispatcher", "")
        if text and text.lower() != "none":
            return cells.dispatcher(text)
        grouped = model.moe is not None and model.moe.groups > 1
        tuned = "megatron-bridge" in self.row.get("source", "").lower()
        known = [("hybridep", tuned), ("deepep", tuned and grouped), ("alltoall", True)]
        return self._assume("dispatcher", next(n for n, wanted in known if wanted and n in era.dispatchers))

    def _tp_overlap(self, model: Model, tp: int) -> bool:
        if "no overlap" in self.other or "vanilla TP" in self.other or tp == 1 or model.moe is not None:
            return False
        return "TP_COMM_OVERLAP=False" not in self.other

    def _offload(self) -> float:
        text = self.row.get("offload", "")
        return self._noted(cells.offloaded_states(text or self._assume("offload", "none")))


@functools.lru_cache(maxsize=256)
def _model(name: str) -> Model:
    return load_model(name)


@functools.lru_cache(maxsize=256)
def _cluster(gpu: str, gpus: int) -> Cluster:
    return load_cluster(f"{gpu}x{gpus}")


def group_key(run: Run) -> tuple[Any, ...]:
    """Runs with the same key are priced together: they share model, cluster and workload."""
    return (run.model.name, run.model.vocab, len(run.model.mtp), run.cluster.name, run.cluster.domain_gpus, run.workload)
