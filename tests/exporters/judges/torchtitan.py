"""torchtitan's own configuration manager, degrees, mesh of every rank, and model, for an exported recipe.

Kinds of cases: "recipe" (an export's files on a number of ranks; through the command line if it has "words"), and "count"
(parameters of a model of its registry). The compute capability is assumed, kernels are stand-ins; the device mesh stands on a
process group that carries nothing.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import sys
from typing import Any

import torch
import torch._dynamo
import torch._inductor.utils
import torch.distributed as dist
import torch.distributed.device_mesh as device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests import megatron_stand_ins as stand_ins
from tests.exporters.judges import serve
from tests.exporters.judges.absent import no_compiler, stand_in

logging.disable(logging.CRITICAL)
no_compiler()
stand_in("datasets", "torch.utils.tensorboard", "grain", "PIL", "wandb")
torch.cuda.get_device_capability = lambda *_: (9, 0)
for kind in (torch.nn.Linear, torch.nn.Embedding):  # nothing is computed
    kind.reset_parameters = lambda self: None


def _own_group(ranks: Any = None, *, make: Any = device_mesh.new_group, **options: Any) -> Any:
    """Groups that rank 0 is not in are not created, which changes nothing."""
    return make(ranks=ranks, **options) if ranks is None or 0 in ranks else None


device_mesh.new_group = _own_group


def _counted(module: str, registry: dict[str, Any]) -> int:
    from torchtitan.models.common import rope

    for kind in (rope.ComplexRoPE, rope.CosSinRoPE):  # tables of angles, made anew for every layer, are no parameters
        kind._precompute_cache = lambda self: torch.empty(0)
    model_registry = importlib.import_module(f"torchtitan.models.{module}").model_registry
    with torch.device("meta"):
        return sum(p.numel() for p in model_registry(**registry).model.build().parameters())


_meshes: set[tuple[int, ...]] = set()


def _build_mesh(dims: Any) -> None:
    """The mesh of a plan; it follows from the degrees, so that each is built once."""
    degrees = (dims.world_size, dims.dp_replicate, dims.dp_shard, dims.cp, dims.tp, dims.pp, dims.ep)
    if degrees not in _meshes:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=dims.world_size)
        dims.build_mesh()
        _meshes.add(degrees)


def _judge(case: dict[str, Any]) -> dict[str, Any]:
    if case["kind"] == "count":
        return {"parameters": _counted(case["module"], case["registry"])}
    from torchtitan.config.manager import ConfigManager
    from torchtitan.distributed.parallel_dims import ParallelDims
    from torchtitan.distributed.pipeline_parallel import _get_pipeline_metadata, _get_pp_rank_to_stage_indices_mapping

    sys.path.insert(0, case["directory"])
    sys.modules.pop("moeplan_recipe", None)
    module = importlib.import_module("moeplan_recipe")  # torchtitan would not say what is missing
    os.environ["WORLD_SIZE"] = str(case["world"])
    try:
        if "words" in case:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                config = ConfigManager().parse_args(["--module", "moeplan_recipe", "--config", "plan", *case["words"]])
        else:  # a tenth of the time
            config = module.plan()
        dims = ParallelDims.from_config(config.parallelism, case["world"])
        _build_mesh(dims)
        config.model_spec.model.update_from_config(config=config)
        parallelism, stages = config.parallelism, []
        if dims.pp > 1:
            _get_pipeline_metadata(dims, parallelism, config.model_spec.model)
            parts = parallelism.module_fqns_per_model_part
            stages = [
                [
                    sum(name.startswith("layers.") for name in parts[i])
                    for i in _get_pp_rank_to_stage_indices_mapping(
                        rank, dims.pp, parallelism.pipeline_parallel_schedule, len(parts)
                    )
                ]
                for rank in range(dims.pp)
            ]
        local, whole = config.training.local_batch_size, config.training.global_batch_size
        if whole % (local * dims.dp_replicate * dims.dp_shard):
            raise ValueError("global batch size must be multiple of local batch size times data-parallel degree")
        return {
            "degrees": [dims.tp, dims.cp, dims.pp, dims.dp_replicate * dims.dp_shard, dims.ep],
            "layers": len(config.model_spec.model.layers),
            "stages": stages,
            "accumulation": whole // (local * dims.dp_replicate * dims.dp_shard),
            "recompute": config.activation_checkpoint is not None,
        }
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        sys.path.remove(case["directory"])


if __name__ == "__main__":
    with stand_ins.packages():
        serve(_judge)
