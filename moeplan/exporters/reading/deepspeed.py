"""DeepSpeed's JSON read back: layout and workload, with the model from a configuration beside it.

World = autotp_size x dp, with dp = train_batch_size / (micro-batch x accumulation steps). What a layout cannot say is read as
the nearest that it can, with a remark. Not read: pipelines of DeepSpeed, which are no keys of its JSON.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
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
_SHARDINGS = {0: "ddp", 1: "optimizer", 2: "optimizer", 3: "fsdp"}


class Section:
    """A JSON object that is asked for its keys, and refuses values of another type."""

    def __init__(self, data: Any, where: str) -> None:
        """`where`: for messages."""
        if not isinstance(data, Mapping):
            raise SchemaError(f"{where}: expected a JSON object")
        self.data, self.where = data, where
        self.asked: set[str] = set()

    def section(self, key: str) -> Section:
        """The object of a key; an empty one where it is absent."""
        self.asked.add(key)
        return Section(self.data.get(key, {}), f"{self.where}, key '{key}'")

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


def load_json(path: Path) -> Any:
    """Contents of a JSON file."""
    try:
        return json.loads(read_text(path, "configuration"))
    except (ValueError, RecursionError) as error:
        raise SchemaError(f"configuration '{path}' is not JSON: {error}") from None


def read_settings(
    data: Any, model: Model, seq_len: int, world: int | None, remarks: list[str], *, where: str, era: str = "latest"
) -> tuple[Workload, Layout]:
    """Workload and layout of DeepSpeed's configuration; `world` overrides what its batch sizes say."""
    top = Section(data, where)
    zero, experts = top.section("zero_optimization"), top.section("expert_parallel")
    tp = top.section("tensor_parallel").count("autotp_size", 1) or 1
    micro, batch, dp = _batches(top, world // tp if world else None)
    stage = zero.count("stage", 0) or 0
    if stage not in _SHARDINGS:
        raise SchemaError(f"{where}: ZeRO stage {stage} is none of {', '.join(map(str, _SHARDINGS))}")
    if stage == 2:
        remarks.append("ZeRO 2 is priced as ZeRO 1: gradients are counted whole")
    offload = zero.section("offload_optimizer")
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
        sharding=_SHARDINGS[stage],  # type: ignore[arg-type]
        dispatcher=_dispatcher(model, experts),  # type: ignore[arg-type]
        dp_overlap=zero.switch("overlap_comm", default=stage == 3),
        recompute=("full",) if "activation_checkpointing" in top.data else (),
        optimizer_offload=float(offload.text("device", "none") != "none"),
    )
    if not top.section("bf16").switch("enabled"):
        remarks.append("training without bf16 is priced as bf16")
    workload = Workload(
        seq_len=seq_len,
        global_batch=batch,
        precision=load_precision("bf16"),
        era=load_era(era),
        gradient_bytes=4 if top.section("data_types").text("grad_accum_dtype", "bf16") == "fp32" else 2,
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
