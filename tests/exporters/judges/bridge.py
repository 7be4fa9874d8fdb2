"""Megatron-Bridge's own recipes, overrides and validation, then Megatron-Core's process groups and layers of every stage.

A case has a recipe, the configuration that the recipe would ask a model hub for, overrides and a number of ranks. Packages that
need a GPU, and those of data sets, are stand-ins; compute capability and version of Transformer Engine are assumed.
"""

from __future__ import annotations

import functools
import importlib
import pickle
import sys
import types
from collections.abc import Callable
from typing import Any

import transformers  # noqa: F401  before stand-ins, which it would take for the packages
import transformers.models.auto.modeling_auto as auto
from transformers import AutoConfig

from tests import megatron, megatron_session
from tests import megatron_stand_ins as stand_ins
from tests.exporters.judges import folder, serve
from tests.exporters.judges.absent import no_compiler, stand_in

PLAIN = (
    "datasets", "nvidia_resiliency_ext", "modelopt", "mlflow", "wandb", "comet_ml", "diffusers", "qwen_vl_utils", "timm",
    "open_clip", "flash_attn", "peft", "accelerate", "mistral_common", "PIL", "soundfile", "librosa", "torchvision", "requests",
    "pandas", "pyarrow", "nvdlfw_inspect", "torch.utils.tensorboard", "megatron.energon", "megatron.bridge.diffusion",
    "megatron.bridge.recipes.flux", "megatron.bridge.recipes.wan",
)  # fmt: skip
DEGREES = (
    "tensor_model_parallel_size", "context_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)  # fmt: skip
PARSER = "hydra.core.override_parser"
SHAPE = {  # field of Bridge's model by ours
    "layers": "num_layers", "hidden": "hidden_size", "heads": "num_attention_heads", "experts": "num_moe_experts",
    "topk": "moe_router_topk", "expert_width": "moe_ffn_hidden_size", "vocab": "vocab_size",
}  # fmt: skip


def _published(config: dict[str, Any]) -> Any:
    """Bridge's model of a configuration, which in a recipe would come from a hub."""
    bridge = importlib.import_module("megatron.bridge").AutoBridge
    values = dict(config)
    found = AutoConfig.for_model(values.pop("model_type"), **values)
    found.architectures = found.architectures or [auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[found.model_type]]
    return bridge.from_hf_config(found)


def _remembered(make: Callable[..., Any]) -> Callable[..., Any]:
    """A function that gives, for what alone it was given before, a copy of what it gave then."""
    known: dict[str, bytes] = {}

    def made(values: Any, **options: Any) -> Any:
        if options:
            return make(values, **options)
        key = repr(values)
        if key not in known:
            known[key] = pickle.dumps(make(values))
        return pickle.loads(known[key])

    return made


@functools.cache
def _hasten() -> None:
    """Recipes become trees of nodes, and overrides are parsed, once each: this is nine tenths of a case."""
    conf, parser = importlib.import_module("omegaconf").OmegaConf, importlib.import_module(f"{PARSER}.overrides_parser")
    conf.create = staticmethod(_remembered(conf.create))
    parse = functools.cache(parser.OverridesParser.create().parse_rule)
    parser.OverridesParser.parse_rule = lambda self, text, rule: parse(text, rule)


def _arguments(config: Any) -> types.SimpleNamespace:
    """Megatron-LM's arguments that its process groups ask for."""
    return types.SimpleNamespace(
        **{name: getattr(config.model, name) for name in (*DEGREES, "virtual_pipeline_model_parallel_size")},
        hierarchical_context_parallel_sizes=None,
        hybrid_context_parallel=False,
        gtp_weight_remat_size=1,
        expert_gtp_weight_remat_size=1,
        hybrid_layer_pattern=None,
        num_distributed_optimizer_instances=config.ddp.num_distributed_optimizer_instances,
        use_tp_pp_dp_mapping=config.dist.use_tp_pp_dp_mapping,
    )


def _judge(case: dict[str, Any]) -> dict[str, Any]:
    _hasten()
    capability = (case.get("capability", 9), 0)
    with megatron_session.session(case["world"], case.get("environment", {}), capability, "2.14.0") as core:
        found = sys.modules["megatron"].__path__
        path = str(folder("megatron-bridge") / "megatron")
        found.extend([path] if path not in found else [])
        bridge = importlib.import_module("megatron.bridge")
        asked: list[str] = []

        def local(name: str, *_: Any, **__: Any) -> Any:
            asked.append(name)
            return _published(case["config"])

        bridge.AutoBridge.from_hf_pretrained = staticmethod(local)
        recipe = getattr(importlib.import_module("megatron.bridge.recipes"), case["recipe"])()
        utils = importlib.import_module("megatron.bridge.training.utils.omegaconf_utils")
        config = utils.process_config_with_overrides(recipe, cli_overrides=case["overrides"]) or recipe
        importlib.import_module("megatron.bridge.training.config").runtime_config_update(config)
        model = config.model
        args = _arguments(config)
        megatron._initialize(core, args, case["world"])
        layers = megatron._layers(core, args, model, case["world"])
        experts = model.num_moe_experts
        if experts and experts % model.expert_model_parallel_size:
            raise ValueError(f"{experts} experts over {model.expert_model_parallel_size} ranks (Megatron-Core's layer)")
        return {
            "degrees": [getattr(args, name) for name in DEGREES],
            "dp": config.data_parallel_size,
            "layers": layers,
            "batches": [config.train.global_batch_size, config.train.micro_batch_size],
            "overlap": [model.overlap_moe_expert_parallel_comm, model.tp_comm_overlap, config.ddp.overlap_grad_reduce],
            "shape": {ours: getattr(model, theirs) for ours, theirs in SHAPE.items()},
            "mtp": model.mtp_num_layers,
            "first_and_last_in_bf16": model.first_last_layers_bf16,
            "gradients_in_fp32": config.ddp.grad_reduce_in_fp32,
            "hub": asked[0],
        }


if __name__ == "__main__":
    no_compiler()
    stand_in(*PLAIN)
    with stand_ins.packages():
        serve(_judge)
