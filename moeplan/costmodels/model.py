"""Model: the architecture of a transformer as layers of blocks.

A `Layer` is a tuple of blocks that run one after another on the residual stream; a block is a token mixer
(`Attention`, `LatentAttention`, `LinearAttention`, `Mamba`) or a feed-forward part (`Mlp`, `Moe`). Most models have
layers of one mixer and one feed-forward part; hybrids have one block a layer, and a few have more. Equal layers compare
equal, so a model is its few distinct layer kinds and the order they come in. Sizes are in elements; nothing here knows
about devices or parallelism.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from moeplan.errors import ModelError


@dataclass(frozen=True, kw_only=True, slots=True)
class Attention:
    """Multi-head attention with grouped queries (GQA); multi-head attention is `kv_heads == heads`."""

    heads: int
    """Query heads."""
    kv_heads: int
    """Key / value heads (query groups)."""
    head_dim: int
    """Width of a query and of a key head."""
    v_head_dim: int
    """Width of a value head; equals `head_dim` in most models."""
    window: int = 0
    """Tokens that a query sees back (sliding window or chunk); 0: the whole sequence."""
    qkv_bias: bool = False
    """Biases on the query, key and value projections."""
    out_bias: bool = False
    """Bias on the output projection."""
    qk_norm: Literal["none", "head", "full"] = "none"
    """Norm weights on queries and keys: per head (`head_dim` each) or over all heads."""
    gate: bool = False
    """The query projection also yields an output gate of the same width (Qwen3-Next)."""
    head_gate: bool = False
    """One scalar gate a head on the output, from a projection of its own (Laguna)."""
    sinks: bool = False
    """One learned softmax offset a head (GPT-OSS)."""

    def __post_init__(self) -> None:
        _positive(self, "heads", "kv_heads", "head_dim", "v_head_dim")
        if self.heads % self.kv_heads:
            raise ModelError(f"attention: {self.kv_heads} key/value heads do not divide {self.heads} query heads")


@dataclass(frozen=True, kw_only=True, slots=True)
class Compression:
    """How DeepSeek-V4 shortens its sequence: queries see a window of tokens and one key for every `rate` tokens."""

    window: int
    """Tokens that a query sees back one by one."""
    rate: int
    """Tokens that one compressed key stands for; 0: no compressed keys, the window alone."""
    out_groups: int
    """Groups of heads whose outputs are projected down apart from each other."""
    out_rank: int
    """Width that the output of one group is projected down to."""

    def __post_init__(self) -> None:
        _positive(self, "window", "out_groups", "out_rank")


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentAttention:
    """Multi-head latent attention (MLA), with the sparse indexer of DeepSeek-V3.2 where `index_heads` is set.

    With `compression` (DeepSeek-V4) all heads read the `kv_rank` wide latent itself as key and as value.
    """

    heads: int
    q_rank: int
    """Rank of the query compression; 0: queries are projected directly."""
    kv_rank: int
    """Rank of the shared key / value compression."""
    nope_dim: int
    """Width of the part of a query / key head without position."""
    rope_dim: int
    """Width of the rotary part of a query / key head; keys share one."""
    v_dim: int
    """Width of a value head."""
    qkv_bias: bool = False
    out_bias: bool = False
    index_heads: int = 0
    """Heads of the sparse-attention indexer; 0: dense attention."""
    index_dim: int = 0
    index_topk: int = 0
    """Keys that a query attends to; without `index_heads` those of an earlier layer's indexer or the last ones."""
    head_gate: bool = False
    """One scalar gate a head on the output, from a projection of its own (Ling 3)."""
    sinks: bool = False
    """One learned softmax offset a head (DeepSeek-V4)."""
    compression: Compression | None = None
    """Compressed keys of DeepSeek-V4; None: every token has its key."""

    def __post_init__(self) -> None:
        _positive(self, "heads", "kv_rank", "nope_dim", "v_dim")

    @property
    def query_size(self) -> int:
        """Elements of a token's queries."""
        return self.heads * (self.nope_dim + self.rope_dim)

    @property
    def key_value_size(self) -> int:
        """Elements of a token's keys and values as attention reads them: for each head, or the shared latent if compressed."""
        return self.kv_rank if self.compression else self.heads * (self.nope_dim + self.rope_dim + self.v_dim)


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearAttention:
    """Attention with a recurrent state: gated delta net (GDN), Kimi delta attention (KDA) or lightning attention."""

    variant: Literal["gdn", "kda", "lightning"]
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    conv: int = 0
    """Taps of the short convolution; 0: none."""
    full_rank: bool = False
    """Decay and output gate of KDA come from full matrices (Ling 3), not through a bottleneck as wide as a head."""

    def __post_init__(self) -> None:
        _positive(self, "key_heads", "value_heads", "key_dim", "value_dim")


@dataclass(frozen=True, kw_only=True, slots=True)
class Mamba:
    """Selective state space block, Mamba-1 (`version` 1) or Mamba-2."""

    version: Literal[1, 2]
    inner: int
    """Inner width: heads x head_dim in Mamba-2, expand x hidden in Mamba-1."""
    state: int
    heads: int = 1
    groups: int = 1
    """Groups that share B and C (Mamba-2)."""
    conv: int = 4
    dt_rank: int = 0
    """Rank of the time-step projection (Mamba-1)."""
    conv_bias: bool = True
    proj_bias: bool = False
    chunk: int = 128
    """Tokens of one scan chunk (Mamba-2)."""

    def __post_init__(self) -> None:
        _positive(self, "inner", "state", "heads", "groups")


@dataclass(frozen=True, kw_only=True, slots=True)
class Mlp:
    """Dense feed-forward block: two matrices, three when gated (SwiGLU, GeGLU)."""

    width: int
    gated: bool = True
    bias: bool = False

    def __post_init__(self) -> None:
        _positive(self, "width")


@dataclass(frozen=True, kw_only=True, slots=True)
class Moe:
    """Routed experts, and the shared experts that every token passes beside them."""

    experts: int
    """Routed experts."""
    topk: int
    """Routed experts that a token goes to."""
    width: int
    """Feed-forward width of one routed expert."""
    gated: bool = True
    shared_width: int = 0
    """Feed-forward width of all shared experts together; 0: none."""
    shared_gate: bool = False
    """A scalar gate on the shared experts' output (Qwen)."""
    bias: bool = False
    """Biases in the routed experts (GPT-OSS)."""
    router_bias: bool = False
    """A learned bias in the router's linear layer (GPT-OSS)."""
    expert_bias: bool = False
    """Selection bias per expert, updated without gradients (auxiliary-loss-free balancing)."""
    expert_bias_is_parameter: bool = False
    """The published checkpoint counts `expert_bias` among its parameters (ERNIE)."""
    latent: int = 0
    """Width that tokens are projected to before dispatch (latent MoE); 0: the hidden size."""
    zero_experts: int = 0
    """Further experts that return their input and compute nothing (LongCat)."""
    score: Literal["softmax", "sigmoid", "sqrtsoftplus"] = "softmax"
    """Router score function."""
    pre_softmax: bool = False
    """Scores are normalised over all experts before the top-k is taken."""
    groups: int = 0
    """Router groups of experts for group-limited routing; 0: none."""
    group_topk: int = 0
    """Groups that a token may use."""
    scaling: float = 1.0
    """Factor on the routed output."""

    def __post_init__(self) -> None:
        _positive(self, "experts", "topk", "width")
        if self.topk > self.experts + self.zero_experts:
            raise ModelError(f"mixture of experts: top-k {self.topk} exceeds the {self.experts} experts")

    @property
    def active_experts(self) -> float:
        """Routed experts that compute for a token on average; zero experts take their share of the top-k."""
        return self.topk * self.experts / (self.experts + self.zero_experts)


Block: TypeAlias = Attention | LatentAttention | LinearAttention | Mamba | Mlp | Moe
Mixer: TypeAlias = Attention | LatentAttention | LinearAttention | Mamba


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """Blocks on the residual stream, in the order they run."""

    blocks: tuple[Block, ...]
    norms: int = -1
    """Norms over the hidden size; by default one before every block."""

    def __post_init__(self) -> None:
        if self.norms < 0:
            object.__setattr__(self, "norms", len(self.blocks))

    @property
    def is_moe(self) -> bool:
        """Whether the layer holds routed experts."""
        return any(isinstance(b, Moe) for b in self.blocks)


@dataclass(frozen=True, kw_only=True)
class Model:
    """A transformer language model: what is computed, not how."""

    name: str
    """Published name in lower case, or the name of the file it was read from."""
    hidden: int
    vocab: int
    """Rows of the published embedding, before any padding."""
    layers: tuple[Layer, ...]
    """Decoder layers in order."""
    mtp: tuple[Layer, ...] = ()
    """Multi-token-prediction layers; each adds a projection of 2 x hidden and a pass through the output head."""
    mtp_shared: bool = False
    """All prediction depths use the parameters of one (Nemotron-3)."""
    tied: bool = False
    """The output head is the embedding."""
    max_positions: int = 0
    """Longest sequence the published model was made for; 0: not stated."""
    streams: int = 1
    """Residual streams, mixed before and after every block by hyper-connections (DeepSeek-V4)."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_bias: bool = True
    """Whether layer norms have a bias (MPT has none)."""
    norm_eps: float = 1e-5
    activation: Literal["silu", "gelu", "relu2", "swigluoai"] = "silu"
    position: Literal["rope", "learned", "alibi", "none"] = "rope"
    """Position encoding; "learned" ones are parameters (GPT-3)."""
    rope_base: float = 10000.0
    rope_fraction: float = 1.0
    """Share of a head that is rotated."""
    family: str = ""
    """`model_type` of the published configuration."""
    source: str = ""
    """Where the configuration was published."""
    remarks: tuple[str, ...] = ()
    """What the reader had to assume."""
    config: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """The configuration this was read from, kept so that a plan file can carry it."""

    def __post_init__(self) -> None:
        _positive(self, "hidden", "vocab", "streams")
        if not self.layers:
            raise ModelError(f"model '{self.name}' has no layers")

    def __hash__(self) -> int:
        return hash((self.name, self.hidden, self.vocab, len(self.layers), len(self.mtp)))

    @functools.cached_property
    def kinds(self) -> tuple[Layer, ...]:
        """The distinct decoder layers, in order of first appearance."""
        return tuple(dict.fromkeys(self.layers))

    @functools.cached_property
    def kind_of_layer(self) -> tuple[int, ...]:
        """For every decoder layer the index of its kind; length `len(layers)`."""
        index = {kind: i for i, kind in enumerate(self.kinds)}
        return tuple(index[layer] for layer in self.layers)

    @functools.cached_property
    def blocks(self) -> tuple[Block, ...]:
        """The distinct blocks of all layers, prediction layers included."""
        return tuple(dict.fromkeys(b for layer in (*self.kinds, *self.mtp) for b in layer.blocks))

    @property
    def moe(self) -> Moe | None:
        """The first mixture-of-experts block, None for a dense model."""
        return next((b for b in self.blocks if isinstance(b, Moe)), None)

    @property
    def is_hybrid(self) -> bool:
        """Whether layers hold single blocks (Mamba hybrids), as Megatron's hybrid pattern expects."""
        return any(isinstance(b, Mamba) for b in self.blocks)

    def cut(self, layers: int) -> Model:
        """The same model with its first `layers` layers only (the "-NL-proxy" models of published runs)."""
        if not 1 <= layers <= len(self.layers):
            raise ModelError(f"model '{self.name}' has {len(self.layers)} layers, cannot be cut to {layers}")
        return dataclasses.replace(self, name=f"{self.name}-{layers}l-proxy", layers=self.layers[:layers])


def _positive(record: Any, *names: str) -> None:
    for name in names:
        value = getattr(record, name)
        if not isinstance(value, int) or value <= 0:
            raise ModelError(f"{type(record).__name__}: {name} must be a positive integer, found {value!r}")
