"""Tables of aiconfigurator as samples."""

from __future__ import annotations

import importlib.util
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from moeplan.errors import ClusterError, DeviceError, FileError, SchemaError, UsageError
from moeplan.profiles.curves import KNOT_BYTES
from moeplan.profiles.hardware import load_cluster
from moeplan.profiles.imports import aiconfigurator, samples_text
from moeplan.profiles.imports.aiconfigurator import PACKAGE, read_tables
from moeplan.profiles.samples import Environment, Sample, load_samples
from tests.profiles.imports.tables import GPU, attention_s, exchange_s, exchanges, gemm_s, gemms, tree, write

H200 = load_cluster("h200x16")
DTYPES = {"bf16": "bfloat16", "fp8": "fp8", "fp8-blockwise": "fp8_block"}


@pytest.fixture(scope="module")
def systems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tree(tmp_path_factory.mktemp("aiconfigurator"))


@pytest.fixture(scope="module")
def samples(systems: Path) -> tuple[Sample, ...]:
    return read_tables(H200, root=systems).samples


def of(samples: tuple[Sample, ...], op: str, key: str = "") -> list[Sample]:
    return [s for s in samples if s.op == op and (not key or s.key == key)]


def test_what_is_taken(systems: Path) -> None:
    tables = read_tables(H200, root=systems)
    kinds = Counter((s.op, s.key) for s in tables.samples)
    assert set(kinds) == {
        *(("gemm", key) for key in DTYPES), ("attention", "128"), ("attention", "192/128"),
        *((op, "bf16") for op in ("all_gather", "reduce_scatter", "all_reduce", "all_to_all")),
    }  # fmt: skip
    assert tables.device == GPU
    assert tables.software == "aiconfigurator tables: nccl 2.29.2, sglang 0.5.14, trtllm 1.3.0rc20, vllm 0.24.0"
    assert any("no backward pass" in text for text in tables.remarks)
    assert any("whole MoE operations" in text for text in tables.remarks)


@pytest.mark.parametrize(
    ("key", "framework", "slower"), [("bf16", "vllm", 1.0), ("fp8", "trtllm", 1.0), ("fp8-blockwise", "sglang", 1.1)]
)
def test_gemms_come_from_the_kernel_of_a_training_step(
    samples: tuple[Sample, ...], key: str, framework: str, slower: float
) -> None:
    found = of(samples, "gemm", key)
    assert len(found) == 4 * 3 * 3  # one row and sides of 32 are not of a training step
    for sample in found:  # the newest version, and of two kernels for a shape the one that has most rows
        assert sample.how.startswith(f"{framework} ") and sample.how.endswith(", linear")
        assert sample.seconds == pytest.approx(slower * gemm_s(DTYPES[key], **sample.sizes), rel=1e-5)


def test_attention_is_whole_and_causal(samples: tuple[Sample, ...]) -> None:
    """Rows of a sliding window stay out, and so does the kernel that another framework falls back to."""
    plain, latent = of(samples, "attention", "128"), of(samples, "attention", "192/128")
    assert len(plain) == 2 * 3 * 2 and len(latent) == 8
    for sample, qk, v in [*((s, 128, 128) for s in plain), *((s, 192, 128) for s in latent)]:
        shape = [sample.sizes[name] for name in ("batch", "seq", "heads", "kv_heads")]
        assert sample.seconds == pytest.approx(attention_s(*shape, qk, v), rel=1e-5)
        assert sample.sizes["flop"] == pytest.approx(shape[0] * shape[2] * shape[1] ** 2 * (qk + v))
        assert sample.sizes["io_bytes"] == pytest.approx(2 * shape[0] * shape[1] * (shape[2] + shape[3]) * (qk + v))


def test_collectives_count_bytes(samples: tuple[Sample, ...]) -> None:
    """Elements of two bytes become bytes; the newest NCCL counts."""
    found = of(samples, "all_to_all")
    assert {s.group for s in found} == {"2/1", "4/1", "8/1"}
    assert {s.sizes["message_bytes"] for s in found} == {2.0**p for p in range(16, 29, 2)}
    for sample in found:
        ranks = float(sample.group.partition("/")[0])
        assert sample.seconds == pytest.approx(exchange_s(sample.sizes["message_bytes"], ranks), rel=1e-5)
        assert sample.how == "nccl 2.29.2" and KNOT_BYTES[0] <= sample.sizes["message_bytes"] <= KNOT_BYTES[-1]


def test_one_framework_and_version(systems: Path) -> None:
    tables = read_tables(H200, root=systems, framework="vllm", version="0.9.1")
    assert {s.how.partition(",")[0] for s in tables.samples} == {"vllm 0.9.1", "nccl 2.29.2"}
    bf16 = of(tables.samples, "gemm", "bf16")
    assert bf16[0].seconds == pytest.approx(2 * gemm_s("bfloat16", **bf16[0].sizes), rel=1e-5)
    with pytest.raises(UsageError, match="--version 0.9.1 belongs to a framework"):
        read_tables(H200, root=systems, version="0.9.1")


def test_a_version_that_is_not_there(systems: Path, tmp_path: Path) -> None:
    write(tmp_path / "data/h200/gemm/vllm/0.24.0/gemm_perf.txt", gemms())
    with pytest.raises(FileError, match="no table of vllm 7.0 for H200") as caught:
        read_tables(H200, root=tmp_path, framework="vllm", version="7.0")
    assert caught.value.hint == "there are vllm 0.24.0"


@pytest.mark.parametrize(
    ("older", "newer"),
    [("1.3.0rc20", "1.3.0rc23"), ("1.3.0rc23", "1.3.0"), ("0.5.6", "0.5.6.post2"), ("0.5.6.post2", "0.5.10"),
     ("0.9.1", "0.24.0"), ("2.23", "2.27.3"), ("0.1.dev19262", "0.1")],
)  # fmt: skip
def test_order_of_versions(older: str, newer: str) -> None:
    assert aiconfigurator._order(older) < aiconfigurator._order(newer)


def test_many_rows_are_thinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "h200/gemm/vllm/0.24.0/gemm_perf.txt", gemms())
    monkeypatch.setattr(aiconfigurator, "MOST", 20)
    tables = read_tables(H200, root=tmp_path)
    found = of(tables.samples, "gemm", "bf16")
    assert len(found) == 20 and len({s.case for s in found}) == 20
    assert 14 <= sum(min(s.sizes["n"], s.sizes["k"]) >= 512 and s.sizes["m"] >= 1024 for s in found) <= 18
    assert "at most 20 rows of a curve were taken, of up to 36" in tables.remarks
    assert read_tables(H200, root=tmp_path).samples == tables.samples


def test_groups_larger_than_a_domain_are_left_out(tmp_path: Path) -> None:
    write(tmp_path / "h200/comm/nccl/2.29.2/nccl_perf.txt", exchanges())
    found = read_tables(replace(H200, domain_gpus=4), root=tmp_path).samples
    assert {s.group for s in found} == {"2/1", "4/1"}


def test_a_device_without_tables(systems: Path) -> None:
    with pytest.raises(ClusterError, match="no tables for MI300X") as caught:
        read_tables(load_cluster("mi300xx8"), root=systems)
    assert caught.value.hint == "it has B200, H200"


def test_broken_tables(tmp_path: Path) -> None:
    path = tmp_path / "h200/gemm/vllm/0.24.0/gemm_perf.txt"
    write(path, [{k: v for k, v in row.items() if k != "n"} for row in gemms()])
    with pytest.raises(SchemaError, match=r"gemm_perf.txt': no column 'n'"):
        read_tables(H200, root=tmp_path)
    path.with_name("other").mkdir()
    lines = write(tmp_path / "b/h200/gemm/vllm/1/gemm_perf.txt", gemms()).read_text().splitlines()
    (tmp_path / "b/h200/gemm/vllm/1/gemm_perf.txt").write_text("\n".join([*lines[:5], lines[5][:20]]))
    with pytest.raises(SchemaError, match=r"line 6: 3 values for 7 columns"):
        read_tables(H200, root=tmp_path / "b")
    odd = [{**row, "m": "many"} for row in gemms()]
    write(tmp_path / "c/h200/gemm/vllm/1/gemm_perf.txt", odd)
    with pytest.raises(SchemaError, match="column 'm': not all values are numbers"):
        read_tables(H200, root=tmp_path / "c")
    with pytest.raises(FileError, match="there is no directory"):
        read_tables(H200, root=tmp_path / "nowhere")


def test_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DeviceError) as caught:
        read_tables(H200)
    assert caught.value.hint == "pip install 'moeplan[aiconfigurator]'" and caught.value.exit_code == 1


def test_parquet_without_its_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "h200/gemm/vllm/0.24.0/gemm_perf.parquet"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"PAR1")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DeviceError, match="needs pyarrow"):
        read_tables(H200, root=tmp_path)


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = gemms()
    path = tmp_path / "h200/gemm/vllm/0.24.0/gemm_perf.parquet"
    path.parent.mkdir(parents=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    write(tmp_path / "text/h200/gemm/vllm/0.24.0/gemm_perf.txt", rows)
    assert read_tables(H200, root=tmp_path).samples == read_tables(H200, root=tmp_path / "text").samples
    path.write_bytes(path.read_bytes()[:100])
    aiconfigurator._read.cache_clear()
    with pytest.raises(SchemaError, match="is not parquet"):
        read_tables(H200, root=tmp_path)


@pytest.mark.skipif(importlib.util.find_spec(PACKAGE) is None, reason="needs aiconfigurator-core")
@pytest.mark.parametrize("name", ["A100", "B200", "GB200", "H100", "H200", "L40S"])
def test_the_package_itself(name: str) -> None:
    tables = read_tables(load_cluster(f"{name.lower()}x8"))
    kinds = {(s.op, s.key) for s in tables.samples}
    assert {("gemm", "bf16"), ("attention", "128"), ("attention", "192/128"), ("all_reduce", "bf16")} <= kinds
    rates = [2e-12 * s.sizes["m"] * s.sizes["n"] * s.sizes["k"] / s.seconds for s in of(tables.samples, "gemm", "bf16")]
    peak = load_cluster(f"{name.lower()}x8").device.peak_flop_per_s["bf16"] * 1e-12
    assert 0.4 * peak < max(rates) < 1.05 * peak


def test_file_of_samples(samples: tuple[Sample, ...], tmp_path: Path) -> None:
    environment = Environment(
        moeplan="1",
        torch="",
        backend="import",
        communication="nccl",
        device=GPU,
        memory_bytes=1e11,
        processors=132,
        when="2026-01-01",
    )
    path = tmp_path / "profile.samples.jsonl"
    path.write_text(samples_text(environment, samples))
    assert load_samples(path) == (environment, list(samples))
