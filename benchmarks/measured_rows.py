"""Public measurements as rows: what each table holds, in the sizes that the curves of moeplan take.

Every function reads one kind of row of DATA_DIR (silicon/<device>/*.csv, kernels.csv) and gives `Rows`. Seconds, bytes, FLOP
inside; tables hold microseconds and TFLOP/s. `core` marks the region that training uses.
"""

from __future__ import annotations

import csv
import functools
import re
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from moeplan.costmodels.routing import deduplicated_copies
from moeplan.profiles.curves import attention_bytes, causal_flop

Array: TypeAlias = npt.NDArray[Any]
Table: TypeAlias = list[dict[str, str]]

FOLDERS = {"h100": "h100_sxm", "h200": "h200_sxm", "b200": "b200_sxm", "gb200": "gb200", "a100": "a100_sxm", "l40s": "l40s"}
INFERSIM_PEAK_TFLOP_PER_S = {"h800": 1979.0, "h20": 296.0}
"""What the efficiencies of alibaba/InferSim are shares of."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Measured times of one operation."""

    sizes: Mapping[str, Array]
    """The arguments of `seconds`."""
    seconds: Array
    shapes: Array
    """What a row measures, as text; equal shapes are held out together."""
    core: Array
    """Rows in the region that training uses."""
    ranges: Mapping[str, Array] = field(default_factory=dict)
    """Further sizes whose span is worth telling."""

    def take(self, mask: Array) -> Rows:
        """The rows of a mask."""
        sizes, ranges = ({k: v[mask] for k, v in part.items()} for part in (self.sizes, self.ranges))
        return Rows(sizes=sizes, ranges=ranges, seconds=self.seconds[mask], shapes=self.shapes[mask], core=self.core[mask])


@functools.cache
def read(path: Path) -> Table:
    """All rows of a CSV file."""
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def where(table: Table, **wanted: str | tuple[str, ...]) -> Table:
    """The rows whose columns have (one of) the wanted values."""
    return [r for r in table if all(r.get(k) == v or (isinstance(v, tuple) and r.get(k) in v) for k, v in wanted.items())]


def numbers(table: Table, names: str) -> list[Array]:
    """Columns as arrays of numbers."""
    return [np.array([float(row[name]) for row in table]) for name in names.split()]


def described(data: Path, kind: str, gpu: str, source: str = "") -> Table:
    """Rows of kernels.csv with the `name=value` pairs of their shape as further columns."""
    table = [row for row in where(read(data / "kernels.csv"), kind=kind, gpu=gpu) if source in row["source"]]
    return [{**row, **dict(re.findall(r"(\w+)=([\w.-]+)", row["shape"]))} for row in table]


def texts(*columns: Array) -> Array:
    """One text per row."""
    return np.array([",".join(f"{v:.6g}" for v in row) for row in zip(*columns, strict=True)])


def gemm_rows(table: Table, time: str) -> Rows:
    """GEMM calls with at least 64 rows, times in us or rates in TFLOP/s; training has m >= 1024 and n, k >= 512."""
    m, n, k, value = numbers([row for row in table if float(row["m"]) >= 64], f"m n k {time}")
    seconds = 2e-12 * m * n * k / value if time == "tflops" else value * 1e-6
    core = (m >= 1024) & (n >= 512) & (k >= 512)
    return Rows(sizes={"m": m, "n": n, "k": k}, seconds=seconds, shapes=texts(m, n, k), core=core)


def grouped_rows(groups: Array, m: Array, n: Array, k: Array, tflop_per_s: Array) -> Rows:
    """Grouped GEMMs with at least 64 rows a group."""
    sizes = {"groups": groups, "m": m, "n": n, "k": k}
    seconds = 2e-12 * groups * m * n * k / tflop_per_s
    return Rows(sizes=sizes, seconds=seconds, shapes=texts(*sizes.values()), core=m >= 256).take(m >= 64)


def simumax_grouped(data: Path, gpu: str, stage: str) -> Rows:
    """Transformer Engine's grouped GEMM; of the weight gradients those that accumulate in float32."""
    table = where(described(data, "grouped_gemm", gpu), stage=stage, main_grad_dtype=("fp32", "bf16" * (stage == "fwd")))
    return grouped_rows(*numbers(table, "ng M N K tflops"))


def infersim_grouped(data: Path, device: str) -> Rows:
    """DeepGEMM's contiguous layout. Its rows per group were drawn at random: the efficiency is sounder than the time."""
    table = where(read(data / "silicon" / device / "grouped_gemm_raw.csv"), phase="prefill")
    groups, m, hidden, width = numbers(table, "num_local_experts tokens_per_expert hidden_size intermediate_size")
    n, k = np.concatenate([2 * width, hidden]), np.concatenate([hidden, width])
    share = np.concatenate(numbers(table, "up_mfu down_mfu"))
    return grouped_rows(np.tile(groups, 2), np.tile(m, 2), n, k, share * INFERSIM_PEAK_TFLOP_PER_S[device])


def expert_rows(data: Path, device: str, dtype: str) -> Rows:
    """TensorRT-LLM's MoE operation without the rows marked as mis-tuned; `tokens` counts those of all ranks."""
    path = data / "silicon" / FOLDERS[device] / "moe_grouped_gemm.csv"
    table = where(read(path), dtype=dtype, framework="trtllm", flag="0")
    table = where(table, distribution="balanced") or where(table, ep="1")
    tokens, hidden, inter, topk, total, ep, tp, gated, time = numbers(
        table, "tokens hidden inter topk num_experts ep tp gated time_us"
    )
    rows, experts = tokens * topk / ep, total / ep
    sizes = dict(rows=rows, tokens=tokens, experts=experts, hidden=hidden, width=inter / tp, projections=2 + gated)
    return Rows(sizes=sizes, seconds=time * 1e-6, shapes=texts(*sizes.values()), core=rows / experts >= 64)


def attention_rows(columns: list[Array], qk: float, v: float) -> Rows:
    """Causal attention: batch, sequence, heads, kv heads and us, or TFLOP/s (below 0) with the masked half counted in."""
    batch, seq, heads, kv_heads, value = columns
    flop = causal_flop(batch, seq, heads, qk, v)
    seconds = np.where(value > 0, value * 1e-6, -2e-12 * flop / value)
    sizes = {"flop": flop, "io_bytes": attention_bytes(batch, seq, heads, kv_heads, qk, v)}
    names = texts(batch, seq, heads, kv_heads)
    return Rows(sizes=sizes, seconds=seconds, shapes=names, core=flop >= 3e10, ranges={"seq": seq})


def silicon_attention(data: Path, device: str, size: str) -> Rows:
    """Attention of one head size; "192/128" is latent attention."""
    folder = data / "silicon" / FOLDERS[device]
    if size == "192/128":
        table = where(read(folder / "mla.csv"), phase="context", framework="trtllm")
        return attention_rows(numbers(table, "batch seq heads heads time_us"), 192.0, 128.0)
    table = where(read(folder / "attention_context.csv"), framework="vllm", head_dim=size)
    return attention_rows(numbers(table, "batch seq heads kv_heads time_us"), float(size), float(size))


def simumax_attention(data: Path, gpu: str, size: str) -> Rows:
    """Transformer Engine's attention, stored as rates."""
    qk, v = size.split("/") if "/" in size else (size, size)
    table = where(described(data, "attention-fwd", gpu, "SimuMax"), qk_head_dim=qk)
    *columns, rate = numbers(table, "batch seq_len head_num kv_head_num tflops")
    return attention_rows([*columns, -rate], float(qk), float(v))


def dispatch_rows(tokens: Array, payload: Array, topk: Array, ep: Array, local: Array, seconds: Array) -> Rows:
    """De-duplicated copies over one link class: NVLink where all ranks are local, else the network."""
    copies = deduplicated_copies(topk, ep, local)  # type: ignore[arg-type]
    leaving = np.where(ep > local, copies.scale_out, copies.scale_up)
    names = texts(tokens, payload, topk, ep)
    sizes = {"link_bytes": tokens * payload * leaving, "tokens": tokens}
    return Rows(sizes=sizes, seconds=seconds, shapes=names, core=tokens >= 1024, ranges={"ranks": ep})


def deepep_rows(data: Path, device: str, phase: str, nodes: tuple[str, ...]) -> Rows:
    """DeepEP's training kernels: dispatch sends FP8 with a scale per 128 elements, combine bf16."""
    path = data / "silicon" / FOLDERS[device] / "moe_all2all.csv"
    table = where(read(path), mode="normal", phase=phase, sms="24", nodes=nodes)
    count, ep, tokens, hidden, topk, time = numbers(table, "nodes ep tokens_per_rank hidden topk transmit_us")
    return dispatch_rows(tokens, hidden * (1 + 4 / 128 if phase == "dispatch" else 2), topk, ep, ep / count, time * 1e-6)


def hybridep_rows(data: Path, gpu: str, phase: str, sms: str, local: int) -> Rows:
    """HybridEP kernels on 4096 tokens of 7168, top-8, in one NVLink domain (`local` 0) or over nodes of `local` ranks.

    Stored as rates over the copies to all holders, the own included; for one domain also times of arXiv:2603.07685 table 7
    (those across nodes must come from a routing that reaches fewer nodes than a free top-8, else they beat the network).
    """
    every = described(data, f"moe-{phase}", gpu)
    table = [row for row in where(every, sms=sms) if re.search("HybridEP.*ernel", row["shape"])]
    table += [] if local else where(every, lib="hybridep")
    (ep,) = numbers(table, "EP")
    payload = np.array([7168 * (1 + 4 / 128 if row["precision"] == "fp8" else 2) for row in table])
    holders = ep / local if local else ep
    sent = 4096 * payload * holders * (1 - (1 - 1 / holders) ** 8)
    rate, time_us = (np.array([float(row[name] or "nan") for row in table]) for name in ("GBps", "time_us"))
    seconds = np.where(np.isnan(time_us), sent / (rate * 1e9), time_us * 1e-6)
    tokens, topk = np.full_like(ep, 4096.0), np.full_like(ep, 8.0)
    return dispatch_rows(tokens, payload, topk, ep, np.full_like(ep, local) if local else ep, seconds)


# ---------------------------------------------------------------- single numbers


def backward_ratios(data: Path) -> dict[tuple[str, bool], float]:
    """Backward over forward time of attention by device and whether it is latent attention (192/128).

    Median over the long runs measured on each generation; without one, that of latent attention. Rates of both directions are
    given with 2.5 times the forward's FLOP for the backward. H800: times in a training trace.
    """
    table = read(data / "kernels.csv")
    ratios: dict[tuple[str, bool], list[float]] = {}
    for forward in table:
        if forward["kind"] in ("attention-fwd", "mha-prefill-fwd"):
            twin = where(table, kind=forward["kind"].replace("fwd", "bwd"), gpu=forward["gpu"], shape=forward["shape"])
            shape = dict(pair.split("=") for pair in forward["shape"].split("; ")) if "; " in forward["shape"] else {}
            if int(shape.get("head_num", 128)) * int(shape.get("seq_len", 4096)) ** 2 >= 64 * 4096**2:
                place = (forward["gpu"].split("/")[0].split("-")[0].lower(), shape.get("qk_head_dim") != "128")
                ratios.setdefault(place, []).append(2.5 * float(forward["tflops"]) / float(twin[0]["tflops"]))
    trace = read(data / "silicon" / "h800_dsv3_train" / "kernels.csv")
    spent = [sum(numbers(where(trace, op=op), "dur_us")[0]) for op in ("attn_fwd", "attn_bwd")]
    ratios["h100", True].append(spent[1] / spent[0])
    median = {place: round(float(statistics.median(values)), 2) for place, values in ratios.items()}
    same = {"h200": "h100", "gb200": "b200", "b200-simumax": "b200", "a100-pcie": "a100", "l40s": "a100"}
    return {
        (device, latent): median.get((same.get(device, device), latent), median[same.get(device, device), True])
        for device in (*same, *same.values()) for latent in (False, True)
    }  # fmt: skip


def streaming_rates(data: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Memory streaming (median of copy, mul, add, triad, dot), else what large decode attention reads; host copies."""
    table = read(data / "kernels.csv")
    for device, folder in FOLDERS.items():
        kinds = tuple(f"hbm-{kind}" for kind in ("copy", "mul", "add", "triad", "dot"))
        if streams := where(table, gpu=device.upper(), kind=kinds):
            yield device, "memory", {"gb_per_s": float(np.median(numbers(streams, "GBps")[0])), "source": "azure, stream"}
        else:
            decode = read(data / "silicon" / folder / "attention_generation.csv")
            batch, length, heads, size, time_us = numbers(decode, "batch kv_len kv_heads head_dim time_us")
            read_bytes = 4 * batch * length * heads * size
            rate = float(f"{np.median((read_bytes / time_us)[read_bytes >= 1e9]) / 1e3:.4g}")
            source = "silicon attention_generation.csv, median where 1 GB or more is read"
            yield device, "memory", {"gb_per_s": rate, "source": source, "inferred": True}
        for name, way in (("host_to_device", "Host to Device"), ("device_to_host", "Device to Host")):
            for row in where(table, kind="nvbandwidth", gpu=device.upper(), shape=way):
                yield device, name, {"gb_per_s": float(row["GBps"]), "source": "azure, nvbandwidth"}
    for row in where(table, kind="mla-decode-dense", gpu="H800", shape="memory-bound config"):
        yield "h800", "memory", {"gb_per_s": float(row["GBps"]), "source": "flashmla, dense decode", "inferred": True}


def gemm_peaks(data: Path) -> dict[str, dict[str, float]]:
    """The best matmul rate that a search over shapes found, by device and precision."""
    peaks: dict[str, dict[str, float]] = {}
    wanted = ("H100", "H200", "B200", "GB200", "B300", "A100", "A100 PCIe", "MI300X", "MI325X", "MI355X")
    for row in where(read(data / "kernels.csv"), kind="gemm", gpu=wanted):
        if "best shape" in row["shape"]:
            peaks.setdefault(row["gpu"].lower().replace(" ", "-"), {})[row["precision"]] = float(row["tflops"])
    for row in where(read(data / "kernels.csv"), kind="grouped_gemm", gpu="GB200"):
        peaks["gb200"]["fp8-mx-grouped"] = float(row["tflops"])
    return peaks


def bus_rates(data: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Large collectives across nodes, and within one where no curve exists; network interfaces give 50 GB/s a GPU."""
    published = read(data / "collectives.csv")
    groups = (
        ("H100", "64", 8, 50, "coreweave, GPU type not printed"), ("B200", "32", 4, 50, "mleng, P6-B200 EFA"),
        ("GB200", "72", 1, 0, "coreweave"), ("GB200", "144", 2, 0, "coreweave"), ("GB200", "1440", 20, 0, "coreweave"),
        ("MI300X", "2", 1, 0, "mleng"), ("MI300X", "8", 1, 0, "mleng"), ("MI355X", "8", 1, 0, "oci"),
    )  # fmt: skip
    for gpu, ranks, domains, nic, source in groups:
        for op in ("all_reduce", "alltoall"):
            table = where(published, gpu=gpu, num_gpus=ranks, op=op)
            for row in [r for r in table if int(r["bytes"]) in (2**29, max(int(r["bytes"]) for r in table))]:
                rate = float(row["busbw_GBps"])
                point = {"op": op.replace("alltoall", "all_to_all"), "ranks": int(ranks), "domains": domains,
                         "message_bytes": int(row["bytes"]), "bus_gb_per_s": rate}  # fmt: skip
                share = {"scale_out_efficiency": round(rate * domains / nic / int(ranks), 3)} if nic else {}
                yield gpu.lower(), {**point, **share, "source": source}
    for row in where(read(data / "kernels.csv"), kind=("moe-dispatch", "moe-combine"), gpu=("H100", "GB200")):
        ranks = row["shape"].partition(" ")[0][3:]
        if "nccl" in row["shape"]:
            domains = max(int(ranks) // 8, 1) if row["gpu"] == "H100" else 1
            message, seconds = 4096 * 8 * 7168 * 2, float(row["time_us"]) * 1e-6
            rate = float(f"{message / seconds * (1 - 1 / int(ranks)) / 1e9:.4g}")
            point = {"op": "all_to_all", "ranks": int(ranks), "domains": domains, "message_bytes": message,
                     "bus_gb_per_s": rate}  # fmt: skip
            if domains > 1:
                point["scale_out_efficiency"] = round(message / seconds * (1 - 1 / domains) / 50e9, 3)
            yield row["gpu"].lower(), {**point, "source": f"2603.07685 table 7, {row['kind'][4:]}"}
