"""`moeplan catalog`: everything in it, with sources."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from moeplan.costmodels.model_catalog import model_names
from moeplan.profiles.hardware import cluster_names, device_names
from tests.cli.conftest import Moeplan


@pytest.mark.parametrize(
    ("kind", "names"), [("models", model_names()), ("devices", device_names()), ("clusters", cluster_names())]
)
def test_lists_are_complete(moeplan: Moeplan, kind: str, names: list[str]) -> None:
    end = moeplan("catalog", kind)
    assert end.code == 0 and [line.split()[0] for line in end.out.splitlines()[1:] if line[:1] != " "] == list(names)
    data = json.loads(moeplan("catalog", kind, "--json").out)
    assert [d["name"] for d in data] == list(names)


@pytest.mark.parametrize(
    ("kind", "name", "key", "value"),
    [
        ("models", "deepseek-v3", "experts", 256),
        ("models", "DeepSeek-V3-671B", "name", "deepseek-v3"),
        ("models", "mixtral-8x7b-4l-proxy", "layers", 4),
        ("devices", "h100", "name", "H100"),
        ("clusters", "gb200x72", "nvlink_domain", 72),
        ("clusters", "eos", "name", "eos"),
    ],
)
def test_one_entry(moeplan: Moeplan, kind: str, name: str, key: str, value: object) -> None:
    data: dict[str, Any] = json.loads(moeplan("catalog", kind, name, "--json").out)
    assert data[key] == value
    assert yaml.safe_load(moeplan("catalog", kind, name).out)[key] == value


def test_every_number_of_a_device_has_a_source(moeplan: Moeplan) -> None:
    for device in json.loads(moeplan("catalog", "devices", "--json").out):
        facts = [v for v in device.values() if isinstance(v, dict)]
        assert facts and all(fact["source"] for fact in facts)


def test_files_are_shown_too(moeplan: Moeplan, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("device: H100\ngpus: 24\n")
    assert json.loads(moeplan("catalog", "clusters", tmp_path / "mine.yaml", "--json").out)["nodes"] == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing argument"),
        (["modles"], "'modles' is not one of 'models', 'devices', 'clusters'"),
        (["models", "mixtrl-8x7b"], "unknown model 'mixtrl-8x7b'"),
        (["devices", "h1000"], "unknown device 'h1000'"),
        (["clusters", "eoss"], "unknown cluster 'eoss'"),
        (["clusters", "h100xx"], "not a count of GPUs"),
        (["models", ""], "unknown model ''"),
        (["models", "a", "b"], "unexpected extra argument"),
    ],
)
def test_wrong_use(moeplan: Moeplan, arguments: list[str], message: str) -> None:
    end = moeplan("catalog", *arguments)
    assert end.code in (1, 2) and message in end.complaint and end.out == ""
