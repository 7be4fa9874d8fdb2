"""Megatron's own parser, validators and models, in this process and on a CPU: the judge of what we export.

The code judged against is the wheel `megatron-core==0.19.2`, which pip downloads once into a cache; `MEGATRON_LM` names a
folder to use instead (see `megatron_session`). What GPUs and GPU packages would tell it (compute capability, version of
Transformer Engine, kernels) is assumed (see `megatron_stand_ins`); every verdict is Megatron's, but for `_step`, which restates
what only a running step checks. Each case leaves the process as it found it: hundreds run one after another, about 15 ms each.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

from tests.megatron_session import VERSION, session

__all__ = [
    "VERSION",
    "Verdict",
    "accept",
    "build_counts",
    "build_parameters",
    "estimates",
    "known_flags",
    "rank_groups",
    "split_chunks",
    "start",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What Megatron says to a list of arguments."""

    accepted: bool
    stage: str = ""
    """Where it was refused: parse, validate, config, batch, groups, layers, build or step; empty if accepted."""
    message: str = ""
    """Megatron's words, with the place in its source."""
    microbatches: int = 0
    """Micro-batches of a step and rank; 0 if refused before they were known."""
    layers: tuple[tuple[int, ...], ...] = ()
    """Decoder layers of every pipeline rank and chunk."""

    def __str__(self) -> str:
        return "accepted" if self.accepted else f"refused at {self.stage}: {self.message}"


def accept(
    arguments: Sequence[str],
    *,
    world: int,
    environment: Mapping[str, str] | None = None,
    capability: tuple[int, int] = (9, 0),
    te_version: str = "2.14.0",
    build: bool = False,
) -> Verdict:
    """Whether Megatron would start with these arguments on `world` ranks; `build` also makes the model of every stage."""
    stage, microbatches = "", 0
    layers: tuple[tuple[int, ...], ...] = ()
    with session(world, environment or {}, capability, te_version) as megatron:
        try:
            stage = "parse"
            args = _parse(megatron, arguments)
            stage = "validate"
            megatron.arguments.validate_args(args, {})
            stage = "config"
            config = _config(megatron, args)
            stage = "batch"
            microbatches = _microbatches(megatron, args)
            stage = "groups"
            _initialize(megatron, args, world)
            stage = "layers"
            layers = _layers(megatron, args, config, world)
            if build:
                stage = "build"
                for _ in _models(megatron, args, world):
                    pass
            stage = "step"
            _step(args, config, microbatches)
        except (Exception, SystemExit) as error:
            return Verdict(accepted=False, stage=stage, message=_describe(error), microbatches=microbatches, layers=layers)
    return Verdict(accepted=True, microbatches=microbatches, layers=layers)


def build_counts(
    arguments: Sequence[str],
    world: int,
    *,
    environment: Mapping[str, str] | None = None,
    capability: tuple[int, int] = (9, 0),
    te_version: str = "2.14.0",
) -> list[tuple[int, int]]:
    """(dense parameters, expert parameters) on the first rank of every pipeline stage, from the models Megatron builds."""
    return [
        (sum(n for name, n in stage if not _is_expert(name)), sum(n for name, n in stage if _is_expert(name)))
        for stage in build_parameters(arguments, world, environment=environment, capability=capability, te_version=te_version)
    ]


def build_parameters(
    arguments: Sequence[str],
    world: int,
    *,
    environment: Mapping[str, str] | None = None,
    capability: tuple[int, int] = (9, 0),
    te_version: str = "2.14.0",
) -> list[list[tuple[str, int]]]:
    """(name, elements) of every parameter on the first rank of every pipeline stage."""
    with session(world, environment or {}, capability, te_version) as megatron:
        args = _parse(megatron, arguments)
        megatron.arguments.validate_args(args, {})
        return [
            [(name, p.numel()) for chunk in chunks for name, p in chunk.named_parameters()]
            for chunks in _models(megatron, args, world)
        ]


def estimates(
    arguments: Sequence[str], world: int, *, environment: Mapping[str, str] | None = None, capability: tuple[int, int] = (9, 0)
) -> tuple[float, float]:
    """Megatron's own figures: FLOP of a step, and bytes of weights, gradients and optimizer states on the fullest rank."""
    with session(world, environment or {}, capability, "2.14.0") as megatron:
        args = _parse(megatron, arguments)
        megatron.arguments.validate_args(args, {})
        multiple = args.make_vocab_size_divisible_by * args.tensor_model_parallel_size
        args.padded_vocab_size = -(-args.vocab_size // multiple) * multiple
        flops = megatron.training.num_floating_point_operations(args, args.global_batch_size)
        return float(flops), float(megatron.theoretical_memory_usage.compute_weight_and_optimizer_memory(args))


def start(arguments: Sequence[str], world: int) -> str:
    """Why a run stops between its parser and its first step, where Megatron sets up the schedule and counts samples."""
    with session(world, {}, (9, 0), "2.14.0") as megatron:
        args = _parse(megatron, arguments)
        megatron.arguments.validate_args(args, {})
        optimizer = mock.Mock(param_groups=[])
        with mock.patch.object(megatron.training, "get_args", lambda: args):
            try:
                if not args.skip_train:
                    megatron.training.get_optimizer_param_scheduler(optimizer)
                megatron.training.get_train_valid_test_num_samples()
            except Exception as error:
                return _describe(error)
    return ""


def known_flags() -> dict[str, Any]:
    """Every flag of Megatron's parser with its argparse action."""
    with session(1, {}, (9, 0), "2.14.0") as megatron:
        return dict(megatron.arguments.argparse.ArgumentParser()._option_string_actions)


def rank_groups(arguments: Sequence[str], world: int) -> dict[str, list[list[int]]]:
    """The rank lists of tp, cp, dp, dp_cp, pp, etp, ep, edp and tp_ep, from Megatron's generator."""
    with session(world, {}, (9, 0), "2.14.0") as megatron:
        args = _parse(megatron, arguments)
        tp, pp, cp, ep = (
            args.tensor_model_parallel_size, args.pipeline_model_parallel_size, args.context_parallel_size,
            args.expert_model_parallel_size,
        )  # fmt: skip
        etp = args.expert_tensor_parallel_size or tp
        make = functools.partial(megatron.parallel_state.RankGenerator, pp=pp, order=_order(args))
        dense = make(tp=tp, ep=1, cp=cp, dp=world // (tp * cp * pp))
        expert = make(tp=etp, ep=ep, cp=1, dp=world // (etp * ep * pp))
        assert dense.get_ranks("pp") == expert.get_ranks("pp")
        return {
            "tp": dense.get_ranks("tp"), "cp": dense.get_ranks("cp"), "dp": dense.get_ranks("dp"),
            "dp_cp": dense.get_ranks("dp-cp"), "pp": dense.get_ranks("pp"), "etp": expert.get_ranks("tp"),
            "ep": expert.get_ranks("ep"), "edp": expert.get_ranks("dp"), "tp_ep": expert.get_ranks("tp-ep"),
        }  # fmt: skip


def split_chunks(texts: Sequence[str]) -> list[tuple[str, ...] | None]:
    """Chunks of pipeline splits in layout letters, as Megatron reads them; None where it refuses the text."""
    letters = {"embedding": "E", "decoder": "t", "mtp": "m", "loss": "L"}
    chunks: list[tuple[str, ...] | None] = []
    with session(1, {}, (9, 0), "2.14.0") as megatron:
        layout = megatron.pipeline_parallel_layer_layout.PipelineParallelLayerLayout
        for text in texts:
            try:
                found = layout.parse_str_to_list(text)
            except AssertionError:
                chunks.append(None)
            else:
                chunks.append(tuple("".join(letters[layer.name] for layer in chunk) for chunk in found))
    return chunks


# The stages, each Megatron's own code.


def _parse(megatron: Any, arguments: Sequence[str]) -> Any:
    with mock.patch.object(sys, "argv", ["pretrain_gpt.py", *arguments]):
        args = megatron.arguments.parse_args()
    for name, value in vars(args).items():  # the parser is shared, its list defaults must not be
        if isinstance(value, list):
            setattr(args, name, copy.copy(value))
    return args


def _config(megatron: Any, args: Any) -> Any:
    config = megatron.argument_utils.core_transformer_config_from_args(args)
    megatron.training.get_megatron_ddp_config(args)
    megatron.training.get_megatron_optimizer_config(args)
    return config


def _microbatches(megatron: Any, args: Any) -> int:
    calculator = megatron.num_microbatches_calculator
    calculator.destroy_num_microbatches_calculator()
    calculator.init_num_microbatches_calculator(
        0, None, args.global_batch_size, args.micro_batch_size, args.data_parallel_size * args.gtp_weight_remat_size,
        args.decrease_batch_size_if_needed,
    )  # fmt: skip
    return int(calculator.get_num_microbatches())


def _order(args: Any) -> str:
    return "tp-cp-ep-pp-dp" if args.use_tp_pp_dp_mapping else "tp-cp-ep-dp-pp"


def _initialize(megatron: Any, args: Any, world: int, rank: int = 0) -> None:
    """`initialize_model_parallel` as rank `rank`; groups that the rank is not in are not created, which changes nothing."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    state = megatron.parallel_state
    state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    create = state.create_group

    def create_own(ranks: Any = None, *rest: Any, **options: Any) -> Any:
        if rank not in ranks:
            return None
        options["backend"], options["pg_options"] = "fake", None
        return create(ranks, *rest, **options)

    with mock.patch.object(state, "create_group", create_own):
        state.initialize_model_parallel(
            args.tensor_model_parallel_size,
            args.pipeline_model_parallel_size,
            args.virtual_pipeline_model_parallel_size,
            gtp_remat_size=args.gtp_weight_remat_size,
            expert_gtp_remat_size=args.expert_gtp_weight_remat_size,
            context_parallel_size=args.context_parallel_size,
            hierarchical_context_parallel_sizes=args.hierarchical_context_parallel_sizes,
            hybrid_context_parallel=args.hybrid_context_parallel,
            expert_model_parallel_size=args.expert_model_parallel_size,
            num_distributed_optimizer_instances=args.num_distributed_optimizer_instances,
            expert_tensor_parallel_size=args.expert_tensor_parallel_size,
            order=_order(args),
            create_gloo_process_groups=False,
        )


def _layers(megatron: Any, args: Any, config: Any, world: int) -> tuple[tuple[int, ...], ...]:
    chunks = args.virtual_pipeline_model_parallel_size
    if args.hybrid_layer_pattern is not None:
        return tuple(
            tuple(_hybrid_layers(megatron, args, v if chunks else None) for v in range(chunks or 1))
            for _ in _pipeline_ranks(megatron, args, world)
        )
    layout = config.pipeline_model_parallel_layout
    counted = tuple(
        tuple(
            layout.get_num_layers_to_build(vp_stage=v, pp_rank=p)
            if layout is not None
            else megatron.transformer_block.get_num_layers_to_build(config, vp_stage=v if chunks else None, pp_rank=p)
            for v in range(chunks or 1)
        )
        for p in range(args.pipeline_model_parallel_size)
    )
    total = sum(map(sum, counted))
    assert total == config.num_layers, f"the stages hold {total} layers, the model has {config.num_layers}"
    return counted


def _hybrid_layers(megatron: Any, args: Any, chunk: int | None) -> int:
    allocation = megatron.hybrid_layer_allocation
    main = allocation.parse_hybrid_pattern(args.hybrid_layer_pattern).main_pattern
    group = megatron.parallel_state.get_pipeline_model_parallel_group()
    return len(allocation.select_pipeline_segment(main, group, chunk)[0])


def _pipeline_ranks(megatron: Any, args: Any, world: int) -> Iterator[None]:
    """Become the first rank of one pipeline stage after the other."""
    stages = args.pipeline_model_parallel_size
    ranks = world // stages
    if args.use_tp_pp_dp_mapping:
        ranks = args.tensor_model_parallel_size * args.context_parallel_size
    for stage in range(stages):
        _initialize(megatron, args, world, stage * ranks)
        yield


def _models(megatron: Any, args: Any, world: int) -> Iterator[list[Any]]:
    """The model chunks of the first rank of every pipeline stage, on the meta device."""
    import torch

    from tests import megatron_stand_ins as stand_ins

    utils = megatron.argument_utils
    describe = utils.hybrid_config_from_args if args.hybrid_layer_pattern is not None else utils.gpt_config_from_args
    args.init_model_with_meta_device, args.perform_initialization = True, False
    for _ in _pipeline_ranks(megatron, args, world):
        megatron.random.initialize_rng_tracker(force_reset=True)
        megatron.random.get_cuda_rng_tracker().fork = lambda *_, **__: contextlib.nullcontext()
        groups = megatron.process_groups_config.ProcessGroupCollection.use_mpu_process_groups()
        chunks = args.virtual_pipeline_model_parallel_size
        models = []
        for chunk in range(chunks or 1):
            stage = chunk if chunks else None
            ends = {
                "pre_process": megatron.parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
                "post_process": megatron.parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
            }
            description = describe(args)
            with stand_ins.Meta(), torch.device("meta"):
                models.append(description.get_builder_cls()(description).build_model(groups, vp_stage=stage, **ends))
        yield models


def _is_expert(name: str) -> bool:
    return ".experts." in name and "shared_experts" not in name


def _step(args: Any, config: Any, microbatches: int) -> None:
    """What Megatron checks only while a step runs, or when a layer is made, in its words or ours."""
    tp, pp, cp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size, args.context_parallel_size
    if args.num_experts and tp > 1 and not args.sequence_parallel:
        raise ValueError("a mixture of experts trains with tensor parallelism only if sequence parallelism is on")
    if args.virtual_pipeline_model_parallel_size:
        group = config.microbatch_group_size_per_vp_stage
        if not pp <= group <= microbatches:
            raise ValueError(f"interleaved schedule: group of {group} micro-batches not in [PP={pp}, M={microbatches}]")
        if 0 < microbatches % group < pp:
            raise RuntimeError(f"interleaved schedule: last group of {microbatches % group} micro-batches under PP={pp}")
    if args.num_experts and args.moe_token_dispatcher_type == "flex":
        expert_ranks = args.expert_tensor_parallel_size * args.expert_model_parallel_size
        if config.moe_flex_dispatcher_backend in ("deepep", "ncclep") and expert_ranks == 1:
            raise ValueError(f"the {config.moe_flex_dispatcher_backend} dispatcher requires ETP x EP > 1")
    if args.use_megatron_fsdp and args.overlap_moe_expert_parallel_comm:
        if args.virtual_pipeline_model_parallel_size:
            raise ValueError("expert-parallel overlap with FSDP does not support interleaved pipelines")
        if config.cuda_graph_impl not in ("none", "full_iteration"):
            raise ValueError("expert-parallel overlap with FSDP does not support per-layer CUDA graphs")
    if (
        args.overlap_moe_expert_parallel_comm
        and config.cuda_graph_impl == "transformer_engine"
        and not config.cuda_graph_modules
    ):
        raise ValueError("expert-parallel overlap must be off where a CUDA graph captures the whole layer")
    if args.num_distributed_optimizer_instances > 1 and not args.use_distributed_optimizer:
        raise ValueError("several optimizer instances need the distributed optimizer")
    if args.sequence_parallel and args.seq_length % (tp * cp):
        raise ValueError(f"sequence parallelism: {args.seq_length} tokens not divisible by TP x CP = {tp} x {cp}")


def _describe(error: BaseException) -> str:
    """Type, message and the deepest place in Megatron's source."""
    place, trace = "", error.__traceback__
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if f"megatron{os.sep}core" in name or f"megatron{os.sep}training" in name:
            place = f" [{name[name.rindex('megatron' + os.sep) :]}:{trace.tb_lineno}]"
        trace = trace.tb_next
    text = " ".join(str(error).split()) or "(no message)"
    return f"{type(error).__name__}: {text}{place}"
