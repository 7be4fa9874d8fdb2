"""`moeplan solve`: what it prints, writes and returns."""

import json
from pathlib import Path

import pytest
import yaml

from moeplan.planner.plan import load_plan
from tests.cli.conftest import Moeplan, question


def test_a_table_the_shares_and_the_certificate(moeplan: Moeplan) -> None:
    end = moeplan("solve", *question(top=2))
    assert (end.code, end.err) == (0, "")
    assert "mixtral-8x7b-4l-proxy on H100x8, 16 x 4096 tokens, bf16, era " in end.out
    for text in ("step time", "layers/expert GEMM", "peak memory by pipeline stage", "gap 0%", "passed over: "):
        assert text in end.out
    assert [line[0] for line in end.out.splitlines() if line[:2] in ("1 ", "2 ", "3 ")] == ["1", "2"]


def test_json_is_data_alone(moeplan: Moeplan) -> None:
    end = moeplan("solve", *question(top=2), "--json")
    data = json.loads(end.out)
    assert (end.code, end.err, data["status"]) == (0, "", "optimal")
    assert data["considered"] == sum(data["rejected"].values()) + data["priced"]
    assert len(data["plans"]) == 2 and data["plans"][0]["schema"] == "moeplan.plan/1"
    assert data["tied"] == [1] * data["plans"][0]["runners_up"][0].get("tie", False)


def test_the_best_plan_goes_to_a_file(moeplan: Moeplan, tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    shown = json.loads(moeplan("solve", *question(), "-o", path, "--json").out)["plans"][0]
    plan = load_plan(path)
    assert shown["layout"] == yaml.safe_load(path.read_text())["layout"] == yaml.safe_load(plan.text())["layout"]
    end = moeplan("solve", *question(), "-o", path)
    assert f"plan written to {path}; next: moeplan export {path} --to megatron -d launch" in end.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plan.yaml"]


def test_pins_and_forbids(moeplan: Moeplan) -> None:
    end = moeplan("solve", *question(), "--pin", "tp=2", "--pin", "recompute=none", "--forbid", "ep>4", "--top", "9", "--json")
    layouts = [p["layout"] for p in json.loads(end.out)["plans"]]
    assert layouts and all(x["tp"] == 2 and x["ep"] <= 4 and "recompute" not in x for x in layouts)


def test_refined_plans_are_faster_and_say_so(moeplan: Moeplan, tmp_path: Path) -> None:
    # The head of a small model with a large vocabulary weighs as much as layers do, which the search's splits see as FLOP only.
    asked = [*question(model="qwen3-30b-a3b", cluster="h100x64", global_batch=512), "--pin", "pp=8", "--pin", "vpp=1"]
    plain, path = json.loads(moeplan("solve", *asked, "--no-refine", "--json").out)["plans"], tmp_path / "plan.yaml"
    refined = json.loads(moeplan("solve", *asked, "--json", "-o", path).out)["plans"]
    assert min(p["predicted"]["step_s"] for p in refined) < min(p["predicted"]["step_s"] for p in plain)
    proof = refined[0]["certificate"]
    assert proof["pipelines"] > 0 and proof["opened"] > 0 and proof["gap"] == 0 and proof["status"] == "optimal"
    plan = load_plan(path)
    assert plan.layout.stages == refined[0]["layout"]["stages"]
    assert plan.certificate is not None and plan.certificate.pipelines == proof["pipelines"]
    assert "splits of" in moeplan("explain", path).out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--no-refine", "--gap", "0.01"], "--gap does not go with --no-refine"),
        (["--no-refine", "--jobs", "2"], "--jobs does not go with --no-refine"),
        (["--refine", "--gap", "2"], "2 is not between 0 and 1 (100%)"),
        (["--refine", "--gap", "much"], "'much' is not a share"),
        (["--refine", "--time-limit", "0s"], "a time above 0 is needed"),
        (["--refine", "--objective", "gpus", "--target-step-time", "9s"], "--refine does not go with --objective gpus"),
    ],
)
def test_refinement_is_asked_for_in_full(moeplan: Moeplan, options: list[str], words: str) -> None:
    end = moeplan("solve", *question(), *options)
    assert end.code == 2 and words in end.err


def test_options_reach_the_plan(moeplan: Moeplan, tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    more = {"precision": "fp8-cs", "era": "te-2024", "gradients": "bf16", "moments": "bf16", "imbalance": 1.2,
            "memory_limit": "60GiB", "price_per_gpu_hour": 2.5}  # fmt: skip
    assert moeplan("solve", *question(**more), "-o", path).code == 0
    plan = load_plan(path)
    work = plan.problem.workload
    assert (work.precision.name, work.era.name, work.gradient_bytes, work.moment_bytes, work.imbalance) == (
        "fp8-cs", "te-2024", 2, 2, 1.2,
    )  # fmt: skip
    assert plan.problem.device_bytes == 60 * 2**30 and plan.problem.profile.cluster.price_per_gpu_hour == 2.5


def test_without_prediction_layers(moeplan: Moeplan, tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    model = "deepseek-v3-2l-proxy"
    whole = json.loads(moeplan("solve", *question(model=model), "--json").out)["plans"][0]["predicted"]["step_s"]
    assert moeplan("solve", *question(model=model), "--no-mtp", "-o", path).code == 0
    plan = load_plan(path)
    assert plan.problem.model.mtp == () and plan.step_s < whole
    end = moeplan("solve", *question(), "--no-mtp")
    assert "note: mixtral-8x7b-4l-proxy has no prediction layers; --no-mtp changes nothing" in end.err


@pytest.mark.parametrize("target", (["--target-step-time", "400ms"], ["--target-tokens-per-s", "160000"]))
def test_fewest_gpus(moeplan: Moeplan, target: list[str]) -> None:
    end = moeplan("solve", *question(cluster="h100x32"), "--objective", "gpus", *target, "--json")
    plans = json.loads(end.out)["plans"]
    assert {p["layout"]["world"] for p in plans} <= {8, 16, 24, 32}
    assert all(p["predicted"]["step_s"] <= 0.4096 for p in plans)


def test_least_cost_shows_sizes_and_prices(moeplan: Moeplan) -> None:
    end = moeplan("solve", *question(cluster="h100x24", global_batch=48), "--objective", "cost", "--price-per-gpu-hour", "2")
    assert end.code == 0 and "per 10^12 tok" in end.out
    data = moeplan(
        "solve", *question(cluster="h100x24", global_batch=48), "--objective", "cost", "--price-per-gpu-hour", "2", "--json"
    )
    plans = json.loads(data.out)["plans"]
    spent = [p["layout"]["world"] * p["predicted"]["step_s"] for p in plans]
    tied = {0, *json.loads(data.out)["tied"]}
    assert all(a <= b for (i, a), b in zip(enumerate(spent), spent[1:], strict=False) if i not in tied)
    assert max(spent[i] for i in tied) <= 1.3 * min(spent)
    assert ("GPUs" in end.out.splitlines()[1]) == (len({p["layout"]["world"] for p in plans}) > 1)


LARGE = question(model="mixtral-8x7b", memory_limit="35GiB")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (LARGE, "the best layout of mixtral-8x7b misses the 35.0 GiB of a H100 by "),
        (LARGE, "16 GPUs would do"),
        (question(memory_limit="1GiB"), "the 1.0 GiB of a H100 by"),
        (question(memory_limit="1GiB"), "up to 64 times the 8 GPUs do not help"),
        ([*question(), "--pin", "tp=3"], "tp=3 leaves no layout of mixtral-8x7b-4l-proxy on 8 GPUs: tp must divide the 8 GPUs"),
        ([*question(), "--pin", "mbs=3"], "mbs=3 leaves no layout of mixtral-8x7b-4l-proxy on 8 GPUs: a micro-batch must "),
        (question(global_batch=7, seq_len=4097), "every layout of mixtral-8x7b-4l-proxy on 8 GPUs is refused: "),
        ([*question(), "--objective", "gpus", "--target-step-time", "1us"], "no size from 8 to 8 GPUs reaches the target"),
        (
            [*LARGE, "--objective", "cost", "--price-per-gpu-hour", "1"],
            "no size from 8 to 8 GPUs will do, the best layout of mixtral-8x7b misses the 35.0 GiB",
        ),
    ],
)
def test_no_plan_fits(moeplan: Moeplan, arguments: list[str], message: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    end = moeplan("solve", *arguments, "-o", path)
    assert end.code == 3 and end.out == ""
    assert end.err.startswith("no plan fits: ") and end.err.count("\n") == 1 and message in end.err
    assert not path.exists()


def test_no_plan_fits_as_json(moeplan: Moeplan) -> None:
    end = moeplan("solve", *LARGE, "--json")
    data = json.loads(end.out)
    assert end.code == 3 and (data["status"], data["plans"], data["gpus_that_fit"]) == ("infeasible", [], 16)


def test_remarks_of_the_model_go_to_stderr(moeplan: Moeplan, tmp_path: Path) -> None:
    config = {
        "hidden_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "intermediate_size": 1024,
        "vocab_size": 999,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    end = moeplan("solve", *question(model=tmp_path, global_batch=8), "--json")
    assert end.code == 0 and end.err.startswith("note: the configuration names no model_type") and json.loads(end.out)


def test_ties_stand_beside_the_certificate(moeplan: Moeplan, tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    end = moeplan("solve", *question(), "-o", path)
    data = json.loads(moeplan("solve", *question(), "--json").out)
    best, tied = data["plans"][0], data["tied"]
    assert tied == [i + 1 for i, r in enumerate(best["runners_up"]) if r.get("tie")] and len(tied) > 0
    assert "gap 0%" in end.out and f"tie within the noise: {len(tied)} of the next 4 plans" in end.out
    assert f"to tell this plan from {best['measure']['against']}: " in end.out and best["measure"]["run"]
    marked = [line[0] for line in end.out.splitlines() if line[:2] in ("1 ", "2 ", "3 ", "4 ", "5 ") and "  tie  " in line]
    assert marked == [str(i + 1) for i in (0, *tied)]
    assert [r.tie for r in load_plan(path).runners_up] == [r.get("tie", False) for r in best["runners_up"]]


def test_a_plan_alone_ties_with_nothing(moeplan: Moeplan) -> None:
    end = moeplan("solve", *question(top=1))
    assert end.code == 0 and "tie" not in end.out.split("best of")[1] and "  tie  " not in end.out
