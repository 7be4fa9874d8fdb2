"""Output of nccl-tests as samples, and as curves of a profile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from moeplan.errors import ClusterError, FileError, UnknownNameError
from moeplan.profiles.hardware import Cluster, load_cluster
from moeplan.profiles.imports.nccl_tests import OPERATIONS, collective_samples, read_runs, with_collectives
from moeplan.profiles.nominal import nominal
from moeplan.profiles.samples import Sample
from tests.profiles.imports.nccl_output import SIZES, output, usual_us

H100 = load_cluster("h100x64")
RACK = load_cluster("gb200x144")


def file(tmp_path: Path, text: str, name: str = "run.txt") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def samples(path: Path, cluster: Cluster = H100, op: str = "") -> list[Sample]:
    return collective_samples(read_runs(path, op), cluster)


@pytest.mark.parametrize("program", OPERATIONS)
@pytest.mark.parametrize("old", [False, True])
def test_every_program_and_form(tmp_path: Path, program: str, old: bool) -> None:
    found = samples(file(tmp_path, output(program, old=old)))
    assert {(s.op, s.group, s.key) for s in found} == {(OPERATIONS[program], "8/1", "bf16")}
    assert [s.sizes["message_bytes"] for s in found] == list(SIZES)
    for sample in found:  # out of place, not in place
        assert sample.seconds == pytest.approx(usual_us(sample.sizes["message_bytes"]) * 1e-6, rel=1e-3)
    assert found[0].how == "nccl-tests, float"


@pytest.mark.parametrize(
    ("cluster", "hosts", "per_host", "group"),
    [
        (H100, ["a"], 4, "4/1"),
        (H100, ["a", "b"], 8, "16/2"),
        (H100, ["a", "b", "c", "d"], 1, "4/4"),
        (RACK, [f"t{i}" for i in range(18)], 4, "72/1"),
        (RACK, [f"t{i}" for i in range(36)], 1, "36/2"),
        (replace(H100, domain_gpus=2), ["a"], 8, "8/4"),
    ],
)
def test_groups_and_domains(tmp_path: Path, cluster: Cluster, hosts: Sequence[str], per_host: int, group: str) -> None:
    text = output("all_gather", hosts=hosts, per_host=per_host, device="")
    assert {s.group for s in samples(file(tmp_path, text), cluster)} == {group}


def test_groups_that_work_at_once(tmp_path: Path) -> None:
    """With a split communicator each group has one rank of every host; busbw then counts in a way of its own."""
    text = output("all_reduce", hosts=["a", "b"], groups=8)
    assert {s.group for s in samples(file(tmp_path, text))} == {"2/2"}


@pytest.mark.parametrize("prefix", ["[1,0]<stdout>:", "0: ", ""])
def test_prefixes_and_lines_between(tmp_path: Path, prefix: str) -> None:
    text = output(prefix=prefix).replace(
        "# Using", f"{prefix}node01:4000:4000 [0] NCCL INFO NCCL version 2.27.3+cuda12.9\n# Using"
    )
    found = samples(file(tmp_path, text))
    assert len(found) == len(SIZES) and found[0].how == "nccl-tests, nccl 2.27.3, float"


def test_version_in_one_number(tmp_path: Path) -> None:
    text = "# nccl-tests version 2.17.4 nccl-headers=22809 nccl-library=22809\n" + output()
    assert samples(file(tmp_path, text))[0].how == "nccl-tests, nccl 2.28.9, float"


def test_several_runs_in_a_file_and_repeats(tmp_path: Path) -> None:
    slower = output("all_gather", time_us=lambda size: 1.2 * usual_us(size))
    text = output("all_gather") + slower + output("alltoall")
    found = samples(file(tmp_path, text))
    assert {s.op for s in found} == {"all_gather", "all_to_all"} and len(found) == 2 * len(SIZES)
    twice = next(s for s in found if s.op == "all_gather")
    assert len(twice.times_s) == 2 and twice.spread == pytest.approx(0.1 / 1.1, rel=1e-2)
    assert twice.seconds == pytest.approx(1.1 * usual_us(SIZES[0]) * 1e-6, rel=1e-3)


def test_operation_from_command_line_name_or_option(tmp_path: Path) -> None:
    bare = output("reduce_scatter", announced=False)
    assert samples(file(tmp_path, "+ mpirun ./build/reduce_scatter_perf -b 4K\n" + bare))[0].op == "reduce_scatter"
    assert samples(file(tmp_path, bare, "reduce-scatter_8gpus.log"))[0].op == "reduce_scatter"
    assert samples(file(tmp_path, bare), op="reduce_scatter")[0].op == "reduce_scatter"
    both = (
        "+ ./all_gather_perf\n"
        + output("all_gather", announced=False)
        + "+ ./alltoall_perf\n"
        + output("alltoall", announced=False)
    )
    assert {s.op for s in samples(file(tmp_path, both))} == {"all_gather", "all_to_all"}
    with pytest.raises(FileError, match="run at line 1: which operation it is the output does not say") as caught:
        read_runs(file(tmp_path, bare))
    assert "--op" in str(caught.value)
    with pytest.raises(UnknownNameError, match="all_redcue"):
        read_runs(file(tmp_path, bare), "all_redcue")


def test_small_messages_and_empty_ones_are_left_out(tmp_path: Path) -> None:
    found = samples(file(tmp_path, output(sizes=[0, 8, 2048, 4096, 8192], time_us=lambda _: 10.0)))
    assert [s.sizes["message_bytes"] for s in found] == [4096, 8192]
    with pytest.raises(FileError, match="no message of 4096 bytes or more"):
        samples(file(tmp_path, output(sizes=[8, 2048])))


def test_in_place_where_out_of_place_is_not_given(tmp_path: Path) -> None:
    lines = output(sizes=[2**20]).splitlines()
    at = next(i for i, line in enumerate(lines) if line.lstrip().startswith("1048576"))
    words = lines[at].split()
    lines[at] = " ".join([*words[:5], *["N/A"] * 4, *words[9:]])
    (sample,) = samples(file(tmp_path, "\n".join(lines)))
    assert sample.seconds == pytest.approx(float(words[9]) * 1e-6)


def broken(tmp_path: Path, old: str, new: str, text: str = "") -> str:
    """The complaint about an output in which the row of 1 MiB was changed."""
    lines = (text or output()).splitlines()
    at = next(i for i, line in enumerate(lines) if line.lstrip().startswith("1048576"))
    assert old in lines[at]
    lines[at] = lines[at].replace(old, new, 1)
    with pytest.raises(FileError) as caught:
        read_runs(file(tmp_path, "\n".join(lines) + "\n"))
    assert f"line {at + 1}:" in str(caught.value)
    return str(caught.value)


def test_corrupt_rows(tmp_path: Path) -> None:
    row = next(line for line in output().splitlines() if line.lstrip().startswith("1048576"))
    words = row.split()
    assert "9 columns, 11 to 13 are expected" in broken(tmp_path, row, " ".join(words[:9]))
    assert "1 columns" in broken(tmp_path, row, words[0])
    assert "is not a row of results" in broken(tmp_path, words[5], "1x.2")
    assert "algbw is" in broken(tmp_path, f"{words[5]} ", f"{float(words[5]) * 3:.5g} ")
    assert "a time of 0 us" in broken(tmp_path, f"{words[5]} ", "0.00 ")
    assert "3 wrong values" in broken(tmp_path, "      0 ", "      3 ")


def test_busbw_of_another_operation_or_group(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="busbw is 1.75 of algbw, 0.875 is that of all_gather among 8 ranks"):
        read_runs(file(tmp_path, output("all_reduce")), "all_gather")
    text = output("all_gather").replace("#  Rank  7", "#  nothing")
    with pytest.raises(FileError, match="busbw is 0.875 of algbw, 0.857"):
        read_runs(file(tmp_path, text))


def test_ranks_that_cannot_be(tmp_path: Path) -> None:
    text = output()
    with pytest.raises(FileError, match="no line '# Rank 0"):
        read_runs(file(tmp_path, "".join(line for line in text.splitlines(True) if "Rank" not in line)))
    with pytest.raises(FileError, match="no line '# Rank 3"):
        read_runs(file(tmp_path, text.replace("Rank  3", "Rnk  3")))
    with pytest.raises(FileError, match="rank 2 stands twice"):
        read_runs(file(tmp_path, text.replace("Rank  3", "Rank  2")))
    with pytest.raises(FileError, match="groups of 1 ranks"):
        read_runs(file(tmp_path, output(per_host=1)))
    with pytest.raises(FileError, match="groups of 2 and 6 ranks"):
        read_runs(
            file(
                tmp_path,
                text.replace("Group  0 Pid 4000", "Group  1 Pid 4000").replace("Group  0 Pid 4001", "Group  1 Pid 4001"),
            )
        )
    with pytest.raises(ClusterError, match="8 ranks on one host, GB200x144 has 4 GPUs a node"):
        samples(file(tmp_path, text), RACK)


def test_files_without_results(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="has no row of results"):
        read_runs(file(tmp_path, output(sizes=[])))
    with pytest.raises(FileError, match="is JSON"):
        read_runs(file(tmp_path, '{"config": {}}'))
    with pytest.raises(FileError, match="is of broadcast"):
        read_runs(file(tmp_path, output("all_gather").replace("all_gather_perf", "broadcast_perf")))
    with pytest.raises(FileError, match="does not exist"):
        read_runs(tmp_path / "none.txt")


def test_a_profile_with_measured_collectives(tmp_path: Path) -> None:
    usual = nominal(H100)
    inside = samples(file(tmp_path, output("all_to_all".replace("_to_", "to"), time_us=lambda size: 5 * usual_us(size))))
    profile = with_collectives(usual, inside, "NVIDIA H100 80GB HBM3")
    for size in (2.0**16, 2.0**23, 2.0**29):
        assert profile.collective_s("all_to_all", size, 8) == pytest.approx(5e-6 * usual_us(size), rel=1e-3)
        assert profile.collective_s("all_to_all", size, 4) == usual.collective_s("all_to_all", size, 4)
        assert profile.collective_s("all_gather", size, 8) == usual.collective_s("all_gather", size, 8)
    assert profile.origins["collectives/all_to_all of 8"].measured
    assert profile.origins["gemm/bf16"].note.startswith("not measured in this run, nominal: ")
    assert profile.gemms == usual.gemms and profile.ring_share == usual.ring_share


def test_links_between_nodes_from_the_output(tmp_path: Path) -> None:
    """A ring between hosts at 30 GB/s a GPU and 20 us a hop is found again, for groups that nobody measured as well."""
    hosts = ["a", "b", "c", "d"]

    def ring_us(size: float) -> float:
        return size * (1 - 1 / 4) / 30e3 + 3 * 20.0

    text = output("all_gather", hosts=hosts, per_host=1, time_us=ring_us, sizes=SIZES[4:])
    profile = with_collectives(nominal(H100), samples(file(tmp_path, text)))
    assert profile.scale_out_bytes_per_s == pytest.approx(30e9, rel=0.02)
    assert profile.scale_out_latency_s == pytest.approx(20e-6, rel=0.05)
    assert profile.across_s("all_gather", 2.0**26, 4, 4, 0.0) == pytest.approx(ring_us(2.0**26) * 1e-6, rel=1e-3)
    assert profile.origins["multi_node/all_gather of 4/4"].measured and profile.origins["links/ring"].measured


def test_another_machine_is_noticed(tmp_path: Path) -> None:
    found = samples(file(tmp_path, output()))
    with pytest.raises(ClusterError, match="the output is of NVIDIA H200, H100x64 has H100"):
        with_collectives(nominal(H100), found, "NVIDIA H200")
    fast = output("all_gather", hosts=["a", "b"], per_host=1, time_us=lambda size: 5.0 + size / 400e3)
    profile = with_collectives(nominal(H100), samples(file(tmp_path, fast)), "a device of the future")
    assert profile.measured_on is not None
    assert any("is H100x64 the cluster it ran on?" in text for text in profile.measured_on.remarks)
