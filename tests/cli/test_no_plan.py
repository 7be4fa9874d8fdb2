"""`moeplan solve` where no plan fits: conditions that conflict are named, and only where they are the reason."""

import json

import pytest

from tests.cli.conftest import Moeplan, question


def test_conflicting_conditions_are_named_alone(moeplan: Moeplan) -> None:
    end = moeplan("solve", *question(), "--pin", "recompute=none", "--pin", "tp=4", "--pin", "pp=4", "--forbid", "ep>4")
    assert (end.code, end.out) == (3, "")
    assert end.err == (
        "no plan fits: tp=4 and pp=4 leave no layout of mixtral-8x7b-4l-proxy on 8 GPUs: tp*pp = 4*4 = 16 does not divide the "
        "8 GPUs; without either there is a plan\n"
    )


def test_what_memory_forbids_says_by_how_much_and_how_many_gpus_would_do(moeplan: Moeplan) -> None:
    asked = [*question(model="mixtral-8x7b", cluster="h100x16", global_batch=32), "--forbid", "optimizer_offload>0"]
    pins = ("tp=1", "pp=1", "etp=1", "recompute=none")
    end = moeplan("solve", *asked, *(part for pin in pins for part in ("--pin", pin)))
    conflict = "tp=1, pp=1, etp=1 and forbidden optimizer_offload>0"
    assert end.code == 3 and end.err.startswith(f"no plan fits: {conflict} leave no layout of mixtral-8x7b on 16 GPUs")
    assert " that fits: the smallest misses the 79.6 GiB of a H100 by " in end.err
    assert end.err.endswith("; without any one of them there is a plan; 32 GPUs would do\n") and end.err.count("\n") == 1


def test_conflict_as_data(moeplan: Moeplan) -> None:
    asked = ["--pin", "pp=1", "--pin", "vpp=2", "--forbid", "tp=8", "--json"]
    data = json.loads(moeplan("solve", *question(), *asked).out)
    assert (data["status"], data["plans"]) == ("infeasible", [])
    assert data["conflict"] == {
        "conditions": ["pp=1", "vpp=2"], "rules": ["virtual-stages"], "excess_bytes": None, "enough_to_drop": ["pp=1", "vpp=2"],
        "smallest": True,
    }  # fmt: skip
    assert "conflict" not in json.loads(moeplan("solve", *question(), "--json").out)


@pytest.mark.parametrize("pins", ([], ["--pin", "tp=1", "--forbid", "ep=8"], ["--pin", "tp=3"]))
def test_conditions_are_not_blamed_for_what_memory_alone_forbids(moeplan: Moeplan, pins: list[str]) -> None:
    end = moeplan("solve", *question(model="mixtral-8x7b", memory_limit="35GiB"), *pins, "--json")
    assert json.loads(end.out)["conflict"] is None and "tp=" not in end.err and "ep=" not in end.err
    begins = "even without conditions " * bool(pins)
    assert end.err.startswith(f"no plan fits: {begins}the best layout of mixtral-8x7b misses the 35.0 GiB of a H100 by ")
    assert end.err.endswith("; 16 GPUs would do\n")


def test_conflicts_of_a_cluster_that_may_shrink_are_those_of_all_its_gpus(moeplan: Moeplan) -> None:
    sizes = ["--objective", "cost", "--price-per-gpu-hour", "1", "--pin", "tp=3"]
    end = moeplan("solve", *question(cluster="h100x16"), *sizes)
    assert end.code == 3 and end.err.startswith("no plan fits: no size from 8 to 16 GPUs will do: tp=3 leaves no layout of ")
