"""What the cells of a run table say: dates, switches, lists of modules, shares.

Each function reads one kind of cell and returns its value, where needed with a remark on what was taken for what. Spellings
differ between sources, so letter case, blanks, "-" and "_" make no difference and the usual synonyms are known; what is not
understood is `Unsupported` with the text as it stands, never a guess.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from moeplan.costmodels.layout import DISPATCHERS, GRAPH_SCOPES, RECOMPUTE_MODULES
from moeplan.errors import MoeplanError

_MONTHS = {m: i + 1 for i, m in enumerate("jan feb mar apr may jun jul aug sep oct nov dec".split())}
_YES, _NO = ("yes", "y", "true", "on", "1", "1.0"), ("no", "n", "false", "off", "none", "0", "0.0")
_SHARDINGS = {
    "distopt": "optimizer", "distributedoptimizer": "optimizer", "optimizer": "optimizer", "zero1": "optimizer",
    "zero2": "optimizer", "fsdp": "fsdp", "fsdp1": "fsdp", "fsdp2": "fsdp", "megatronfsdp": "fsdp", "hsdp": "fsdp",
    "zero3": "fsdp", "ddp": "ddp", "dp": "ddp", "none": "ddp",
}  # fmt: skip
_MODULES = {_name: _name for _name in RECOMPUTE_MODULES} | {
    "core_attention": "core_attn", "attn": "core_attn", "attention": "core_attn", "norm": "layernorm",
    "layer_norm": "layernorm", "mla_up_projection": "mla_up_proj", "up_proj": "mla_up_proj", "moe_activation": "moe_act",
    "shared_expert": "shared_experts",
}  # fmt: skip
_SCOPES = {_name: _name for _name in GRAPH_SCOPES} | {
    "attention": "attn",
    "router": "moe_router",
    "preprocess": "moe_preprocess",
}
_DISPATCHERS = {_name: _name for _name in DISPATCHERS if _name != "none"} | {"a2a": "alltoall", "all2all": "alltoall"}


class Unsupported(MoeplanError):
    """A row that cannot be priced; the message is its reason."""


def month_of(text: str) -> str | None:
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


def whole_number(name: str, text: str) -> int:
    """A whole number of at least 1; "8" and "8.0" alike."""
    try:
        value = float(text)
    except ValueError:
        raise Unsupported(f"{name}='{text}' is not a number") from None
    if not 1 <= value < 1e15 or value != int(value):
        raise Unsupported(f"{name}={text} is not a whole number of at least 1")
    return int(value)


def switch(name: str, text: str) -> bool:
    """Yes or no."""
    if text.lower() in _YES:
        return True
    if text.lower() in _NO:
        return False
    raise Unsupported(f"{name}='{text}' is neither yes nor no")


def sharding(text: str) -> tuple[str, str]:
    """What data parallelism shards, and a remark."""
    folded = re.sub(r"[^a-z0-9]", "", text.lower()).removeprefix("deepspeed")
    if folded not in _SHARDINGS:
        raise Unsupported(f"dp_type '{text}' is not known")
    remarks = {"zero2": "dp_type: zero2 priced with whole gradients", "hsdp": "dp_type: hsdp priced as fsdp over all ranks"}
    return _SHARDINGS[folded], remarks.get(folded, "")


def recompute_modules(text: str) -> tuple[tuple[str, ...], str]:
    """Recomputed modules, and a remark where the text says something that is priced as something else."""
    folded = _fold(text)
    if folded in _NO:
        return (), ""
    if folded.startswith("full"):
        partly = re.search(r"block|\d", folded)
        return ("full",), f"recompute '{text}': priced as full recompute of every layer" if partly else ""
    if "op_level" in folded:
        return ("core_attn",), "recompute of single operations: priced as core attention"
    if folded == "selective":  # Megatron without a list of modules
        return ("core_attn",), ""
    if match := re.fullmatch(r"selective_*\((.*)\)", folded):
        folded = match[1]
    return _listed(re.sub(r"\(.*\)", "", folded), _MODULES, f"recompute '{text}'", "module"), ""


def graph_scopes(text: str) -> tuple[str, ...]:
    """What CUDA graphs cover; a prefix says who captures them ("te:", "local:")."""
    folded = _fold(text).split(":")[-1]
    return () if folded in _NO else _listed(folded, _SCOPES, f"cuda_graphs '{text}'", "scope")


def dispatcher(text: str) -> str:
    """How tokens reach their experts."""
    name = _DISPATCHERS.get(_fold(text).replace("_", ""))
    if name is None:
        raise Unsupported(f"dispatcher '{text}' is not known")
    return name


def offloaded_states(text: str) -> tuple[float, str]:
    """Share of the optimizer states on the host, and a remark on what else is offloaded."""
    folded = text.lower()
    remark = "offload of activations is not modelled" if "activation" in folded else ""
    if folded in _NO:
        return 0.0, ""
    if "optim" not in folded:
        return 0.0, remark or f"offload '{text}' is not modelled"
    if match := re.search(r"fraction[ =:]*(\d*\.?\d+)|(\d+(?:\.\d+)?) ?%", folded):
        share = float(match[1]) if match[1] else float(match[2]) / 100
        if share > 1:
            raise Unsupported(f"offload '{text}': a share of {share:g} is more than all")
        return share, remark
    return 1.0, remark


def capacity_factor(text: str) -> float:
    """Capacity above which experts drop tokens; 0 where none is named. A rank's padded capacity is no such factor."""
    match = re.search(r"(?<!rank_)(?<!rank )capacity(?:[ _-]?factor)?[ =:]+(\d*\.?\d+)", text, re.IGNORECASE)
    return float(match[1]) if match else 0.0


def written_split(text: str) -> str | None:
    """The pipeline split that a text names with pp_layout=..."""
    match = re.search(r"pp_layout\s*[=:]\s*[\"']?([EtmL|*()0-9,]+)", text)
    return match[1].strip(",") if match else None


def _fold(text: str) -> str:
    return re.sub(r"[\s_-]+", "_", text.strip().lower())


def _listed(text: str, known: Mapping[str, str], where: str, what: str) -> tuple[str, ...]:
    """Names joined by "+" or commas."""
    names: Sequence[str] = [n.strip("_") for n in re.split(r"[+,]", text)]
    for name in names:
        if name not in known:
            raise Unsupported(f"{where}: {what} '{name}' is not known")
    return tuple(dict.fromkeys(known[n] for n in names))


def other_framework(text: str) -> str | None:
    """The era of a framework that is not Megatron, where a source names one."""
    folded = text.lower()
    if re.search(r"framework=(maxtext|paxml)", folded):
        return "xla-2024"
    if "torch.compile" in folded:
        return "pytorch-compiled-2025" if re.search(r"(\b|_)202[5-9]", folded) else "pytorch-compiled"
    if "llm-foundry" in folded:
        return "llm-foundry"
    if re.search(r"\b(automodel|xtuner|torchtune|llama-?factory|axolotl|veomni)\b", folded):
        return "pytorch-2025"
    if re.search(r"torchtitan|hugging face modules|deepspeed zero", folded):
        return "pytorch-eager"
    return None


def device_variant(gpu: str, source: str) -> str:
    """The device that a source describes more closely than its name does."""
    return "H100-96GB" if gpu == "H100" and re.search(r"96 ?GB.*500 ?W", source) else gpu


def measured_machine(gpu: str, source: str) -> str:
    """A machine whose own kernels were published along with its runs; empty: none."""
    return "b200-simumax" if gpu == "B200" and "SimuMax" in source else ""
