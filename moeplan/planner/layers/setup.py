"""The MoE layer of a plan at the size of the ranks that are there.

A plan is for a cluster, a check runs on what is at hand. Groups shrink to what divides the ranks, first the shards of an expert
(esp, the plan's etp), then the groups that share the experts (ep), then the tensor-parallel ranks (mp, the plan's tp); what is
left are replicas. A rank keeps the experts and the tokens that it has in the plan, so that its products keep their shapes and
its messages their bytes; fewer ranks share fewer experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from moeplan.costmodels.layout import Layout
from moeplan.costmodels.model import Model, Moe
from moeplan.costmodels.workload import Workload
from moeplan.errors import LayoutError, ProblemError, nearest_hint

SIZES = ("tokens", "hidden", "expert_hidden", "experts", "topk", "mp", "esp", "ep")
"""What a user can set in place of what follows from the plan."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerSetup:
    """An MoE layer on `replicas` x `ep` x `esp` ranks."""

    tokens: int
    """Of a tensor-parallel group."""
    hidden: int
    expert_hidden: int
    """Width inside a whole expert."""
    experts: int
    topk: int
    gated: bool
    mp: int
    esp: int
    ep: int
    replicas: int

    def __post_init__(self) -> None:
        for name in (*SIZES, "replicas"):
            if getattr(self, name) < 1:
                raise LayoutError(f"{name} = {getattr(self, name)}, a whole number from 1 is needed")
        if self.topk > self.experts:
            raise LayoutError(f"topk = {self.topk} exceeds the {self.experts} experts", hint="lower --topk or raise --experts")
        if self.experts % self.ep:
            raise LayoutError(f"ep = {self.ep} does not divide the {self.experts} experts", hint="change --ep or --experts")
        if self.expert_hidden % self.esp:
            raise LayoutError(f"esp = {self.esp} does not divide the expert width {self.expert_hidden}", hint="change --esp")
        whole = self.ep * self.esp
        if whole % self.mp:
            raise LayoutError(
                f"mp = {self.mp} does not divide the ep x esp = {self.ep} x {self.esp} = {whole} ranks of a replica",
                hint=f"use a divisor of {whole}",
            )

    @property
    def ranks(self) -> int:
        """All of them."""
        return self.replicas * self.ep * self.esp

    @property
    def gemms(self) -> int:
        """GEMMs of an expert."""
        return 3 if self.gated else 2

    @property
    def weight_elements(self) -> int:
        """Elements of the experts of one rank."""
        return self.experts // self.ep * self.gemms * self.hidden * self.expert_hidden // self.esp


def scaled_layer(
    model: Model, workload: Workload, layout: Layout, ranks: int, given: Mapping[str, int] | None = None
) -> tuple[LayerSetup, list[str]]:
    """The first MoE layer of a plan on `ranks` ranks, with the sizes in `given`, and remarks on what is not as in the plan."""
    given = dict(given or {})
    for name in given:
        if name not in SIZES:
            raise ProblemError(f"unknown size '{name}'", hint=nearest_hint(name, SIZES))
    blocks = [block for block in model.blocks if isinstance(block, Moe)]
    if not blocks:
        raise ProblemError(f"{model.name} has no experts to verify", hint="name a plan of a mixture-of-experts model")
    block = blocks[0]
    esp = given.get("esp", math.gcd(layout.etp, ranks))
    if ranks % esp:
        raise LayoutError(f"esp = {esp} does not divide the {ranks} ranks", hint=f"use a divisor of {ranks}")
    ep = given.get("ep", math.gcd(layout.ep, ranks // esp))
    if ranks % (ep * esp):
        raise LayoutError(
            f"ep x esp = {ep} x {esp} = {ep * esp} does not divide the {ranks} ranks", hint="change --ep or --esp"
        )
    setup = LayerSetup(
        tokens=given.get("tokens", max(1, layout.micro_batch * workload.seq_len // layout.cp)),
        hidden=given.get("hidden", block.latent or model.hidden),
        expert_hidden=given.get("expert_hidden", block.width),
        experts=(experts := given.get("experts", max(block.experts // layout.ep, 1) * ep)),
        topk=given.get("topk", min(block.topk, experts)),
        gated=block.gated,
        mp=given.get("mp", math.gcd(layout.tp, ep * esp)),
        esp=esp,
        ep=ep,
        replicas=ranks // (ep * esp),
    )
    remarks = [f"{model.name} has {len(blocks)} kinds of MoE layers; this is the first of them"] * (len(blocks) > 1)
    plan = {
        "tp": (layout.tp, setup.mp), "etp": (layout.etp, setup.esp), "ep": (layout.ep, setup.ep),
        "experts": (block.experts, setup.experts), "top-k": (block.topk, setup.topk),
    }  # fmt: skip
    changed = [f"{name} {there} -> {here}" for name, (there, here) in plan.items() if there != here]
    if changed:
        remarks.append(f"scaled from the plan's {layout.world} GPUs to {ranks} ranks: {', '.join(changed)}")
    return setup, remarks
