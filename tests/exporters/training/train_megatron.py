"""Megatron's own `pretrain` with the arguments of an export, on CPUs over gloo.

Parser, validation, model, schedules, gradients, optimizer and log are Megatron's. Weights are drawn by their place in the whole
model, as Megatron's distributed checkpoints name it, and each step has the same samples, so that every layout trains the same
model on the same data. Taken out of the arguments is what no CPU runs: bf16, grouped GEMMs, fused permutation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch

LEFT_OUT = ("bf16", "moe_grouped_gemm", "moe_permute_fusion", "async_save")
"""`async_save` only because each rank would start a further process."""


def seeded(name: str) -> torch.Generator:
    """A source of numbers that depends on a name alone."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:7]))


def fill(chunks: list[Any]) -> list[Any]:
    """Give every weight the values of its part of the whole model."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    for chunk in chunks:
        for weight in chunk.parameters():
            weight.data.fill_(torch.nan)
        state = chunk.sharded_state_dict()
        apply_factories(state)
        for part in nested_values(state):
            if isinstance(part, ShardedTensor):
                whole = 0.05 * torch.randn(part.global_shape, generator=seeded(part.key))
                part.data.data.copy_(whole[part.global_slice()] + (1 if "norm" in part.key else 0))
        assert not any(weight.isnan().any() for weight in chunk.parameters())
    return chunks


def batches(args: Any, rank: int) -> Iterator[torch.Tensor]:
    """The micro-batches of a data-parallel rank, as Megatron deals them out; those of a step are those of every other."""
    size = args.micro_batch_size
    whole = torch.randint(args.vocab_size, (args.global_batch_size, args.seq_length + 1), generator=seeded("samples"))
    while True:
        for first in range(rank * size, len(whole), args.data_parallel_size * size):
            yield whole[first : first + size]


def forward_step(given: Iterator[torch.Tensor], model: Any) -> tuple[torch.Tensor, Any]:
    """Losses of the tokens of a micro-batch, and what to make of them."""
    samples = next(given)
    length = samples.shape[1] - 1
    masked = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
    positions = torch.arange(length).expand(len(samples), -1)
    return model(samples[:, :-1].contiguous(), positions, masked, labels=samples[:, 1:].contiguous()), loss


def loss(losses: torch.Tensor) -> tuple[Any, ...]:
    """Sum and number of the tokens' losses, and both for the log."""
    total, tokens = losses.sum(), torch.tensor(losses.numel(), dtype=torch.int)
    return total, tokens, {"lm loss": torch.stack([total.detach(), tokens.float()])}


def main() -> None:
    """Parse, validate, train."""
    from megatron.core import parallel_state
    from megatron.core.enums import ModelType
    from megatron.training import argument_utils, arguments, initialize, training, vocab_utils
    from megatron.training.global_vars import set_global_variables

    args = arguments.parse_args()
    for name in LEFT_OUT:
        setattr(args, name, False)
    arguments.validate_args(args, {})
    args.padded_vocab_size = vocab_utils.calculate_padded_vocab_size(
        args.vocab_size, args.make_vocab_size_divisible_by, args.tensor_model_parallel_size
    )  # which a tokenizer would do
    set_global_variables(args, build_tokenizer=False)
    initialize._compile_dependencies = lambda: None  # kernels for reading data
    initialize._warmup_jit_function = lambda **_: None
    model = argument_utils.gpt_config_from_args(args)
    model.pre_wrap_hooks = [fill]

    def data(_: Any, vp_stage: int | None = None) -> tuple[Iterator[torch.Tensor], None, None]:
        return batches(args, parallel_state.get_data_parallel_rank()), None, None

    data.is_distributed = True  # type: ignore[attr-defined]
    run = argument_utils.pretrain_cfg_container_from_args(args, model)
    training.pretrain(run, data, ModelType.encoder_or_decoder, forward_step)
