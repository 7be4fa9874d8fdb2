"""Who the ranks are, and that all of them end together, whatever happens to one."""

from __future__ import annotations

import itertools
import os
import signal
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplan.errors import DeviceError, UsageError
from moeplan.profiles.cases import UnsupportedCase, groups
from moeplan.profiles.ranks import Rank, first_host, placement, this_rank
from moeplan.profiles.world import _layout, environment_of, join
from tests.profiles import launching

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "7"}
SRUN = {"SLURM_PROCID": "9", "SLURM_NTASKS": "16", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_ID": "0"}


def test_alone() -> None:
    assert this_rank({}) == Rank() and this_rank({}).ranks == 1


def test_torchrun() -> None:
    expected = Rank(rank=5, ranks=8, local_rank=1, node=1, address="a", port=7)
    assert this_rank(TORCHRUN) == expected
    agent = this_rank(
        {**TORCHRUN, "GROUP_RANK": "3", "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "2"}
    )
    assert (agent.node, agent.hosted, agent.attempt) == (3, True, "2")


def test_srun() -> None:
    rank = this_rank({**SRUN, "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_JOB_ID": "123"})
    assert (rank.rank, rank.ranks, rank.local_rank, rank.node, rank.address) == (9, 16, 1, 1, "gpu07")
    assert rank.port == this_rank({**SRUN, "SLURM_JOB_NODELIST": "b", "SLURM_JOB_ID": "123"}).port != 29500
    chosen = this_rank({**SRUN, "MASTER_ADDR": "x", "MASTER_PORT": "9"})
    assert (chosen.address, chosen.port) == ("x", 9)


def test_a_batch_script_is_no_rank() -> None:
    assert this_rank({name: value for name, value in SRUN.items() if name != "SLURM_STEP_ID"}) == Rank()


@pytest.mark.parametrize(
    ("environment", "word"),
    [
        ({**TORCHRUN, "RANK": "x"}, "RANK='x'"),
        ({**TORCHRUN, "RANK": "8"}, "rank 8 of 8"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR"),
        (SRUN, "names no nodes"),
        ({**SRUN, "MASTER_ADDR": "x", "SLURM_LOCALID": ""}, "SLURM_LOCALID"),
    ],
)
def test_a_broken_environment_is_refused(environment: dict[str, str], word: str) -> None:
    with pytest.raises(DeviceError, match=word):
        this_rank(environment)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("n1", "n1"), ("n1,n2", "n1"), ("gpu[003-010,17],x", "gpu003"), ("r[1-2]n[04,07]", "r1n04"), ("a-b[9]", "a-b9"), ("", "")],
)
def test_first_host(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        ("2/1", ((0, 1), (2, 3), (4, 5), (6, 7))),
        ("4/1", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("2/2", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("4/2", ((0, 1, 4, 5), (2, 3, 6, 7))),
        ("8/2", ((0, 1, 2, 3, 4, 5, 6, 7),)),
        ("3/1", ((0, 1, 2), (4, 5, 6))),
    ],
)
def test_placement(group: str, expected: tuple[tuple[int, ...], ...]) -> None:
    assert placement(8, 4, group) == expected


@given(st.integers(1, 6), st.integers(1, 6))
def test_placements_are_disjoint_and_even(domains: int, per_domain: int) -> None:
    ranks = domains * per_domain
    for name in groups(ranks, per_domain):
        size, crossed = map(int, name.split("/"))
        found = placement(ranks, per_domain, name)
        members = [rank for group in found for rank in group]
        assert found and len(members) == len(set(members)) and max(members) < ranks
        for group in found:
            of_domains = [rank // per_domain for rank in group]
            assert len(group) == size and group == tuple(sorted(group))
            assert [of_domains.count(d) for d in sorted(set(of_domains))] == [size // crossed] * crossed


def test_a_placement_that_does_not_fit() -> None:
    with pytest.raises(DeviceError, match="3 domains with 1 ranks each, there are 2 domains of 4"):
        placement(8, 4, "3/3")
    for name in ("8", "1/1", "4/3", "2/0", "a/b"):
        with pytest.raises(UsageError):
            placement(8, 4, name)


SERIAL = itertools.count()


def fact(node: int, host: str = "h", device: str = "cpu", uuid: str = "") -> dict[str, Any]:
    return {"node": node, "host": host, "device": device, "uuid": uuid or str(next(SERIAL))}


def test_order_of_ranks_on_nodes() -> None:
    good = [fact(0), fact(0), fact(7, "i"), fact(7, "i")]
    assert _layout(good) == {"nodes": 2, "per_node": 2, "shared": {"h": 2, "i": 2}}
    with pytest.raises(DeviceError, match="rank 1 is on node 1") as error:
        _layout([fact(0), fact(1), fact(0), fact(1)])
    assert "--distribution=block" in str(error.value)
    with pytest.raises(DeviceError, match="2 on node 0, 1 on node 1"):
        _layout([fact(0), fact(0), fact(1)])
    with pytest.raises(DeviceError, match="1 ranks on A, 1 ranks on B"):
        _layout([fact(0, device="A"), fact(0, device="B")])
    with pytest.raises(DeviceError, match="2 ranks share one GPU"):
        _layout([fact(0, device="A", uuid="u"), fact(0, device="A", uuid="u")])


def test_a_world_of_one() -> None:
    before = signal.getsignal(signal.SIGINT)
    world = join("cpu", environment={})
    try:
        assert (world.rank, world.ranks, world.nodes, world.per_node, world.library) == (0, 1, 1, 1, "")
        assert world.agree(3) == [3] and world.first("one", lambda: {"a": 1}) == {"a": 1}
        with pytest.raises(DeviceError, match=r"this process failed at a step: ValueError: why"):
            world.collect("a step", lambda: raising(ValueError("why\nnot")), list)
        with pytest.raises(UnsupportedCase, match="no"):
            world.collect("a step", lambda: raising(UnsupportedCase("no")), list)
        with pytest.raises(UsageError, match="mine"):
            world.collect("a step", lambda: raising(UsageError("mine")), list)
        with pytest.raises(DeviceError, match="a block"), world.together("a block"):
            raise KeyError("k")
        assert world.agree(None) == [None] and not world.stopped
        os.kill(os.getpid(), signal.SIGINT)
        world.agree(None)
        assert world.stopped
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            world.agree(None)
        facts = environment_of(world, "here")
        assert (facts.backend, facts.ranks, facts.communication, facts.cluster) == ("cpu", 1, "", "here")
        assert facts.memory_bytes == facts.host_memory_bytes > 0 and facts.processors >= 1 and facts.device and facts.when
    finally:
        world.leave()
    assert signal.getsignal(signal.SIGINT) is before


def raising(error: Exception) -> None:
    raise error


def test_no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(DeviceError, match="needs torch, which is not installed") as error:
        join(environment={})
    assert error.value.hint == "pip install 'moeplan[profile]'"


def test_no_gpu() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(DeviceError, match="--device cuda: torch .* sees no GPU"):
        join("cuda", environment={})


def test_ranks_know_their_places() -> None:
    assert [said["world"] for said in launching.scene("two", 2).said] == [
        [0, 2, 0, 0, 1, 2, "gloo"],
        [1, 2, 1, 0, 1, 2, "gloo"],
    ]
    found = [said["world"] for said in launching.scene("four", 4, 2).said[:3]]
    assert found == [[0, 4, 0, 0, 2, 2, "gloo"], [1, 4, 1, 0, 2, 2, "gloo"], [2, 4, 0, 1, 2, 2, "gloo"]]


def test_agreement() -> None:
    for said in launching.scene("two", 2).said:
        assert (said["agreed"], said["sum"], said["unsupported"], said["block"]) == ([0, 10], 3, "not this one", True)


def one_message(ended: launching.Ended, teller: int) -> str:
    """The message that all ranks have; one of them is to tell it."""
    messages = {said["error"] for said in ended.said if said}
    assert len(messages) == 1
    assert [rank for rank, said in enumerate(ended.said) if said and not said["elsewhere"]] == [teller]
    return messages.pop()


def test_a_rank_that_fails_ends_all_with_one_message() -> None:
    ended = launching.scene("two", 2)
    assert ended.codes == [1, 1]
    message = one_message(ended, teller=0)
    assert message.startswith("rank 1 (") and message.endswith(") failed at the last block: ValueError: no luck")


def test_a_library_that_fails_on_one_rank() -> None:
    ended = launching.scene("library", 2)
    assert ended.codes == [1, 1]
    message = one_message(ended, teller=0)
    assert message.startswith("rank 1 (") and message.endswith(
        "at start of gloo: RuntimeError: NCCL error: unhandled system error"
    )


def test_a_rank_that_hangs() -> None:
    ended = launching.scene("hang", 2)
    assert ended.codes[0] == 1
    assert "rank 1 (" in ended.said[0]["error"] and "does not answer at the end of exchange of values" in ended.said[0]["error"]


def test_rank_0_dies_under_srun() -> None:
    ended = launching.scene("orphan", 2, 2, "srun")
    assert ended.codes == [-signal.SIGKILL, 1]
    assert "rank 0 (" in one_message(ended, teller=1)
    assert ended.said[1]["world"] == [1, 2, 0, 1, 2, 1, "gloo"]


def test_a_rank_that_dies() -> None:
    ended = launching.scene("four", 4, 2)
    assert ended.codes == [1, 1, 1, -signal.SIGKILL]
    died = [said["died"] for said in ended.said[:3]]
    assert len({d["failure"] for d in died}) == 1 and "rank 3 (" in died[0]["failure"]
    assert [d["elsewhere"] for d in died] == [False, True, True]
    assert died[0]["ended"] == "failed" and died[0]["logged"] == len(died[0]["samples"]) == 2, (
        "what was measured before is kept"
    )


def test_a_stop_on_one_rank_stops_all() -> None:
    for said in launching.scene("four", 4, 2).said[:3]:
        assert (said["stopped"]["ended"], said["stopped"]["left"]) == ("interrupted", 2)
