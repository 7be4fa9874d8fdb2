"""A plan file says everything, comes back as it was, and refuses what does not hold together."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from moeplan.costmodels.model_catalog import load_model
from moeplan.errors import FileError, LayoutError, MoeplanError, SchemaError
from moeplan.planner.plan import SCHEMA, Plan, load_plan, price_plan
from moeplan.planner.plan_data import cluster_data, model_data, read_cluster, read_model
from moeplan.planner.problem import Problem
from moeplan.planner.solve import solve
from moeplan.profiles.hardware import Cluster, load_cluster
from moeplan.profiles.nominal import nominal
from moeplan.units import GIB
from tests.planner import tiny

CONFIG = {
    "model_type": "mixtral",
    "hidden_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 1024,
    "vocab_size": 32000,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
CLUSTER = "device: H100\ngpus: 16\ngpus_per_node: 4\nnvlink_domain: 4\nnic: {gbit_per_s: 200}\nprice_per_gpu_hour: 1.5\n"


def mixtral(**more: Any) -> Problem:
    return tiny.problem(load_model("mixtral-8x7b-4l-proxy"), "h100x16", batch=32, **more)


def best(problem: Problem) -> Plan:
    return solve(problem, keep=3).plans[0]


def written(plan: Plan, path: Path, **changes: Any) -> Path:
    """The file of a plan with some keys changed ("layout.tp": 2), or left out where the value is None."""
    data = yaml.safe_load(plan.text())
    for name, value in changes.items():
        where = data
        *above, key = name.split(".")
        for part in above:
            where = where[int(part) if part.isdigit() else part]
        if value is None:
            del where[key]
        else:
            where[key] = value
    path.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    return path


PLAN = best(mixtral())


@pytest.mark.parametrize(
    "problem",
    [
        mixtral(),
        mixtral(precision="fp8-cs", era="latest", imbalance=1.25, gradient_bytes=2),
        mixtral(memory_limit_bytes=40 * GIB, pins="tp<=2 recompute=moe_act", forbid="ep>4"),
        tiny.problem(load_model("deepseek-v3-4l-proxy"), "h100x64", batch=64, capacity_factor=1.5, moment_bytes=2),
        tiny.problem(load_model("llama3-8b"), "gb200x8", batch=16, precision="nvfp4", era="latest"),
    ],
    ids=["plain", "recipe", "limits", "prediction layer", "dense"],
)
def test_what_is_saved_comes_back(problem: Problem, tmp_path: Path) -> None:
    plan = best(problem)
    plan.save(tmp_path / "plan.yaml")
    again = load_plan(tmp_path / "plan.yaml")
    assert again.text() == plan.text() == (tmp_path / "plan.yaml").read_text()
    assert again.layout == plan.layout and again.problem.workload == problem.workload
    assert again.problem.model == problem.model and again.problem.profile.cluster == problem.profile.cluster
    assert again.problem.device_bytes == problem.device_bytes
    assert [c.text for c in again.problem.pins] == [c.text for c in problem.pins]
    assert (again.step_s, again.peak_bytes) == (plan.step_s, plan.peak_bytes)
    again.save(tmp_path / "twice.yaml")
    assert (tmp_path / "twice.yaml").read_text() == plan.text()


def test_a_plan_file_is_plain_yaml() -> None:
    data = yaml.safe_load(PLAN.text())
    assert data["schema"] == SCHEMA == "moeplan.plan/1" and data["model"] == "mixtral-8x7b-4l-proxy"
    assert data["cluster"] == "H100x16" and data["layout"]["world"] == 16
    assert data["predicted"]["step_s"] == pytest.approx(PLAN.step_s, abs=1e-5)
    assert sum(data["predicted"]["time_s"].values()) == pytest.approx(PLAN.step_s, abs=1e-4)
    assert sum(data["certificate"]["rejected"].values()) + data["certificate"]["priced"] == data["certificate"]["considered"]
    assert json.loads(json.dumps(data)) == data


def test_numbers_of_a_plan_hang_together() -> None:
    tokens = PLAN.problem.workload.tokens
    assert PLAN.tokens_per_s_per_gpu == pytest.approx(tokens / PLAN.step_s / 16)
    assert PLAN.mfu == pytest.approx(PLAN.model_flops_per_s / 989.4e12, rel=1e-2)
    assert PLAN.low_s < PLAN.step_s < PLAN.high_s
    assert PLAN.peak_bytes == max(float(s.parts.total) for s in PLAN.stages) == float(PLAN.fullest.parts.total)
    assert len(PLAN.stages) == len(PLAN.stage_s) == PLAN.layout.pp


def test_a_model_of_a_file_is_in_the_plan(tmp_path: Path) -> None:
    path = tmp_path / "mine" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(CONFIG))
    model = load_model(str(path))
    plan = best(tiny.problem(model, "h100x8", batch=16))
    plan.save(tmp_path / "plan.yaml")
    path.unlink()
    again = load_plan(tmp_path / "plan.yaml")
    assert yaml.safe_load(plan.text())["model"]["config"] == CONFIG
    assert again.problem.model == model and again.text() == plan.text()


def test_a_directory_beside_the_command_is_in_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Its name alone would point nowhere once the plan is somewhere else; nor would that of a cluster file.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mymodel").mkdir()
    (tmp_path / "mymodel" / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "mycluster").write_text(CLUSTER)
    model, cut = load_model("mymodel"), load_model("mymodel-3l-proxy")
    assert model_data(model)["config"] == CONFIG and read_model(model_data(cut), "here") == cut
    assert cluster_data(load_cluster("mycluster"))["gpus"] == 16


def test_a_cluster_of_a_file_is_in_the_plan(tmp_path: Path) -> None:
    path = tmp_path / "h100.yaml"  # half a name of the catalog
    path.write_text(CLUSTER)
    cluster = load_cluster(path)
    problem = dataclasses.replace(mixtral(), profile=nominal(cluster))
    plan = best(problem)
    plan.save(tmp_path / "plan.yaml")
    path.unlink()
    again = load_plan(tmp_path / "plan.yaml")
    assert again.problem.profile.cluster == cluster and again.text() == plan.text()
    assert isinstance(read_cluster(cluster_data(cluster), "here"), Cluster)


@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-v3-6l-proxy", "llama3-8b", "nemotron-3-super-120b-a12b"])
@pytest.mark.parametrize("cut", (False, True), ids=["whole", "without prediction"])
def test_models_come_back_with_what_was_left_out(name: str, cut: bool) -> None:
    model = load_model(name)
    if cut:
        model = dataclasses.replace(model, mtp=())
    data = model_data(model)
    assert read_model(json.loads(json.dumps(data)), "here") == model
    assert isinstance(data, str) == (not cut or not load_model(name).mtp)


@pytest.mark.parametrize(
    ("changes", "message", "hint"),
    [
        ({"schema": None}, "is not a plan: it has no 'schema'", SCHEMA),
        ({"schema": "moeplan.plan/2"}, "has schema 'moeplan.plan/2', this moeplan", "solve it again"),
        ({"schema": 1}, "has schema '1'", "solve it again"),
        ({"layuot": {}}, "unknown key 'layuot'", "did you mean 'layout'?"),
        ({"model": None}, "missing key 'model'", ""),
        ({"cluster": None}, "missing key 'cluster'", ""),
        ({"workload": None}, "missing key 'workload'", ""),
        ({"layout": None}, "missing key 'layout'", ""),
        ({"model": "mixtrl-8x7b"}, "key 'model': unknown model 'mixtrl-8x7b'", "mixtral-8x7b"),
        ({"model": 7}, "key 'model': expected a mapping", ""),
        ({"model": {"name": "x", "config": {}, "lyers": 3}}, "key 'model': unknown key 'lyers'", "'layers'"),
        ({"model": {"name": "x", "config": {}}}, "key 'model': model 'x': no layers found", "num_hidden_layers"),
        ({"model": {"name": "deepseek-v3", "mtp_layers": 2}}, "key 'model': mtp_layers is 2, deepseek-v3 has 1", ""),
        ({"cluster": "h100x12"}, "key 'cluster': cluster 'H100x12': 12 GPUs do not fill nodes of 8", "8 or 16"),
        ({"cluster": {"name": "x"}}, "key 'cluster': missing key 'device'", ""),
        ({"workload": 3}, "key 'workload': expected a mapping", ""),
        ({"workload.precision": "fp9"}, "key 'workload': unknown precision 'fp9'", "nvfp4"),
        ({"workload.era": None}, "key 'workload': missing key 'era'", ""),
        ({"workload.seq_len": -1}, "key 'workload': seq_len=-1", ""),
        ({"workload.seq_len": "4k"}, "key 'workload', key 'seq_len': expected int, found str '4k'", ""),
        ({"workload.seqlen": 1}, "key 'workload': unknown key 'seqlen'", "'seq_len'"),
        ({"workload.imbalance": 99.0}, "imbalance=99 exceeds the 8 experts", ""),
        ({"layout": []}, "key 'layout': expected a mapping", ""),
        ({"layout.world": 32}, "key 'layout': world is 32, but tp*cp*dp*pp = ", ""),
        ({"layout.tpp": 2}, "key 'layout': unknown key 'tpp'", "'tp'"),
        ({"layout.dp": 3}, "key 'layout': dense and expert grids differ", "edp = "),
        ({"layout.vpp": 10**30}, "key 'layout': vpp=", ""),
        ({"layout.recompute": ["mpl"]}, "key 'layout': unknown recompute module 'mpl'", "mlp"),
        ({"layout.dispatcher": "deepp"}, "key 'dispatcher': expected one of none, allgather", ""),
        ({"limits": {"pins": ["tp=banana"]}}, "key 'limits': condition 'tp=banana': 'banana' is not a number", ""),
        ({"limits": {"memory_byts": 1.0}}, "key 'limits': unknown key 'memory_byts'", "'memory_bytes'"),
        ({"runners_up": 3}, "key 'runners_up': expected a list", ""),
        ({"runners_up.0.step_s": "fast"}, "key 'runners_up'[0], key 'step_s': expected float, found str 'fast'", ""),
        ({"certificate.considered": "all"}, "key 'certificate', key 'considered': expected int", ""),
        ({"provenance": "mine"}, "key 'provenance': expected a mapping", ""),
        ({"remarks": "none"}, "key 'remarks': expected a list", ""),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)  # fmt: skip
def test_what_does_not_hold_together_is_refused(changes: dict[str, Any], message: str, hint: str, tmp_path: Path) -> None:
    path = written(PLAN, tmp_path / "plan.yaml", **changes)
    with pytest.raises(SchemaError) as caught:
        load_plan(path)
    assert caught.value.message.startswith(f"plan file '{path}'")
    assert message in caught.value.message and hint in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"cluster": "h100x32"}, "world-size"),
        ({"workload.global_batch": 33}, "global-batch"),
        ({"layout.vpp": 3}, "virtual-stages"),
        ({"layout.recompute": ["mla_up_proj"]}, "recompute-blocks"),
        ({"workload.era": "te-2024", "layout.dispatcher": "hybridep"}, "dispatcher-era"),
        ({"layout.stages": "Et|ttt|L"}, "pipeline-split"),
    ],
)
def test_a_hand_edited_layout_must_keep_the_rules(changes: dict[str, Any], rule: str, tmp_path: Path) -> None:
    with pytest.raises(MoeplanError, match=rf"plan file '.*plan.yaml': .*\(rule {rule}\)"):
        load_plan(written(PLAN, tmp_path / "plan.yaml", **changes))


def test_an_edited_layout_is_priced_as_it_stands_and_loses_its_certificate(tmp_path: Path) -> None:
    plan = load_plan(written(PLAN, tmp_path / "plan.yaml", **{"layout.recompute": ["layernorm"]}))
    assert plan.layout.recompute == ("layernorm",) and plan.step_s > PLAN.step_s
    assert plan.certificate is None and PLAN.certificate is not None
    assert plan.remarks == ("the layout was changed by hand, so no search stands behind the plan",)
    plan.save(tmp_path / "again.yaml")
    assert load_plan(tmp_path / "again.yaml").remarks == plan.remarks


@pytest.mark.parametrize("layers", [3, "3"])
def test_recompute_of_some_layers_comes_back(layers: int | str, tmp_path: Path) -> None:
    changes = {"layout.recompute": ["full"], "layout.recompute_layers": layers, "layout.ep_overlap": False}
    plan = load_plan(written(PLAN, tmp_path / "plan.yaml", **changes))
    assert plan.layout.recompute_layers == "3" and plan.step_s > PLAN.step_s
    plan.save(tmp_path / "again.yaml")
    again = load_plan(tmp_path / "again.yaml")
    assert (again.layout, again.step_s, again.peak_bytes) == (plan.layout, plan.step_s, plan.peak_bytes)


@pytest.mark.parametrize(
    ("changes", "remark"),
    [
        ({"moeplan": "0.0.1"}, "written by moeplan 0.0.1, priced by "),
        ({"workload.global_batch": 64}, "the workload was changed by hand"),
        ({"provenance.model_sha256": "0" * 16}, "is not the one that the plan was made for"),
        ({"provenance.cluster_sha256": "0" * 16}, "the cluster was changed by hand"),
    ],
)
def test_what_is_no_longer_as_it_was_is_remarked(changes: dict[str, Any], remark: str, tmp_path: Path) -> None:
    plan = load_plan(written(PLAN, tmp_path / "plan.yaml", **changes))
    assert any(remark in text for text in plan.remarks) and plan.certificate is None


def test_keys_that_may_be_left_out(tmp_path: Path) -> None:
    left = dict.fromkeys(("moeplan", "predicted", "certificate", "runners_up", "provenance"))
    plan = load_plan(written(PLAN, tmp_path / "plan.yaml", **left))
    assert (plan.certificate, plan.runners_up, plan.remarks) == (None, (), ())
    assert plan.step_s == PLAN.step_s


@pytest.mark.parametrize("text", ["", "[]", "plan", "schema: [", "\x00", "a: 1\na: 2"])
def test_files_that_are_no_plans(text: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    with pytest.raises(SchemaError, match=r"plan file '.*plan.yaml'"):
        load_plan(path)


def test_a_plan_that_is_not_there_or_not_to_be_written(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="does not exist"):
        load_plan(tmp_path / "none.yaml")
    with pytest.raises(FileError, match="cannot write plan file"):
        PLAN.save(tmp_path / "none" / "plan.yaml")


def test_a_plan_of_a_layout_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match="dense and expert grids differ"):
        price_plan(PLAN.problem, dataclasses.replace(PLAN.layout, tp=PLAN.layout.tp * 2))
