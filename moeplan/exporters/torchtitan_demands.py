"""What torchtitan cannot run of a plan, and which of its models a plan's model is (torchtitan 0.3.0).

Its rules are dp_replicate x dp_shard x cp x tp x pp = world, and that ep divides dp_shard x cp x tp; what it shares with
Megatron (heads, experts, batches) the plan has kept already.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from moeplan.costmodels.layout import Layout
from moeplan.costmodels.model import Attention, Model
from moeplan.costmodels.model_catalog import named_model
from moeplan.errors import MoeplanError
from moeplan.exporters.demands import ALL_LAYERS, Demand, whole_layers, without_capacity, without_features
from moeplan.planner.plan import Plan
from moeplan.records import from_mapping, load_yaml

BACKENDS = {"none": "", "alltoall": "standard", "deepep": "deepep", "hybridep": "hybridep"}
"""torchtitan's name of a dispatcher."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TitanModel:
    """A model that torchtitan holds."""

    module: str
    """Package under torchtitan.models."""
    flavor: str
    """Its name there."""
    longest: int
    """Tokens of the longest sequence."""


@functools.cache
def titan_models() -> Mapping[str, TitanModel]:
    """The models of torchtitan by their names in the catalog."""
    where = "torchtitan_models.yaml"
    data = load_yaml(Path(__file__).parent / "flags" / where, "flag file")
    return {name: from_mapping(TitanModel, values, f"{where}, {name}") for name, values in data.items()}


def titan_model(model: Model) -> TitanModel | None:
    """torchtitan's model that is the same; prediction layers may be left out."""
    try:
        published = named_model(model.name)
    except MoeplanError:
        return None
    if published is None or dataclasses.replace(published, mtp=model.mtp) != model:
        return None
    return titan_models().get(model.name)


def _longest(plan: Plan) -> int:
    found = titan_model(plan.problem.model)
    return found.longest if found else plan.problem.workload.seq_len


def _kv_heads(plan: Plan) -> list[int]:
    return [b.kv_heads for b in plan.problem.model.blocks if isinstance(b, Attention)]


def replicas(layout: Layout) -> int:
    """Ranks that hold the same weights before anything is sharded, of dense parts or of experts."""
    return max(layout.dp * layout.cp, layout.edp)


def _shards_anyhow(plan: Plan) -> bool:
    """Whether torchtitan shards weights over ranks that are no replicas of its mesh."""
    x = plan.layout
    return x.cp > 1 or plan.problem.model.moe is not None and x.ep != x.tp


def _graphs(plan: Plan) -> bool:
    x = plan.layout
    return bool(x.cuda_graphs) and (x.cuda_graphs != ("full_iteration",) or x.pp > 1 or x.ep > 1)


DEMANDS: tuple[Demand, ...] = (
    Demand(
        "model",
        "the model is one that torchtitan holds",
        lambda plan: titan_model(plan.problem.model) is None,
        lambda plan: f"{plan.problem.model.name} is not one of {', '.join(titan_models())}, as published",
    ),
    Demand(
        "positions",
        "sequences within the positions of torchtitan's model",
        lambda plan: plan.problem.workload.seq_len > _longest(plan),
        lambda plan: f"{plan.problem.workload.seq_len} tokens, at most {_longest(plan)}",
    ),
    Demand(
        "expert-tensor",
        "etp = 1: there is no tensor parallelism inside experts",
        lambda plan: plan.layout.etp > 1,
        lambda plan: f"etp={plan.layout.etp}",
        "--pin etp=1",
    ),
    Demand(
        "key-heads",
        "tp divides the key heads",
        lambda plan: any(n % plan.layout.tp for n in _kv_heads(plan)),
        lambda plan: f"tp={plan.layout.tp} for {_kv_heads(plan)} key heads",
        "a smaller tp",
    ),
    Demand(
        "sharding",
        "sharding fsdp, or ddp with cp = 1 and, with experts, ep = tp; weights are never gathered for a whole step (ZeRO 1)",
        lambda plan: plan.layout.sharding == "optimizer" or plan.layout.sharding == "ddp" and _shards_anyhow(plan),
        lambda plan: f"sharding={plan.layout.sharding}, cp={plan.layout.cp}, ep={plan.layout.ep}, tp={plan.layout.tp}",
        "--pin sharding=fsdp",
    ),
    Demand(
        "gradient-overlap",
        "dp_overlap on: FSDP always gathers and reduces beside compute",
        lambda plan: not plan.layout.dp_overlap and replicas(plan.layout) > 1,
        lambda plan: "dp_overlap is off",
        "--pin dp_overlap=true",
    ),
    Demand(
        "dispatcher",
        "dispatcher alltoall, deepep, or hybridep with ep > 1",
        lambda plan: plan.layout.dispatcher not in BACKENDS or plan.layout.dispatcher == "hybridep" and plan.layout.ep == 1,
        lambda plan: f"dispatcher={plan.layout.dispatcher}, ep={plan.layout.ep}",
        "--pin dispatcher=alltoall",
    ),
    without_features("ep_overlap", "shared_overlap"),
    Demand(
        "moe-schedule",
        "no schedule of MoE layers",
        lambda plan: bool(plan.layout.moe_schedule),
        lambda plan: f"moe_schedule '{plan.layout.moe_schedule}'",
        "solve with --target megatron",
    ),
    Demand(
        "cuda-graphs",
        "CUDA graphs over the full iteration or none, and none with pp > 1 or ep > 1",
        _graphs,
        lambda plan: f"CUDA graphs over {'+'.join(plan.layout.cuda_graphs)}, pp={plan.layout.pp}, ep={plan.layout.ep}",
        "--pin cuda_graphs=none",
    ),
    whole_layers("recompute of whole layers or none: selective policies choose operations, not modules"),
    ALL_LAYERS,
    Demand(
        "precision",
        "precision bf16 with gradients and moments in fp32",
        lambda plan: plan.problem.workload.precision.name != "bf16"
        or plan.problem.workload.gradient_bytes != 4
        or plan.problem.workload.moment_bytes != 4,
        lambda plan: f"{plan.problem.workload.precision.name}, gradients of {plan.problem.workload.gradient_bytes} bytes, "
        f"moments of {plan.problem.workload.moment_bytes}",
        "--precision bf16",
    ),
    without_capacity("no capacity factor: no tokens are dropped"),
    Demand(
        "offload",
        "optimizer states on the device: weights and gradients would go with them",
        lambda plan: plan.layout.optimizer_offload > 0,
        lambda plan: f"optimizer_offload={plan.layout.optimizer_offload:g}",
        "--pin optimizer_offload=0",
    ),
    Demand(
        "prediction-layers",
        "prediction (MTP) layers with pp = 1 and cp = 1",
        lambda plan: bool(plan.problem.model.mtp) and plan.layout.pp * plan.layout.cp > 1,
        lambda plan: f"{len(plan.problem.model.mtp)} with pp={plan.layout.pp}, cp={plan.layout.cp}",
        "solve with --no-mtp",
    ),
    Demand(
        "tied-pipeline",
        "pp = 1 where head and embedding are one matrix",
        lambda plan: plan.problem.model.tied and plan.layout.pp > 1,
        lambda plan: f"pp={plan.layout.pp}",
        "--pin pp=1",
    ),
)  # fmt: skip
"""What torchtitan demands of a plan."""
