"""`moeplan profile import`."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from moeplan.profiles.hardware import load_cluster
from moeplan.profiles.nominal import nominal
from moeplan.profiles.profile_file import load_profile
from moeplan.profiles.samples import load_samples, samples_path
from moeplan.records import sha256_of
from tests.cli.conftest import Moeplan
from tests.profiles.imports.nccl_output import SIZES, output, usual_us
from tests.profiles.imports.tables import exchange_s, tree

IMPORT = ("profile", "import", "--from")


@pytest.fixture(scope="module")
def systems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tree(tmp_path_factory.mktemp("aiconfigurator"))


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    path = tmp_path / "sweep.log"
    path.write_text(output("all_reduce") + output("alltoall", time_us=lambda size: 5 * usual_us(size)))
    return path


def test_tables_of_aiconfigurator(moeplan: Moeplan, systems: Path, tmp_path: Path) -> None:
    path = tmp_path / "h200.yaml"
    end = moeplan(*IMPORT, "aiconfigurator", "--cluster", "h200x64", systems, "-o", path)
    assert end.code == 0 and f"profile written to {path}; use it with --profile {path}" in end.err
    assert "dense GEMM" in end.out and "all_to_all of 8" in end.out and "grouped GEMM" not in end.out
    assert "note: the tables hold no backward pass" in end.err
    profile, usual = load_profile(path), nominal(load_cluster("h200x64"))
    assert profile.gemm("bf16").flop_per_s == pytest.approx(700e12, rel=0.03)
    assert profile.attention(128, 128).flop_per_s == pytest.approx(600e12, rel=0.03)
    assert profile.attention(128, 128).backward_ratio == usual.attention(128, 128).backward_ratio
    assert profile.collective_s("all_gather", 2.0**24, 8) == pytest.approx(exchange_s(2.0**24, 8), rel=1e-3)
    assert profile.grouped["bf16-wgrad"] == usual.grouped["bf16-wgrad"]
    assert profile.origins["gemm/bf16"].measured and "vllm 0.24.0" in profile.origins["gemm/bf16"].note
    assert "nominal" in profile.origins["grouped_gemm/bf16-wgrad"].note
    run = profile.measured_on
    assert run is not None and run.backend == "import" and "trtllm 1.3.0rc20" in run.software
    environment, samples = load_samples(samples_path(path))
    assert run.samples == len(samples) and run.samples_sha256 == sha256_of(samples_path(path), "samples")
    assert environment.device == run.device == "NVIDIA H200"


def test_plans_can_be_made_with_what_was_imported(moeplan: Moeplan, systems: Path, tmp_path: Path) -> None:
    path = tmp_path / "h200.yaml"
    assert moeplan(*IMPORT, "aiconfigurator", "--cluster", "h200x8", systems, "-o", path).code == 0
    question = ("--model", "mixtral-8x7b-4l-proxy", "--global-batch", 16, "--seq-len", 4096)
    assert moeplan("solve", "--profile", path, *question, "-o", tmp_path / "plan.yaml").code == 0


def test_output_of_nccl_tests(moeplan: Moeplan, sweep: Path, tmp_path: Path) -> None:
    path = tmp_path / "h100.yaml"
    end = moeplan(*IMPORT, "nccl-tests", "--cluster", "h100x16", sweep, "-o", path, "--json")
    assert end.code == 0
    assert {curve["name"] for curve in json.loads(end.out)["curves"]} == {
        "collectives/all_reduce of 8",
        "collectives/all_to_all of 8",
    }
    profile, usual = load_profile(path), nominal(load_cluster("h100x16"))
    assert profile.collective_s("all_to_all", 2.0**26, 8) == pytest.approx(5e-6 * usual_us(2**26), rel=1e-3)
    assert profile.collective_s("all_gather", 2.0**26, 8) == usual.collective_s("all_gather", 2.0**26, 8)
    assert profile.measured_on is not None and profile.measured_on.samples == 2 * len(SIZES)
    assert profile.measured_on.when and profile.measured_on.software == "nccl-tests"


def test_output_of_nccl_tests_into_a_profile(moeplan: Moeplan, systems: Path, tmp_path: Path) -> None:
    """What the profile had stays, with its samples, but for the collectives that are replaced."""
    first, second, log = tmp_path / "first.yaml", tmp_path / "second.yaml", tmp_path / "all_gather.txt"
    assert moeplan(*IMPORT, "aiconfigurator", "--cluster", "h200x64", systems, "-o", first).code == 0
    log.write_text(output("all_gather", device="NVIDIA H200"))
    assert moeplan(*IMPORT, "nccl-tests", "--profile", first, log, "-o", second).code == 0
    before, after = load_profile(first), load_profile(second)
    assert after.gemms == before.gemms and after.collectives["all_gather"][4] == before.collectives["all_gather"][4]
    assert after.collective_s("all_gather", 2.0**26, 8) == pytest.approx(1e-6 * usual_us(2**26), rel=1e-3)
    assert after.measured_on is not None and before.measured_on is not None
    assert after.measured_on.software == before.measured_on.software
    samples = load_samples(samples_path(second))[1]
    eight = [s.how for s in samples if (s.op, s.group) == ("all_gather", "8/1")]
    assert set(eight) == {"nccl-tests, float"} and len(eight) == len(SIZES)
    assert [s for s in samples if s.op == "gemm"] == [s for s in load_samples(samples_path(first))[1] if s.op == "gemm"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["aiconfigurator"], "--from aiconfigurator needs --cluster"),
        (["nccl-tests", "{sweep}"], "--from nccl-tests needs either --cluster or --profile"),
        (["nccl-tests", "--cluster", "h100x8"], "--from nccl-tests needs its output"),
        (
            ["nccl-tests", "--cluster", "h100x8", "{sweep}", "--framework", "vllm"],
            "--framework means nothing to --from nccl-tests",
        ),
        (["aiconfigurator", "--cluster", "h100x8", "--op", "all_reduce"], "--op means nothing to --from aiconfigurator"),
        (["aiconfigurator", "--profile", "{sweep}"], "--profile means nothing to --from aiconfigurator"),
        (["aiconfigurator", "--cluster", "h100x8", "a", "b"], "--from aiconfigurator takes one folder, 2 are given"),
        (["somewhere", "--cluster", "h100x8"], "'somewhere' is not one of"),
    ],
)
def test_wrong_usage(moeplan: Moeplan, sweep: Path, tmp_path: Path, arguments: list[str], complaint: str) -> None:
    end = moeplan(*IMPORT, *(a.format(sweep=sweep) for a in arguments), "-o", tmp_path / "out.yaml")
    assert end.code == 2 and complaint in end.err and not (tmp_path / "out.yaml").exists()


def test_what_cannot_be_imported(moeplan: Moeplan, systems: Path, sweep: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.yaml"
    end = moeplan(*IMPORT, "aiconfigurator", "--cluster", "mi300xx8", systems, "-o", path)
    assert end.code == 1 and "no tables for MI300X" in end.err and "it has B200, H200" in end.err
    end = moeplan(*IMPORT, "nccl-tests", "--cluster", "h200x8", sweep, "-o", path)
    assert end.code == 1 and "the output is of NVIDIA H100 80GB HBM3, H200x8 has H200" in end.err
    end = moeplan(*IMPORT, "nccl-tests", "--cluster", "h100x8", sweep, "-o", sweep)
    assert end.code == 2 and "is an input itself" in end.err
    end = moeplan(*IMPORT, "nccl-tests", "--cluster", "h100x8", sweep, "-o", tmp_path / "no" / "out.yaml")
    assert end.code == 1 and "there is no directory" in end.err
    sweep.write_text(sweep.read_text().replace("1048576 ", "1048576x", 1))
    end = moeplan(*IMPORT, "nccl-tests", "--cluster", "h100x8", sweep, "-o", path)
    assert end.code == 1 and not path.exists() and not samples_path(path).exists()


def test_package_that_is_not_installed(moeplan: Moeplan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    end = moeplan(*IMPORT, "aiconfigurator", "--cluster", "h200x8", "-o", tmp_path / "out.yaml")
    assert end.code == 1 and "hint: pip install 'moeplan[aiconfigurator]'" in end.err
