"""A profile file holds everything that prices depend on, digit by digit, and refuses what is not one."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import pytest
import yaml

from moeplan.costmodels.layout import Layouts
from moeplan.costmodels.model_catalog import load_model
from moeplan.costmodels.price import Pricing
from moeplan.errors import ClusterError, FileError, SchemaError
from moeplan.planner.plan import Plan, load_plan
from moeplan.planner.solve import solve
from moeplan.profiles.curves import StreamCurve
from moeplan.profiles.hardware import device_names, load_cluster
from moeplan.profiles.nominal import nominal
from moeplan.profiles.origin import CalibratedOn, MeasuredOn
from moeplan.profiles.profile import Profile
from moeplan.profiles.profile_file import SCHEMA, is_nominal, load_profile, on_cluster, profile_text
from tests.conftest import PLAIN
from tests.planner import tiny

H100 = nominal(load_cluster("h100x16"))
CHANGED = dataclasses.replace(
    H100,
    name="ours",
    sustained={"bf16": 0.1 + 0.2, "quantized": 1 / 3, "attention": 0.7},
    host=1.23456789012345678,
    exposed=2 / 3,
    calibrated_on=(CalibratedOn(rows=("a", "b"), table_sha256="0" * 64, error_before=0.2, error_after=0.1),),
    measured_on=MeasuredOn(when="2026-01-02", device="NVIDIA H100", backend="cuda", software="torch 2.9", remarks=("slow: 3",)),
    ring_share=0.7,
    all_to_all_share=0.6,
    send_share=0.5,
    hop_s=1e-5 / 3,
    host_copies={"host_to_device": 5e10},
    multi_node={"all_gather": {"16/2": dataclasses.replace(H100.collectives["all_gather"][8], residuals=(0.01, -1 / 3))}},
    streams={
        "norm": StreamCurve(
            launch_s=1e-6, bytes_per_s=1e12, fused=True, error=0.1, error_p90=0.2, samples=3, valid={}, source="ours"
        )
    },
)
FILE_ONLY = {"path", "sha256"}


def saved(profile: Profile, path: Path) -> Profile:
    profile.save(path)
    return load_profile(path)


def fields(profile: Profile) -> dict[str, Any]:
    return {f.name: getattr(profile, f.name) for f in dataclasses.fields(profile) if f.name not in FILE_ONLY}


def edited(path: Path, **changes: Any) -> Path:
    """The file with keys changed ("gemms.bf16.error": 1), or left out where the value is None."""
    data = yaml.safe_load(profile_text(H100))
    for name, value in changes.items():
        where, (*above, key) = data, name.split(".")
        for part in above:
            where = where[part]
        if value is None:
            del where[key]
        else:
            where[key] = value
    path.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    return path


# ---------------------------------------------------------------- there and back


@pytest.mark.parametrize("name", device_names())
def test_every_nominal_profile_comes_back_equal(name: str, tmp_path: Path) -> None:
    profile = nominal(load_cluster(f"{name}x8"))
    again = saved(profile, tmp_path / "p.yaml")
    assert fields(again) == fields(profile)
    assert (tmp_path / "p.yaml").read_text() == profile_text(again)


@pytest.mark.parametrize("profile", [CHANGED, PLAIN], ids=["changed", "a device of no catalog"])
def test_what_was_changed_comes_back_equal(profile: Profile, tmp_path: Path) -> None:
    assert fields(saved(profile, tmp_path / "p.yaml")) == fields(profile)


@pytest.mark.parametrize("model", [tiny.MIXED, tiny.LATENT], ids=["experts", "latent"])
@pytest.mark.parametrize("precision", ["bf16", "fp8-cs"])
def test_every_price_is_equal(model: Any, precision: str, tmp_path: Path) -> None:
    problem = tiny.problem(model, "h100x16", batch=16, precision=precision)
    layouts = Layouts.of([plan.layout for plan in solve(problem, keep=5).plans])
    for profile in (problem.profile, dataclasses.replace(CHANGED, cluster=problem.profile.cluster)):
        again = saved(profile, tmp_path / "p.yaml")
        one, two = (Pricing(model, p, problem.workload, layouts).step_cost() for p in (profile, again))
        assert {n: v.tolist() for n, v in one.time} == {n: v.tolist() for n, v in two.time}
        assert one.stage_s.tolist() == two.stage_s.tolist()


def test_the_file_is_plain_and_says_where_it_comes_from(tmp_path: Path) -> None:
    again = saved(CHANGED, tmp_path / "p.yaml")
    text = (tmp_path / "p.yaml").read_text()
    data = yaml.safe_load(text)
    assert data["schema"] == SCHEMA == "moeplan.profile/1" and data["cluster"] == "H100x16"
    assert list(data)[:6] == ["schema", "moeplan", "name", "cluster", "sustained", "host"]
    curve = data["gemms"]["bf16"]
    assert {"error", "samples", "valid", "source", "launch_s", "flop_per_s"} <= set(curve)
    assert data["origins"]["gemm/bf16"]["device"] == "h100" and data["origins"]["gemm/bf16"]["note"]
    assert (again.path, again.sha256) == (str(tmp_path / "p.yaml"), hashlib.sha256(text.encode()).hexdigest())
    assert H100.path == H100.sha256 == ""


def test_a_cluster_of_no_catalog_stands_in_the_file(tmp_path: Path) -> None:
    cluster = dataclasses.replace(load_cluster("h100x16"), name="ours", nics_per_node=4)
    profile = nominal(cluster)
    again = saved(profile, tmp_path / "p.yaml")
    assert again.cluster == cluster and yaml.safe_load((tmp_path / "p.yaml").read_text())["cluster"]["nics_per_node"] == 4


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="cannot write profile"):
        H100.save(tmp_path / "none" / "p.yaml")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("changes", "message", "hint"),
    [
        ({"schema": None}, "is not a profile: it has no 'schema'", SCHEMA),
        ({"schema": "moeplan.profile/2"}, "has schema 'moeplan.profile/2', this moeplan", "moeplan calibrate"),
        ({"schema": "moeplan.plan/1"}, "has schema 'moeplan.plan/1'", "moeplan calibrate"),
        ({"hots": 1.0}, "unknown key 'hots'", "did you mean 'host'?"),
        ({"gemms.bf16.flops": 1.0}, "key 'gemms'.bf16: unknown key 'flops'", "flop_per_s"),
        ({"cluster": None}, "missing key 'cluster'", ""),
        ({"cluster": "h100x12"}, "key 'cluster': cluster 'H100x12': 12 GPUs do not fill nodes of 8", "8 or 16"),
        ({"cluster": 7}, "key 'cluster': expected a mapping", ""),
        ({"gemms.bf16": None}, "key 'gemms': no curve for bf16", ""),
        ({"gemms.bf16.flop_per_s": -1.0}, "flop_per_s=-1.0 is not a positive number", ""),
        ({"gemms.bf16.flop_per_s": "fast"}, "key 'flop_per_s': expected float, found str 'fast'", ""),
        ({"grouped.fp8-wgrad": None}, "key 'grouped': no curve for fp8-wgrad", ""),
        ({"collectives.all_to_all": None}, "key 'collectives': no curve for all_to_all", ""),
        ({"collectives.all_to_all": {}}, "key 'collectives.all_to_all': no curve at all", ""),
        ({"collectives.all_to_all.many": {}}, "missing key 'error'", ""),
        ({"dispatches.deepep-combine": None}, "key 'dispatches': no curve for deepep-combine", ""),
        ({"attentions": {}}, "key 'attentions': no curve of an equal head size", "128"),
        ({"sustained.bf61": 0.8}, "unknown kind 'bf61' in sustained", "did you mean 'bf16'"),
        ({"sustained.bf16": 0.0}, "sustained bf16 is 0, above 0 and up to 100", ""),
        ({"host": -1.0}, "host is -1, above 0", ""),
        ({"host": 1e9}, "host is 1e+09, above 0 and up to 100", ""),
        ({"exposed": float("nan")}, "exposed is nan", ""),
        ({"stream_bytes_per_s": float("inf")}, "stream_bytes_per_s is inf", ""),
        ({"host": "1"}, "key 'host': expected float, found str '1'", ""),
        ({"calibrated_on": [{}]}, "key 'calibrated_on'[0]: missing key 'rows'", ""),
        ({"origins.gemm/bf16.measured": "yes"}, "key 'measured': expected bool", ""),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)  # fmt: skip
def test_what_is_no_profile_is_refused(changes: dict[str, Any], message: str, hint: str, tmp_path: Path) -> None:
    path = edited(tmp_path / "p.yaml", **changes)
    with pytest.raises(SchemaError) as caught:
        load_profile(path)
    assert caught.value.message.startswith(f"profile '{path}'")
    assert message in caught.value.message and hint in (caught.value.hint or "")


@pytest.mark.parametrize("text", ["", "[]", "profile", "schema: [", "\x00", "a: 1\na: 2"])
def test_files_of_other_kinds(text: str, tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(SchemaError, match=r"profile '.*p.yaml'"):
        load_profile(tmp_path / "p.yaml")
    with pytest.raises(FileError, match="does not exist"):
        load_profile(tmp_path / "none.yaml")


@pytest.mark.parametrize("size", ["big", "0", "128/", "-1"])
def test_head_sizes_and_ranks_are_numbers(size: str, tmp_path: Path) -> None:
    data = yaml.safe_load(profile_text(H100))
    data["attentions"][size] = data["attentions"]["128"]
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(data))
    with pytest.raises(SchemaError, match=f"'{size}' is not a head size"):
        load_profile(tmp_path / "p.yaml")
    data = yaml.safe_load(profile_text(H100))
    data["collectives"]["all_gather"][size] = data["collectives"]["all_gather"]["8"]
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(data))
    with pytest.raises(SchemaError, match=f"'{size}' is not a count of ranks"):
        load_profile(tmp_path / "p.yaml")


# ---------------------------------------------------------------- other counts, and plans


def test_another_count_of_the_same_hosts(tmp_path: Path) -> None:
    profile = saved(CHANGED, tmp_path / "p.yaml")
    more = on_cluster(profile, load_cluster("h100x256"))
    assert more.cluster == load_cluster("h100x256") == profile.resized(256).cluster
    assert more.gemms is profile.gemms and (more.host, more.sha256) == (profile.host, profile.sha256)
    for other, message in (
        (load_cluster("a100x16"), "made for H100x16 with device H100, A100x16 has A100"),
        (dataclasses.replace(load_cluster("h100x16"), nics_per_node=4), "with nics_per_node 8, H100x16 has 4"),
        (dataclasses.replace(load_cluster("h100x16"), oversubscription=2.0), "with oversubscription 1.0, H100x16 has 2.0"),
    ):
        with pytest.raises(ClusterError, match=message):
            on_cluster(profile, other)


def test_what_is_nominal(tmp_path: Path) -> None:
    assert is_nominal(H100) and is_nominal(H100.resized(64))
    assert is_nominal(nominal(dataclasses.replace(load_cluster("h100x16"), nics_per_node=4)))
    assert not is_nominal(CHANGED) and not is_nominal(dataclasses.replace(H100, host=1.1)) and not is_nominal(PLAIN)
    assert not is_nominal(saved(H100, tmp_path / "p.yaml")), "a file may change, so that it is named"


def mixtral_with(profile: Profile) -> Plan:
    problem = tiny.problem(load_model("mixtral-8x7b-4l-proxy"), "h100x16", batch=16)
    return solve(dataclasses.replace(problem, profile=profile), keep=2).plans[0]


def test_a_plan_names_its_profile_and_is_priced_with_it(tmp_path: Path) -> None:
    profile = saved(CHANGED, tmp_path / "p.yaml")
    plan = mixtral_with(profile)
    plan.save(tmp_path / "plan.yaml")
    data = yaml.safe_load((tmp_path / "plan.yaml").read_text())
    said = {k: v for k, v in data["provenance"].items() if k.startswith("profile")}
    assert said == {"profile": "ours", "profile_file": str(tmp_path / "p.yaml"), "profile_sha256": profile.sha256}
    remark = f"priced with the profile 'ours' of 'p.yaml' (sha256 {profile.sha256[:12]}), not with the nominal one"
    assert remark in plan.remarks
    again = load_plan(tmp_path / "plan.yaml")
    assert again.text() == plan.text() and again.step_s == plan.step_s and again.certificate == plan.certificate
    assert again.step_s != mixtral_with(H100).step_s or again.layout != mixtral_with(H100).layout


def test_a_plan_finds_its_profile_beside_it(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    plan = mixtral_with(saved(CHANGED, tmp_path / "p.yaml"))
    (tmp_path / "p.yaml").rename(tmp_path / "there" / "p.yaml")
    plan.save(tmp_path / "there" / "plan.yaml")
    again = load_plan(tmp_path / "there" / "plan.yaml")
    assert again.step_s == plan.step_s and again.problem.profile.path == str(tmp_path / "there" / "p.yaml")
    assert again.remarks == plan.remarks


def test_a_plan_is_never_priced_with_another_profile(tmp_path: Path) -> None:
    plan = mixtral_with(saved(CHANGED, tmp_path / "p.yaml"))
    path = tmp_path / "plan.yaml"
    plan.save(path)
    dataclasses.replace(CHANGED, host=1.5).save(tmp_path / "p.yaml")
    with pytest.raises(SchemaError, match=r"priced with '.*p.yaml', sha256 \w{12}; '.*p.yaml' has sha256 \w{12}") as caught:
        load_plan(path)
    assert caught.value.message.startswith(f"plan file '{path}', key 'provenance'") and "beside the plan" in str(caught.value)
    (tmp_path / "p.yaml").unlink()
    with pytest.raises(SchemaError, match="it is not there"):
        load_plan(path)
    data = yaml.safe_load(path.read_text())
    for key in ("profile_file", "profile_sha256"):
        del data["provenance"][key]
    path.write_text(yaml.safe_dump(data))
    assert is_nominal(load_plan(path).problem.profile)


def test_a_plan_of_a_profile_that_no_file_holds(tmp_path: Path) -> None:
    plan = mixtral_with(dataclasses.replace(H100, host=1.5))
    assert "priced with the profile 'nominal', which no file holds, not with the nominal one" in plan.remarks
    plan.save(tmp_path / "plan.yaml")
    with pytest.raises(SchemaError, match="priced with the profile 'nominal', which no file holds"):
        load_plan(tmp_path / "plan.yaml")


@pytest.mark.parametrize("value", [None, 3, [], {}, "x" * 300, "\x00"])
def test_a_plan_with_odd_words_about_its_profile(value: Any, tmp_path: Path) -> None:
    plan = mixtral_with(saved(CHANGED, tmp_path / "p.yaml"))
    for key in ("profile_file", "profile_sha256"):
        data = plan.to_data()
        data["provenance"][key] = value
        (tmp_path / "plan.yaml").write_text(yaml.safe_dump(data))
        with pytest.raises(SchemaError, match="key 'provenance'"):
            load_plan(tmp_path / "plan.yaml")
