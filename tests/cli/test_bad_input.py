"""Whatever is typed or handed over, the answer is one sentence with the object, the place and the numbers, and no traceback."""

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cli.conftest import Moeplan, Outcome, question

CONFIG = {
    "model_type": "mixtral", "hidden_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4,
    "intermediate_size": 1024, "vocab_size": 32000, "num_local_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip
CLUSTER: dict[str, Any] = {
    "device": "H100", "gpus": 8, "gpus_per_node": 8, "nvlink_domain": 8, "scale_up": {"gb_per_s": 450},
    "nic": {"gbit_per_s": 400, "latency_us": 4}, "nics_per_node": 8, "oversubscription": 1.0, "host_memory_gib": 1000,
    "price_per_gpu_hour": 2.0,
}  # fmt: skip

CONSTANTS: dict[str, Any] = {
    "schema": "moeplan.constants/1", "name": "mine", "source": "measured", "element_bytes": 2, "mp": 2, "esp": 2, "ep": 4,
    "constants": {"a2a": "287us, 1.72GB/s", "all-gather": "3us, 9GB/s", "reduce-scatter": "3us, 9GB/s", "gemm": "4us,9TFLOP/s"},
}  # fmt: skip
SIZES = ["--hidden", "512", "--expert-hidden", "1024", "--top-k", "2"]
LAYER = ["--constants", "fsmoe-b", *SIZES]
"""A layer of `moeplan schedule`, without its tokens."""


def refused(end: Outcome, message: str, hint: str = "", code: int | None = None) -> None:
    """One sentence, the way out of it where there is one, an exit code, nothing on stdout."""
    assert end.code == code if code is not None else end.code in (1, 2)
    assert end.out == "" and end.complaint.lower().startswith("error: ")
    assert end.complaint.count("\n") <= 1
    assert message in end.complaint.replace("\n\t", " ") and hint in end.complaint


OPTIONS: list[tuple[dict[str, Any] | list[str], int, str, str]] = [  # changes or further options, exit code, message, hint
    ({"model": None}, 2, "missing --model", "moeplan solve --help"),
    ({"model": None, "seq_len": None}, 2, "missing --model, --seq-len", ""),
    ({"model": "mixtrl-8x7b"}, 2, "unknown model 'mixtrl-8x7b'", "did you mean 'mixtral-8x7b'"),
    ({"model": ""}, 2, "unknown model ''", ""),
    ({"model": "mödel-é-模型"}, 2, "unknown model 'mödel-é-模型'", ""),
    ({"model": "m" * 300}, 2, "unknown model 'mmm", ""),
    ({"model": "./" + "m" * 300}, 1, "does not exist", ""),
    ({"model": "mixtral-8x7b-0l-proxy"}, 1, "model 'mixtral-8x7b' has 32 layers, cannot be cut to 0", ""),
    ({"cluster": "h100x0"}, 1, "cluster 'H100x0': gpus is 0, a whole number of at least 1 is needed", ""),
    ({"cluster": "h100x-8"}, 1, "gpus is -8", ""),
    ({"cluster": "h100x8.5"}, 1, "cluster 'h100x8.5': '8.5' is not a count of GPUs", "h100x64"),
    ({"cluster": "h100x12"}, 1, "12 GPUs do not fill nodes of 8, 4 are left over", "use 8 or 16 GPUs"),
    ({"cluster": "h100"}, 1, "a device without a count of GPUs", "h100x64"),
    ({"cluster": "q100x8"}, 2, "unknown device 'q100'", "did you mean 'H100'"),
    ({"cluster": "h100x99999999"}, 1, "99999999 GPUs, at most 10000000", ""),
    ({"cluster": "nowhere"}, 2, "unknown cluster 'nowhere'", "h100x256"),
    ({"cluster": "nowhere.yaml"}, 1, "cluster file 'nowhere.yaml' does not exist", ""),
    ({"global_batch": 0}, 2, "0 is not a whole number of at least 1", ""),
    ({"global_batch": -3}, 2, "-3 is not a whole number of at least 1", ""),
    ({"global_batch": 2.5}, 2, "2.5 is not a whole number of at least 1", ""),
    ({"global_batch": "many"}, 2, "'many' is not a number", ""),
    ({"global_batch": "nan"}, 2, "nan is not a whole number", ""),
    ({"global_batch": "inf"}, 2, "inf is not a whole number", ""),
    ({"global_batch": "1e30"}, 2, "1e30 is more than the 1000000000 that are handled", ""),
    ({"global_batch": 10**8}, 1, "global_batch=100000000 is more than the 10000000", ""),
    ({"seq_len": 0}, 2, "'--seq-len': 0 is not a whole number", ""),
    ({"seq_len": 65536}, 1, "65536 exceeds the 32768 positions of mixtral-8x7b", "--seq-len 32768 or less"),
    ({"precision": "fp9"}, 2, "unknown precision 'fp9'", "nvfp4"),
    ({"precision": "fp8-mx"}, 1, "fp8-mx needs compute capability 10.0, H100 has 9.0", "--precision bf16"),
    ({"precision": "fp8-cs", "cluster": "a100x8"}, 1, "fp8-cs needs compute capability 8.9, A100 has 8.0", "bf16"),
    ({"era": "deepep-2024"}, 2, "unknown era 'deepep-2024'", "did you mean 'deepep-2025'"),
    ({"gradients": "fp16"}, 2, "'fp16' is not one of 'fp32', 'bf16'", ""),
    ({"imbalance": 0.5}, 1, "imbalance=0.5 must be at least 1.0", ""),
    ({"imbalance": "nan"}, 1, "imbalance=nan", ""),
    ({"imbalance": "inf"}, 1, "imbalance=inf", ""),
    ({"imbalance": 1e300}, 1, "exceeds the 8 experts of mixtral-8x7b", ""),
    ({"imbalance": 2, "model": "llama3-8b"}, 2, "--imbalance 2: llama3-8b has no experts", ""),
    ({"memory_limit": "plenty"}, 2, "'plenty' is not a size", "80GiB"),
    ({"memory_limit": ""}, 2, "'' is not a size", ""),
    ({"memory_limit": "-5GiB"}, 2, "'-5GiB' is not a size", ""),
    ({"memory_limit": "0"}, 2, "--memory-limit 0 leaves no memory", "70GiB"),
    ({"memory_limit": "1e400"}, 2, "'1e400' is too large for a size", ""),
    ({"memory_limit": "80 GiBs"}, 2, "'80 GiBs' is not a size", ""),
    ({"price_per_gpu_hour": -1}, 2, "--price-per-gpu-hour -1: a price of 0 or more", ""),
    ({"price_per_gpu_hour": "nan"}, 2, "--price-per-gpu-hour nan", ""),
    ({"price_per_gpu_hour": "cheap"}, 2, "'cheap' is not a valid float", ""),
    (["--objective", "speed"], 2, "'speed' is not one of 'throughput', 'gpus', 'cost'", ""),
    (["--objective", "cost"], 1, "objective 'cost' needs a price", "--price-per-gpu-hour"),
    (["--objective", "gpus"], 1, "objective 'gpus' needs a target", "--target-step-time"),
    (["--objective", "gpus", "--target-step-time", "soon"], 2, "'soon' is not a duration", "90s"),
    (["--objective", "gpus", "--target-step-time", "0"], 2, "--target-step-time 0: a time above 0", ""),
    (["--objective", "gpus", "--target-tokens-per-s", "nan"], 2, "--target-tokens-per-s nan: a number above 0", ""),
    (["--objective", "gpus", "--target-tokens-per-s", "-5"], 2, "--target-tokens-per-s -5: a number above 0", ""),
    (["--target-tokens-per-s", "10"], 2, "a target goes with --objective gpus or cost", ""),
    (["--target-step-time", ""], 2, "a target goes with --objective gpus or cost", ""),
    (["--pin", "tp=banana"], 2, "condition 'tp=banana': 'banana' is not a number", ""),
    (["--pin", "tpp=2"], 2, "condition 'tpp=2': unknown field 'tpp'", "did you mean 'tp'"),
    (["--pin", "tp=nan"], 2, "condition 'tp=nan': 'nan' is not a number", ""),
    (["--pin", ""], 2, "'' is not a condition", "tp=2"),
    (["--forbid", "dispatcher=deepp"], 2, "unknown dispatcher 'deepp'", "did you mean 'deepep'"),
    (["--top", "0"], 2, "0 is not a whole number", ""),
    (["--top", "101"], 2, "101 is more than the 100 that are handled", ""),
    (["--tpo", "3"], 2, "No such option '--tpo'", "--top"),
    (["extra"], 2, "unexpected extra argument (extra)", ""),
]  # fmt: skip


def name_of(value: object) -> str | None:
    return " ".join(f"{k}={v}"[:40] for k, v in value.items()) if isinstance(value, dict) else None


@pytest.mark.parametrize(("changes", "code", "message", "hint"), OPTIONS, ids=name_of)
def test_options(moeplan: Moeplan, changes: Any, code: int, message: str, hint: str) -> None:
    arguments = question(**changes) if isinstance(changes, dict) else [*question(), *changes]
    refused(moeplan("solve", *arguments), message, hint, code)


LAYOUTS: list[tuple[list[str], int, str]] = [
    (["--tp", "3"], 1, "tp*cp*pp = 3*1*1 = 3 does not divide the 8 GPUs of H100x8"),
    (["--tp", "16"], 1, "= 16 does not divide the 8 GPUs"),
    (["--ep", "8", "--etp", "2"], 1, "etp*ep*pp = 2*8*1 = 16 does not divide the 8 GPUs"),
    (["--micro-batch", "3"], 1, "global batch 16 is not a multiple of micro_batch*dp = 3*8 = 24"),
    (["--vpp", "1e30"], 2, "1e30 is more than"),
    (["--vpp", "900000000", "--pp", "8"], 1, "7200000000 chunks for 4 layers"),
    (["--tp", "nan"], 2, "nan is not a whole number"),
    (["--recompute", "banana"], 1, "unknown recompute module 'banana'"),
    (["--recompute", "full+moe"], 1, "'full' stands alone (rule recompute-full)"),
    (["--cuda-graphs", "everything"], 1, "unknown CUDA graph scope 'everything'"),
    (["--dispatcher", "deepp"], 2, "'deepp' is not one of 'allgather', 'alltoall', 'deepep', 'hybridep'"),
    (["--dispatcher", "deepep", "--ep", "8", "--era", "te-2024"], 1, "'deepep' does not exist in era te-2024"),
    (["--ep-overlap"], 1, "ep_overlap with ep=1"),
    (["--tp-overlap"], 1, "tp_overlap with tp=1"),
    (["--optimizer-offload", "2"], 1, "optimizer_offload=2.0 must lie between 0 and 1"),
    (["--optimizer-offload", "nan"], 1, "optimizer_offload=nan"),
    (["--stages", "Et*3L"], 1, "it places 3 decoder layers, the model has 4"),
    (["--stages", "(("], 1, "'((' is not a pipeline split"),
    (["--stages", "t*99999999999"], 1, "is not a pipeline split"),
    (["--stages", "(E|)*999999999L"], 1, "is not a pipeline split"),
    (["--stages", "é"], 1, "'é' is not a pipeline split"),
    (["--sharding", "zero3"], 2, "'zero3' is not one of 'ddp', 'optimizer', 'fsdp'"),
]


@pytest.mark.parametrize(("options", "code", "message"), LAYOUTS, ids=[" ".join(o)[:50] for o, _, _ in LAYOUTS])
def test_layouts(moeplan: Moeplan, options: list[str], code: int, message: str) -> None:
    refused(moeplan("estimate", *question(), *options), message, code=code)


def test_experts_options_without_experts(moeplan: Moeplan) -> None:
    dense = question(model="llama3-8b")
    refused(moeplan("estimate", *dense, "--dispatcher", "deepep"), "llama3-8b has no experts to dispatch to", code=2)
    refused(moeplan("estimate", *dense, "--ep", "2"), "do not suit a model with no experts", code=1)
    refused(moeplan("estimate", *dense, "--etp", "2"), "do not suit a model with no experts", code=1)


def test_commands(moeplan: Moeplan) -> None:
    refused(moeplan("sovle"), "No such command 'sovle'.", "Did you mean 'solve'?", 2)
    refused(moeplan("qqq"), "No such command 'qqq'.", code=2)
    refused(moeplan("--verbose"), "No such option '--verbose'", code=2)
    nothing = moeplan()
    assert nothing.code == 2 and "Commands:" in nothing.err + nothing.out


@pytest.mark.parametrize("command", ("solve", "estimate", "schedule", "simulate"))
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none/plan.yaml", "there is no directory"),
        (".", "it is a directory"),
        ("x" * 300, "File name too long"),
        ("file/plan.yaml", "there is no directory"),
        pytest.param(
            "locked/plan.yaml", "is not writable", marks=pytest.mark.skipif(os.geteuid() == 0, reason="root may write")
        ),
    ],
)
def test_paths_that_cannot_be_written(
    moeplan: Moeplan, plan_file: Path, tmp_path: Path, command: str, name: str, message: str
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "locked").mkdir(mode=0o500)
    before = sorted(tmp_path.rglob("*"))
    given = {"schedule": [*LAYER, "--sweep", "tokens=1,2", "-o"], "simulate": [plan_file, "--trace"]}
    refused(moeplan(command, *given.get(command, [*question(), "-o"]), tmp_path / name), message, code=1)
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "file").read_text() == "mine"


FILES: list[tuple[str, bytes, str]] = [  # name, content, message about the model file
    ("bad.json", b'{"hidden_size": 512,\n "vocab_size": }', "line 2: not valid JSON: Expecting value"),
    ("empty.json", b"", "line 1: not valid JSON"),
    ("list.json", b"[1, 2]", "expected the keys of a config.json, found list"),
    ("null.json", b"null", "found NoneType"),
    ("deep.json", b"[" * 100_000, "not valid JSON: nested too deeply"),
    ("binary.json", bytes(range(256)), "not UTF-8 text"),
    ("sizes.json", b'{"hidden_size": 512}', "model 'sizes': no layers found"),
    ("nothing.json", b"{}", "model 'nothing': no layers found"),
    ("bad.yaml", b"a: [1\nb", "not valid YAML"),
    ("twice.yaml", b"hidden_size: 1\nhidden_size: 2", "line 2: not valid YAML: key 'hidden_size' stands twice"),
    ("tag.yaml", b"!!python/object:os.system {}", "not valid YAML"),
    ("nul.yaml", b"\x00", "not valid YAML"),
]


@pytest.mark.parametrize(("name", "content", "message"), FILES, ids=[name for name, _, _ in FILES])
def test_model_files(moeplan: Moeplan, tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    refused(moeplan("solve", *question(model=tmp_path / name)), message, code=1)


def test_model_directories(moeplan: Moeplan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "odd" / "config.json").mkdir(parents=True)
    refused(moeplan("solve", *question(model=tmp_path / "empty")), "config.json' does not exist", code=1)
    refused(moeplan("solve", *question(model=tmp_path / "odd")), "config.json' is a directory", "path of a file", 1)
    refused(moeplan("solve", *question(model=tmp_path / "none.json")), "none.json' does not exist", code=1)
    monkeypatch.chdir(tmp_path)
    refused(moeplan("solve", *question(model="empty")), "model file 'empty/config.json' does not exist", code=1)


ODD: tuple[Any, ...] = (
    "abc",
    None,
    0,
    -1,
    1.5,
    [],
    {},
    True,
    float("inf"),
    float("nan"),
    10**30,
    "",
    "8",
    [1],
    {"a": 1},
    1e300,
)


@pytest.mark.parametrize("key", CONFIG)
def test_wrong_types_in_a_config(moeplan: Moeplan, tmp_path: Path, key: str) -> None:
    path = tmp_path / "config.json"
    for value in ODD:
        path.write_text(json.dumps({**CONFIG, key: value}))
        end = moeplan("solve", *question(model=path, seq_len=128), "--top", 1)
        if end.code:
            refused(end, f"model '{tmp_path.name}'")
    path.write_text(json.dumps({k: v for k, v in CONFIG.items() if k != key}))
    assert moeplan("solve", *question(model=path, seq_len=128), "--top", 1).code in (0, 1)


@pytest.mark.parametrize("key", CLUSTER)
def test_wrong_types_in_a_cluster_file(moeplan: Moeplan, tmp_path: Path, key: str) -> None:
    path = tmp_path / "cluster.yaml"
    for value in (*ODD, {"gbit_per_s": 0}, {"gbit_per_s": "x"}, {"gbit_per_s": 1, "gb_per_s": 1}):
        path.write_text(yaml.safe_dump({**CLUSTER, key: value}))
        end = moeplan("solve", *question(cluster=path, seq_len=128), "--top", 1)
        if end.code:
            refused(end, "cluster", code=1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("device: H100\ngpsu: 8", "unknown key 'gpsu'\nhint: did you mean 'gpus'?"),
        ("device: H100", "missing key 'gpus'"),
        ("device: Q100\ngpus: 8", "key 'device': unknown device 'Q100'\nhint: did you mean 'H100'"),
        ("device: H100\ngpus: 8\ngpus: 16", "line 3: not valid YAML: key 'gpus' stands twice"),
        ("device: H100\ngpus: 8\nnic: 400", "key 'nic': 400 has no unit"),
        ("device: H100\ngpus: 16 GPUs", "key 'gpus': expected int, found str '16 GPUs'"),
        ("", "expected a mapping with the keys device, gpus, name"),
        ("- H100", "expected a mapping"),
        ("device: [", "line 2: not valid YAML"),
    ],
)
def test_cluster_files(moeplan: Moeplan, tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(content)
    refused(moeplan("solve", *question(cluster=path)), message, code=1)
    assert f"cluster file '{path}'" in moeplan("solve", *question(cluster=path)).err


def places(data: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all keys and of first entries of lists."""
    entries = data.items() if isinstance(data, dict) else list(enumerate(data))[:1] if isinstance(data, list) else ()
    return [p for key, value in entries for p in ((*above, key), *places(value, (*above, key)))]


def test_wrong_types_in_a_plan_file(moeplan: Moeplan, plan_file: Path, tmp_path: Path) -> None:
    path, plain = tmp_path / "plan.yaml", yaml.safe_load(plan_file.read_text())
    pick = random.Random(3)
    for place in places(plain):
        if place[0] == "predicted" and len(place) > 1:
            continue
        for value in pick.sample(ODD, 5):
            data = yaml.safe_load(plan_file.read_text())
            where = data
            for key in place[:-1]:
                where = where[key]
            where[place[-1]] = value
            path.write_text(yaml.safe_dump(data))
            end = moeplan("estimate", path, "--json")
            if end.code:
                refused(end, f"error: plan file '{path}'", code=1)


@pytest.mark.parametrize("key", [*CONSTANTS, *CONSTANTS["constants"]])
def test_wrong_types_in_a_constants_file(moeplan: Moeplan, tmp_path: Path, key: str) -> None:
    path = tmp_path / "mine.yaml"
    for value in (*ODD, "1us", "1us,0GB/s", "-1us,1GB/s", "nan,nan", "1us,1GB/s,1"):
        inner = {**CONSTANTS["constants"], key: value} if key in CONSTANTS["constants"] else CONSTANTS["constants"]
        path.write_text(yaml.safe_dump({**CONSTANTS, "constants": inner} | ({key: value} if key in CONSTANTS else {})))
        end = moeplan("schedule", "--constants", path, *SIZES, "--tokens", 64)
        if end.code:
            refused(end, "")
            assert any(word in end.complaint for word in ("mine", "handled", "does not divide", "missing --ep"))
    for left in ({k: v for k, v in CONSTANTS.items() if k != key}, {**CONSTANTS, "gemms": 2}):
        path.write_text(yaml.safe_dump(left))
        end = moeplan("schedule", "--constants", path, *SIZES, "--tokens", 64)
        if end.code:
            refused(end, "")


def test_a_plan_of_another_kind_is_not_simulated(moeplan: Moeplan, tmp_path: Path) -> None:
    for name, content in (
        ("binary.yaml", bytes(range(256))),
        ("empty.yaml", b""),
        ("constants.yaml", b"schema: moeplan.constants/1"),
    ):
        (tmp_path / name).write_bytes(content)
        refused(
            moeplan("simulate", tmp_path / name, "--trace", tmp_path / "trace.json"), f"plan file '{tmp_path / name}'", code=1
        )
    assert not (tmp_path / "trace.json").exists()


@pytest.mark.parametrize("name", ("none.csv", "empty.csv", "binary.csv", "columns.csv", "."))
def test_run_tables(moeplan: Moeplan, tmp_path: Path, name: str) -> None:
    (tmp_path / "empty.csv").write_bytes(b"")
    (tmp_path / "binary.csv").write_bytes(bytes(range(256)))
    (tmp_path / "columns.csv").write_text("id,model,gpus\n1,2,3\n")
    refused(moeplan("estimate", "--runs", tmp_path / name, "-o", tmp_path / "out.csv"), f"run table '{tmp_path}", code=1)
    assert not (tmp_path / "out.csv").exists()


def test_other_files_for_plans_and_tables(moeplan: Moeplan, plan_file: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    refused(moeplan("estimate", tmp_path / "config.json"), "is not a plan: it has no 'schema'", "moeplan.plan/1", 1)
    refused(moeplan("estimate", "--runs", plan_file), "lacks the columns id, model", code=1)
    refused(moeplan("solve", *question(model=plan_file)), "no layers found", code=1)
    refused(moeplan("solve", *question(cluster=plan_file)), "unknown key 'schema'", code=1)
