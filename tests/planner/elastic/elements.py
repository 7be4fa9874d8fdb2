"""The state of small models element by element: an independent count of what ranks hold, move and lose.

Every tensor is a row of numbered elements; a rank's holding is a 1 or 0 for each element in each state class. Sizes must
divide by all cuts, so that every border lies between two elements.
"""

import itertools
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from moeplan.costmodels.counts import norm_size
from moeplan.costmodels.layout import Layout
from moeplan.costmodels.megatron_counts import layer_weights_held, padded_vocab, prediction_weights_held
from moeplan.costmodels.model import Attention, Layer, Mlp, Model, Moe
from moeplan.costmodels.stages import chunk_letters

GQA = Attention(heads=4, kv_heads=4, head_dim=6, v_head_dim=6)
DENSE_LAYER = Layer(blocks=(GQA, Mlp(width=12)))
MOE_LAYER = Layer(blocks=(GQA, Moe(experts=4, topk=2, width=12, shared_width=12)))
DENSE = Model(name="elements-dense", hidden=24, vocab=300, layers=(DENSE_LAYER,) * 4)
TIED = Model(name="elements-tied", hidden=24, vocab=300, layers=(DENSE_LAYER, *(MOE_LAYER,) * 3), tied=True)
LEARNED = Model(name="elements-learned", hidden=24, vocab=300, layers=(MOE_LAYER,) * 4, position="learned", max_positions=24)
PREDICTING = Model(name="elements-mtp", hidden=24, vocab=300, layers=(DENSE_LAYER, *(MOE_LAYER,) * 3), mtp=(MOE_LAYER,))
MODELS = (DENSE, TIED, LEARNED, PREDICTING)
CLASSES = {"weights": 2, "states": 12}


def layouts(model: Model, worlds: tuple[int, ...] = (4, 6, 8)) -> list[tuple[Layout, int]]:
    """Every layout of these many ranks that cuts `model` without a remainder, each with every number of replicas."""
    found = []
    experts = 4 if model.moe else 1
    degrees = itertools.product((1, 2, 4), (1, 2), (1, 2, 3, 4), (1, 2), (1, 2, 3, 4, 6, 8), (1, 2, 4), (1, 2))
    for tp, cp, pp, vpp, dp, ep, etp in degrees:
        ranks = tp * cp * dp
        if ranks * pp not in worlds or experts % ep or ranks % (ep * etp) or pp * vpp > len(model.layers):
            continue
        if (vpp > 1 and pp == 1) or (etp > 1 and not model.moe):
            continue
        edp = ranks // (ep * etp)
        for sharding, instances in (("optimizer", 1), ("optimizer", 2), ("ddp", 1), ("fsdp", 1)):
            if (dp * cp) % instances or (model.moe and edp % instances):
                continue
            cuts: dict[str, Any] = {"tp": tp, "cp": cp, "pp": pp, "vpp": vpp, "dp": dp, "ep": ep, "etp": etp, "edp": edp}
            found.append((Layout(**cuts, sharding=sharding), instances))
    return found


def held(model: Model, layout: Layout, instances: int = 1) -> tuple[Any, Any]:
    """Which elements every rank holds, [world, elements], and the bytes of each element, [elements]."""
    q = layout.tp * layout.cp * layout.dp
    columns, sizes = [], []
    for name, each in CLASSES.items():
        for family, length, real, stages in tensors(model, layout):
            has = np.zeros((layout.pp, q, length), np.bool_)
            for rank in range(q):
                for first, last in ranges(family, length, layout, instances, name, rank):
                    has[np.ix_(stages, [rank], np.arange(first, last))] = True
            columns.append(has.reshape(layout.pp * q, length)[:, :real])
            sizes.append(np.full(real, each))
    return np.concatenate(columns, axis=1).astype(np.float32), np.concatenate(sizes).astype(np.float32)


def tensors(model: Model, layout: Layout) -> list[tuple[Any, int, int, list[int]]]:
    """Every tensor: its cut (copies of an expert, "tp" or "whole"), elements, those that are state, and the stages with it."""
    chunks = chunk_letters(model, layout.pp, layout.vpp, layout.stages)
    where = {letter: [c % layout.pp for c, chunk in enumerate(chunks) if letter in chunk] for letter in "EmL"}
    order = [c % layout.pp for c, chunk in enumerate(chunks) for _ in range(chunk.count("t"))]
    found: list[tuple[Any, int, int, list[int]]] = []
    for layer, stage in zip(model.layers, order, strict=True):
        found += [(cut_of(w), w.size, w.size, [stage]) for w in layer_weights_held(layer, model)]
    found += [(cut_of(w), w.size, w.size, where["m"]) for w in prediction_weights_held(model)]
    rows, real = padded_vocab(model, layout.tp) * model.hidden, model.vocab * model.hidden
    inputs = where["E"] + where["m"]
    found.append(("tp", rows, real, inputs + where["L"] * model.tied))
    if not model.tied:
        found.append(("tp", rows, real, where["L"]))
    if model.position == "learned":
        found.append(("whole", model.max_positions * model.hidden, model.max_positions * model.hidden, inputs))
    found.append(("whole", norm_size(model), norm_size(model), [order[-1]] if model.mtp else where["L"]))
    return found


def cut_of(weight: Any) -> Any:
    """How a weight is cut: the number of experts, "tp" or "whole"."""
    return weight.copies if weight.shard.is_expert else "tp" if weight.shard.is_cut else "whole"


def ranges(cut: Any, length: int, layout: Layout, instances: int, name: str, rank: int) -> list[tuple[int, int]]:
    """First and last element of what a rank of a stage holds of a tensor; the last is not part of it."""
    sharded = layout.sharding == "fsdp" or (name == "states" and layout.sharding == "optimizer")
    if isinstance(cut, int):
        tensor, inside, replica = rank % layout.etp, rank // layout.etp % layout.ep, rank // (layout.etp * layout.ep)
        group, tensors_, one = layout.edp // instances, layout.etp, length // cut
        starts = [e * one for e in range(inside * cut // layout.ep, (inside + 1) * cut // layout.ep)]
    else:
        tensor, replica = (rank % layout.tp if cut == "tp" else 0), rank // layout.tp
        group, tensors_, one = layout.dp * layout.cp // instances, layout.tp if cut == "tp" else 1, length
        starts = [0]
    width = one // tensors_
    first, last = tensor * width, (tensor + 1) * width
    if sharded:
        assert width % group == 0, "the tensor does not divide"
        first, last = first + replica % group * (width // group), first + (replica % group + 1) * (width // group)
    return [(s + first, s + last) for s in starts]


def gains(old: tuple[Any, Any], new: tuple[Any, Any]) -> Any:
    """Bytes that every old and every new rank both hold, [old ranks, new ranks]."""
    return (old[0] * old[1]) @ new[0].T


def by_nodes(pairs: Any, node: int) -> Any:
    """Gain of the best ranks inside each pair of nodes, [old nodes, new nodes]."""
    a, b = (-(-n // node) for n in pairs.shape)
    full = np.zeros((a * node, b * node))
    full[: pairs.shape[0], : pairs.shape[1]] = pairs
    out = np.zeros((a, b))
    for i, j in np.ndindex(a, b):
        block = full[i * node : (i + 1) * node, j * node : (j + 1) * node]
        out[i, j] = block[linear_sum_assignment(block, maximize=True)].sum()
    return out


def moved(old: tuple[Any, Any], new: tuple[Any, Any], node: int, dead: tuple[int, ...] = ()) -> tuple[float, float]:
    """Bytes that the new ranks need, and that move under the best placement of nodes and of ranks inside them."""
    found = by_nodes(gains(old, new), node)
    found[list(dead)] = 0.0
    need = float((new[0] @ new[1]).sum())
    return need, need - float(found[linear_sum_assignment(found, maximize=True)].sum())


def lost(old: tuple[Any, Any], node: int, dead: tuple[int, ...]) -> float:
    """Bytes of the elements that are held, but on dead nodes only."""
    alive = ~np.isin(np.arange(len(old[0])) // node, dead)
    return float(old[1][old[0].max(axis=0) > old[0][alive].max(axis=0, initial=0.0)].sum())
