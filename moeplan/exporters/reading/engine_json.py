"""The JSON of DeepSpeed's engine as a launch command of Megatron-DeepSpeed names it, beside the flags that say the same.

DeepSpeed takes the JSON where both speak, and each difference is a remark. Of a JSON that cannot be seen, or of values in it
that a variable leaves open, the flags decide. train_batch_size = micro-batch x accumulation steps x dp.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moeplan.errors import LayoutError
from moeplan.exporters.reading.deepspeed import SHARDINGS, Section, Zero, parse_json, read_zero
from moeplan.exporters.reading.dialect import Spoken, implied
from moeplan.exporters.reading.flags import Given
from moeplan.exporters.reading.tokens import MARK_CLOSE, MARK_OPEN
from moeplan.exporters.reading.words import shown, unknowns
from moeplan.records import read_text

_PASSED = (
    "gradient_clipping", "steps_per_print", "prescale_gradients", "wall_clock_breakdown", "optimizer", "scheduler",
    "communication_data_type", "activation_checkpointing", "comms_logger", "flops_profiler", "csv_monitor", "wandb",
    "tensorboard", "curriculum_learning", "data_efficiency", "zero_allow_untested_optimizer", "dump_state", "checkpoint",
    "memory_breakdown",
)  # fmt: skip
"""Keys of the JSON that change neither model nor layout, or that the flags say again."""
_PASSED_ZERO = ("contiguous_gradients", "reduce_scatter", "_size", "_threshold", "_parameters", "_distance")
"""Ends of the same of its section on ZeRO."""
_ALL = "ZeRO, batch and number format are those of the flags"
_OPEN = "there the flags decide"
_BATCHES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def read_settings(flags: Spoken, files: Mapping[str, str], folder: Path, remarks: list[str]) -> Section:
    """The engine's configuration; empty where it cannot be seen."""
    given = flags.find("--deepspeed_config")
    if given is None or not given.values:
        remarks.append(f"no --deepspeed_config is named: {_ALL}")
        return Section({}, "DeepSpeed's configuration")
    name = given.values[0]
    where = f"configuration '{shown(name)}'"
    text = files.get(Path(name).name)
    if text is None:
        path = next((p for p in (folder / name, folder / Path(name).name) if not unknowns(str(p)) and p.is_file()), None)
        text = None if path is None else read_text(path, "configuration")
    if text is None:
        remarks.append(f"{where} is neither beside the file nor written by it as far as that can be followed: {_ALL}")
        return Section({}, where)
    if open_names := unknowns(text):
        remarks.append(f"{where}: {', '.join(open_names)} not known without running it; {_OPEN}")
        text = re.sub(f"{MARK_OPEN}[^{MARK_CLOSE}]*{MARK_CLOSE}", "null", text)
    data = parse_json(text, where)
    automatic = [key for key, value in Section(data, where).data.items() if '"auto"' in json.dumps(value)]
    if automatic:
        remarks.append(f"{where}: 'auto' in {', '.join(automatic)} is for the Trainer of transformers; {_OPEN}")
    return Section(data, where)


def read_world(top: Section, ways: int) -> int | None:
    """GPUs that three batch sizes and the degrees beside dp amount to."""
    batch, micro, steps = (top.count(key) for key in _BATCHES)
    if micro and batch and steps and not batch % (micro * steps):
        return batch // (micro * steps) * ways
    return None


def differs(remarks: list[str], top: Section, key: str, value: Any, given: Given) -> None:
    """A remark that the JSON and a flag say different things."""
    remarks.append(f"{top.where} says {key} {value}, the command {given}: DeepSpeed takes the configuration")


def read_batches(flags: Spoken, top: Section, dp: int, remarks: list[str], faults: list[str]) -> dict[str, Given | None]:
    """Global batch and micro-batch of the JSON, where they are not those of the flags."""
    batch, micro, steps = (top.count(key) for key in _BATCHES)
    flag_batch, flag_micro = flags.number("--global-batch-size"), flags.number("--micro-batch-size")
    if batch is None and micro and steps:
        batch = micro * steps * dp
    if micro is None and flag_micro is None and batch and steps and not batch % (dp * steps):
        micro = batch // (dp * steps)
    out: dict[str, Given | None] = {}
    rows = ((_BATCHES[0], batch, "--global-batch-size", flag_batch), (_BATCHES[1], micro, "--micro-batch-size", flag_micro))
    for key, value, flag, number in rows:
        given = flags.find(flag)
        if value and value != number:
            out |= implied(flag, value)
            if given is not None and number is not None:
                differs(remarks, top, key, value, given)
    batch, micro = batch or flag_batch, micro or flag_micro
    if batch and micro and steps and batch != micro * steps * dp:
        product = f"{micro} x {steps} x {dp} = {micro * steps * dp}"
        faults.append(f"{top.where}: {_BATCHES[0]} {batch} is not {_BATCHES[1]} x {_BATCHES[2]} x dp = {product}")
    return out


def read_engine(flags: Spoken, top: Section, remarks: list[str]) -> Zero:
    """ZeRO as the JSON has it; a JSON that is there and names no stage has none."""
    given, stage = flags.find("--zero-stage"), flags.count("--zero-stage", default=1)
    section = top.section("zero_optimization").data
    unsaid = not top.data or top.data.get("zero_optimization", {}) is None or section.get("stage", 0) in (None, "auto")
    if unsaid and stage not in SHARDINGS:
        raise LayoutError(f"{given}: ZeRO has the stages {', '.join(map(str, SHARDINGS))}")
    zero = read_zero(top, remarks, stage if unsaid else 0)
    if not unsaid:
        flags.defaults.pop("--zero-stage", None)
    if given is not None and zero.stage != stage:
        differs(remarks, top, "ZeRO stage", zero.stage, given)
    on_cpu = flags.find("--cpu-optimizer")
    if not top.data:
        return dataclasses.replace(zero, offload=float(on_cpu is not None))
    if on_cpu is not None and not zero.offload:
        differs(remarks, top, "offload_optimizer", "none", on_cpu)
    return zero


def read_sharding(zero: Zero) -> dict[str, Given | None]:
    """Flags of Megatron-LM that shard as ZeRO does."""
    out: dict[str, Given | None] = {}
    name = {"ddp": "", "optimizer": "--use-distributed-optimizer", "fsdp": "--use-megatron-fsdp"}[SHARDINGS[zero.stage]]
    switches = [name, *(["--overlap-grad-reduce", "--overlap-param-gather"] if zero.overlap else [])]
    switches += ["--optimizer-cpu-offload"] if zero.offload else []
    switches += ["--grad-reduce-in-bf16"] if zero.gradient_bytes == 2 else []
    for flag in filter(None, switches):
        out |= implied(flag)
    return out


def remark_rest(top: Section, remarks: list[str]) -> None:
    """A remark on keys that were not looked at."""
    zero = top.section("zero_optimization")
    found = [
        f"zero_optimization.{key}"
        for key, value in zero.data.items()
        if value not in (False, None, 1) and key not in zero.asked and not key.endswith(_PASSED_ZERO)
    ]
    found += [f"zero_optimization.{k}" for k in ("zero_hpz_partition_size", "mics_shard_size") if zero.data.get(k, 0) > 1]
    found += [key for key in top.data if key not in top.asked and key not in _PASSED]
    if found:
        remarks.append(f"{top.where}: not looked at: {', '.join(found)}")
