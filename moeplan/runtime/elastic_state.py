"""Optimizer states in pieces over data parallelism, and checkpoints that any layout can read.

Every copy of a parameter keeps Adam's moments of one piece of it, ceil(n / copies) of its n elements, updates that piece and
gathers the others' (ZeRO-1). In a checkpoint experts are DTensors cut by ep on their first axis, moments flat DTensors cut by
ep and then by copies; names count layers from the model's first. torch.distributed.checkpoint fits them to another layout.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from moeplan.runtime import wire
from moeplan.runtime.elastic_model import Stage, is_expert
from moeplan.runtime.placement import LayerRanks

MOMENTS = ("exp_avg", "exp_avg_sq")
BETAS, EPSILON = (0.9, 0.95), 1e-8
KEPT = 2
"""Checkpoints that stay."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """What one rank updates of a parameter."""

    name: str
    weight: torch.nn.Parameter
    axis: str
    """Ranks that hold the same parameter: "copies" of experts, else "dense"."""
    part: Tensor
    """The rank's elements of the weight, in the weight's memory."""
    at: slice
    moments: Mapping[str, Tensor]

    def adam(self, step: int, learning_rate: float) -> None:
        """Update the part with its elements of the weight's gradient."""
        assert self.weight.grad is not None
        grad, (first, second) = self.weight.grad.reshape(-1)[self.at], (self.moments[name] for name in MOMENTS)
        first.lerp_(grad, 1.0 - BETAS[0])
        second.mul_(BETAS[1]).addcmul_(grad, grad, value=1.0 - BETAS[1])
        unbiased = [moment / (1.0 - beta**step) for moment, beta in zip((first, second), BETAS, strict=True)]
        self.part.addcdiv_(unbiased[0], unbiased[1].sqrt() + EPSILON, value=-learning_rate)


class State:
    """Weights and Adam's moments of the ranks of a layout."""

    def __init__(self, stage: Stage, ranks: LayerRanks, pipeline: int) -> None:
        self.ranks = ranks
        self.pieces = [_piece(name, weight, ranks) for name, weight in stage.named_parameters()]
        self.done = torch.zeros(2, dtype=torch.int64)
        """Steps, and samples consumed."""
        place = ranks.placement
        # [stages, ep, copies] and [stages, ranks of a stage]
        grid = torch.arange(pipeline * place.world).view(pipeline, place.replicas, place.ep)
        axes = ("pp", "ep", "copies")
        self.expert_mesh = DeviceMesh("cpu", grid.transpose(1, 2).contiguous(), mesh_dim_names=axes)["ep", "copies"]
        self.dense_mesh = DeviceMesh("cpu", grid.view(pipeline, -1), mesh_dim_names=("pp", "dp"))["dp"]

    def step(self, learning_rate: float, samples: int) -> None:
        """Add up gradients, update the pieces, gather the weights."""
        self.done += torch.tensor([1, samples])
        for piece in self.pieces:
            assert piece.weight.grad is not None
            wire.reduce(self.ranks, piece.axis, piece.weight.grad)
            piece.adam(int(self.done[0]), learning_rate)
        for piece in self.pieces:
            if self.ranks.size(piece.axis) > 1:
                parts = wire.gather_uneven(self.ranks, piece.axis, piece.part)
                piece.weight.data.copy_(torch.cat(parts).view_as(piece.weight))
            piece.weight.grad = None

    def tensors(self) -> dict[str, Any]:
        """All that a checkpoint holds, in this rank's memory."""
        found: dict[str, Any] = {"done": self.done}
        for piece in self.pieces:
            expert, data = is_expert(piece.name), piece.weight.data
            mesh, moment_cuts = (self.expert_mesh, [Shard(0), Shard(0)]) if expert else (self.dense_mesh, [Shard(0)])
            whole = data.shape[0] * (self.ranks.placement.ep if expert else 1)
            weight_cuts = [Shard(0), Replicate()] if expert else [Replicate()]
            found[f"model.{piece.name}"] = _distributed(data, mesh, weight_cuts, (whole, *data.shape[1:]))
            elements = data[0].numel() * whole
            for name, moment in piece.moments.items():
                found[f"optimizer.{name}.{piece.name}"] = _distributed(moment, mesh, moment_cuts, (elements,))
        return found

    def save(self, directory: Path) -> Path:
        """Write a checkpoint, whole or not at all; older ones than the last few are removed."""
        path = directory / f"step-{int(self.done[0]):08d}"
        unfinished = path.with_suffix(".part")
        if dist.get_rank() == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
            directory.mkdir(parents=True, exist_ok=True)
        dist.barrier()
        save(self.tensors(), checkpoint_id=unfinished)
        if dist.get_rank() == 0:
            unfinished.rename(path)
            for old in checkpoints(directory)[:-KEPT]:
                shutil.rmtree(old)
        dist.barrier()
        return path

    def load(self, path: Path) -> None:
        """Take over a checkpoint, whatever layout wrote it."""
        load(self.tensors(), checkpoint_id=path)

    def load_last(self, directory: Path) -> int:
        """Take over the last complete checkpoint, if there is one; the steps done."""
        # What rank 0 sees counts: a file system may show a new checkpoint to some ranks only.
        names = [[path.name for path in checkpoints(directory)][-1:]]
        dist.broadcast_object_list(names, src=0)
        for name in names[0]:
            self.load(directory / name)
        return int(self.done[0])


def checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints, the oldest first."""
    return sorted(path for path in directory.glob("step-*") if path.suffix != ".part")


def _piece(name: str, weight: torch.nn.Parameter, ranks: LayerRanks) -> Piece:
    axis = "copies" if is_expert(name) else "dense"
    flat, copies, place = weight.data.view(-1), ranks.size(axis), ranks.place(axis)
    each = -(-len(flat) // copies)
    at = slice(min(place * each, len(flat)), min((place + 1) * each, len(flat)))
    moments = {moment: torch.zeros_like(flat[at]) for moment in MOMENTS}
    return Piece(name=name, weight=weight, axis=axis, part=flat[at], at=at, moments=moments)


def _distributed(local: Tensor, mesh: DeviceMesh, cuts: list[Any], shape: tuple[int, ...]) -> DTensor:
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, mesh, cuts, run_check=False, shape=torch.Size(shape), stride=stride)
