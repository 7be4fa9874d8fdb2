"""Parm and FSMoE: counted message volumes and times by vector, and ranks with real tokens for what no table counts."""

import numpy as np
import pytest

from moeplan.costmodels.moe.base import Lines, MoeSize
from moeplan.costmodels.moe.schedules import find_schedule
from tests.costmodels.moe.vectors import FP32, FREE, MS, columns, line, rows_of

PRINTED = 5e-6
"""Half of the last digit of the printed times."""
VOLUMES, TIMES = rows_of("parm_message_volumes"), columns("parm_derived_vectors")
LAYOUTS = {
    "baseP": ["baseline"],
    "baseD": ["replicated-baseline"],
    "S1": ["s1"],
    "S2": ["s2"],
    "FSMoE-H": ["hierarchical", "fsmoe"],
}
KINDS = {"a2a": "DC", "espag": "G", "espar": "A", "esprs": "S", "mpag": "M", "expert_MAC_per_gpu": "E"}


def sized(row, gemms=2):
    """The size of a row of the volumes: one element is one byte, one MAC is one FLOP."""
    slots = row["E"] * row["T"] * row["M"]
    return MoeSize(
        token_bytes=row["BL"] * row["M"],
        slot_bytes=slots,
        expert_flop=gemms * slots * row["H"],
        mp_ranks=row["N_MP"],
        esp_ranks=row["N_ESP"],
        ep_ranks=row["P"] / row["N_ESP"],
    )


@pytest.mark.parametrize("row", VOLUMES, ids=lambda r: "{layout}-{quantity}-{P:g}-{N_MP:g}-{N_ESP:g}-{E:g}".format(**r))
def test_counted_volumes(row):
    for name in LAYOUTS[row["layout"]]:
        for direction, passes in (("forward", 1), ("backward", 2)):
            amounts = find_schedule(name).amounts(sized(row), direction)
            for kind in KINDS[row["quantity"]]:
                expected = row["elements_per_gpu"] * (passes if kind == "E" else 1)
                assert amounts[kind] == pytest.approx(expected, rel=1e-6)


def test_times_by_vector():
    at = {k: np.array(v) for k, v in TIMES.items()}
    token_bytes = at["B"] * at["L"] * at["M"] * FP32
    ranks = {"mp_ranks": at["N_MP"], "esp_ranks": at["N_ESP"], "ep_ranks": at["P"] / at["N_ESP"]}
    size = MoeSize(token_bytes=token_bytes, slot_bytes=at["kf"] * token_bytes, expert_flop=0.0, **ranks)
    exchange, gather = line(at["alpha_a2a"], at["beta_a2a"]), line(at["alpha_ag"], at["beta_ag"])
    lines = Lines(
        exchange=exchange,
        fused_exchange=exchange,
        gather=gather,
        scatter=gather,
        reduce=line(at["alpha_ar"], at["beta_ar"]),
        mp_gather=gather,
        experts=FREE,
    )
    assert (size.all_ranks == at["saa_phases"]).all()
    columns_of = {"baseline": "t_base_ms", "s1": "t_S1_ms", "s2": "t_S2_ms", "hierarchical": "t_hier_serial_ms"}
    took = {}
    for name, column in columns_of.items():
        schedule = find_schedule(name)
        took[name] = schedule.seconds(1, schedule.parts(size, lines, 1, "forward"), size)
        assert took[name] / MS == pytest.approx(at[column], rel=1e-6, abs=PRINTED)
    # The choice; equal without tensor parallelism, where the table says S1.
    assert (np.where(took["s1"] <= took["s2"], "S1", "S2") == at["best_of_S1_S2"]).all()


# ---------------------------------------------------------------- ranks with real tokens


class Ranks:
    """P ranks, each with a copy of its group's slots [E, T, M], a slice of each expert [M, H], [H, M], and a count of bytes."""

    experts, slots, width, hidden = 4, 8, 3, 8

    def __init__(self, p, mp, esp):
        self.p, self.mp, self.esp, self.ep = p, mp, esp, p // esp
        rng = np.random.default_rng(p * 100 + mp * 10 + esp)
        self.tokens = rng.normal(size=(p // mp, self.experts, self.slots, self.width))
        self.up = rng.normal(size=(self.experts, self.width, self.hidden))
        self.down = rng.normal(size=(self.experts, self.hidden, self.width))
        self.counted = {}

    def own(self, rank):
        return self.tokens[rank // self.mp]

    def expected(self, rank):
        return np.maximum(self.own(rank) @ self.up, 0) @ self.down

    def count(self, kind, values):
        assert len({v.size for v in values}) == 1
        self.counted[kind] = values[0].size

    def exchange(self, kind, held):
        """All-to-all of equal slices of the first axis among ranks of the same place in their shard groups."""
        self.count(kind, held)
        out = []
        for rank in range(self.p):
            place, lane = divmod(rank, self.esp)
            slices = [np.split(held[other * self.esp + lane], self.ep)[place] for other in range(self.ep)]
            out.append(np.stack(slices))
        return out

    def gather(self, kind, held, members):
        out = [np.stack([held[m] for m in members(rank)]) for rank in range(self.p)]
        self.count(kind, out)
        return out

    def shards(self, rank):
        return range(rank - rank % self.esp, rank - rank % self.esp + self.esp)

    def compute(self, held):
        """Slices of the local experts over [..., experts of this rank, slots, M]; counts multiply-adds."""
        out, local = [], self.experts // self.ep
        for rank, x in enumerate(held):
            place, lane = divmod(rank, self.esp)
            mine = slice(place * local, (place + 1) * local)
            up = np.split(self.up[mine], self.esp, axis=2)[lane]
            down = np.split(self.down[mine], self.esp, axis=1)[lane]
            out.append(np.maximum(x @ up, 0) @ down)
        self.counted["E"] = held[0].size * 2 * self.hidden // self.esp
        return out

    def reduce(self, held):
        self.count("A", held)
        return [sum(held[m] for m in self.shards(rank)) for rank in range(self.p)]

    def back(self, held):
        """The inverse of `exchange`: [places, slice, ...] to [all slices, ...]."""
        self.count("C", held)
        out = []
        for rank in range(self.p):
            place, lane = divmod(rank, self.esp)
            out.append(np.concatenate([held[other * self.esp + lane][place] for other in range(self.ep)]))
        return out


def deepspeed(ranks):
    share = [np.split(ranks.own(r), ranks.mp, axis=1)[r % ranks.mp] for r in range(ranks.p)]
    arrived = ranks.gather("G", ranks.exchange("D", share), ranks.shards)
    summed = ranks.reduce(ranks.compute(arrived))
    sent = ranks.back([x[r % ranks.esp] for r, x in enumerate(summed)])
    group = ranks.gather("M", sent, lambda r: range(r - r % ranks.mp, r - r % ranks.mp + ranks.mp))
    return [np.concatenate(list(x), axis=1) for x in group]


def replicated(ranks):
    """Shards in one group hold the same slots; of several groups one rank each gathers, which all ranks then have."""
    groups = max(1, ranks.esp // ranks.mp)
    held = ranks.gather("G", [ranks.own(r) for r in range(ranks.p)], lambda r: ranks.shards(r)[:: ranks.mp])
    joined = [np.concatenate(list(x), axis=1) for x in held]
    summed = ranks.reduce(ranks.compute(ranks.exchange("D", joined)))
    out = ranks.back(summed)
    return [np.split(x, groups, axis=1)[r % ranks.esp // ranks.mp % groups] for r, x in enumerate(out)]


@pytest.mark.parametrize(
    "p, mp, esp", [(8, 2, 2), (8, 4, 2), (8, 2, 4), (8, 4, 4), (4, 2, 1), (4, 4, 1), (4, 1, 2), (4, 1, 1), (8, 1, 4)]
)
@pytest.mark.parametrize("name, run", [("deepspeed", deepspeed), ("replicated-baseline", replicated)])
def test_ranks_with_real_tokens(name, run, p, mp, esp):
    ranks = Ranks(p, mp, esp)
    for rank, out in enumerate(run(ranks)):
        assert out == pytest.approx(ranks.expected(rank))
    slots = ranks.experts * ranks.slots * ranks.width
    # Slots are gathered here where the layer gathers tokens, as if each token had one slot.
    size = MoeSize(
        token_bytes=slots, slot_bytes=slots, expert_flop=2 * slots * ranks.hidden, mp_ranks=mp, esp_ranks=esp, ep_ranks=ranks.ep
    )
    amounts = find_schedule(name).amounts(size, "forward")
    assert amounts == pytest.approx(ranks.counted)
