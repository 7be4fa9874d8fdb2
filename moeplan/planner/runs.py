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

from moeplan.costmodels.layout import DISPATCHERS, GRAPH_SCOPES, RECOMPUTE_MODULES, Layout
from moeplan.costmodels.model import Model
from moeplan.costmodels.model_catalog import load_model
from moeplan.costmodels.stages import balanced_split, check_split
from moeplan.costmodels.workload import Era, Workload, era_at, load_era, load_precision
from moeplan.errors import MoeplanError
from moeplan.profiles.hardware import Cluster, load_cluster

T = TypeVar("T")

REQUIRED_COLUMNS = ("id", "model", "gpu", "num_gpus", "seq_len", "gbs", "tp", "pp")
"""Columns without which no row can be priced."""

_MONTHS = {m: i + 1 for i, m in enumerate("jan feb mar apr may jun jul aug sep oct nov dec".split())}
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


class Unsupported(MoeplanError):
    """A row that cannot be priced; the message is its reason."""


def read_run(row: Mapping[str, str]) -> Run:
    """The run of one row; raises `Unsupported` with the reason where it cannot be priced."""
    return _Reader(row).run()


def run_month(text: str) -> str | None:
    """The month ("2025-04") that a source's description points to: a release, a date or a paper; None if nothing does."""
    if match := re.search(r"\b(20[12]\d)-(0[1-9]|1[0-2])\b", text):
        return f"{match[1]}-{match[2]}"
    if match := re.search(r"(?<![\d.])v?(2[3-9])\.(0[1-9]|1[0-2])(?!\d)", text):
        return f"20{match[1]}-{match[2]}"
    if match := re.search(r"\b([A-Z][a-z]{2})[a-z]* (20[12]\d)\b", text):
        month = _MONTHS.get(match[1].lower())
        if month:
            return f"{match[2]}-{month:02d}"
    if match := re.search(r"arXiv:(\d\d)(0[1-9]|1[0-2])\.", text):
        return f"20{match[1]}-{match[2]}"
    if match := re.search(r"v5\.(\d)", text):  # MLPerf Training rounds of June and November 2025
        return "2025-06" if match[1] == "0" else "2025-10"
    if match := re.search(r"\b(20[12]\d)\b", text):
        return f"{match[1]}-06"
    return None


class _Reader:
    """Cells of one row, and what had to be assumed."""

    def __init__(self, row: Mapping[str, str]) -> None:
        self.row = {k: (v or "").strip() for k, v in row.items() if k}
        self.remarks: list[str] = []
        self.other = self.row.get("other", "")
        self.notes = self.other + "; " + self.row.get("notes", "")

    def run(self) -> Run:
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

    def _integer(self, name: str, default: int | None = None, *, least: int = 1) -> int:
        text = self.row.get(name, "")
        if not text:
            if default is None:
                raise Unsupported(f"{name} is not given")
            return self._assume(name, default)
        try:
            value = float(text)
        except ValueError:
            raise Unsupported(f"{name}='{text}' is not a number") from None
        if value != int(value) or value < least:
            raise Unsupported(f"{name}={text} is not a whole number of at least {least}")
        return int(value)

    def _era(self) -> Era:
        text = " ".join(self.row.get(k, "") for k in ("era", "source", "source_ref", "id"))
        if name := self.row.get("era"):
            return _era(name)
        month = run_month(text)
        if month is None:
            return _era(self._assume("era", load_era("latest").name))
        return era_at(month)

    @property
    def _month(self) -> str:
        return run_month(" ".join(self.row.get(k, "") for k in ("source", "source_ref", "id"))) or "2026-06"

    def _model(self) -> Model:
        try:
            model = _model(self.row["model"])
        except MoeplanError as error:
            raise Unsupported(str(error)) from None
        if re.search(r"\bMTP=0|no MTP|w/o MTP", self.notes):
            model = replace(model, mtp=())
        return model

    def _cluster(self) -> Cluster:
        gpus = self._integer("num_gpus")
        try:
            cluster = _cluster(self.row["gpu"], gpus)
            domain = self._integer("gpus_per_node", cluster.domain_gpus)
            return replace(cluster, domain_gpus=domain) if domain != cluster.domain_gpus else cluster
        except MoeplanError as error:
            raise Unsupported(str(error)) from None

    def _workload(self, era: Era, model: Model) -> Workload:
        name = self.row.get("precision") or self._assume("precision", "bf16")
        try:
            precision = load_precision(name)
        except MoeplanError as error:
            raise Unsupported(str(error)) from None
        if name.lower() == "fp8":
            self.remarks.append("precision: fp8 does not say how it scales, assumed per-tensor scaling")
        source = self.row.get("source", "").lower()
        tuned = "mlperf" in source or "megatron-bridge" in source
        gradient = 2 if tuned and "FP32" not in self.notes else 4
        moments = 2 if re.search(r"adam_moments=bfloat16|BF16 Adam moments", self.notes) else 4
        padded = re.search(r"rank_capacity_factor=([0-9.]+)", self.other)
        drop = re.search(r"capacity(?: factor)?[ =]+([0-9.]+)", self.other)
        real = model.moe is not None and re.search(r"real (routing|SFT|data|C4)|unforced", self.notes) is not None
        return Workload(
            seq_len=self._integer("seq_len"),
            global_batch=self._integer("gbs"),
            precision=precision,
            era=era,
            gradient_bytes=gradient,
            moment_bytes=moments,
            imbalance=self._assume("routing imbalance of real data", 1.1) if real and not drop else 1.0,
            capacity_factor=0.0 if padded or not drop else float(drop[1]),
        )

    def _layout(self, model: Model, cluster: Cluster, workload: Workload) -> Layout:
        kind = self.row.get("dp_type", "")
        fsdp = kind in ("fsdp", "megatron-fsdp", "zero3") or "fsdp=" in self.other
        degree = 1 if fsdp else None
        tp, pp = self._integer("tp", degree), self._integer("pp", degree)
        cp = self._integer("cp", 1)
        if cluster.gpus % (tp * cp * pp):
            raise Unsupported(f"tp*cp*pp = {tp}*{cp}*{pp} = {tp * cp * pp} does not divide {cluster.gpus} GPUs")
        dp = cluster.gpus // (tp * cp * pp)
        ep, etp = self._expert_degrees(model, tp)
        if tp * cp * dp % (etp * ep):
            raise Unsupported(f"etp*ep = {etp}*{ep} = {etp * ep} does not divide the {tp * cp * dp} GPUs of a stage")
        split, vpp = self._split(model, workload, pp)
        micro = self._micro_batch(workload, dp)
        sp = self.row.get("sequence_parallel", "")
        return Layout(
            tp=tp, cp=cp, pp=pp, vpp=vpp, dp=dp, ep=ep, etp=etp, edp=tp * cp * dp // (etp * ep),
            micro_batch=micro,
            sequence_parallel=sp.lower() in ("yes", "true", "1") if sp else tp > 1,
            sharding="fsdp" if fsdp else "ddp" if kind == "ddp" else "optimizer",
            recompute=self._recompute(),
            dispatcher=self._dispatcher(model, workload.era) if model.moe else "none",  # type: ignore[arg-type]
            ep_overlap=self.row.get("a2a_overlap", "") == "yes",
            tp_overlap=self._tp_overlap(model, tp),
            dp_overlap="no overlap" not in self.other,
            cuda_graphs=self._graphs(),
            optimizer_offload=self._offload(),
            stages=split,
        )  # fmt: skip

    def _expert_degrees(self, model: Model, tp: int) -> tuple[int, int]:
        if model.moe is None:
            return 1, 1
        ep = self._integer("ep")
        given = self.row.get("etp")
        etp = self._integer("etp") if given else self._assume("etp", tp if self._month < _FOLDING else 1)
        if model.moe.experts % ep:
            raise Unsupported(f"ep={ep} does not divide the {model.moe.experts} experts of {model.name}")
        return ep, etp

    def _split(self, model: Model, workload: Workload, pp: int) -> tuple[str, int]:
        layers = len(model.layers)
        whole = layers // pp if pp > 1 and layers % pp == 0 else 1
        vpp = self._integer("vpp", whole if pp > 1 else 1)
        if pp == 1:
            vpp = 1
        if match := re.search(r"pp_layout=([EtmL|*()0-9]+)", self.other):
            problem = check_split(match[1], layers, len(model.mtp), pp, vpp)
            if problem:
                raise Unsupported(f"pp_layout '{match[1]}' does not fit: {problem}")
            return match[1], vpp
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

    def _recompute(self) -> tuple[str, ...]:
        text = self.row.get("recompute", "").lower()
        if not text:
            return self._assume("recompute", ())
        if text == "none":
            return ()
        if text.startswith("full"):
            if "block" in text:
                self.remarks.append(f"recompute '{text}': priced as full recompute of every layer")
            return ("full",)
        if "op-level" in text:
            self.remarks.append("recompute of single operations: priced as core attention")
            return ("core_attn",)
        if "core_attn (" in text or "(core_attn)" in text:
            return ("core_attn",)
        names = tuple(n.strip() for n in text.split("+"))
        unknown = [n for n in names if n not in RECOMPUTE_MODULES]
        if unknown:
            raise Unsupported(f"recompute module '{unknown[0]}' is not known")
        return names

    def _graphs(self) -> tuple[str, ...]:
        text = self.row.get("cuda_graphs", "").lower()
        if not text:
            return self._assume("CUDA graphs", ())
        if text == "none":
            return ()
        names = tuple(text.split(":")[-1].split("+"))
        unknown = [n for n in names if n not in GRAPH_SCOPES]
        if unknown:
            raise Unsupported(f"CUDA graph scope '{unknown[0]}' is not known")
        return names

    def _dispatcher(self, model: Model, era: Era) -> str:
        text = self.row.get("dispatcher", "").lower()
        if text:
            if text not in DISPATCHERS:
                raise Unsupported(f"dispatcher '{text}' is not known")
            return text
        grouped = model.moe is not None and model.moe.groups > 1
        known = [("hybridep", True), ("deepep", grouped), ("alltoall", True)]
        return self._assume("dispatcher", next(n for n, wanted in known if wanted and n in era.dispatchers))

    def _tp_overlap(self, model: Model, tp: int) -> bool:
        if "no overlap" in self.other or "vanilla TP" in self.other or tp == 1 or model.moe is not None:
            return False
        return "TP_COMM_OVERLAP=False" not in self.other

    def _offload(self) -> float:
        text = self.row.get("offload", "").lower()
        if "activation" in text:
            self.remarks.append("offload of activations is not modelled")
        if match := re.search(r"optimizer.*fraction ([0-9.]+)", text):
            return float(match[1])
        return 1.0 if "optimizer" in text else 0.0


@functools.lru_cache(maxsize=256)
def _model(name: str) -> Model:
    return load_model(name)


@functools.lru_cache(maxsize=256)
def _cluster(gpu: str, gpus: int) -> Cluster:
    return load_cluster(f"{gpu}x{gpus}")


def _era(name: str) -> Era:
    try:
        return load_era(name)
    except MoeplanError as error:
        raise Unsupported(str(error)) from None


def group_key(run: Run) -> tuple[Any, ...]:
    """Runs with the same key are priced together: they share model, cluster and workload."""
    return (run.model.name, len(run.model.mtp), run.cluster.name, run.cluster.domain_gpus, run.workload)
