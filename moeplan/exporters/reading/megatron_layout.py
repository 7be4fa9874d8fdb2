"""The layout and the workload that Megatron-LM's flags describe: the inverse of `megatron.py`.

Defaults are those of megatron-core 0.19.2. What a layout cannot say is read as the nearest that it can, with a remark.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from moeplan.costmodels.hf_config import MOST_LAYERS
from moeplan.costmodels.layout import GRAPH_SCOPES, RECOMPUTE_MODULES, Layout
from moeplan.costmodels.model import Mlp, Model
from moeplan.costmodels.stages import chunk_letters, format_split, parse_split
from moeplan.costmodels.workload import KEPT, Precision, Workload, load_era, load_precision
from moeplan.errors import LayoutError, ModelError
from moeplan.exporters.reading.flags import Flags

_RECIPES = {"tensorwise": "fp8-cs", "delayed": "fp8-delayed", "blockwise": "fp8-blockwise", "mxfp8": "fp8-mx"}
"""Precisions by Megatron's names of FP8 recipes."""
_BACKENDS = {"deepep": "deepep", "hybridep": "hybridep"}


def read_sequence(flags: Flags) -> int:
    """Tokens of a sequence."""
    found = flags.number("--seq-length", "--encoder-seq-length", least=1)
    if found is None and not flags.has("--seq-length", "--encoder-seq-length"):
        raise ModelError("the arguments have no --seq-length", hint="a training command of Megatron-LM has it")
    return found or 1


def read_workload(flags: Flags, seq_len: int, global_batch: int, era: str, remarks: list[str]) -> Workload:
    """What a step has to do."""
    moments = 4
    if flags.has("--use-precision-aware-optimizer"):
        types = {flags.text("--exp-avg-dtype") or "fp32", flags.text("--exp-avg-sq-dtype") or "fp32"}
        moments = 4 if "fp32" in types else 2
        if types - {"fp32", "bf16"} or len(types) > 1:
            remarks.append(f"Adam moments in {' and '.join(sorted(types))} are priced with {moments} bytes each")
    main = flags.text("--main-grads-dtype") or "fp32"
    narrow = flags.has("--grad-reduce-in-bf16") or main == "bf16"
    flags.find("--accumulate-allreduce-grads-in-fp32")
    if (flags.text("--main-params-dtype") or "fp32") != "fp32":
        remarks.append("main parameters in fp16 are priced as fp32")
    optimizer = flags.text("--optimizer") or "adam"
    if optimizer != "adam":
        remarks.append(f"--optimizer {optimizer} is priced as Adam")
    flags.find("--moe-router-force-load-balancing")
    return Workload(
        seq_len=seq_len,
        global_batch=global_batch,
        precision=_precision(flags, remarks),
        era=load_era(era),
        gradient_bytes=2 if narrow else 4,
        moment_bytes=moments,
        capacity_factor=flags.real("--moe-expert-capacity-factor", default=0.0),
    )


def read_global_batch(flags: Flags, dp: int, remarks: list[str]) -> int:
    """Sequences of a step."""
    micro = read_micro_batch(flags)
    schedule = flags.text("--step-batch-size-schedule")
    if schedule and (last := re.findall(r":\s*(\d+)", schedule)):
        remarks.append(f"--step-batch-size-schedule '{schedule}': its last size, {last[-1]} sequences, is taken")
        return int(last[-1])
    if flags.has("--rampup-batch-size"):
        remarks.append("--rampup-batch-size: the global batch at its end is taken")
    return flags.count("--global-batch-size", default=micro * dp)


def read_micro_batch(flags: Flags) -> int:
    """Sequences of a micro-batch."""
    found = flags.number("--micro-batch-size", least=1)
    if found is None and not flags.has("--micro-batch-size"):
        raise ModelError("the arguments have no --micro-batch-size", hint="a training command of Megatron-LM has it")
    return found or 1


def _precision(flags: Flags, remarks: list[str]) -> Precision:
    form, recipe = flags.text("--fp8-format"), flags.text("--fp8-recipe")
    if flags.has("--fp8-hybrid", "--fp8-e4m3"):
        form = "hybrid"
    (
        flags.find("--fp8-amax-history-len"),
        flags.find("--fp8-amax-compute-algo"),
        flags.find("--reuse-grad-buf-for-mxfp8-param-ag"),
    )
    flags.find("--fp16")
    if not flags.has("--bf16"):
        remarks.append(f"{'--fp16' if flags.has('--fp16') else 'training in fp32 (no --bf16)'} is priced as bf16")
    if flags.has("--fp4-format"):
        flags.find("--fp4-recipe")
        if flags.has("--fp4-param-gather"):
            remarks.append("--fp4-param-gather: weights are priced in bf16 all the same")
        return load_precision("nvfp4")
    if form is None:
        return load_precision("bf16")
    if recipe is None:
        flags.defaults["--fp8-recipe"] = "delayed"
    name = _RECIPES.get(recipe or "delayed")
    if name is None:
        remarks.append(f"--fp8-recipe {recipe} is priced as blockwise")
    kept = "" if flags.has("--fp8-param-gather") else KEPT
    if flags.has("--first-last-layers-bf16"):
        remarks.append("--first-last-layers-bf16: all layers are priced in FP8")
    return load_precision((name or "fp8-blockwise") + kept)


def read_layout(flags: Flags, model: Model, world: int, remarks: list[str], faults: list[str]) -> Layout:
    """The layout of `world` ranks; refuses one whose degrees do not divide them.

    `faults` gets what Megatron refuses of a split and a layout cannot say; it is then the even one.
    """
    tp = flags.count("--tensor-model-parallel-size", default=1)
    cp = flags.count("--context-parallel-size", default=1)
    pp = flags.count("--pipeline-model-parallel-size", default=1)
    ep, etp = _expert_degrees(flags, model, tp)
    for name, value in (("tp", tp), ("cp", cp), ("pp", pp), ("ep", ep), ("etp", etp)):
        if value < 1:
            raise LayoutError(f"{name}={value} must be at least 1")
    _refuse_weight_shards(flags, tp, etp if model.moe is not None else flags.number("--expert-tensor-parallel-size") or tp)
    for text, ways in ((f"tp*cp*pp = {tp}*{cp}*{pp}", tp * cp * pp), (f"etp*ep*pp = {etp}*{ep}*{pp}", etp * ep * pp)):
        if world % ways:
            raise LayoutError(
                f"{text} = {ways} does not divide the {world} GPUs", hint="change the degrees, or say the GPUs with --gpus"
            )
    if cp > 1:
        flags.find("--cp-comm-type")
        for flag in ("--hierarchical-context-parallel-sizes", "--hybrid-context-parallel"):
            if flags.has(flag):
                remarks.append(f"{flag} is priced as plain context parallelism")
    if flags.has("--use-tp-pp-dp-mapping"):
        remarks.append("--use-tp-pp-dp-mapping: ranks are priced in Megatron's default order")
    vpp, stages = read_split(flags, model, pp, faults)
    if pp * vpp > MOST_LAYERS:
        raise LayoutError(f"pp*vpp = {pp}*{vpp} chunks are more than the {MOST_LAYERS} layers that can be read")
    return Layout(
        tp=tp,
        cp=cp,
        pp=pp,
        vpp=vpp,
        dp=world // (tp * cp * pp),
        ep=ep,
        etp=etp,
        edp=world // (etp * ep * pp),
        micro_batch=read_micro_batch(flags),
        sequence_parallel=flags.has("--sequence-parallel") and tp > 1,
        stages=stages,
        **_sharding(flags, remarks),
        **_experts(flags, model, remarks),
        **_recompute(flags, model, [chunk.count("t") for chunk in chunk_letters(model, pp, vpp, stages)], remarks),
        tp_overlap=flags.has("--tp-comm-overlap"),
        cuda_graphs=_graphs(flags, model, remarks),
        optimizer_offload=_offload(flags),
    )


def _expert_degrees(flags: Flags, model: Model, tp: int) -> tuple[int, int]:
    ep = (
        flags.count("--expert-model-parallel-size", default=1)
        if model.moe
        else flags.number("--expert-model-parallel-size") or 1
    )
    etp = flags.number("--expert-tensor-parallel-size")
    if model.moe is None:
        return ep, 1
    if flags.has("--moe-extended-tp"):
        return 1, tp * ep
    return ep, flags.count("--expert-tensor-parallel-size", default=tp) if etp is None else etp


def _refuse_weight_shards(flags: Flags, tp: int, etp: int) -> None:
    for flag, size in (("--tensor-parallel-num-weight-shards", tp), ("--expert-tensor-parallel-num-weight-shards", etp)):
        shards = flags.number(flag)
        if shards is not None and shards > size:
            raise LayoutError(f"{flag} {shards}: weights in more shards than the tensor-parallel size {size} cannot be priced")


def read_split(flags: Flags, model: Model, pp: int, faults: list[str]) -> tuple[int, str]:
    """Virtual stages, and the split if it is not the even one."""
    pattern = flags.text("--hybrid-layer-pattern", "--hybrid-override-pattern")
    text = flags.text("--pipeline-model-parallel-layout")
    count = len(model.layers)
    ends = flags.number("--decoder-first-pipeline-num-layers"), flags.number("--decoder-last-pipeline-num-layers")
    if text:
        return _chunks(len(parse_split(text)), pp, "--pipeline-model-parallel-layout", faults), text
    if pattern and "|" in pattern.split("/")[0]:
        parts = [len(part) for part in pattern.split("/")[0].split("|")]
        vpp = _chunks(len(parts), pp, "--hybrid-layer-pattern", faults)
        return vpp, _unless_even(parts, model, pp, vpp)
    embedding, loss = (flags.has(f"--account-for-{end}-in-pipeline-split") for end in ("embedding", "loss"))
    given = flags.number("--num-virtual-stages-per-pipeline-rank")
    vpp = given or 1
    if given is None and (each := flags.number("--num-layers-per-virtual-pipeline-stage")):
        whole = count + embedding + loss
        if whole % (pp * each):
            faults.append(
                f"--num-layers-per-virtual-pipeline-stage {each}: {whole} layers are not a multiple of {pp} stages of {each}"
            )
        vpp = max(1, whole // pp // each)
    if pp == 1 or (ends == (None, None) and not embedding and not loss):
        return vpp, ""
    sizes = _uneven(count, pp, vpp, ends, embedding, loss)
    if sizes is None:
        shares = [x if x is not None else "an even share" for x in ends]
        faults.append(
            f"{count} layers cannot be split over {pp} stages of {vpp} chunk(s) with {shares[0]} on the first stage and "
            f"{shares[1]} on the last{', embedding or loss counted as layers' if embedding or loss else ''}"
        )
        return vpp, ""
    return vpp, _unless_even(sizes, model, pp, vpp)


def _chunks(chunks: int, pp: int, flag: str, faults: list[str]) -> int:
    if chunks % pp:
        faults.append(f"{flag}: its {chunks} chunks are not a multiple of the {pp} pipeline stages")
    return max(1, chunks // pp)


def _uneven(
    count: int, pp: int, vpp: int, ends: tuple[int | None, int | None], embedding: bool, loss: bool
) -> list[int] | None:
    """Layers of every chunk where the first or last stage holds another number, or counts embedding or loss as layers; None
    where these are no whole numbers."""
    first, last = ends
    if ends == (None, None):
        ranks = [(count + embedding + loss) / pp] * pp
    else:
        middle = pp - sum(x is not None for x in ends)
        each = (count - (first or 0) - (last or 0)) / middle if middle else 0
        ranks = [each] * pp
        ranks[0] = each if first is None else first
        ranks[-1] = each if last is None else last
    sizes = [ranks[c % pp] / vpp for c in range(pp * vpp)]
    sizes[0] -= embedding
    sizes[-1] -= loss
    if any(s < 0 or s != int(s) for s in sizes) or sum(sizes) != count:
        return None
    return [int(s) for s in sizes]


def _unless_even(sizes: list[int], model: Model, pp: int, vpp: int) -> str:
    """The text of a split; empty where it is the even one."""
    chunks = ["t" * size for size in sizes]
    chunks[0] = "E" + chunks[0]
    chunks[-1] += "m" * len(model.mtp) + "L"
    even = len(model.layers) % (pp * vpp) == 0 and tuple(chunks) == chunk_letters(model, pp, vpp, "")
    return "" if even else format_split(chunks)


def _sharding(flags: Flags, remarks: list[str]) -> dict[str, Any]:
    sharding = "optimizer" if flags.has("--use-distributed-optimizer") else "ddp"
    if flags.has("--use-megatron-fsdp", "--use-custom-fsdp"):
        strategy = flags.word("--data-parallel-sharding-strategy", default="optim_grads_params")
        sharding = {"no_shard": "ddp", "optim": "optimizer"}.get(strategy, "fsdp")
        if strategy == "optim_grads":
            remarks.append("gradients sharded, weights not (optim_grads), is priced as FSDP")
        flags.find("--ckpt-format"), flags.find("--init-model-with-meta-device")
    elif flags.has("--use-torch-fsdp2"):
        sharding = "fsdp"
        remarks.append("--use-torch-fsdp2 is priced as Megatron's FSDP")
    overlap = flags.has("--overlap-grad-reduce")
    if overlap and sharding != "ddp" and not flags.has("--overlap-param-gather"):
        remarks.append("--overlap-grad-reduce without --overlap-param-gather is priced as if both were given")
    flags.find("--overlap-param-gather")
    if (flags.number("--num-distributed-optimizer-instances") or 1) > 1:
        remarks.append("several instances of the distributed optimizer are priced as one")
    return {"sharding": sharding, "dp_overlap": overlap}


def _experts(flags: Flags, model: Model, remarks: list[str]) -> dict[str, Any]:
    if model.moe is None:
        return {"dispatcher": "none"}
    kind = flags.word("--moe-token-dispatcher-type", default="allgather")
    if kind == "flex":
        backend = (
            "deepep" if flags.has("--moe-enable-deepep") else flags.word("--moe-flex-dispatcher-backend", default="deepep")
        )
        kind = _BACKENDS.get(backend, "deepep")
        if backend not in _BACKENDS:
            remarks.append(f"--moe-flex-dispatcher-backend {backend} is priced as deepep")
    elif kind not in ("allgather", "alltoall"):
        remarks.append(f"--moe-token-dispatcher-type {kind} is priced as alltoall")
        kind = "alltoall"
    if not flags.has("--moe-grouped-gemm"):
        remarks.append("without --moe-grouped-gemm experts run one by one; they are priced as one grouped GEMM")
    flags.find("--moe-permute-fusion"), flags.find("--delay-wgrad-compute"), flags.find("--moe-router-padding-for-quantization")
    return {
        "dispatcher": kind,
        "ep_overlap": flags.has("--overlap-moe-expert-parallel-comm"),
        "shared_overlap": flags.has("--moe-shared-expert-overlap"),
    }


def _recompute(flags: Flags, model: Model, layers: Sequence[int], remarks: list[str]) -> dict[str, Any]:
    """What is recomputed, and in how many layers of each chunk; `layers`: what chunks hold."""
    kind = flags.text("--recompute-granularity")
    if flags.has("--recompute-activations"):
        kind = "selective"
    modules = flags.values("--recompute-modules")
    method, number = flags.text("--recompute-method"), flags.number("--recompute-num-layers")
    if kind == "full":
        if method == "block":
            count = min(number or 0, max(layers))
            every = count == max(layers) and not model.mtp  # whose layers `block` leaves out
            return {"recompute": ("full",) if count else (), "recompute_layers": str(count) if count and not every else ""}
        if (number or 1) > 1:
            remarks.append(f"full recompute by units of {number} layers is priced as by single layers")
        return {"recompute": ("full",)}
    out = list(dict.fromkeys(m for m in modules if m in RECOMPUTE_MODULES and m != "full")) if kind == "selective" else []
    if kind == "selective" and not modules:
        flags.defaults["--recompute-modules"] = "core_attn"
        out = ["core_attn"]
    for module in modules if kind == "selective" else ():
        if module not in RECOMPUTE_MODULES:
            remarks.append(f"recompute of {module} is not priced")
    whole = flags.has("--moe-layer-recompute") and model.moe and "moe" not in out
    return {"recompute": tuple([*out, "moe"] if whole else out)}


def _graphs(flags: Flags, model: Model, remarks: list[str]) -> tuple[str, ...]:
    kind = flags.text("--cuda-graph-impl") or "none"
    if kind == "none" and flags.has("--enable-cuda-graph", "--external-cuda-graph"):
        kind = "local" if flags.has("--enable-cuda-graph") else "transformer_engine"
    scopes = flags.values("--cuda-graph-modules", "--cuda-graph-scope")
    flags.find("--no-check-for-nan-in-loss-and-grad"), flags.find("--cuda-graph-warmup-steps")
    if kind == "none":
        return ()
    if kind == "full_iteration" or "full_iteration" in scopes:
        return ("full_iteration",)
    if kind == "local":
        remarks.append("--cuda-graph-impl local is priced as transformer_engine")
    known = [s for s in scopes if s in GRAPH_SCOPES]
    if not known:
        known = ["attn", *(["moe"] if model.moe else []), *(["mlp"] if any(isinstance(b, Mlp) for b in model.blocks) else [])]
    return tuple(dict.fromkeys(known))


def _offload(flags: Flags) -> float:
    if not flags.has("--optimizer-cpu-offload"):
        return 0.0
    flags.find("--overlap-cpu-optimizer-d2h-h2d")
    return flags.real("--optimizer-offload-fraction", default=1.0)
