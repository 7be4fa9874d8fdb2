"""What programs of nccl-tests print, with times of our own: the form of their documentation, old and new."""

from __future__ import annotations

from collections.abc import Callable, Sequence

SIZES = tuple(2**p for p in range(12, 30))
NAMES = {"all_reduce": "sum", "all_gather": "none", "reduce_scatter": "sum", "alltoall": "none", "sendrecv": "none"}


def bus_factor(program: str, ranks: int) -> float:
    return {"all_reduce": 2 * (ranks - 1) / ranks, "sendrecv": 1.0}.get(program, (ranks - 1) / ranks)


def usual_us(size: float) -> float:
    return 12.0 + size / 250e3


def output(
    program: str = "all_reduce",
    *,
    hosts: Sequence[str] = ("node01",),
    per_host: int = 8,
    groups: int = 1,
    device: str = "NVIDIA H100 80GB HBM3",
    sizes: Sequence[int] = SIZES,
    time_us: Callable[[float], float] = usual_us,
    announced: bool = True,
    old: bool = False,
    wrong: str = "0",
    prefix: str = "",
) -> str:
    """A whole output; `old`: without the columns redop and root, with "error" in place of "#wrong"."""
    ranks = len(hosts) * per_host
    lines = [f"# Collective test starting: {program}_perf"] if announced else []
    lines += [
        "# nThread 1 nGpus 1 minBytes 4096 maxBytes 536870912 step: 2(factor) warmup iters: 5 iters: 20 agg iters: 1",
        "#",
    ]
    lines.append("# Using devices")
    for rank in range(ranks):
        host, number = hosts[rank // per_host], rank % per_host
        group = "" if old else f"Group {rank % groups:2d} "
        lines.append(
            f"#  Rank {rank:2d} {group}Pid {4000 + rank} on {host:>10s} device {number:2d} [0x{16 + number:02x}] {device}"
        )
    end = "error" if old else "#wrong"
    extra = "" if old else "   redop    root"
    lines.append("#" + " " * 60 + "out-of-place                       in-place")
    lines.append(f"#       size         count      type{extra}     time   algbw   busbw {end}     time   algbw   busbw {end}")
    lines.append("#        (B)    (elements)                        (us)  (GB/s)  (GB/s)            (us)  (GB/s)  (GB/s)")
    factor = bus_factor(program, ranks // groups)
    for size in sizes:
        row = f"{size:12d} {size // 4:12d} {'float':>9s}" + ("" if old else f" {NAMES[program]:>7s}      -1")
        for slower in (1.0, 1.1):
            taken = float(f"{slower * time_us(size):.4g}")
            rate = size / taken / 1e3
            row += f" {taken:8.5g} {rate:7.2f} {rate * factor:7.2f} {'1e-07' if old else wrong:>6s}"
        lines.append(row)
    lines += ["# Out of bounds values : 0 OK", "# Avg bus bandwidth    : 123.4", "#"]
    return "".join(f"{prefix}{line}\n" for line in lines)
