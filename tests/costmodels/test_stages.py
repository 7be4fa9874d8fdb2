"""Stages: the text of a split, its rules, the balanced split against brute force, the ranks that bind."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.costmodels.counts import flops_per_token
from moeplan.costmodels.model import Layer, Mlp, Model
from moeplan.costmodels.model_catalog import load_model
from moeplan.costmodels.stages import (
    all_ranks,
    balanced_split,
    binding_ranks,
    check_split,
    chunk_letters,
    format_split,
    layer_flops,
    parse_split,
    rank_contents,
)
from moeplan.errors import LayoutError
from tests.conftest import DENSE_LAYER, LATENT_LAYER, MOE_LAYER, TINY_LATENT, TINY_MOE, layouts_of
from tests.costmodels.random_splits import unequal_splits

QUICK = settings(max_examples=60, deadline=None)

# Text of a split and its chunks.
TEXTS = [
    ("EtL", ("EtL",)),
    ("Et*3|tL", ("Ettt", "tL")),
    ("Et*3|(tt|)*29m|L", ("Ettt", *["tt"] * 29, "m", "L")),
    ("E|(t*2|)*2t,t|L", ("E", "tt", "tt", "tt", "L")),
    ("E||L", ("E", "", "L")),
    ("(Et|)*1L", ("Et", "L")),
    ("Et*10mL", ("E" + "t" * 10 + "mL",)),
]

# Text, what its writer may have meant.
NO_SPLITS = ["", "Et tL", "etL", "Et*|L", "Et*3)|L", "(Et|L", "((t|)*2)*2", "2tL", "Et**2L", "EtxL", "Et|)*2L"]

# Text, (layers, mtp, pp, vpp), what is wrong with it (None: nothing).
CHECKS = [
    ("Ett|ttL", (4, 0, 2, 1), None),
    ("Et|t|t|tL", (4, 0, 2, 2), None),
    ("E|t|t|L", (2, 0, 4, 1), None),
    ("Et*3|(tt|)*29m|L", (61, 1, 8, 4), None),
    ("Ett|ttmmL", (4, 2, 2, 1), None),
    ("Ett|ttL", (4, 0, 4, 1), "2 chunks, pp*vpp = 4*1 = 4 are needed"),
    ("Ett|ttL", (4, 0, 2, 2), "2 chunks, pp*vpp = 2*2 = 4 are needed"),
    ("tEt|ttL", (4, 0, 2, 1), "it must start with the one E"),
    ("Ett|EttL", (4, 0, 2, 1), "it must start with the one E"),
    ("tt|ttL", (4, 0, 2, 1), "it must start with the one E"),
    ("Ett|tLt", (4, 0, 2, 1), "it must end with the one L"),
    ("EttL|ttL", (4, 0, 2, 1), "it must end with the one L"),
    ("Ett|tL", (4, 0, 2, 1), "it places 3 decoder layers, the model has 4"),
    ("Ett|ttL", (4, 1, 2, 1), "it places 0 prediction layers, 1 are trained"),
    ("Ett|ttmL", (4, 0, 2, 1), "it places 1 prediction layers, 0 are trained"),
    ("Ett|tmtL", (4, 1, 2, 1), "prediction layers must stand together after all decoder layers"),
    ("Et|tt|tm|mL", (4, 2, 4, 1), "prediction layers must stand together after all decoder layers"),
    ("|Ett|ttL", (4, 0, 3, 1), "it must start with the one E"),
    ("Ett|ttL|", (4, 0, 3, 1), "it must end with the one L"),
    ("Ett||ttL", (4, 0, 3, 1), None),
    ("Et|tttm||L", (4, 1, 2, 2), "prediction layers must be on the last virtual stage of their rank"),
    ("Et|tt|tm|L", (4, 1, 2, 2), None),
]


def chunk_flops(model, seq_len, sizes):
    """Forward FLOP per token of every chunk that holds `sizes` layers in order; the last one holds what follows the layers."""
    ends = list(itertools.accumulate(sizes))
    load = [sum(layer_flops(x, model, seq_len) for x in model.layers[e - s : e]) for s, e in zip(sizes, ends, strict=True)]
    head = 2 * model.vocab * model.hidden
    project = 2 * model.hidden * 2 * model.hidden
    load[-1] += head + sum(layer_flops(x, model, seq_len) + head + project for x in model.mtp)
    return load


def contiguous(layers, chunks):
    """Every allowed way to cut `layers` layers: one at least in each chunk but the last, and the first where it must be."""
    for sizes in itertools.product(range(layers + 1), repeat=chunks):
        bare_first = chunks == layers + 2
        if sum(sizes) == layers and all(s > 0 for s in sizes[bare_first : chunks - 1]):
            yield sizes


# ---------------------------------------------------------------- text


@pytest.mark.parametrize("text, chunks", TEXTS)
def test_parse(text, chunks):
    assert parse_split(text) == chunks


@pytest.mark.parametrize("text", NO_SPLITS)
def test_what_is_no_split(text):
    with pytest.raises(LayoutError, match="is not a pipeline split") as caught:
        parse_split(text)
    assert "Et*3|(tt|)*29m|L" in str(caught.value)


@given(chunks=st.lists(st.text(st.sampled_from("EtmL"), max_size=6), min_size=1, max_size=12).filter(lambda c: c != [""]))
@QUICK
def test_parse_inverts_format(chunks):
    assert parse_split(format_split(chunks)) == tuple(chunks)


@given(size=st.integers(0, 4), count=st.integers(1, 6), first=st.booleans(), last=st.booleans())
@QUICK
def test_parse_inverts_format_of_runs(size, count, first, last):
    chunks = ["E"] * first + ["t" * size] * count + ["L"] * last
    if chunks != [""]:
        assert parse_split(format_split(chunks)) == tuple(chunks)


def test_long_runs_are_written_short():
    assert format_split(parse_split("Et*3|(tt|)*29m|L")) == "Et*3|(tt|)*29m|L"
    assert format_split(["Ett", "tttt", "tL"]) == "Ett|t*4|tL"
    assert len(format_split(["E", *["t" * 40] * 1000, "L"])) < 20


@pytest.mark.parametrize("text, sizes, problem", CHECKS)
def test_check(text, sizes, problem):
    assert check_split(text, *sizes) == problem


# ---------------------------------------------------------------- the balanced split


def test_balanced_split_by_hand():
    # Layers of 2 x 3 x 8 x 10 = 480 FLOP per token, a head of 2 x 48 x 10 = 960, as much as two layers: of six layers
    # the last of two stages takes two, (480 x 4, 480 x 2 + 960), and of four stages none.
    model = Model(name="m", hidden=10, vocab=48, layers=(Layer(blocks=(Mlp(width=8),)),) * 6)
    assert layer_flops(model.layers[0], model, 1) == 480
    assert balanced_split(model, 1, 2) == "Et*4|ttL"
    assert balanced_split(model, 1, 4) == "Ett|tt|tt|L"
    assert balanced_split(model, 1, 1) == "Et*6L"
    # With one more chunk than layers the last is bare, with two more the first as well.
    assert balanced_split(model, 1, 7) == "Et|(t|)*5L"
    assert balanced_split(model, 1, 8) == "E|(t|)*6L"
    with pytest.raises(LayoutError, match="9 pipeline chunks exceed the 6 layers of 'm'"):
        balanced_split(model, 1, 9)


def test_the_first_stage_is_the_lightest_of_equals():
    # Seven equal layers over three stages, beside a head of next to nothing: one stage must hold three, not the first.
    model = Model(name="m", hidden=1000, vocab=1, layers=(Layer(blocks=(Mlp(width=4000),)),) * 7)
    assert balanced_split(model, 1, 3) == "Ett|t*3|ttL"


@pytest.mark.parametrize("layers", [1, 2, 3, 5])
@pytest.mark.parametrize("mtp", [0, 1])
@pytest.mark.parametrize("vocab", [8, 1000, 5000])
def test_balanced_split_against_every_split(layers, mtp, vocab):
    kinds = (DENSE_LAYER, MOE_LAYER, TINY_LATENT.layers[0], DENSE_LAYER, DENSE_LAYER, TINY_LATENT.layers[1])
    model = dataclasses.replace(TINY_MOE, layers=kinds[:layers], mtp=(MOE_LAYER,) * mtp, vocab=vocab)
    for chunks in range(1, layers + 3):
        best = min(max(chunk_flops(model, 256, sizes)) for sizes in contiguous(layers, chunks))
        text = balanced_split(model, 256, chunks)
        assert check_split(text, layers, mtp, chunks, 1) is None
        sizes = [chunk.count("t") for chunk in parse_split(text)]
        assert max(chunk_flops(model, 256, sizes)) == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-v4-flash", "gpt-oss-120b", "jamba-v0.1", "qwen3-next-80b-a3b"])
def test_layers_and_head_are_the_flops_of_the_model(name):
    model = load_model(name)
    # Training is three times the forward pass.
    assert 3 * sum(chunk_flops(model, 4096, [len(model.layers)])) == pytest.approx(flops_per_token(model, 4096), rel=1e-12)


# ---------------------------------------------------------------- ranks


def test_chunks_of_the_even_split():
    model = dataclasses.replace(TINY_LATENT, layers=TINY_LATENT.layers[:7])
    assert chunk_letters(model, 2, 2, "") == ("Ett", "tt", "tt", "tmL")
    assert chunk_letters(model, 1, 1, "") == ("EtttttttmL",)
    assert chunk_letters(model, 2, 1, "Ettttt|ttmL") == ("Ettttt", "ttmL")


def test_contents_of_every_rank_by_hand():
    # Kinds of tiny-latent: the dense first layer, and experts. Chunks go round the ranks: rank 0 holds chunks 0 and 2.
    content = rank_contents(TINY_LATENT, 2, 2, "Et|tt|ttt|ttmL")
    #                          dense, experts, E, L, m
    assert content.tolist() == [[1, 3, 1, 0, 0], [0, 4, 0, 1, 1]]


def test_deepseek_v3_has_few_ranks_that_bind():
    ranks = binding_ranks(load_model("deepseek-v3"), 8, 4, "Et*3|(tt|)*29m|L")
    # Rank 0 has the dense layers; rank 1 eight layers of experts, as ranks 2 to 4; rank 5 the last layer of all and with it
    # the final norm; rank 6 the prediction layer and its copy of the embedding; rank 7 the head.
    assert ranks.rank.tolist() == [0, 1, 5, 6, 7]
    assert ranks.kinds.tolist() == [[3, 6], [0, 8], [0, 8], [0, 6], [0, 6]]
    assert ranks.embedding.tolist() == [1, 0, 0, 0, 0]
    assert ranks.copies.tolist() == [1, 0, 0, 1, 0]
    assert ranks.norms.tolist() == [0, 0, 1, 0, 0]
    assert ranks.mtp.tolist() == [0, 0, 0, 1, 0]
    assert ranks.head.tolist() == [0, 0, 0, 0, 1]


@given(row=layouts_of(TINY_LATENT))
@QUICK
def test_binding_ranks_dominate_all_others(row):
    everything = rank_contents(TINY_LATENT, row.pp, row.vpp, row.stages)
    assert everything.sum(axis=0).tolist() == [1, 7, 1, 1, 1]
    ranks = binding_ranks(TINY_LATENT, row.pp, row.vpp, row.stages)
    kept = np.column_stack([ranks.kinds, ranks.embedding, ranks.head, ranks.mtp])
    # What is listed is what those ranks hold, none twice.
    assert (everything[ranks.rank.astype(int)] == kept).all()
    assert len(set(ranks.rank)) == len(ranks.rank)
    for rank, content in enumerate(everything):
        assert any((k >= content).all() and r <= rank for k, r in zip(kept, ranks.rank, strict=True))


@given(unequal_splits(TINY_LATENT, (2, 3, 4)), st.lists(st.floats(0.0, 1.0), min_size=3, max_size=3))
@QUICK
def test_binding_ranks_keep_the_most_in_flight(given_, weights):
    model, row = given_
    chosen = [choose(model, row.pp, row.vpp, row.stages) for choose in (binding_ranks, all_ranks)]
    for steps in (0, 1) if row.vpp > 1 else ():
        few, every = (max((m[steps] @ weights[-m[steps].shape[1] :]).max() for m in ranks.moments) for ranks in chosen)
        assert few == every


def test_ranks_of_equal_sums_bind_by_their_chunks():
    # Ranks 1 and 2 hold four layers each: 1 and 3, 3 and 1. Rank 1 has 5 and 4 micro-batches in flight, 17 layers; rank 2 comes
    # to hold 7 of its first chunk and none of its second, 21.
    model = dataclasses.replace(TINY_LATENT, layers=(LATENT_LAYER,) * 12, mtp=())
    ranks = binding_ranks(model, 4, 2, "Et|t|t*3|t|t|t*3|t|tL")
    assert ranks.rank.tolist() == [0, 1, 2, 3]
    assert [pair[1][:, 0].max() for pair in ranks.moments[1:3]] == [17, 21]


@given(unequal_splits(TINY_LATENT, (1, 2, 3, 4)))
@QUICK
def test_contents_against_the_letters(given_):
    model, row = given_
    chunks = chunk_letters(model, row.pp, row.vpp, row.stages)
    letters = ["".join(chunks[r :: row.pp]) for r in range(row.pp)]
    content = rank_contents(model, row.pp, row.vpp, row.stages)
    assert content[:, -3:].tolist() == [[text.count(x) for x in "ELm"] for text in letters]
    assert content[:, :-3].sum(axis=1).tolist() == [text.count("t") for text in letters]


def test_moments_by_hand():
    # Four ranks of two chunks of 3 and 1 layers: what each rank holds of a round of 4 micro-batches and of longer steps.
    model = dataclasses.replace(TINY_LATENT, layers=(LATENT_LAYER,) * 16, mtp=())
    ranks = all_ranks(model, 4, 2, "Et*3|(t*3|)*3(t|)*3tL")
    assert [[moment[:, 0].tolist() for moment in pair] for pair in ranks.moments] == [
        [[16], [3 * 8 + 3]], [[16], [3 * 8 + 1]], [[15], [3 * 7]], [[13], [3 * 5]],
    ]  # fmt: skip
    assert ranks.loss.tolist() == [3 * 4 + 1, 0]
    # Where all chunks are equal, so are all moments.
    even = all_ranks(model, 4, 2, "")
    assert [[moment.tolist() for moment in pair] for pair in even.moments] == [
        [[[16, 0]], [[2 * 11, 0]]], [[[16, 0]], [[2 * 9, 0]]], [[[14, 0]]] * 2, [[[10, 0]]] * 2,
    ]  # fmt: skip
    assert all_ranks(model, 4, 1, "").moments == () and all_ranks(model, 4, 1, "").loss.tolist() == [4, 0]


@given(row=layouts_of(TINY_LATENT))
@QUICK
def test_every_rank_on_request(row):
    ranks = all_ranks(TINY_LATENT, row.pp, row.vpp, row.stages)
    content = rank_contents(TINY_LATENT, row.pp, row.vpp, row.stages)
    assert ranks.rank.tolist() == list(range(row.pp))
    assert (np.column_stack([ranks.kinds, ranks.embedding, ranks.head, ranks.mtp]) == content).all()
    # Tokens enter once and once more for prediction layers in another chunk; there is one final norm.
    chunks = chunk_letters(TINY_LATENT, row.pp, row.vpp, row.stages)
    assert ranks.copies.sum() == 1 + ("m" not in chunks[0])
    assert ranks.norms.sum() == 1
