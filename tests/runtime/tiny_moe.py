"""A tiny MoE, trained for real by one rank of the layout that a plan file names; train_tiny_moe.py starts the ranks.

Tensor parallelism splits a dense layer and the tokens that go to the experts, expert parallelism exchanges these, data
parallelism sums gradients; all over gloo. Steps and memory are reported as Megatron-LM does. What it lacks or does wrong is
real: expert tensor parallelism is not there, `--memory-mib` limits what a rank may hold, and with `--hang-with tp=2` the last
rank leaves out one collective.
"""

from __future__ import annotations

import argparse
import ctypes
import resource
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml

from moeplan.costmodels.layout import Layout
from moeplan.planner.plan_data import read_layout
from moeplan.runtime.groups import rank_groups

HIDDEN, WIDTH, EXPERTS, TOPK, LAYERS = 64, 256, 4, 2, 2


class _SumForward(torch.autograd.Function):
    """Sum over a group; its gradient is the same on all ranks."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return grad, None


class _Exchange(torch.autograd.Function):
    """Rows to other ranks, `sent` to each and `received` from each; gradients go back the same way."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, sent: list[int], received: list[int], group: Any) -> torch.Tensor:
        ctx.how = (received, sent, group)
        out = x.new_empty(sum(received), x.shape[1])
        dist.all_to_all_single(out, x.contiguous(), received, sent, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        sent, received, group = ctx.how
        out = grad.new_empty(sum(received), grad.shape[1])
        dist.all_to_all_single(out, grad.contiguous(), received, sent, group=group)
        return out, None, None, None


class Job:
    """One rank of the training."""

    def __init__(self, layout: Layout, rank: int) -> None:
        self.x, self.rank = layout, rank
        if layout.etp > 1:
            raise NotImplementedError(f"expert tensor parallelism (etp={layout.etp}) on rank {rank}")
        self.groups: dict[str, Any] = {}
        self.place: dict[str, int] = {}
        for name, members in rank_groups(layout).items():
            for ranks in members:
                group = dist.new_group(ranks)
                if rank in ranks:
                    self.groups[name], self.place[name] = group, ranks.index(rank)
        torch.manual_seed(7)
        local = EXPERTS // layout.ep
        self.dense = [self._weight(HIDDEN, WIDTH // layout.tp) for _ in range(2 * LAYERS)]
        self.gates = [self._weight(HIDDEN, EXPERTS) for _ in range(LAYERS)]
        self.experts = [self._weight(local, HIDDEN, WIDTH) for _ in range(2 * LAYERS)]
        self.optimizer = torch.optim.AdamW([*self.dense, *self.gates, *self.experts], lr=1e-3)

    def _weight(self, *shape: int) -> torch.Tensor:
        return (0.05 * torch.randn(*shape)).requires_grad_()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Hidden states [tokens, hidden] to hidden states."""
        x = tokens
        for layer in range(LAYERS):
            up, down = self.dense[2 * layer], self.dense[2 * layer + 1]
            y = torch.nn.functional.gelu(x @ up) @ down.T
            x = x + (_SumForward.apply(y, self.groups["tp"]) if self.x.tp > 1 else y)
            x = x + self._experts(x, layer)
        return x

    def _experts(self, x: torch.Tensor, layer: int) -> torch.Tensor:
        rows, tp = x.shape[0], self.x.tp
        mine = x.chunk(tp)[self.place["tp"]]
        weight, chosen = (mine @ self.gates[layer]).softmax(-1).topk(TOPK)
        flat = chosen.flatten()
        order = flat.argsort(stable=True)
        counts = torch.bincount(flat, minlength=EXPERTS)
        sent_rows = mine.repeat_interleave(TOPK, 0)[order]
        per_rank = counts.view(self.x.ep, -1)
        theirs = torch.empty_like(per_rank)
        dist.all_to_all_single(theirs, per_rank, group=self.groups["ep"])
        sent, received = per_rank.sum(1).tolist(), theirs.sum(1).tolist()
        got = _Exchange.apply(sent_rows, sent, received, self.groups["ep"])
        label = torch.cat([torch.repeat_interleave(torch.arange(theirs.shape[1]), c) for c in theirs])
        up, down = self.experts[2 * layer], self.experts[2 * layer + 1]
        out = torch.zeros_like(got)
        for expert in range(theirs.shape[1]):
            place = (label == expert).nonzero().flatten()
            out = out.index_put((place,), torch.nn.functional.gelu(got[place] @ up[expert]) @ down[expert].T)
        back = _Exchange.apply(out, received, sent, self.groups["ep"])
        combined = torch.zeros_like(mine).index_add(0, order // TOPK, back * weight.flatten()[order, None])
        if tp == 1:
            return combined
        whole = torch.cat([combined if i == self.place["tp"] else torch.zeros_like(combined) for i in range(tp)])
        return _SumForward.apply(whole, self.groups["tp"])[:rows]

    def step(self, sequences: int, seq_len: int, limit: MemoryLimit | None = None, micro_batch: int = 0) -> None:
        """One optimizer step over this rank's sequences, micro-batch by micro-batch (the layout's, if none is given)."""
        each = micro_batch or self.x.micro_batch
        for _ in range(sequences // each):
            x = torch.randn(each * seq_len, HIDDEN)
            loss = self.forward(x).square().mean()
            if limit is not None:
                limit.check()
            loss.backward()
        for weights, name in (((*self.dense, *self.gates), "dp"), (self.experts, "edp")):
            for weight in weights:
                if weight.grad is not None:
                    dist.all_reduce(weight.grad, group=self.groups[name])
        self.optimizer.step()
        self.optimizer.zero_grad()


def resident_bytes() -> int:
    """Memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


class MemoryLimit:
    """What a process may hold beyond what it holds now."""

    def __init__(self, mib: int) -> None:
        self.before, self.most = resident_bytes(), mib * 2**20

    def check(self) -> None:
        """Refuse to hold more."""
        held = resident_bytes() - self.before
        if held > self.most:
            raise MemoryError(f"holds {held / 2**20:.0f} MiB more than at the start, {self.most / 2**20:.0f} are allowed")


def train(options: argparse.Namespace, rank: int) -> None:
    """The whole run of one rank."""
    plan = yaml.safe_load(options.plan.read_text())
    layout, workload = read_layout(plan["layout"], "plan"), plan["workload"]
    torch.set_num_threads(1)
    for option, value in ((-8, 1), (-3, 65536)):  # M_ARENA_MAX, M_MMAP_THRESHOLD: what is freed is given back at once
        ctypes.CDLL(None).mallopt(option, value)
    dist.init_process_group("gloo", rank=rank, world_size=layout.world)
    print(f"rank {rank} of {layout.world} has joined", flush=True)
    job = Job(layout, rank)
    print(f"rank {rank} is ready", flush=True)
    job.step(1, workload["seq_len"], micro_batch=1)  # what the libraries allocate once is nobody's micro-batch
    limit = MemoryLimit(options.memory_mib or 2**20)
    hang = options.hang_with.split("=") if options.hang_with else None
    for iteration in range(1, options.steps + 1):
        dist.barrier()
        started = time.perf_counter()
        if hang is not None and str(getattr(layout, hang[0])) == hang[1] and iteration == 2 and rank == layout.world - 1:
            dist.barrier(group=job.groups["pp"])  # its own: the others wait for a collective that never comes
            time.sleep(3600)
        job.step(workload["global_batch"] // layout.dp, workload["seq_len"], limit)
        dist.barrier()
        taken_ms = 1e3 * (time.perf_counter() - started)
        if rank == layout.world - 1:
            done = f"consumed samples: {iteration * workload['global_batch']:8d}"
            print(
                f" [2026-11-22 16:00:{iteration:02d}] iteration {iteration:8d}/{options.steps:8d} | "
                f"{done} | elapsed time per iteration (ms): {taken_ms:.1f} |",
                flush=True,
            )
        if iteration == 2:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            print(
                f"[Rank {rank}] (after 2 iterations) memory (MB) | allocated: {peak:.2f} | max allocated: {peak:.2f} | "
                f"reserved: {peak:.2f} | max reserved: {peak:.2f}",
                flush=True,
            )
    dist.destroy_process_group()
