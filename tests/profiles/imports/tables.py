"""A small tree of tables as aiconfigurator lays them out, in the form that its collector writes, with times of our own."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

GPU = "NVIDIA H200"
FLOP_PER_S = {"bfloat16": 700e12, "fp8": 1200e12, "fp8_block": 1100e12}
ATTENTION_FLOP_PER_S, ATTENTION_BYTES_PER_S = 600e12, 1.5e12


def gemm_s(dtype: str, m: float, n: float, k: float) -> float:
    cast = 0.0 if dtype == "bfloat16" else 2e-12 * m * k
    return 5e-6 + 2 * m * n * k / FLOP_PER_S[dtype] + cast


def attention_s(batch: float, seq: float, heads: float, kv_heads: float, qk: float, v: float) -> float:
    flop, moved = batch * heads * seq * seq * (qk + v), 2 * batch * seq * (heads + kv_heads) * (qk + v)
    return 2e-5 + flop / ATTENTION_FLOP_PER_S + moved / ATTENTION_BYTES_PER_S


def exchange_s(message_bytes: float, ranks: float) -> float:
    return 4e-6 * ranks + message_bytes / 300e9


def write(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def gemms(slower: float = 1.0, kernel: str = "linear", dtypes: Sequence[str] = tuple(FLOP_PER_S)) -> list[dict[str, object]]:
    sides = (32, 512, 2048, 8192)
    return [
        {"device": GPU, "kernel_source": kernel, "gemm_dtype": dtype, "m": m, "n": n, "k": k,
         "latency": 1e3 * slower * gemm_s(dtype, m, n, k)}
        for dtype, m, n, k in product(dtypes, (1, 64, 512, 2048, 8192), sides, sides)
    ]  # fmt: skip


def attention(window: int = 0, slower: float = 1.0, head: int = 128) -> list[dict[str, object]]:
    return [
        {"device": GPU, "kernel_source": "flash", "batch_size": batch, "isl": seq, "num_heads": 32, "num_key_value_heads": kv,
         "head_dim": head, "attn_dtype": "bfloat16", "kv_cache_dtype": "bfloat16", "step": 0, "window_size": window,
         "latency": 1e3 * slower * attention_s(batch, seq, 32, kv, head, head)}
        for batch, seq, kv in product((1, 4), (16, 512, 2048, 8192), (8, 32))
    ]  # fmt: skip


def latent() -> list[dict[str, object]]:
    return [
        {"device": GPU, "kernel_source": "default", "mla_dtype": "bfloat16", "kv_cache_dtype": "bfloat16", "step": 0,
         "batch_size": batch, "isl": seq, "num_heads": heads, "latency": 1e3 * attention_s(batch, seq, heads, heads, 192, 128)}
        for batch, seq, heads in product((1, 2), (1024, 4096), (16, 128))
    ]  # fmt: skip


def exchanges(dtype: str = "half", slower: float = 1.0) -> list[dict[str, object]]:
    """Sizes count elements; an 8-bit element is a byte."""
    width = {"half": 2, "int8": 1}[dtype]
    return [
        {"nccl_dtype": dtype, "num_gpus": ranks, "message_size": 2**p // width, "op_name": op,
         "latency": 1e3 * slower * exchange_s(2**p, ranks)}
        for op, ranks, p in product(("all_gather", "reduce_scatter", "all_reduce", "alltoall"), (2, 4, 8), range(10, 31, 2))
    ]  # fmt: skip


def tree(root: Path) -> Path:
    """The folder of systems, with tables of one device, old versions and rows that must not count."""
    system = root / "systems" / "data" / "h200_sxm"
    write(system / "gemm/vllm/0.24.0/gemm_perf.txt", [*gemms(), *gemms(3.0, "spare", ["bfloat16"])[:200]])
    write(system / "gemm/vllm/0.9.1/gemm_perf.txt", gemms(2.0))
    write(system / "gemm/trtllm/1.3.0rc20/gemm_perf.txt", gemms())
    write(system / "gemm/sglang/0.5.14/gemm_perf.txt", gemms(1.1))
    write(system / "attention/vllm/0.24.0/context_attention_perf.txt", [*attention(), *attention(window=128, slower=0.1)])
    write(system / "attention/sglang/0.5.14/context_attention_perf.txt", attention(slower=5.0, head=192))
    write(system / "mla/trtllm/1.3.0rc20/context_mla_perf.txt", latent())
    write(system / "comm/nccl/2.29.2/nccl_perf.txt", [*exchanges(), *exchanges("int8", 0.5)])
    write(system / "comm/nccl/2.23/nccl_perf.txt", exchanges(slower=2.0))
    write(root / "systems" / "data" / "b200_sxm" / "gemm/vllm/0.24.0/gemm_perf.txt", gemms(0.5))
    (root / "systems" / "data" / "l4").mkdir()
    return root / "systems"
