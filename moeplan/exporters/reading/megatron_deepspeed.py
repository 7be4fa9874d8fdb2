"""Launch commands of Megatron-DeepSpeed: its flags and the JSON of its engine, said in the flags of Megatron-LM.

dp = world / (tp x pp x sequence-parallel size), and ep divides dp. A `Spoken` then answers `megatron_architecture.py` and
`megatron_layout.py` as if the command were one of Megatron-LM. Defaults are Megatron-DeepSpeed's. What it refuses and a layout
cannot say is a fault, what is priced as something else a remark.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from moeplan.costmodels.stages import format_split
from moeplan.errors import LayoutError, ModelError
from moeplan.exporters.megatron_deepspeed_facts import dialect
from moeplan.exporters.megatron_model import pattern
from moeplan.exporters.reading.deepspeed import Section, Zero
from moeplan.exporters.reading.dialect import Spoken, implied
from moeplan.exporters.reading.engine_json import (
    differs,
    read_batches,
    read_engine,
    read_settings,
    read_sharding,
    read_world,
    remark_rest,
)
from moeplan.exporters.reading.flags import Flags, Given

FRAMEWORK = f"Megatron-DeepSpeed {dialect().written_for}"
"""Name and date of what is read."""
_UNPRICED = (
    "--partition-activations", "--checkpoint-in-cpu", "--enable-zbh1-pipeline", "--enable-zbh1-exact-semantics",
    "--ds-sequence-parallel-fpdt", "--random-ltd", "--kd", "--mos", "--memory-centric-tiled-linear",
)  # fmt: skip
"""Flags that cost or save time or memory, which nothing here prices."""


def speaks(flags: Flags) -> bool:
    """Whether a command is one of Megatron-DeepSpeed."""
    return not flags.last.keys().isdisjoint(dialect().signs)


def translate(
    flags: Spoken, world: int | None, files: Mapping[str, str], folder: Path, remarks: list[str], faults: list[str]
) -> int | None:
    """Fill in what the command implies; gives the number of GPUs, which the batch sizes of a JSON may say.

    `files` are texts that the script writes, `folder` is where others are looked for.
    """
    tp, pp = (max(flags.number(f"--{kind}-model-parallel-size") or 1, 1) for kind in ("tensor", "pipeline"))
    ways = tp * pp * max(flags.number("--ds-sequence-parallel-size") or 1, 1)
    flags.find("--deepspeed")
    top = read_settings(flags, files, folder, remarks)
    world = world or read_world(top, ways)
    dp = max((world or 1) // ways, 1)
    zero = read_engine(flags, top, remarks)
    out = _experts(flags, tp, dp, remarks)
    out |= read_batches(flags, top, dp, remarks, faults) | read_sharding(zero)
    out |= _manner(flags) | _recompute(flags, remarks) | _format(flags, top, remarks) | _pipeline(flags, pp, zero, faults)
    _refuse(flags, zero, out["--num-experts"] is not None, faults)
    _remark(flags, top, remarks)
    remark_rest(top, remarks)
    flags.implied = out
    return world


# The model and its experts.


def _experts(flags: Spoken, tp: int, dp: int, remarks: list[str]) -> dict[str, Given | None]:
    """Layers with experts and how they are placed; a count of 1 is a dense model."""
    given = flags.find("--num-experts")
    counts = [_count(given, value) for value in flags.values("--num-experts")] if given else []
    layers = flags.number("--num-layers") or 1
    interval = flags.count("--expert-interval", default=2) if max(counts, default=1) > 1 else 1
    if interval < 1:
        raise ModelError(f"{flags.find('--expert-interval')}: a whole number of at least 1 is needed")
    if interval > layers:
        remarks.append(f"experts in every layer whose number {interval} divides: none of {layers}: the model is dense")
    if flags.has("--num-experts-switch"):
        raise ModelError(
            f"{flags.find('--num-experts-switch')}: experts of Megatron's old SwitchMLP cannot be priced",
            hint="--num-experts says DeepSpeed's",
        )
    placed = layers // interval
    if len(counts) not in (0, 1, placed):
        raise ModelError(
            f"{given}: {len(counts)} numbers for {placed} layers with experts (every {interval} of {layers})",
            hint="give one number, or one for each of these layers",
        )
    counts = counts * placed if len(counts) == 1 else counts
    kinds = sorted({n for n in counts if n > 1})
    if len(kinds) > 1:
        raise ModelError(
            f"{given}: layers with {' and '.join(map(str, kinds))} experts in one model cannot be priced",
            hint=f"price one of them with --add '--num-experts {kinds[-1]}'",
        )
    degree = flags.number("--moe-expert-parallel-size") or 1
    if not kinds:
        flags.find("--topk", "--mlp-type", "--enable-expert-tensor-parallelism")
        return {"--num-experts": None, **implied("--expert-model-parallel-size", 1)}
    if dp % degree:
        raise LayoutError(
            f"{flags.find('--moe-expert-parallel-size')}: it does not divide the {dp} data-parallel ranks",
            hint="take a divisor of them",
        )
    has = [(i + 1) % interval == 0 and counts[i // interval] > 1 for i in range(layers)]
    out = implied("--num-experts", kinds[0], like=given) | implied("--moe-router-topk", flags.count("--topk", default=1))
    out |= {} if all(has) else implied("--moe-layer-freq", pattern([int(x) for x in has]))
    return out | _placement(flags, tp, dp, kinds[0] // degree, degree, remarks) | _residual(flags, tp, remarks)


def _placement(flags: Spoken, tp: int, dp: int, each: int, degree: int, remarks: list[str]) -> dict[str, Given | None]:
    """Dispatch is an all-to-all of DeepSpeed's; experts are cut over the tensor-parallel ranks on demand only."""
    cut = flags.has("--enable-expert-tensor-parallelism")
    if tp > 1 and not cut:
        remarks.append(
            f"experts are whole on each of the {tp} tensor-parallel ranks (no --enable-expert-tensor-parallelism): DeepSpeed "
            f"shards their optimizer states over {dp // degree} ranks, priced over {tp * dp // degree}"
        )
    if tp > 1 and not flags.has("--sequence-parallel"):
        remarks.append(
            "experts with tp > 1 are priced with --sequence-parallel only: give it with --add to price the run as if it had it"
        )
    if each > 1:
        remarks.append(f"the {each} experts of a rank run one by one; they are priced as one grouped GEMM")
    out = implied("--expert-tensor-parallel-size", tp if cut else 1) | implied("--moe-token-dispatcher-type", "alltoall")
    flags.find("--moe-train-capacity-factor")
    if not flags.has("--disable-moe-token-dropping"):
        factor = flags.text("--moe-train-capacity-factor", default="1.0")
        out |= implied("--moe-expert-capacity-factor", factor, like=flags.find("--moe-train-capacity-factor"))
    return out | implied("--moe-grouped-gemm")


def _residual(flags: Spoken, tp: int, remarks: list[str]) -> dict[str, Given | None]:
    """The dense MLP beside the experts of PR-MoE, as wide as one of them."""
    kind = flags.word("--mlp-type", default="standard")
    if kind == "standard":
        return {}
    if kind != "residual":
        raise ModelError(f"--mlp-type {kind} cannot be priced", hint="standard and residual can")
    hidden = flags.number("--hidden-size") or 1
    width = flags.number("--ffn-hidden-size") or (hidden * 8 // 192 * 64 if flags.has("--swiglu") else 4 * hidden)
    whole = (
        f", cut over the {tp} tensor-parallel ranks" if tp > 1 and not flags.has("--enable-expert-tensor-parallelism") else ""
    )
    remarks.append(f"--mlp-type residual: its dense MLP is priced as a gated shared expert of width {width}{whole}")
    return implied("--moe-shared-expert-intermediate-size", width) | implied("--moe-shared-expert-gate")


def _count(given: Given | None, value: str) -> int:
    if not re.fullmatch(r"\d{1,9}", value) or int(value) < 1:
        raise ModelError(f"{given}: whole numbers of at least 1 are needed")
    return int(value)


def _manner(flags: Spoken) -> dict[str, Given | None]:
    """Attention groups, positions and vocabulary."""
    out: dict[str, Given | None] = {}
    if flags.has("--num-key-value-heads"):
        out |= implied("--group-query-attention")
    if flags.has("--no-position-embedding") and not flags.has("--use-rotary-position-embeddings"):
        out |= implied("--position-embedding-type", "none")
    kind = flags.word("--tokenizer-type", default="GPT2BPETokenizer")
    out |= implied("--tokenizer-type", kind)
    flags.asked.discard("--tokenizer-type")
    if kind == "NullTokenizer" and (count := flags.number("--vocab-size")):
        out |= implied("--vocab-size", count + 1)
    return out


def _recompute(flags: Spoken, remarks: list[str]) -> dict[str, Given | None]:
    units, how = flags.number("--checkpoint-num-layers") or 1, flags.has("--deepspeed-activation-checkpointing")
    if flags.has("--checkpoint-activations"):
        out = implied("--recompute-granularity", "full") | implied("--recompute-method", "uniform")
        return out | implied("--recompute-num-layers", units)
    if how and not flags.has("--recompute-granularity", "--recompute-activations"):
        remarks.append(
            "--deepspeed-activation-checkpointing says how to recompute: without --checkpoint-activations or "
            "--recompute-granularity nothing is"
        )
    return {}


def _format(flags: Spoken, top: Section, remarks: list[str]) -> dict[str, Given | None]:
    bf16, fp16 = (top.section(name).switch("enabled") for name in ("bf16", "fp16"))
    if not bf16 and not fp16:
        return {}
    taken, other = ("bf16", "fp16") if bf16 else ("fp16", "bf16")
    if (given := flags.find(f"--{other}")) is not None and not flags.has(f"--{taken}"):
        differs(remarks, top, f"{taken}.enabled", "true", given)
    return {**implied(f"--{taken}"), f"--{other}": None}


# Pipelines, and what DeepSpeed refuses or nothing here prices.


def _pipeline(flags: Spoken, pp: int, zero: Zero, faults: list[str]) -> dict[str, Given | None]:
    """DeepSpeed splits any number of layers, the first stages with one more."""
    off = flags.find("--no-pipeline-parallel")
    if off is not None and pp > 1:
        raise LayoutError(
            f"{flags.find('--pipeline-model-parallel-size')} with --no-pipeline-parallel: Megatron-DeepSpeed refuses it",
            hint="drop one of the two",
        )
    if off is None and zero.stage >= 2:
        faults.append(f"ZeRO {zero.stage} excludes DeepSpeed's pipeline engine, which runs without --no-pipeline-parallel")
    layers = flags.number("--num-layers") or 1
    if pp <= 1 or layers % pp == 0 or layers < pp:
        return {}
    sizes = [layers // pp + (i < layers % pp) for i in range(pp)]
    chunks = ["t" * size for size in sizes]
    chunks[0], chunks[-1] = "E" + chunks[0], chunks[-1] + "L"
    return implied("--pipeline-model-parallel-layout", format_split(chunks))


def _refuse(flags: Spoken, zero: Zero, experts: bool, faults: list[str]) -> None:
    if not flags.has("--create-moe-param-group") and experts and zero.stage >= 1:
        faults.append(f"experts with ZeRO {zero.stage} need --create-moe-param-group")
    if experts and zero.stage == 3:
        faults.append("ZeRO 3 does not take DeepSpeed's layer of experts, stages 1 and 2 do")
    if (flags.number("--ds-sequence-parallel-size") or 1) > 1 and flags.has("--sequence-parallel"):
        faults.append("--ds-sequence-parallel-size excludes --sequence-parallel")


def _remark(flags: Spoken, top: Section, remarks: list[str]) -> None:
    """What is priced as something else, and what does nothing."""
    if (degree := flags.number("--ds-sequence-parallel-size") or 1) > 1:
        remarks.append(
            f"--ds-sequence-parallel-size {degree}: all-to-alls over heads are priced as context parallelism by rings"
        )
    weights = top.section("zero_optimization").section("offload_param").text("device", "none")
    if weights != "none" or (flags.text("--remote-device") or "none") != "none":
        remarks.append("weights in host memory (offload_param, --remote-device) are priced as on the device")
    remarks += [f"{flag} is not priced" for flag in _UNPRICED if flags.has(flag)]
    for flag in dialect().idle:
        if flag in flags.last:
            flags.asked.add(flag)
            remarks.append(f"{flags.last[flag]} has no effect under DeepSpeed's engine")
