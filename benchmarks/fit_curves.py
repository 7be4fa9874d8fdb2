"""Fit the curves of moeplan/profiles/catalog/curves.yaml to tables of public measurements.

    python benchmarks/fit_curves.py DATA_DIR -o moeplan/profiles/catalog/curves.yaml [--report]

DATA_DIR holds silicon/<device>/*.csv (kernel and collective times), kernels.csv and collectives.csv. Each yield of the
`*_operations` is one fit. It minimises log error with a robust loss, so that mis-tuned kernels and small sizes do not rule. A
fifth of the shapes, chosen by a hash of the shape, stays out of the fit and gives the errors; tables below 40 rows are fitted
whole and give the errors of a 5-fold cross-validation. Choices: bf16 GEMM from cuBLAS, fp8 from TensorRT-LLM with per-tensor
scales, fp8-blockwise from DeepGEMM; MoE operation from TensorRT-LLM with balanced routing (A100: one rank, mild skew);
attention from vLLM, latent attention from TensorRT-LLM; the newest NCCL in 16-bit floats; DeepEP with 24 SMs.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import textwrap
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from scipy.optimize import least_squares

from moeplan.profiles import curves as forms
from moeplan.profiles.curve_file import to_human
from moeplan.profiles.curves import KNOT_BYTES
from moeplan.records import save_text

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import measured_rows as rows_of
from benchmarks.measured_rows import Array, Rows, described, numbers, read, where

HOLD_OUT = 5
"""One shape in this many is kept out of a fit."""
WHOLE_BELOW = 40
"""Tables with fewer rows are fitted whole and cross-validated."""
CORE_WEIGHT = 3.0
"""Weight of rows in the region that training uses."""
PRIOR = 0.02
"""Pull of each log parameter to its start: nothing beside hundreds of rows, decisive where four rows leave it open."""
CHIPS = {"h100": (989, 1979, 3.0), "h200": (989, 1979, 4.1), "h800": (989, 1979, 3.0), "h20": (148, 296, 3.6),
         "b200": (2250, 4500, 6.8), "gb200": (2500, 5000, 7.0), "a100": (312, 624, 1.7), "l40s": (362, 733, 0.7)}  # fmt: skip
"""Dense peak in 16 and 8 bits (TFLOP/s), streaming memory (TB/s): starts of a fit; a fitted rate never exceeds the peak."""
BOUNDS = {
    "launch_s": (1e-8, 1e-3), "latency_s": (1e-6, 1e-3), "group_s": (1e-11, 1e-4), "token_s": (1e-11, 1e-6),
    "quantize_s": (1e-16, 1e-10), "result_s": (1e-16, 1e-10), "sharpness": (1.0, 8.0), "bytes_per_s": (1e10, 1e13),
    "weight_bytes_per_s": (1e10, 2e13), "activation_bytes_per_s": (1e10, 1e14), "token_bytes_per_s": (1e10, 1e14),
}  # fmt: skip
PRECISIONS = {"bfloat16": "bf16", "fp8": "fp8", "fp8_block": "fp8-blockwise"}
STUDY = {
    "h100 gemm bf16": 8.9, "h200 gemm bf16": 8.9, "b200 gemm bf16": 9.8, "a100 gemm bf16": 9.0, "l40s gemm bf16": 15.2,
    "h100 quantized_gemm fp8": 9.8, "h200 quantized_gemm fp8": 7.8, "b200 quantized_gemm fp8": 8.7,
    "h100 quantized_gemm fp8-blockwise": 21.4, "b200 quantized_gemm fp8-blockwise": 16.4, "h100 experts fp8-blockwise": 5.1,
    "h200 experts fp8-blockwise": 5.9, "b200 experts fp8-blockwise": 8.0, "h100 experts bf16": 5.1, "b200 experts bf16": 7.5,
    "h100 attention 128": 5.9, "h200 attention 128": 6.5, "b200 attention 128": 7.1, "gb200 attention 128": 9.7,
    "a100 attention 128": 5.6, "l40s attention 128": 7.3,
}  # fmt: skip
"""Mean errors in % that an earlier study reached on all rows of the same tables, for the report."""


class Operation(NamedTuple):
    """One fit: the place of the result (device, group, key), the rows, and the form with the starts of its parameters."""

    place: tuple[str, str, str]
    rows: Rows
    start: Any


class Result(NamedTuple):
    """A fitted curve, and its errors and region flags on rows that the fit did not see."""

    place: tuple[str, str, str]
    curve: Any
    misses: Array
    core: Array


def start(form: type[Any], device: str, source: str, **given: float) -> Any:
    """A curve of a form with the parameters where its fit starts; a parameter of 0 stays out of the fit."""
    wide, narrow, memory = CHIPS[device.split("-")[0]]
    typical = {
        "launch_s": 5e-6, "flop_per_s": 0.7e12 * (narrow if given.get("weight_bytes") == 1.0 else wide), "sharpness": 2.0,
        "bytes_per_s": 0.9e12 * memory, "quantize_s": 2e-12, "result_s": 3e-13, "group_s": 1e-6, "latency_s": 5e-5,
        "weight_bytes_per_s": 1e12 * memory, "activation_bytes_per_s": 1e11 * memory, "token_bytes_per_s": 5e11 * memory,
    }  # fmt: skip
    fields = {f.name for f in dataclasses.fields(form)}
    values = {**{name: value for name, value in typical.items() if name in fields}, **given}
    return form(**values, error=0.0, error_p90=0.0, samples=0, valid={}, source=source)


def fit(op: Operation, rows: Rows) -> Any:
    """The curve of `op` with its parameters fitted to `rows`."""
    device, _, key = op.place
    bounds = {**BOUNDS, "flop_per_s": (1e12, 1e12 * CHIPS[device.split("-")[0]]["fp8" in key])}
    free = [name for name in bounds if getattr(op.start, name, 0.0) > 0.0]
    origin = np.log([getattr(op.start, name) for name in free])
    low, high = np.log([bounds[name] for name in free]).T
    weight = np.sqrt(np.where(rows.core, CORE_WEIGHT, 1.0))

    def misses(x: Array) -> Array:
        curve = dataclasses.replace(op.start, **dict(zip(free, np.exp(x).tolist(), strict=True)))
        return np.concatenate([weight * np.log(curve.seconds(**rows.sizes) / rows.seconds), PRIOR * (x - origin)])

    found = least_squares(misses, np.clip(origin, low, high), bounds=(low, high), loss="soft_l1", f_scale=0.1)
    return dataclasses.replace(op.start, **{n: float(f"{v:.4g}") for n, v in zip(free, np.exp(found.x), strict=True)})


def errors(curve: Any, rows: Rows) -> Array:
    """|curve / measured - 1| of each row."""
    return np.asarray(np.abs(curve.seconds(**rows.sizes) / rows.seconds - 1.0))


def quality(misses: Array) -> dict[str, Any]:
    """The two errors that a curve carries, with three decimals."""
    return {"error": round(float(np.median(misses)), 3), "error_p90": round(float(np.quantile(misses, 0.9)), 3)}


def fit_and_judge(op: Operation) -> Result:
    """Fit one operation and judge it on rows that the fit did not see."""
    rows = op.rows
    if rows.seconds.size >= WHOLE_BELOW:
        fold = np.array([zlib.crc32(shape.encode()) % HOLD_OUT for shape in rows.shapes])
        seen = rows.take(fold != 0)
        curve, parts = fit(op, seen), [rows.take(fold == 0)]
        judged = [curve]
    else:
        fold = np.unique(rows.shapes, return_inverse=True)[1] % HOLD_OUT
        folds = sorted(set(fold.tolist()))
        seen, curve, parts = rows, fit(op, rows), [rows.take(fold == f) for f in folds]
        judged = [fit(op, rows.take(fold != f)) for f in folds]
    misses = np.concatenate([errors(c, part) for c, part in zip(judged, parts, strict=True)])
    spans = {k: (float(v.min()), float(v.max())) for k, v in {**rows.sizes, **rows.ranges}.items()}
    curve = dataclasses.replace(curve, **quality(misses), samples=seen.seconds.size, valid=spans)
    return Result(op.place, curve, misses, np.concatenate([part.core for part in parts]))


# ---------------------------------------------------------------- operations


def silicon_operations(data: Path, device: str, backward: Mapping[tuple[str, bool], float]) -> Iterator[Operation]:
    """GEMM, MoE operation and attention of the large tables."""
    folder = data / "silicon" / rows_of.FOLDERS[device]
    for dtype, key in PRECISIONS.items():
        if table := where(read(folder / "gemm.csv"), dtype=dtype):
            source = "silicon gemm.csv, {framework} {version}, {kernel}".format(**table[0])
            group, form = ("gemm", forms.GemmCurve) if key == "bf16" else ("quantized_gemm", forms.QuantizedGemmCurve)
            begin = start(form, device, source, weight_bytes=2.0 if key == "bf16" else 1.0)
            yield Operation((device, group, key), rows_of.gemm_rows(table, "time_us"), begin)
        if (rows := rows_of.expert_rows(data, device, dtype)).seconds.size:
            source = "silicon moe_grouped_gemm.csv, trtllm" + ", 1 rank, power-law routing" * (device == "a100")
            begin = start(forms.ExpertCurve, device, source, launch_s=3e-5, weight_bytes=2.0 if key == "bf16" else 1.0)
            yield Operation((device, "experts", key), rows, begin)
    for size in ("64", "128", "192", "192/128"):
        if (rows := rows_of.silicon_attention(data, device, size)).seconds.size:
            source = "silicon mla.csv, trtllm" if "/" in size else "silicon attention_context.csv, vllm"
            begin = start(forms.AttentionCurve, device, source, launch_s=2e-5, backward_ratio=backward[device, "/" in size])
            yield Operation((device, "attention", size), rows, begin)


def dispatch_operations(data: Path) -> Iterator[Operation]:
    """DeepEP and HybridEP, within an NVLink domain and across nodes."""
    link: dict[str, float] = {"bytes_per_s": 4e11}
    network: dict[str, float] = {"bytes_per_s": 4e10}
    for phase in ("dispatch", "combine"):
        for device in ("h100", "h200", "b200", "gb200"):
            rows = rows_of.deepep_rows(data, device, phase, ("1",))
            begin = start(forms.DispatchCurve, device, "silicon moe_all2all.csv, DeepEP normal, 24 SMs", **link, token_s=2e-8)
            yield Operation((device, "dispatch", f"deepep-{phase}"), rows, begin)
        begin = start(forms.DispatchCurve, "h100", "silicon moe_all2all.csv, DeepEP normal, 24 SMs, 2 and 4 nodes", **network)
        rows = rows_of.deepep_rows(data, "h100", phase, ("2", "4"))
        yield Operation(("h100", "dispatch", f"deepep-{phase}-scale-out"), rows, begin)
        begin = start(forms.DispatchCurve, "gb200", "hybridep, kernel time, 32 SMs; 2603.07685 table 7", **link)
        rows = rows_of.hybridep_rows(data, "GB200", phase, "32", 0)
        yield Operation(("gb200", "dispatch", f"hybridep-{phase}"), rows, begin)
        begin = start(forms.DispatchCurve, "h100", "hybridep, kernel time, 8 SMs", **network)
        rows = rows_of.hybridep_rows(data, "H100", phase, "8", 8)
        yield Operation(("h100", "dispatch", f"hybridep-{phase}-scale-out"), rows, begin)


def training_operations(data: Path, backward: Mapping[tuple[str, bool], float]) -> Iterator[Operation]:
    """Kernels as training frameworks issue them, with the gradients apart, and DeepGEMM by itself."""
    for device, gpu in (("b200-simumax", "B200"), ("a100-pcie", "A100-PCIe")):
        for suffix, layout, stage in (("", "TN", "fwd"), ("-dgrad", "NN", "bwd_grad_act"), ("-wgrad", "NT", "bwd_grad_w")):
            table = where(described(data, "gemm", gpu, "SimuMax"), layout=layout)
            begin = start(forms.GemmCurve, device, f"simumax, {layout}", output_bytes=8.0 if suffix == "-wgrad" else 2.0)
            yield Operation((device, "gemm", "bf16" + suffix), rows_of.gemm_rows(table, "tflops"), begin)
            weight = 8.0 if suffix == "-wgrad" else 2.0
            begin = start(forms.GroupedGemmCurve, device, f"simumax, TE grouped GEMM, {stage}", weight_bytes=weight)
            yield Operation((device, "grouped_gemm", "bf16" + suffix), rows_of.simumax_grouped(data, gpu, stage), begin)
        for size in ("128", "192/128"):
            ratio = backward[device, "/" in size]
            begin = start(forms.AttentionCurve, device, "simumax", launch_s=2e-5, backward_ratio=ratio)
            yield Operation((device, "attention", size), rows_of.simumax_attention(data, gpu, size), begin)
    for device in ("h800", "h20"):
        one_byte = {"input_bytes": 1.0, "weight_bytes": 1.0}
        begin = start(forms.GemmCurve, device, "infersim gemm_raw.csv, DeepGEMM, quantisation apart", **one_byte)
        rows = rows_of.gemm_rows(read(data / "silicon" / device / "gemm_raw.csv"), "latency_us")
        yield Operation((device, "gemm", "fp8-blockwise"), rows, begin)
        source = "infersim grouped_gemm_raw.csv, DeepGEMM contiguous, quantisation apart"
        begin = start(forms.GroupedGemmCurve, device, source, **one_byte)
        yield Operation((device, "grouped_gemm", "fp8-blockwise"), rows_of.infersim_grouped(data, device), begin)


# ---------------------------------------------------------------- collectives


def knots(sizes: Array, seconds: Array, source: str) -> tuple[Any, Array]:
    """A collective curve through measured seconds by bytes, and its errors at the sizes between the knots.

    Where a larger message was faster, the smaller one takes its time: noise only ever adds.
    """
    measured = dict(zip(sizes.tolist(), seconds.tolist(), strict=True))
    times = np.minimum.accumulate([measured[size] for size in reversed(KNOT_BYTES)])[::-1]
    curve = forms.CollectiveCurve(
        times_s=tuple(float(f"{t:.4g}") for t in times), error=0.0, error_p90=0.0, samples=len(KNOT_BYTES), source=source,
        valid={"message_bytes": (KNOT_BYTES[0], max(measured))},
    )  # fmt: skip
    between = [size for size in measured if size > KNOT_BYTES[0] and size not in KNOT_BYTES]
    misses = np.array([abs(curve.seconds(size) / measured[size] - 1.0) for size in between])
    return dataclasses.replace(curve, **quality(misses)), misses


def collective_results(data: Path) -> Iterator[Result]:
    """NCCL within a node by operation and ranks, and the one sweep across nodes."""
    for device, folder in rows_of.FOLDERS.items():
        table = where(read(data / "silicon" / folder / "collectives.csv"), library="nccl", dtype="half")
        newest = max((row["version"] for row in table), key=lambda v: [int(part) for part in v.split(".")])
        for op in ("all_gather", "reduce_scatter", "all_reduce", "alltoall"):
            for ranks in ("2", "4", "8"):
                if rows := where(table, op=op, gpus=ranks, version=newest):
                    size, time_us = numbers(rows, "bytes time_us")
                    curve, misses = knots(size, time_us * 1e-6, f"silicon collectives.csv, NCCL {newest}")
                    place = (device, f"collectives {op.replace('alltoall', 'all_to_all')}", ranks)
                    yield Result(place, curve, misses, np.ones(misses.size, bool))
    size, rate = numbers(where(read(data / "collectives.csv"), gpu="B200", num_gpus="32"), "bytes busbw_GBps")
    curve, misses = knots(size, size * 2 * 31 / 32 / (rate * 1e9), "mleng, P6-B200, 8 x 50 GB/s EFA per node")
    yield Result(("b200", "multi_node all_reduce", "32/4"), curve, misses, np.ones(misses.size, bool))


# ---------------------------------------------------------------- output

HEADER = """\
# Times of operations as fitted curves, written by benchmarks/fit_curves.py; do not edit.
# Times in us (ns per group and token, ps per element), rates in TFLOP/s and GB/s. error, error_p90: median and 90th percentile
# of |curve / measured - 1| on rows that the fit did not see; samples: rows that it saw; valid: span of the measured sizes.
# The first word of a source:
"""
JUDGEMENT = ("error", "error_p90", "samples", "valid", "source")
"""What a curve tells of its fit; written after its parameters."""
SOURCES = {
    "silicon": "aiconfigurator-core 0.12.0, measured tables (NVIDIA, Apache-2.0)",
    "infersim": "alibaba/InferSim f2293da, bench_data (Apache-2.0)",
    "simumax": "MooreThreads/SimuMax v1.2, efficiencies of Transformer Engine 2 in configs/system (Apache-2.0)",
    "hybridep": "deepseek-ai/DeepEP, branch hybrid-ep, README (MIT)",
    "2603.07685": "arXiv:2603.07685",
    "mleng": "stas00/ml-engineering, network and maximum achievable matmul, also all gemm_peak rates (CC BY-SA 4.0)",
    "azure": "Azure/AI-benchmarking-guide (MIT)",
    "flashmla": "deepseek-ai/FlashMLA README (MIT)",
    "coreweave": "coreweave/nccl-tests README",
    "oci": "OCI MI355X validation guide, rccl-tests",
    "backward_ratio": "simumax, 2603.07685, flashmla, deepseek-ai/profile-data; Hopper from latent attention, L40S from A100",
    "fp8-mx-grouped": "NVIDIA/Megatron-LM, DeepSeek-V3 on GB200",
}


def catalog(data: Path, results: list[Result]) -> dict[str, Any]:
    """Everything as plain data, by device."""
    devices: dict[str, Any] = {}
    for (device, group, key), curve, _, _ in results:
        place = devices.setdefault(device, {})
        for name in group.split():
            place = place.setdefault(name, {})
        told = to_human(curve)
        place[key] = {name: told.pop(name) for name in list(told) if name not in JUDGEMENT} | told
    for device, name, rate in rows_of.streaming_rates(data):
        devices.setdefault(device, {}).setdefault("rates", {})[name] = rate
    for device, peaks in rows_of.gemm_peaks(data).items():
        devices.setdefault(device, {})["gemm_peak_tflop_per_s"] = peaks
    for device, point in rows_of.bus_rates(data):
        devices.setdefault(device, {}).setdefault("bus", []).append(point)
    return {device: devices[device] for device in sorted(devices)}


def lines(key: str, value: Any, depth: int) -> Iterator[str]:
    """YAML with one flow mapping a curve, so that the file stays short."""
    head = "  " * depth + (f"'{key}':" if key[0].isdigit() else f"{key}:")
    if isinstance(value, dict) and (depth == 0 or all(isinstance(inner, dict | list) for inner in value.values())):
        yield head
        for name, inner in value.items():
            yield from lines(name, inner, depth + 1)
    elif isinstance(value, list):
        yield head
        yield from (f"{'  ' * depth}- {flow(item, depth + 1)}" for item in value)
    else:
        yield f"{head} {flow(value, depth + 1)}"


def flow(value: Any, depth: int) -> str:
    """A value in YAML flow style, wrapped."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6).removesuffix("...\n").strip()
    wrapped = textwrap.wrap(text, 122 - 2 * depth, break_long_words=False, break_on_hyphens=False)
    return ("\n" + "  " * (depth + 1)).join(wrapped)


def report(results: list[Result]) -> Iterator[str]:
    """One line a curve: errors on unseen rows, in the training region too, beside those of the earlier study."""
    yield f"{'curve':46s} {'n':>6s} {'med':>6s} {'p90':>6s} {'mean':>6s} | core {'med':>5s} {'mean':>6s} | study | parameters"
    for place, curve, misses, core in results:
        name, inner = " ".join(place), misses[core] if core.any() else misses
        told = {k: v for k, v in to_human(curve).items() if k not in JUDGEMENT}
        yield (
            f"{name:46s} {curve.samples:6d} {np.median(misses):6.1%} {np.quantile(misses, 0.9):6.1%} {misses.mean():6.1%} | "
            f"{np.median(inner):10.1%} {inner.mean():6.1%} | {STUDY.get(name, ''):>5} | {told}"
        )


def main() -> None:
    """Fit, write, report."""
    parser = argparse.ArgumentParser(description="Fit the shipped curves to tables of public measurements.")
    parser.add_argument("data", type=Path, help="directory with silicon/, kernels.csv and collectives.csv")
    parser.add_argument("-o", "--output", type=Path, required=True, help="YAML file to write")
    parser.add_argument("--report", action="store_true", help="print the errors of every curve")
    options = parser.parse_args()
    backward = rows_of.backward_ratios(options.data)
    operations = [op for device in rows_of.FOLDERS for op in silicon_operations(options.data, device, backward)]
    operations += [*training_operations(options.data, backward), *dispatch_operations(options.data)]
    results = [fit_and_judge(op) for op in operations] + list(collective_results(options.data))
    body = {"sources": SOURCES, "devices": catalog(options.data, results)}
    text = HEADER + "\n".join(line for key, value in body.items() for line in lines(key, value, 0)) + "\n"
    save_text(options.output, text, "curves")
    if options.report:
        print(*report(results), sep="\n")


if __name__ == "__main__":
    main()
