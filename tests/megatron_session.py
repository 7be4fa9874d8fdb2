"""Megatron inside this process: where its wheel comes from, how it is imported once, and the border around every case."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import logging
import os
import subprocess
import sys
import tempfile
import types
import typing
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

VERSION = "0.19.2"
# Variables of the machine that Megatron reads; a case sees only those that it names.
_MACHINE = ("CUDA_", "NCCL_", "NVTE_", "PYTORCH_", "SLURM_", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_", "TORCHELASTIC_")
_MODULES = (
    "training.arguments", "training.argument_utils", "training.training", "core.num_microbatches_calculator",
    "core.parallel_state", "core.process_groups_config", "core.transformer.transformer_block", "core.utils",
    "core.tensor_parallel.random", "core.models.hybrid.hybrid_layer_allocation", "training.theoretical_memory_usage",
    "core.transformer.pipeline_parallel_layer_layout",
)  # fmt: skip


class Unavailable(Exception):
    """The wheel can be had neither from the cache nor from the network."""


def folder() -> Path:
    """The folder that holds `megatron/`: `MEGATRON_LM`, or the unzipped wheel in `MOEPLAN_CACHE` (default: `.cache`)."""
    if chosen := os.environ.get("MEGATRON_LM"):
        if not (Path(chosen) / "megatron" / "training" / "arguments.py").is_file():
            raise Unavailable(f"MEGATRON_LM={chosen} holds no megatron/training/arguments.py")
        return Path(chosen)
    cache = Path(os.environ.get("MOEPLAN_CACHE") or Path(__file__).resolve().parent.parent / ".cache")
    target = cache / f"megatron-core-{VERSION}"
    if not (target / "megatron").is_dir():
        _download(cache, target)
    return target


def _download(cache: Path, target: Path) -> None:
    """Fetch and unzip beside the target, then rename: of several processes at once the first to finish wins."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=cache) as work:
            unzipped = Path(work) / "unzipped"
            with zipfile.ZipFile(_fetch_wheel(Path(work))) as wheel:
                wheel.extractall(unzipped)
            with contextlib.suppress(OSError):  # another process was faster
                unzipped.rename(target)
    except OSError as error:
        raise Unavailable(f"cannot write to the cache {cache}: {error.strerror}") from None
    if not (target / "megatron").is_dir():
        raise Unavailable(f"cannot write {target}")


def _fetch_wheel(work: Path) -> Path:
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--retries", "1",
        "--only-binary=:all:", "--python-version", "3.12", "--dest", str(work), f"megatron-core=={VERSION}",
    ]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    except subprocess.TimeoutExpired:
        raise Unavailable("pip download did not finish within 300 s") from None
    wheels = list(work.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["no wheel came"]
        raise Unavailable(f"pip download megatron-core=={VERSION}: {lines[-1]}")
    return wheels[0]


@functools.cache
def load() -> Any:
    """Megatron's modules under their last name, imported once; a text saying why not, if that failed."""
    try:
        path = folder() / "megatron"
        for name in ("torch._dynamo", "torch._inductor.utils"):  # they look for triton, and must do so before a stand-in exists
            importlib.import_module(name)
    except (Unavailable, ImportError) as error:
        return str(error)
    from tests import megatron_stand_ins as stand_ins

    package = types.ModuleType("megatron")  # a namespace package, which any other `megatron` on the path would hide
    package.__path__ = [str(path)]
    sys.modules["megatron"] = package
    with stand_ins.packages(), quiet():
        found = {name.rsplit(".", 1)[-1]: importlib.import_module(f"megatron.{name}") for name in _MODULES}
        _share_parser(found["arguments"])
    return types.SimpleNamespace(**found)


def _share_parser(arguments: Any) -> None:
    """Let `parse_args` take the same parser every time (it has 800 flags), and raise where argparse would exit."""
    parser = arguments.argparse.ArgumentParser(description="Megatron-LM Arguments", allow_abbrev=False)
    arguments.add_megatron_arguments(parser)

    def refuse(message: str) -> typing.NoReturn:
        raise ValueError(message)

    parser.error = refuse
    arguments.argparse = types.SimpleNamespace(**vars(arguments.argparse))
    arguments.argparse.ArgumentParser = lambda *_, **__: parser
    arguments.add_megatron_arguments = lambda given: given


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Within: no warnings, no logging, no output; and `typing.override`, which Python 3.11 lacks."""
    disabled = logging.root.manager.disable
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        if not hasattr(typing, "override"):
            stack.enter_context(mock.patch.object(typing, "override", lambda function: function, create=True))
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(disabled)


@contextlib.contextmanager
def session(world: int, environment: Mapping[str, str], capability: tuple[int, int], te_version: str) -> Iterator[Any]:
    """Megatron as it would find itself on rank 0 of `world` GPUs; afterwards the process is as before."""
    megatron = load()
    if isinstance(megatron, str):
        pytest.skip(f"Megatron {VERSION} is not available: {megatron}")
    import torch
    import torch.distributed as dist
    from packaging.version import Version

    from tests import megatron_stand_ins as stand_ins

    if dist.is_initialized():
        raise RuntimeError("torch.distributed is in use in this process; Megatron's groups need it for themselves")
    variables = {k: v for k, v in os.environ.items() if not k.startswith(_MACHINE)}
    variables |= {"WORLD_SIZE": str(world), "RANK": "0", **environment}
    device = types.SimpleNamespace(
        major=capability[0], minor=capability[1], total_memory=80 << 30, multi_processor_count=132, name="assumed"
    )
    cuda: dict[str, Any] = {
        "get_device_capability": lambda *_: capability,
        "get_device_properties": lambda *_: device,
        "current_device": lambda: torch.device("meta"),
        "current_stream": stand_ins.Nil,
        "Stream": stand_ins.Nil,
        "Event": stand_ins.Nil,
    }
    hook = sys.excepthook  # torch.distributed would put the rank before every line of a trace
    reduced = torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    with contextlib.ExitStack() as stack:
        stack.enter_context(quiet())
        stack.enter_context(stand_ins.packages())
        stack.enter_context(mock.patch.dict(os.environ, variables, clear=True))
        stack.enter_context(mock.patch.object(megatron.utils, "_te_version", Version(te_version)))
        for name, value in cuda.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        try:
            yield megatron
        finally:
            megatron.parallel_state.destroy_model_parallel()
            megatron.num_microbatches_calculator.destroy_num_microbatches_calculator()
            if dist.is_initialized():
                dist.destroy_process_group()
            sys.excepthook = hook
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = reduced
