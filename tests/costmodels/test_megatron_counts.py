"""Our parameters of one rank equal those of the models that Megatron builds, to the last one."""

import dataclasses

import numpy as np
import pytest

from moeplan.costmodels.counts import parameter_count
from moeplan.costmodels.megatron_counts import (
    Held,
    embedding_held,
    final_norm_held,
    head_held,
    layer_held,
    padded_vocab,
    prediction_held,
)
from moeplan.costmodels.model import Model
from moeplan.costmodels.stages import parse_split
from moeplan.exporters.megatron_model import hybrid_pattern, model_arguments
from tests import megatron
from tests.megatron_models import MODELS, launch_arguments


def stages_held(model: Model, chunks: tuple[str, ...], pp: int, tp: int, ep: int, etp: int) -> list[tuple[int, int]]:
    """(dense, expert) parameters of one rank of every stage, summed over the chunks it holds."""
    held = [Held(0, 0)] * pp
    layer, last = 0, max(c for c, chunk in enumerate(chunks) if "t" in chunk)
    for c, chunk in enumerate(chunks):
        parts = []
        for letter in chunk:
            if letter == "t":
                parts.append(layer_held(model.layers[layer], model, tp, ep, etp))
                layer += 1
        if "E" in chunk or "m" in chunk:
            parts.append(embedding_held(model, tp))
        if "m" in chunk:
            parts.append(prediction_held(model, tp, ep, etp))
        if "L" in chunk:
            parts.append(head_held(model, tp, shares_embedding="E" in chunk))
        if c == last if model.mtp else "L" in chunk:
            parts.append(final_norm_held(model))
        held[c % pp] = sum(parts, held[c % pp])
    return [(int(h.dense), int(h.expert)) for h in held]


def even_split(model: Model, chunks: int) -> tuple[str, ...]:
    text = ["t" * (len(model.layers) // chunks)] * chunks
    text[0] = "E" + text[0]
    text[-1] += "m" * len(model.mtp) + "L"
    return tuple(text)


def degrees(tp: int, ep: int, etp: int, pp: int) -> str:
    return (
        f"--tensor-model-parallel-size {tp} {'--sequence-parallel' if tp > 1 else ''} --expert-model-parallel-size {ep} "
        f"--expert-tensor-parallel-size {etp} --pipeline-model-parallel-size {pp}"
    )


# name, layers kept, tp, ep, etp, pp, vpp; world is the smallest that fits
EVEN = [
    ("deepseek-v3", 8, 1, 8, 1, 2, 1),
    ("deepseek-v3", 8, 4, 16, 2, 1, 1),
    ("deepseek-v3", 8, 8, 8, 1, 4, 2),
    ("deepseek-v3.2", 4, 1, 4, 1, 1, 1),
    ("deepseek-v3.2", 4, 4, 8, 1, 2, 1),
    ("deepseek-v2-lite", 6, 1, 1, 1, 1, 1),
    ("deepseek-v2-lite", 6, 4, 8, 1, 3, 1),
    ("deepseek-v2-lite", 6, 2, 4, 2, 2, 3),
    ("mixtral-8x7b", 4, 1, 1, 1, 1, 1),
    ("mixtral-8x7b", 4, 2, 8, 1, 2, 1),
    ("mixtral-8x7b", 4, 8, 1, 8, 1, 1),
    ("mixtral-8x7b", 4, 8, 2, 4, 4, 1),
    ("mixtral-8x7b", 4, 1, 4, 2, 2, 2),
    ("qwen3-30b-a3b", 6, 1, 8, 1, 3, 1),
    ("qwen3-30b-a3b", 6, 8, 4, 2, 2, 1),
    ("qwen3-30b-a3b", 6, 8, 64, 1, 1, 1),
    ("qwen2-57b-a14b", 4, 1, 8, 1, 2, 1),
    ("qwen2-57b-a14b", 4, 4, 2, 4, 4, 1),
    ("gpt-oss-20b", 4, 1, 4, 1, 1, 1),
    ("gpt-oss-20b", 4, 8, 8, 1, 2, 1),
    ("gpt-oss-20b", 4, 2, 32, 1, 4, 1),
    ("glm-4.5-air", 4, 1, 16, 1, 2, 1),
    ("glm-4.5-air", 4, 8, 16, 2, 4, 1),
    ("llama3-8b", 4, 1, 1, 1, 1, 1),
    ("llama3-8b", 4, 8, 1, 1, 2, 2),
    ("nemotron-4-15b", 4, 8, 1, 8, 4, 1),
    ("nemotron-4-15b", 4, 2, 1, 2, 1, 1),
    ("gpt-3-175b", 4, 1, 1, 1, 1, 1),
    ("gpt-3-175b", 4, 8, 1, 1, 2, 1),
    ("gpt-3-175b", 4, 4, 1, 4, 4, 1),
    ("qwen3-next-80b-a3b", 8, 1, 32, 1, 2, 1),
    ("qwen3-next-80b-a3b", 8, 4, 16, 2, 4, 2),
]


@pytest.mark.parametrize(("name", "count", "tp", "ep", "etp", "pp", "vpp"), EVEN)
def test_even_split(name: str, count: int, tp: int, ep: int, etp: int, pp: int, vpp: int) -> None:
    check_even_split(MODELS[name].cut(count), tp, ep, etp, pp, vpp)


@pytest.mark.parametrize("name", ["deepseek-v3", "glm-4.5-air"])
@pytest.mark.parametrize(("tp", "ep", "etp", "pp", "vpp"), [(1, 8, 1, 2, 1), (4, 16, 2, 1, 1), (8, 8, 1, 4, 2)])
def test_without_prediction_layers(name: str, tp: int, ep: int, etp: int, pp: int, vpp: int) -> None:
    check_even_split(dataclasses.replace(MODELS[name].cut(8), mtp=()), tp, ep, etp, pp, vpp)


def check_even_split(model: Model, tp: int, ep: int, etp: int, pp: int, vpp: int) -> None:
    world = pp * int(np.lcm(tp, ep * etp))
    virtual = f"--num-virtual-stages-per-pipeline-rank {vpp}" if vpp > 1 else ""
    arguments = launch_arguments(model_arguments(model, 4096), degrees(tp, ep, etp, pp), virtual)
    found = megatron.build_counts(arguments, world, environment={"CUDA_DEVICE_MAX_CONNECTIONS": "1"})
    assert found == stages_held(model, even_split(model, pp * vpp), pp, tp, ep, etp)


SPLITS = [  # name, layers kept, split, pp
    ("deepseek-v3", 61, "Et*3|(tt|)*29m|L", 8),
    ("deepseek-v3", 8, "Ettt|tt|tt|tmL", 4),
    ("deepseek-v3", 8, "Et|tt|tt|tt|tm|L", 3),
    ("deepseek-v3", 8, "Ett|tt|tt|tt|m|L", 2),
    ("glm-4.5-air", 4, "E|tt|tt|mL", 2),
    ("glm-4.5-air", 4, "Et|ttt|m|L", 4),
    ("gpt-3-175b", 4, "E|tt|tt|L", 4),
    ("mixtral-8x7b", 4, "Et|tt|t|L", 2),
]


@pytest.mark.parametrize(("name", "count", "split", "pp"), SPLITS)
@pytest.mark.parametrize("tp", [1, 2])
def test_explicit_split(name: str, count: int, split: str, pp: int, tp: int) -> None:
    model = MODELS[name].cut(count)
    ep = min(32, model.moe.experts) if model.moe else 1
    layout = f"--pipeline-model-parallel-layout {split}"
    arguments = launch_arguments(model_arguments(model, 4096), degrees(tp, ep, 1, pp), layout)
    found = megatron.build_counts(arguments, pp * ep * tp, environment={"CUDA_DEVICE_MAX_CONNECTIONS": "1"})
    assert found == stages_held(model, parse_split(split), pp, tp, ep, 1)


@pytest.mark.parametrize(("tp", "ep", "segments"), [(1, 8, [52]), (2, 4, [26, 26]), (8, 16, [13, 12, 14, 13])])
def test_mamba_hybrid(tp: int, ep: int, segments: list[int]) -> None:
    model, pp = MODELS["nemotron-3-nano-30b-a3b"], min(2, len(segments))
    pattern = "--hybrid-layer-pattern " + hybrid_pattern(model, segments)
    arguments = launch_arguments(model_arguments(model, 4096), degrees(tp, ep, 1, pp), pattern)
    found = megatron.build_counts(arguments, pp * ep * tp, environment={"CUDA_DEVICE_MAX_CONNECTIONS": "1"})
    chunks = ["t" * n for n in segments]
    chunks[0] = "E" + chunks[0]
    chunks[-1] += "L"
    assert found == stages_held(model, tuple(chunks), pp, tp, ep, 1)


def test_deepseek_v3_by_hand() -> None:
    """Rank 0 of PP8 VPP4 EP32: the embedding, three dense and six sparse layers."""
    model = MODELS["deepseek-v3"]
    assert stages_held(model, parse_split("Et*3|(tt|)*29m|L"), 8, 1, 32, 1)[0] == (4075110400, 2113929216)


@pytest.mark.parametrize("name", MODELS)
def test_one_rank_holds_the_published_parameters(name: str) -> None:
    model = MODELS[name]
    (dense, expert), = stages_held(model, even_split(model, 1), 1, 1, 1, 1)  # fmt: skip
    published = parameter_count(model)
    padding = (padded_vocab(model, 1) - model.vocab) * model.hidden * (1 if model.tied else 2)
    query_norms = len(model.layers) * model.hidden if name == "deepseek-v2-lite" else 0
    assert dense + expert == published.total + published.mtp + padding + query_norms


@pytest.mark.parametrize("name", MODELS)
def test_arrays_give_what_numbers_give(name: str) -> None:
    model = MODELS[name]
    tp, ep, etp = np.array([1, 1, 2, 4]), np.array([1, 4, 2, 8]), np.array([1, 1, 2, 1])
    whole = layer_held(model.layers[-1], model, tp, ep, etp) + prediction_held(model, tp, ep, etp)
    whole += embedding_held(model, tp) + head_held(model, tp) + final_norm_held(model)
    for i in range(len(tp)):
        t, e, x = int(tp[i]), int(ep[i]), int(etp[i])
        one = layer_held(model.layers[-1], model, t, e, x) + prediction_held(model, t, e, x)
        one += embedding_held(model, t) + head_held(model, t) + final_norm_held(model)
        assert (whole.dense[i], whole.expert[i]) == (one.dense, one.expert)  # type: ignore[index]
