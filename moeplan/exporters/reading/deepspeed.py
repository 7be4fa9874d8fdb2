"""DeepSpeed's JSON read back: layout and workload, with the model from a configuration beside it.

World = autotp_size x dp, with dp = train_batch_size / (micro-batch x accumulation steps). What a layout cannot say is read as
the nearest that it can, with a remark. Not read: pipelines of DeepSpeed, which are no keys of its JSON.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeplan.costmodels.hf_config import read_config
from moeplan.costmodels.layout import Layout
from moeplan.costmodels.model import Model
from moeplan.costmodels.workload import Workload, load_era, load_precision
from moeplan.errors import LayoutError, SchemaError
from moeplan.exporters.base import Reading, read_arguments
from moeplan.exporters.neutral import PLAN, read_plan
from moeplan.records import read_text

CONFIG = "ds_config.json"
"""Name of DeepSpeed's JSON in an export."""
MODEL = "config.json"
"""Name of the model's configuration."""
ARGUMENTS = "deepspeed.args"
"""Name of the argument file."""
SHARDINGS = {0: "ddp", 1: "optimizer", 2: "optimizer", 3: "fsdp"}
"""Sharding of a ZeRO stage."""


class Section:
    """A JSON object that is asked for its keys, and refuses values of another type."""

    def __init__(self, data: Any, where: str) -> None:
        """`where`: for messages."""
        if not isinstance(data, Mapping):
            raise SchemaError(f"{where}: expected a JSON object")
        self.data, self.where = data, where
        self.asked: set[str] = set()
        self.sections: dict[str, Section] = {}

    def section(self, key: str) -> Section:
        """The object of a key; an empty one where it is absent."""
        self.asked.add(key)
        if key not in self.sections:
            data = self.data.get(key)
            self.sections[key] = Section({} if data is None else data, f"{self.where}, key '{key}'")
        return self.sections[key]

    def count(self, key: str, default: int | None = None) -> int | None:
        """A whole number of at least 0."""
        self.asked.add(key)
        value = self.data.get(key, default)
        if value is None or value == "auto":
            return default
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise SchemaError(f"{self.where}: {key} is {value!r}, not a whole number")
        return value

    def switch(self, key: str, default: bool = False) -> bool:
        """A truth value."""
        self.asked.add(key)
        value = self.data.get(key, default)
        if value not in (True, False, None, "auto"):
            raise SchemaError(f"{self.where}: {key} is {value!r}, not true or false")
        return value if isinstance(value, bool) else default

    def text(self, key: str, default: str) -> str:
        """A word."""
        self.asked.add(key)
        value = self.data.get(key, default)
        if value is not None and not isinstance(value, str):
            raise SchemaError(f"{self.where}: {key} is {value!r}, not text")
        return value or default


@dataclass(frozen=True, kw_only=True, slots=True)
class Zero:
    """What DeepSpeed's JSON says of sharding, offload and gradients."""

    stage: int
    overlap: bool
    offload: float
    """Share of the optimizer states in host memory."""
    gradient_bytes: int


def load_json(path: Path) -> Any:
    """Contents of a JSON file."""
    return parse_json(read_text(path, "configuration"), f"configuration '{path}'")


def parse_json(text: str, where: str) -> Any:
    """What a JSON text holds."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SchemaError(f"{where} is not JSON: {error}") from None


def read_zero(top: Section, remarks: list[str], stage: int = 0) -> Zero:
    """The sections on ZeRO and on number formats; `stage` is the one where the JSON names none."""
    zero = top.section("zero_optimization")
    stage = found if (found := zero.count("stage")) is not None else stage
    if stage not in SHARDINGS:
        raise SchemaError(f"{top.where}: ZeRO stage {stage} is none of {', '.join(map(str, SHARDINGS))}")
    if stage == 2:
        remarks.append("ZeRO 2 is priced as ZeRO 1: gradients are counted whole")
    offload = zero.section("offload_optimizer").text("device", "none") != "none" or zero.switch("cpu_offload")
    return Zero(
        stage=stage,
        overlap=zero.switch("overlap_comm", default=stage == 3),
        offload=float(offload),
        gradient_bytes=4 if top.section("data_types").text("grad_accum_dtype", "bf16") == "fp32" else 2,
    )


def read_settings(
    data: Any, model: Model, seq_len: int, world: int | None, remarks: list[str], *, where: str, era: str = "latest"
) -> tuple[Workload, Layout]:
    """Workload and layout of DeepSpeed's configuration; `world` overrides what its batch sizes say."""
    top = Section(data, where)
    zero, experts = read_zero(top, remarks), top.section("expert_parallel")
    tp = top.section("tensor_parallel").count("autotp_size", 1) or 1
    micro, batch, dp = _batches(top, world // tp if world else None)
    ep = (experts.count("autoep_size", 1) or 1) if experts.switch("enabled") else 1
    if (tp * dp) % ep:
        raise LayoutError(f"autoep_size = {ep} does not divide the {tp * dp} ranks", hint="take a divisor of them")
    if model.moe is not None and not experts.switch("enabled"):
        remarks.append("expert_parallel is off: every rank holds all experts, or the model places them itself")
    layout = Layout(
        tp=tp,
        dp=dp,
        ep=ep,
        edp=tp * dp // ep,
        micro_batch=micro,
        sharding=SHARDINGS[zero.stage],  # type: ignore[arg-type]
        dispatcher=_dispatcher(model, experts),  # type: ignore[arg-type]
        dp_overlap=zero.overlap,
        recompute=("full",) if "activation_checkpointing" in top.data else (),
        optimizer_offload=zero.offload,
    )
    if not top.section("bf16").switch("enabled"):
        remarks.append("training without bf16 is priced as bf16")
    workload = Workload(
        seq_len=seq_len,
        global_batch=batch,
        precision=load_precision("bf16"),
        era=load_era(era),
        gradient_bytes=zero.gradient_bytes,
    )
    return workload, layout


def _batches(top: Section, dp: int | None) -> tuple[int, int, int]:
    """Micro-batch, global batch and data-parallel size, of which two of DeepSpeed's numbers and dp say the rest."""
    names = ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps")
    micro, batch, steps = (top.count(name) for name in names)
    if dp is None and micro and batch and steps and not batch % (micro * steps):
        dp = batch // (micro * steps)
    if dp is None:
        raise SchemaError(
            f"{top.where}: {', '.join(names)} do not say the number of GPUs: found {micro}, {batch}, {steps}",
            hint="say it with --gpus N",
        )
    if micro is None:
        micro = batch // (dp * (steps or 1)) if batch else 1
    batch = batch or micro * dp * (steps or 1)
    if micro < 1 or batch != micro * dp * (steps or max(batch // (micro * dp), 1)):
        raise SchemaError(f"{top.where}: {names[1]} = {batch} is not {names[0]} x {names[2]} x dp = {micro} x {steps} x {dp}")
    return micro, batch, dp


def _dispatcher(model: Model, experts: Section) -> str:
    if model.moe is None:
        return "none"
    return {"comm": "alltoall"}.get(found := experts.text("comm_backend", "comm"), found)


def read_export(directory: Path) -> Reading:
    """What the files of an export say; its pipeline of one rank and its software era stand in `plan.json` alone."""
    said = read_plan(directory / PLAN)
    _, words = read_arguments(read_text(directory / ARGUMENTS, "argument file"))
    seq_len = int(words[words.index("--seq_length") + 1])
    model = read_config(load_json(directory / MODEL), name=said.model.name, source=said.model.source)
    where = f"configuration '{directory / CONFIG}'"
    workload, layout = read_settings(
        load_json(directory / CONFIG), model, seq_len, None, [], where=where, era=said.workload.era.name
    )
    return Reading(
        model=model,
        workload=workload,
        layout=dataclasses.replace(layout, stages=said.layout.stages),
        world=layout.world,
    )
