"""What compute and communication lose when they run at the same time.

A matrix product beside a collective: each alone, then both together, sized so that both take about equally long alone. With
times c and m alone and t together the loss is (t - max(c, m)) / min(c, m): 0 where the shorter one hides, 1 where nothing does
(kappa of the schedules). On GPUs the product has the current stream and the collective its own; both orders of starting are
measured, since the first one may hold the processors that the other needs. On CPUs the collective runs in the threads of gloo.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from moeplan.profiles.bench_collectives import GroupBench, Measured, Start, named
from moeplan.profiles.cases import Case, UnsupportedCase
from moeplan.profiles.timing import PRECISION
from moeplan.units import MIB

MESSAGE_BYTES = {"cuda": 64.0 * MIB, "cpu": 4.0 * MIB}
"""Message of the collective: that of a layer's dispatch."""
_SIDE = {"cuda": 4096, "cpu": 512}
"""Rows and columns of a matrix product."""
_LEAST_ROWS = 16
_SHARES = {"alone": 0.2, "together": 0.2}


def overlap(bench: GroupBench, case: Case, budget_s: float, precision: float = PRECISION) -> list[Measured]:
    """Both at once in each order, with `alone_compute_s` and `alone_comm_s`."""
    op, _, kernel = case.key.partition("+")
    if kernel != "gemm":
        raise UnsupportedCase(f"overlap '{case.key}': only a gemm runs beside a collective")
    device = bench.world.device
    message = case.sizes.get("message_bytes", MESSAGE_BYTES[device.type])
    moved = replace(case, op=op, key="bf16", sizes={"message_bytes": message})
    start = bench.starter(moved)
    alone_s, together_s = (_SHARES[name] * budget_s for name in ("alone", "together"))
    comm = bench.timed(named(moved), start, alone_s, precision)
    one = bench.timed("a matrix product", _product(device, _SIDE[device.type], 1), 0.5 * alone_s, precision)
    # As many products, the rows cut a little, as take the collective's time.
    products = max(1, round(comm.seconds / one.seconds))
    rows = _SIDE[device.type] * comm.seconds / (one.seconds * products)
    compute_start = _product(device, max(_LEAST_ROWS, round(rows / _LEAST_ROWS) * _LEAST_ROWS), products)
    compute = bench.timed("matrix products", compute_start, alone_s, precision)
    sizes = {"alone_compute_s": compute.seconds, "alone_comm_s": comm.seconds}
    return [
        Measured(
            timing=bench.timed(named(case), both, together_s, precision),
            how=f"{bench.how(moved)} with {products} x torch.mm, {order}",
            sizes=sizes,
        )
        for order, both in _orders(device, start, compute_start)
    ]


def _orders(device: torch.device, comm: Start, compute: Start) -> list[tuple[str, Start]]:
    def comm_first() -> Sequence[Any]:
        works = comm()
        compute()
        return works

    if device.type == "cpu":
        return [("at once", comm_first)]
    cuda: Any = torch.cuda
    side = cuda.Stream(device)

    def compute_first() -> Sequence[Any]:
        side.wait_stream(cuda.current_stream(device))
        compute()
        with cuda.stream(side):
            for work in comm():
                work.wait()
        cuda.current_stream(device).wait_stream(side)
        return ()

    return [("the collective starts first", comm_first), ("the products start first", compute_first)]


def _product(device: torch.device, rows: int, count: int) -> Callable[[], Sequence[Any]]:
    side = _SIDE[device.type]
    x, w = (torch.randn(n, side, dtype=torch.bfloat16, device=device) for n in (rows, side))
    y = torch.empty(rows, side, dtype=torch.bfloat16, device=device)

    def run() -> Sequence[Any]:
        for _ in range(count):
            torch.mm(x, w.t(), out=y)
        return ()

    return run
