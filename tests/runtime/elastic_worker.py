"""Gloo ranks that train the elastic model under one layout after the other; started by the tests.

python -m tests.runtime.elastic_worker RUNS DIRECTORY: loads torch once and forks the ranks of every world size. RUNS is a JSON
list of runs in the order of their worlds: name, layout, steps, the run from whose checkpoint it goes on ("" for none). Every
run leaves a checkpoint; results.json has the losses and samples of each and the digests of what one process reads of it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # what ranks would each load later
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from moeplan.costmodels.layout import Layout
from moeplan.runtime.elastic_state import checkpoints
from moeplan.runtime.elastic_table import ElasticTable, NodeCount
from moeplan.runtime.elastic_train import Job, Trainer

GLOBAL_BATCH = 12


def trainer_of(sizes: dict[str, Any], directory: Path) -> Trainer:
    stages = tuple(sizes.pop("stages", ()))
    layout = Layout(**sizes)
    count = NodeCount(nodes=layout.world, layout=layout, stages=stages, save_steps=1)
    table = ElasticTable(global_batch=GLOBAL_BATCH, counts=(count,))
    return Trainer(Job(table=table, directory=directory, steps=0), count, dist.get_rank())


def run(case: dict[str, Any], directory: Path) -> dict[str, Any]:
    trainer = trainer_of(dict(case["layout"]), directory)
    begun = trainer.state.load_last(directory / case["after"]) if case["after"] else 0
    steps = [trainer.step() for _ in range(case["steps"])]
    trainer.state.save(directory / case["name"])
    return {"begun": begun, "losses": [step.loss for step in steps], "samples": [step.samples for step in steps]}


def digests(name: str, directory: Path) -> dict[str, Any]:
    """Of every tensor of a checkpoint, as one process of the layout without any parallelism reads it."""
    trainer = trainer_of({}, directory)
    trainer.state.load(checkpoints(directory / name)[-1])
    found = {}
    for key, tensor in trainer.state.tensors().items():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        found[key] = [hashlib.sha256(local.numpy().tobytes()).hexdigest(), list(local.shape), float(local.double().norm())]
    return found


def rank_of(rank: int, world: int, cases: list[dict[str, Any]], directory: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/store-{world}-{len(cases)}", rank=rank, world_size=world)
    results = {}
    for case in cases:
        results[case["name"]] = digests(case["digest"], directory) if "digest" in case else run(case, directory)
    if rank == 0:
        (directory / f"results-{cases[0]['name']}.json").write_text(json.dumps(results), encoding="utf-8")
    dist.destroy_process_group()


def forked(rank: int, world: int, cases: list[dict[str, Any]], directory: Path) -> int:
    if process := os.fork():
        return process
    code = 1
    try:
        rank_of(rank, world, cases, directory)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def main(runs: list[dict[str, Any]], directory: Path) -> int:
    results = {}
    for world, group in itertools.groupby(runs, key=lambda case: Layout(**drop_stages(case["layout"])).world):
        cases = list(group)
        processes = [forked(rank, world, cases, directory) for rank in range(world)]
        if any([os.waitpid(process, 0)[1] for process in processes]):
            return 1
        results |= json.loads((directory / f"results-{cases[0]['name']}.json").read_text())
    (directory / "results.json").write_text(json.dumps(results), encoding="utf-8")
    return 0


def drop_stages(sizes: dict[str, Any]) -> dict[str, Any]:
    return {name: size for name, size in sizes.items() if name != "stages"}


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1]), Path(sys.argv[2])))
