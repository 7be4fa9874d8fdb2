"""Baselines and robustness on the terminal and as data."""

import json
from pathlib import Path

from tests.cli.conftest import Moeplan, question

ASKED = question(model="mixtral-8x22b", cluster="h100x128", global_batch=256)


def test_solve_shows_the_obvious_layouts_in_few_lines(moeplan: Moeplan) -> None:
    end = moeplan("solve", *ASKED)
    below = end.out.split("beside the obvious layouts")[1].split("step time")[0].strip().splitlines()
    assert end.code == 0 and below[0].split() == ["layout", "degrees", "step", "why", "not"]
    rows = [line for line in below[1:] if not line.startswith(" ")]
    rows = [r for r in rows if "  " in r]  # a long name goes on in the next line
    assert [r.split("  ")[0] for r in rows[:2]] == ["widest EP, least TP", "EP inside a domain, least PP"]
    assert rows[2].startswith("MoE Parallel Folding") and len(rows) == 3
    assert "it is this plan" in rows[0] and "recompute +" in rows[1]


def test_data_has_all_of_it(moeplan: Moeplan, tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    data = json.loads(moeplan("solve", *ASKED, "--json", "-o", path).out)
    best = data["plans"][0]
    assert [b["name"] for b in best["baselines"]][0] == "widest EP, least TP" and len(best["baselines"]) == 3
    assert all("baselines" not in p for p in data["plans"][1:])
    assert len(data["robustness"]) == len(data["plans"])
    for one in data["robustness"]:
        assert 0.0 <= one["out_of_memory"] <= 1.0 and one["regret"] >= 0.0 and one["routing"][0]["routing"] == "balanced"
    explained = json.loads(moeplan("explain", path, "--json").out)
    assert explained["baselines"] == best["baselines"]
    assert explained["robustness"]["out_of_memory"] == data["robustness"][0]["out_of_memory"]


def test_explain_shows_other_routing_and_the_risk(moeplan: Moeplan, tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    moeplan("solve", *ASKED, "-o", path)
    out = moeplan("explain", path).out
    for text in (
        "beside the obvious layouts",
        "under other routing",
        "99 of 100 steps",
        "probability of running out of memory",
    ):
        assert text in out
    assert "expected loss against the best of the 5 plans" in out


def test_a_column_of_risk_only_where_it_says_something(moeplan: Moeplan) -> None:
    assert "OOM risk" in moeplan("solve", *ASKED).out and "OOM risk" not in moeplan("solve", *question()).out


def test_a_plan_on_a_cliff_is_said_to_be_one(moeplan: Moeplan) -> None:
    tight = [*question(model="llama3-70b", cluster="h100x64", global_batch=128, seq_len=8192), "--top", "1"]
    tight += ["--pin", "tp=8", "--pin", "pp=4", "--pin", "cp=1"]
    alone = [word for pin in ("recompute=none", "optimizer_offload=0", "micro_batch=2", "vpp=11") for word in ("--pin", pin)]
    end = moeplan("solve", *tight, *alone)
    assert "note: on a cliff: it runs out of memory with a probability of " in end.err
    limit = end.err.split("ask with --memory-limit ")[1].split()[0]
    again = moeplan("solve", *tight, "--memory-limit", limit)
    assert again.code == 0 and "on a cliff" not in again.err
