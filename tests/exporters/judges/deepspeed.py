"""DeepSpeed's own configuration classes, choice of an optimizer, AutoEP's checks, and its detector on a class made small.

Kinds of cases: "config" (an export's files), "count" (parameters of the class of a model's configuration), and "train" (losses
of an export's model, batches and optimizer without DeepSpeed, in one process).
"""

from __future__ import annotations

import functools
import json
import logging
import runpy
from pathlib import Path
from typing import Any

import deepspeed.comm as comm
import deepspeed.runtime.config as runtime
import torch
from deepspeed.module_inject.auto_ep import AutoEP
from deepspeed.module_inject.auto_ep_config import validate_autoep_config, validate_autoep_post_detection
from deepspeed.runtime.engine import DeepSpeedEngine
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights

from tests.exporters.judges import serve

logging.disable(logging.CRITICAL)
SMALL = {
    "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "q_lora_rank": 16, "kv_lora_rank": 16,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "vocab_size": 128,
}  # fmt: skip


class Asked(dict[str, Any]):
    """A dictionary that notes what it is asked for: the rest of it would be passed over in silence."""

    def __init__(self, data: dict[str, Any]):
        super().__init__({k: Asked(v) if isinstance(v, dict) else v for k, v in data.items()})
        self.asked: set[str] = set()

    def get(self, key: Any, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key: Any) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: Any) -> bool:
        self.asked.add(key)
        return super().__contains__(key)

    def __copy__(self) -> Asked:
        return self

    def __deepcopy__(self, memo: Any) -> Asked:
        return self


def _model(config: dict[str, Any]) -> Any:
    values = dict(config)
    with torch.device("meta"), no_init_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values))
        model.tie_weights()
    return model


@functools.cache
def _small_model(config: str) -> Any:
    return _model(_small(json.loads(config)))


def _small(config: dict[str, Any]) -> dict[str, Any]:
    """The same class and experts with few and narrow layers."""
    out = {key: SMALL[key] if key in SMALL and value else value for key, value in config.items()}
    if "kv_lora_rank" in out:
        out["num_key_value_heads"] = out["num_attention_heads"]
    for key in ("layer_types", "mlp_only_layers", "rope_scaling", "rope_parameters"):
        out.pop(key, None)
    return {**out, "num_hidden_layers": 4, **({"first_k_dense_replace": 1} if "first_k_dense_replace" in out else {})}


def _losses(directory: Path, world: int, seq_len: int, steps: int) -> list[float]:
    """What `train.py` of an export should print: bf16 weights, of which Adam keeps fp32 ones, and gradients summed in fp32."""
    settings = json.loads((directory / "ds_config.json").read_text())
    torch.manual_seed(1234)
    model = runpy.run_path(str(directory / "train.py"))["build"](directory / "config.json", False)
    tokens = [torch.Generator().manual_seed(1234 + rank) for rank in range(world)]
    weights = list(model.parameters())
    masters = [torch.nn.Parameter(w.detach().float()) for w in weights]
    options = settings["optimizer"]["params"]
    adam = torch.optim.AdamW(masters, **{name: options[name] for name in ("lr", "betas", "eps", "weight_decay")})
    shape, count = (settings["train_micro_batch_size_per_gpu"], seq_len), settings["gradient_accumulation_steps"]
    out = []
    for _ in range(steps):
        adam.zero_grad()
        total = 0.0
        for generator in [g for _ in range(count) for g in tokens]:
            batch = torch.randint(model.config.vocab_size, shape, generator=generator)
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            total += loss.item() / (count * world)
            for master, weight in zip(masters, weights, strict=True):
                part = weight.grad.float() / (count * world) if weight.grad is not None else torch.zeros_like(master)
                master.grad = part if master.grad is None else master.grad + part
                weight.grad = None
        torch.nn.utils.clip_grad_norm_(masters, settings["gradient_clipping"])
        adam.step()
        with torch.no_grad():
            for master, weight in zip(masters, weights, strict=True):
                weight.copy_(master)
        out.append(total)
    return out


def _judge(case: dict[str, Any]) -> dict[str, Any]:
    if case["kind"] == "train":
        return {"losses": _losses(Path(case["directory"]), case["world"], case["seq_len"], case["steps"])}
    if case["kind"] == "count":
        return {"parameters": sum(p.numel() for p in _model(case["config"]).parameters())}
    directory, world = Path(case["directory"]), case["world"]
    text = (directory / "ds_config.json").read_text()
    data = Asked(json.loads(text, object_pairs_hook=runtime.dict_raise_error_on_duplicate_keys))
    tp = data.get("tensor_parallel", {}).get("autotp_size", 1)
    comm.get_rank, comm.get_world_size = lambda *_, **__: 0, lambda *_, **__: world // tp
    found = runtime.DeepSpeedConfig(data)
    experts, zero = found.expert_parallel_config, found.zero_config
    engine = object.__new__(DeepSpeedEngine)
    engine._config, engine.pipeline_parallelism = found, False
    engine._do_optimizer_sanity_check(torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))]))
    silent = sorted(set(data) - data.asked)
    layers = 0
    if "expert_parallel" in data:
        silent += sorted(set(data["expert_parallel"]) - data["expert_parallel"].asked)
        validate_autoep_config(
            experts, world, 1, tp, 1, zero_stage=int(zero.stage), zero_offload_optimizer=zero.offload_optimizer is not None
        )
        specs = AutoEP(_small_model((directory / "config.json").read_text()), experts).ep_parser()
        validate_autoep_post_detection(experts, specs)
        layers = len(specs)
    if silent:
        raise ValueError(f"keys that DeepSpeed passes over: {silent}")
    return {
        "tp": tp,
        "ep": experts.autoep_size if "expert_parallel" in data else 1,
        "stage": int(zero.stage),
        "batch": found.train_batch_size,
        "micro_batch": found.train_micro_batch_size_per_gpu,
        "moe_layers": layers,
    }


if __name__ == "__main__":
    serve(_judge)
