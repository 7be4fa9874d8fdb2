"""The training script of an export to DeepSpeed: the planned model on random tokens, a benchmark to start from.

It is text here, since it runs where moeplan is not. It builds the class of `transformers` from config.json, lets DeepSpeed cut
it, and prints loss and seconds of each step. Every rank builds the whole model in host memory first.
"""

SCRIPT = '''#!/usr/bin/env python3
"""Train the model of config.json on random tokens as ds_config.json says. Replace model and batches with your own."""

import argparse
import json
import os
import time
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from transformers import AutoConfig, AutoModelForCausalLM

HERE = Path(__file__).resolve().parent


def parse():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--deepspeed", action="store_true", help="for the launcher of DeepSpeed, changes nothing")
    parser.add_argument("--deepspeed_config", type=Path, default=HERE / "ds_config.json")
    parser.add_argument("--model_config", type=Path, default=HERE / "config.json")
    parser.add_argument("--seq_length", type=int, required=True)
    parser.add_argument("--train_iters", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--local_rank", type=int, default=int(os.environ.get("LOCAL_RANK", 0)))
    return parser.parse_args()


def build(path, recompute):
    values = json.loads(path.read_text())
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    config.use_cache = False
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def main():
    args = parse()
    settings = json.loads(args.deepspeed_config.read_text())
    get_accelerator().set_device(args.local_rank)
    deepspeed.init_distributed()
    torch.manual_seed(args.seed)
    model = build(args.model_config, "activation_checkpointing" in settings)
    engine, *_ = deepspeed.initialize(model=model, config=settings, model_parameters=model.parameters())
    replica = dist.get_rank() // settings.get("tensor_parallel", {}).get("autotp_size", 1)
    tokens = torch.Generator().manual_seed(args.seed + replica)
    shape = (engine.train_micro_batch_size_per_gpu(), args.seq_length)
    for step in range(args.train_iters):
        start, total = time.perf_counter(), 0.0
        for _ in range(engine.gradient_accumulation_steps()):
            batch = torch.randint(model.config.vocab_size, shape, generator=tokens).to(engine.device)
            loss = engine(input_ids=batch, labels=batch).loss
            engine.backward(loss)
            engine.step()
            total += loss.item() / engine.gradient_accumulation_steps()
        mean = torch.tensor([total], device=engine.device)
        dist.all_reduce(mean)
        if dist.get_rank() == 0:
            print(f"step {step} loss {mean.item() / dist.get_world_size():.6f} {time.perf_counter() - start:.3f} s", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
'''
"""Text of `train.py`."""
