"""Launch files started with stand-ins for what is not here: each hands torchrun, or Ray's workers, the plan's arguments."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from moeplan.exporters.launchers.kubernetes import embedded
from tests.exporters.launchers.rows import job_on, text_of, texts_of
from tests.exporters.test_launch_scripts import recorded, run
from tests.exporters.test_launch_scripts import stubs as stubs

NODES, PER_NODE = 4, 8


def write_all(texts: dict[str, str], directory: Path) -> Path:
    directory.mkdir()
    for name, text in texts.items():
        (directory / name).write_text(text)
    return directory


def check_torchrun(called: list[str], *, rank: int, address: str) -> None:
    from torch.distributed.run import get_args_parser

    parsed = get_args_parser().parse_args(called)
    assert int(parsed.nnodes) * int(parsed.nproc_per_node) == NODES * PER_NODE
    assert (parsed.node_rank, parsed.master_addr) == (rank, address)
    assert parsed.training_script_args[: len(job_on("h100x32").arguments)] == job_on("h100x32").arguments


@pytest.mark.parametrize("name", ["trainjob", "pytorchjob", "job"])
def test_pods_run_the_node_script(name: str, tmp_path: Path, stubs: dict[str, str]) -> None:
    directory = write_all(dict(embedded(text_of(name))), tmp_path / "launch")
    given = {key: value for key, value in stubs.items() if key != "MEGATRON_LM"}
    told = {"NODE_RANK": "2", "MASTER_ADDR": "first"} if name == "job" else {"PET_NODE_RANK": "2", "PET_MASTER_ADDR": "first"}
    # The stand-in for torchrun files its record under the rank, which it finds in the environment of the node script.
    done = run(directory / "run_torchrun.sh", {**given, **told, "RECORD": str(tmp_path / "record")})
    assert (done.returncode, done.stderr) == (0, "")
    (record,) = [p for p in tmp_path.glob("record.*") if p.suffix != ".env"]
    called = record.read_text().split("\0")[:-1]
    check_torchrun(called, rank=2, address="first")
    assert "/opt/megatron/pretrain_gpt.py" in called


def test_skypilot_runs_the_node_script(tmp_path: Path, stubs: dict[str, str]) -> None:
    directory = write_all(texts_of("skypilot"), tmp_path / "launch")
    task = yaml.safe_load((directory / "skypilot.yaml").read_text())
    given = {**stubs, "SKYPILOT_NODE_RANK": "3", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2\n10.0.0.3\n10.0.0.4"}
    done = subprocess.run(["bash", "-c", task["run"]], env=given, cwd=directory, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    check_torchrun(recorded(stubs, 3)[0], rank=3, address="10.0.0.1")


def test_nodes_meet_at_a_rendezvous(tmp_path: Path, stubs: dict[str, str]) -> None:
    directory = write_all(texts_of("rendezvous"), tmp_path / "launch")
    script = directory / "run_rendezvous.sh"
    assert "set RDZV_ENDPOINT to the first node" in run(script, stubs).stderr
    given = {**stubs, "NODE_RANK": "0", "RDZV_ENDPOINT": "first:29500", "RDZV_ID": "seven"}
    assert run(script, given, "--lr", "3e-4").returncode == 0
    from torch.distributed.run import get_args_parser

    parsed = get_args_parser().parse_args(recorded(stubs, 0)[0])
    assert (parsed.nnodes, parsed.nproc_per_node) == (str(NODES), str(PER_NODE))
    assert (parsed.rdzv_backend, parsed.rdzv_id, parsed.rdzv_endpoint) == ("c10d", "seven", "first:29500")
    assert parsed.training_script_args == [*job_on("h100x32").arguments, "--lr", "3e-4"]


RAY = """class ScalingConfig:
    def __init__(self, **options):
        assert options.pop("placement_strategy") == "PACK" and options.pop("resources_per_worker") == {"GPU": 1}
        self.num_workers = options.pop("num_workers")
        assert options == {"use_gpu": True}
"""
RAY_TORCH = """import os
class TorchConfig:
    def __init__(self, backend):
        assert backend == "gloo"
class TorchTrainer:
    def __init__(self, loop, *, scaling_config, torch_config):
        self.loop, self.workers = loop, scaling_config.num_workers
    def fit(self):
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(self.workers), MASTER_PORT="1")
        self.loop()
"""
DISTRIBUTED = "def get_rank():\n    return 0\ndef broadcast_object_list(values, src):\n    assert src == 0\n"
RECORD = "import json, os, sys\njson.dump([sys.argv, dict(os.environ)], open(os.environ['RECORD'], 'w'))\n"


def test_ray_workers_start_their_ranks(tmp_path: Path) -> None:
    stand_ins = {"ray/train/__init__.py": RAY, "ray/train/torch.py": RAY_TORCH, "torch/distributed.py": DISTRIBUTED}
    for name, text in {**stand_ins, "ray/__init__.py": "", "torch/__init__.py": "", "pretrain_gpt.py": RECORD}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    texts = texts_of("ray", settings={"MEGATRON_LM": str(tmp_path)})
    script = write_all(texts, tmp_path / "launch") / "run_ray.py"
    given = {"PYTHONPATH": str(tmp_path), "RECORD": str(tmp_path / "record"), "PATH": "/usr/bin:/bin", "SKIP_PREFLIGHT": "1"}
    subprocess.run([sys.executable, str(script), "--lr", "3e-4"], env=given, check=True)
    words, variables = json.loads((tmp_path / "record").read_text())
    assert words == [str(tmp_path / "pretrain_gpt.py"), *job_on("h100x32").arguments, "--lr", "3e-4"]
    assert variables["WORLD_SIZE"] == "32" and int(variables["MASTER_PORT"]) > 1
    assert job_on("h100x32").environment.items() <= variables.items()
    given = {name: value for name, value in given.items() if name != "SKIP_PREFLIGHT"}
    done = subprocess.run([sys.executable, str(script)], env=given, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "FAIL gpus" in done.stderr
