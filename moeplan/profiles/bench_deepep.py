"""Times of DeepEP's dispatch and combine, where that library is installed.

Tokens go to random distinct experts, `topk` of 256, in bfloat16. The bytes of a sample are those that leave a rank on the
slowest link that the group crosses: one copy of a token to each other rank (in a domain) or to each other domain that holds a
chosen expert. Written after the library's documentation (deepseek-ai/DeepEP, README); groups of whole nodes only.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from moeplan.profiles.bench_collectives import GroupBench, Measured, named
from moeplan.profiles.cases import Case, UnsupportedCase
from moeplan.profiles.timing import PRECISION

EXPERTS = 256
"""Routed experts, as in DeepSeek-V3."""


def deepep(bench: GroupBench, case: Case, budget_s: float, precision: float = PRECISION) -> Measured:
    """Time of "dispatch" or "combine", with the bytes that left a rank on average."""
    try:
        deep_ep = importlib.import_module("deep_ep")
    except ImportError:
        raise UnsupportedCase("DeepEP is not installed") from None
    world, mine = bench.world, bench.members(case.group)
    made: list[Callable[[], Any]] = []

    def prepare() -> float:
        if not mine:
            return 0.0
        group = world.group(case.group, bench.per_domain)
        run, link_bytes = _prepared(deep_ep, case, group, mine, world)
        run()
        made.append(run)
        return link_bytes

    def mean(values: list[float]) -> float:
        taking_part = [v for v in values if v]
        return sum(taking_part) / max(1, len(taking_part))

    link_bytes = world.collect(f"the first {named(case)}", prepare, mean)

    def start() -> tuple[()]:
        if mine:
            made[0]()
        return ()

    timing = bench.timed(named(case), start, budget_s, precision)
    version = getattr(deep_ep, "__version__", "")
    return Measured(timing=timing, how=f"DeepEP {version}".strip(), sizes={"message_bytes": link_bytes})


def _prepared(deep_ep: Any, case: Case, group: Any, members: tuple[int, ...], world: Any) -> tuple[Callable[[], Any], float]:
    tokens, hidden, topk = (int(case.sizes[name]) for name in ("tokens", "hidden", "topk"))
    ranks, domains = map(int, case.group.split("/"))
    device = world.device
    torch.manual_seed(world.rank)
    x = torch.randn(tokens, hidden, dtype=torch.bfloat16, device=device)
    experts = EXPERTS // ranks * ranks
    weights, chosen = torch.rand(tokens, experts, device=device).topk(topk)
    configs = [of(ranks) for of in (deep_ep.Buffer.get_dispatch_config, deep_ep.Buffer.get_combine_config)]
    nvl, rdma = (
        max(getattr(config, f"get_{link}_buffer_size_hint")(2 * hidden, ranks) for config in configs)
        for link in ("nvl", "rdma")
    )
    buffer = deep_ep.Buffer(group, nvl, rdma if domains > 1 else 0)
    per_rank, per_rdma_rank, per_expert, in_rank, _ = buffer.get_dispatch_layout(chosen, experts)
    layout = {
        "num_tokens_per_rank": per_rank, "num_tokens_per_rdma_rank": per_rdma_rank,
        "num_tokens_per_expert": per_expert, "is_token_in_rank": in_rank,
    }  # fmt: skip

    def dispatch() -> Any:
        return buffer.dispatch(x, topk_idx=chosen, topk_weights=weights, **layout)

    run = dispatch
    if case.key == "combine":
        received, _, received_weights, _, handle, _ = dispatch()

        def run() -> Any:
            return buffer.combine(received, handle, topk_weights=received_weights)

    return run, 2.0 * hidden * copies(in_rank, members.index(world.rank), domains)


def copies(in_rank: torch.Tensor, place: int, domains: int) -> float:
    """Copies of tokens that leave rank `place`, from which token goes to which rank: `in_rank` [tokens, ranks]."""
    ranks = in_rank.shape[1]
    if domains == 1:
        return float(in_rank.sum() - in_rank[:, place].sum())
    reached = in_rank.reshape(len(in_rank), domains, ranks // domains).any(-1)  # [tokens, domains]
    return float(reached.sum() - reached[:, place // (ranks // domains)].sum())
