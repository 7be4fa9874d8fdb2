"""A training job whose layout follows the number of its workers: what torchrun restarts when nodes come and go.

    torchrun --nnodes=3:4 --nproc-per-node=1 ... -m moeplan.runtime.elastic_train elastic.json -d run --steps 100

Each start takes the layout that the table plans for the nodes that are there, goes on from the last complete checkpoint and
leaves ranks beyond the layout in reserve. On SIGTERM all ranks end their step together and save, so that a change with notice
loses nothing. A small MoE on CPUs over gloo, cut by pp, dp and ep; not by tp, cp or etp.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from moeplan.errors import DeviceError, LayoutError, MoeplanError
from moeplan.profiles.ranks import Rank, this_rank
from moeplan.runtime import elastic_record, wire
from moeplan.runtime.elastic_data import Ints, micro_batches, sample_ids, sequences
from moeplan.runtime.elastic_model import ModelSize, Stage
from moeplan.runtime.elastic_record import Saved, Started, Step
from moeplan.runtime.elastic_state import State
from moeplan.runtime.elastic_table import ElasticTable, NodeCount, load_table
from moeplan.runtime.placement import Placement, join

SHARED_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
"""Variable of torchrun that gives the workers of every round a store of their own."""
_POLL_S = 0.5
_stores: Any = dist
"""Stubs hide the stores."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What stays the same under all layouts."""

    table: ElasticTable
    directory: Path
    """Shared by all nodes: checkpoints and the journal."""
    steps: int
    """Optimizer steps in all."""
    size: ModelSize = field(default_factory=ModelSize)
    samples: int = 4096
    """In an epoch."""
    seed: int = 1
    learning_rate: float = 3e-3
    warmup_steps: int = 5
    """Steps' worth of samples over which the learning rate rises."""
    timeout_s: float = 600.0
    """After which a rank that is silent is taken for dead."""

    @property
    def journal(self) -> Path:
        """The file of `elastic_record`."""
        return self.directory / "journal.jsonl"


class Notice:
    """Whether this process was told to end."""

    def __init__(self) -> None:
        self.given = False
        signal.signal(signal.SIGTERM, self._take)

    def _take(self, *_: object) -> None:
        self.given = True


AfterStep: TypeAlias = Callable[[Started, Step, Notice], None]
"""Called on rank 0 when a step is in the journal."""


class Trainer:
    """One active rank of a layout."""

    def __init__(self, job: Job, count: NodeCount, rank: int) -> None:
        x = count.layout
        if x.tp * x.cp * x.etp * x.vpp > 1:
            raise LayoutError(
                f"{count.nodes} nodes: {x.degrees()} cannot be trained here", hint="tp, cp, etp and vpp must be 1"
            )
        self.job, self.layout = job, x
        placement = Placement(ep=x.ep, replicas=x.edp)
        self.ranks = join(placement, job.timeout_s, stages=x.pp)
        self.stage_ranks, self.rank = placement.world, rank
        layers = count.layers_of(rank // self.stage_ranks, job.size.layers)
        self.model = Stage(job.size, self.ranks, layers, job.seed)
        self.state = State(self.model, self.ranks, x.pp)

    def step(self) -> Step:
        """Train on the next samples of the global batch."""
        job, consumed, batch = self.job, int(self.state.done[1]), self.job.table.global_batch
        ids = sample_ids(consumed, batch, job.samples, job.seed)
        own = micro_batches(ids, self.layout.dp, self.ranks.place("dense"), self.layout.micro_batch)
        loss = self._gradients(own)
        rise = min(1.0, (consumed + batch) / (job.warmup_steps * batch))
        self.state.step(job.learning_rate * rise, batch)
        wire.reduce(self.ranks, "dense", loss)
        if self.layout.pp > 1:
            dist.broadcast(loss, src=(self.layout.pp - 1) * self.stage_ranks)
        taken = wire.gather(self.ranks, "dense", torch.from_numpy(own.ravel().copy()))
        return Step(step=int(self.state.done[0]), loss=float(loss), samples=tuple(taken.tolist()))

    def _gradients(self, micros: Ints) -> Tensor:
        """All forwards, then all backwards in the same order; the rank's part of the loss, 0 before the last stage."""
        size, total = self.job.size, torch.zeros(1)
        entered: list[Tensor] = []
        left: list[Tensor] = []
        for ids in micros:
            tokens = torch.from_numpy(sequences(ids, size.seq_len + 1, size.vocabulary, self.job.seed))
            x = tokens[:, :-1]
            if not self.model.first:
                x = torch.empty(*x.shape, size.hidden)
                dist.recv(x, self.rank - self.stage_ranks)
                x.requires_grad_()
            y = self.model(x)
            if self.model.last:
                y = F.cross_entropy(y.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
                y = y / (self.job.table.global_batch * size.seq_len)
                total += y.detach()
            else:
                dist.send(y.detach(), self.rank + self.stage_ranks)
            entered.append(x)
            left.append(y)
        for x, y in zip(entered, left, strict=True):
            grad = None
            if not self.model.last:
                grad = torch.empty_like(y)
                dist.recv(grad, self.rank + self.stage_ranks)
            torch.autograd.backward(y, grad)
            if not self.model.first:
                assert x.grad is not None
                dist.send(x.grad, self.rank - self.stage_ranks)
        return total


def train(job: Job, after_step: AfterStep | None = None) -> bool:
    """Run one worker until all steps are done; False: it was told to end, has saved, and is to be started again."""
    me = this_rank(os.environ)
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    count = job.table.at(me.ranks // local_ranks)
    active = count.layout.world
    if active > me.ranks:
        raise DeviceError(f"the layout of {count.nodes} nodes has {active} ranks, but {me.ranks} run")
    store = _store(me, job.timeout_s)
    if me.rank >= active:
        return _reserve(store, me.rank)
    dist.init_process_group(
        "gloo",
        store=_stores.PrefixStore("group", store),
        rank=me.rank,
        world_size=active,
        timeout=timedelta(seconds=job.timeout_s),
    )
    trainer = Trainer(job, count, me.rank)
    begun = trainer.state.load_last(job.directory / "checkpoints")
    started = Started(step=begun, workers=me.ranks, active=active, layout=count.layout.degrees())
    if me.rank == 0:
        job.directory.mkdir(parents=True, exist_ok=True)
        elastic_record.append(job.journal, started)
    finished = _steps(job, count, trainer, started, after_step)
    if finished:
        _release(store, me.rank, range(active, me.ranks))
    dist.destroy_process_group()
    return finished


def _steps(
    job: Job,
    count: NodeCount,
    trainer: Trainer,
    started: Started,
    after_step: AfterStep | None,
) -> bool:
    notice = Notice()
    # All ranks listen before one of them acts upon a notice.
    dist.barrier()
    while int(trainer.state.done[0]) < job.steps:
        step = trainer.step()
        if trainer.rank == 0:
            elastic_record.append(job.journal, step)
            if after_step is not None:
                after_step(started, step, notice)
        told = torch.tensor([int(notice.given)])
        dist.all_reduce(told, op=dist.ReduceOp.MAX)
        ending = bool(told) and step.step < job.steps
        if ending or step.step == job.steps or step.step % count.save_steps == 0:
            trainer.state.save(job.directory / "checkpoints")
            if trainer.rank == 0:
                elastic_record.append(job.journal, Saved(step=step.step, notice=ending))
        if ending:
            return False
    return True


def _store(me: Rank, timeout_s: float) -> Any:
    """The store through which the workers of this round meet."""
    if me.ranks == 1:
        return _stores.HashStore()
    if me.hosted:
        # Keys of an earlier round would still be there, and workers of a node that came back may be sent to another store.
        raise DeviceError("the workers share the store of torchrun, which outlives a change", hint=f"export {SHARED_STORE}=1")
    serve = me.rank == 0
    return _stores.TCPStore(me.address, me.port, me.ranks, serve, timedelta(seconds=timeout_s), wait_for_workers=False)


def _reserve(store: Any, rank: int) -> bool:
    """Wait until the active ranks have finished; a change of the world ends the process by a signal before."""
    while not store.check(["finished"]):
        time.sleep(_POLL_S)
    store.set(f"gone/{rank}", "")
    return True


def _release(store: Any, rank: int, reserve: range) -> None:
    """Let the reserve go; the store is rank 0's and must stay until all have read it."""
    if rank == 0 and reserve:
        store.set("finished", "")
        store.wait([f"gone/{other}" for other in reserve])


def main(arguments: list[str] | None = None, after_step: AfterStep | None = None) -> int:
    """Train as a worker of torchrun: 0 done, 1 to be started again or an error."""
    parser = argparse.ArgumentParser(prog="moeplan.runtime.elastic_train", description=__doc__)
    parser.add_argument("table", type=Path, help="elastic.json")
    parser.add_argument("-d", "--directory", type=Path, required=True, help="checkpoints and journal, shared by all nodes")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--layers", type=int, default=ModelSize().layers)
    parser.add_argument("--experts", type=int, default=ModelSize().experts)
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    try:
        table = load_table(options.table)
        size = ModelSize(layers=options.layers, experts=options.experts)
        job = Job(table=table, directory=options.directory, steps=options.steps, size=size, timeout_s=options.timeout)
        finished = train(job, after_step)
        if finished and os.environ.get("RANK", "0") == "0":
            print(elastic_record.summary(elastic_record.read(job.journal)))
    except MoeplanError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0 if finished else 1


if __name__ == "__main__":
    sys.exit(main())
