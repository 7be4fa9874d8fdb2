"""Launch files of elastic plans: bash, torchrun's parser and the schema of Kubernetes read them; stand-ins are started."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from moeplan.errors import ExportError, UsageError
from moeplan.exporters.elastic import launch
from moeplan.exporters.elastic.launch import ElasticPyTorchJob, ElasticSlurm, ElasticTorchrun
from moeplan.exporters.launchers.base import RUN_NODE, Size
from moeplan.exporters.launchers.kubernetes import embedded
from moeplan.planner.elastic.availability import Availability
from moeplan.planner.elastic.saves import DETECT_S
from moeplan.runtime.elastic_train import SHARED_STORE
from tests.exporters.elastic.plans import DP_ONLY, IMAGE, PIPELINE, elastic_of, texts_of
from tests.exporters.launchers.rows import replaced
from tests.exporters.launchers.test_conformance import PYTORCH_REPLICA, PYTORCH_SPEC, check_volumes, judge
from tests.exporters.test_launch_scripts import recorded, run
from tests.exporters.test_launch_scripts import stubs as stubs

ELASTIC_POLICY = {"minReplicas", "maxReplicas", "rdzvBackend", "rdzvPort", "rdzvHost", "rdzvId", "rdzvConf", "standalone",
                  "nProcPerNode", "maxRestarts", "metrics"}  # fmt: skip
"""Keys of an elastic policy in kubeflow.org/v1 (Kubeflow training operator 1.9, API reference)."""


KILLED_AFTER_S = 30
"""Seconds that torchrun gives workers to end (torch.distributed.elastic, SubprocessContext.close)."""


def write_all(texts: dict[str, str], directory: Path) -> Path:
    directory.mkdir()
    for name, text in texts.items():
        (directory / name).write_text(text)
    return directory


def check_torchrun(called: list[str], directory: Path, restarts: int = 1000) -> list[str]:
    """Compare with the plan of 2 to 6 nodes; what the entry script gets."""
    from torch.distributed.run import config_from_args, get_args_parser

    parsed = get_args_parser().parse_args(called)
    config, _, _ = config_from_args(parsed)
    assert (config.min_nodes, config.max_nodes, config.nproc_per_node) == (2, 6, 8)
    assert (config.max_restarts, config.rdzv_backend) == (restarts, "c10d")
    waits = {name: int(seconds) for name, seconds in config.rdzv_configs.items() if name != "timeout"}
    assert waits.pop("keep_alive_interval") * waits.pop("keep_alive_max_attempt") == DETECT_S
    # a node that waits for others outlives a repair, and a start waits for those that still end their workers
    assert waits.pop("join_timeout") > Availability().repair_s and waits.pop("last_call_timeout") >= KILLED_AFTER_S
    assert not waits
    assert parsed.training_script == str(directory / "elastic_entry.py")
    return [config.rdzv_endpoint, config.run_id, *parsed.training_script_args]


def test_every_node_starts_the_entry_script(tmp_path: Path, stubs: dict[str, str]) -> None:
    directory = write_all(texts_of(elastic_of(PIPELINE), "torchrun", restarts="7"), tmp_path / "a launch")
    script = directory / RUN_NODE
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    given = {**stubs, "NODE_RANK": "0"}  # under which the stand-in files its record
    for missing in ("CHECKPOINTS", "RDZV_ENDPOINT"):
        assert f"set {missing} to" in run(script, given).stderr
        given[missing] = {"CHECKPOINTS": "/my ckpt", "RDZV_ENDPOINT": "first:29500"}[missing]
    assert "set MEGATRON_LM to" in run(script, {k: v for k, v in given.items() if k != "MEGATRON_LM"}).stderr
    done = run(script, {**given, "RDZV_ID": "seven"}, "--data-path", "my data*")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    called, variables = recorded(stubs, 0)
    assert check_torchrun(called, directory, 7) == ["first:29500", "seven", "--data-path", "my data*"]
    assert (variables["PRETRAIN_SCRIPT"], variables["CHECKPOINTS"]) == ("/opt/mega tron/pretrain_gpt.py", "/my ckpt")
    assert variables[SHARED_STORE] == "1"


def test_nodes_are_checked_first(tmp_path: Path, stubs: dict[str, str]) -> None:
    directory = write_all(texts_of(elastic_of(PIPELINE), "torchrun"), tmp_path / "launch")
    (tmp_path / "bin" / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    (tmp_path / "bin" / "nvidia-smi").chmod(0o755)
    given = {**stubs, "CHECKPOINTS": "/c", "RDZV_ENDPOINT": "first", "SKIP_PREFLIGHT": "0", "PREFLIGHT_SKIP": "libraries,nics"}
    done = run(directory / RUN_NODE, given)
    assert done.returncode == 1 and "FAIL gpus: no GPU" in done.stderr and "planned: 8 x H100" in done.stderr


def test_slurm(tmp_path: Path, stubs: dict[str, str]) -> None:
    texts = texts_of(elastic_of(PIPELINE), "slurm", partition="gpu", time="2-00:00:00")
    directory = write_all(texts, tmp_path / "launch")
    script = tmp_path / "slurm_script"  # Slurm runs a copy
    script.write_text(texts["run_slurm.sbatch"])
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", script.read_text(), re.M))
    assert options == {
        "job-name": "mixtral-8x7b-8l-proxy", "nodes": "2-6", "ntasks-per-node": "1", "gpus-per-node": "8", "exclusive": "",
        "no-kill": "", "requeue": "", "open-mode": "append", "time": "2-00:00:00", "partition": "gpu",
    }  # fmt: skip
    given = {
        **stubs, "SLURM_JOB_NODELIST": "rack[1-4]", "SLURM_NNODES": "1", "SLURM_SUBMIT_DIR": str(directory),
        "SLURM_JOB_ID": "42", "NODE_RANK": "0", "CHECKPOINTS": "/c",
    }  # fmt: skip
    assert "set CHECKPOINTS to" in run(script, {k: v for k, v in given.items() if k != "CHECKPOINTS"}).stderr
    done = run(script, given, "--lr", "3e-4")
    assert (done.returncode, done.stderr) == (0, "")
    assert Path(f"{stubs['RECORD']}.srun").read_text().split() == ["--no-kill", "--kill-on-bad-exit=0", "--wait=0"]
    assert check_torchrun(recorded(stubs, 0)[0], directory) == ["rack1:29500", "42", "--lr", "3e-4"]


MORE = {"namespace": "team", "claim": "data", "mount": "/data", "rdma": "rdma/hca_shared"}


def documents(elastic: Any, **more: str) -> dict[str, Any]:
    text = texts_of(elastic, "pytorchjob", **{**IMAGE, **more})["pytorchjob.yaml"]
    return {document["kind"]: document for document in yaml.safe_load_all(text)}


@pytest.mark.parametrize("more", [{}, MORE])
def test_pytorch_job(more: dict[str, str]) -> None:
    found = documents(elastic_of(PIPELINE), **more)
    judge(found["ConfigMap"])
    spec = found["PyTorchJob"]["spec"]
    assert set(spec) <= PYTORCH_SPEC and set(spec["elasticPolicy"]) <= ELASTIC_POLICY
    # the operator refuses processes of a node in both places
    assert spec["nprocPerNode"] == "8" and "nProcPerNode" not in spec["elasticPolicy"]
    assert spec["elasticPolicy"] == {"rdzvBackend": "c10d", "minReplicas": 2, "maxReplicas": 6, "maxRestarts": 1000}
    assert list(spec["pytorchReplicaSpecs"]) == ["Worker"]
    worker = spec["pytorchReplicaSpecs"]["Worker"]
    assert set(worker) == PYTORCH_REPLICA and (worker["replicas"], worker["restartPolicy"]) == (6, "OnFailure")
    pod = worker["template"]["spec"]
    judge({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "one"}, "spec": pod})
    assert [container["name"] for container in pod["containers"]] == ["pytorch"]
    check_volumes(found["ConfigMap"], pod["volumes"], pod["containers"][0]["volumeMounts"], bool(more))
    assert found["PyTorchJob"]["metadata"].get("namespace") == more.get("namespace")


def test_pods_run_the_node_script(tmp_path: Path, stubs: dict[str, str]) -> None:
    texts = texts_of(elastic_of(PIPELINE), "pytorchjob", "slurm", **IMAGE)
    carried = dict(embedded(texts["pytorchjob.yaml"]))
    assert set(carried) == set(texts) - {"pytorchjob.yaml", "run_slurm.sbatch", "README.md"}
    directory = write_all(carried, tmp_path / "launch")
    given = {name: value for name, value in stubs.items() if name != "MEGATRON_LM"}
    told = {"PET_RDZV_ENDPOINT": "job-worker-0:23456", "NODE_RANK": "0"}
    done = run(directory / RUN_NODE, {**given, **told})
    assert (done.returncode, done.stderr) == (0, "")
    called, variables = recorded(stubs, 0)
    assert check_torchrun(called, directory) == ["job-worker-0:23456", "mixtral-8x7b-8l-proxy"]
    assert (variables["PRETRAIN_SCRIPT"], variables["CHECKPOINTS"]) == ("/opt/megatron/pretrain_gpt.py", "/data/checkpoints")
    assert variables[SHARED_STORE] == "1"


def test_the_rendezvous_may_be_set_and_is_checked(tmp_path: Path, stubs: dict[str, str]) -> None:
    directory = write_all(
        texts_of(elastic_of(PIPELINE), "torchrun", rdzv_conf="last_call_timeout=5,is_host=0"), tmp_path / "one"
    )
    given = {**stubs, "NODE_RANK": "0", "CHECKPOINTS": "/c", "RDZV_ENDPOINT": "first"}
    assert run(directory / RUN_NODE, given).returncode == 0
    called, _ = recorded(stubs, 0)
    assert called[called.index("--rdzv-conf") + 1] == "last_call_timeout=5,is_host=0"
    with pytest.raises(UsageError, match="rdzv_conf"):
        texts_of(elastic_of(PIPELINE), "torchrun", rdzv_conf="a=1; rm -rf /")


def test_pods_need_what_nobody_can_ask_for() -> None:
    for missing in IMAGE:
        with pytest.raises(UsageError, match=f"launcher 'pytorchjob' needs {missing}: "):
            texts_of(elastic_of(DP_ONLY), "pytorchjob", **{k: v for k, v in IMAGE.items() if k != missing})


def test_a_config_map_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "CONFIG_MAP_BYTES", 30_000)
    with pytest.raises(ExportError, match=r"the files of pytorchjob.yaml have \d+ bytes, a ConfigMap holds 30000"):
        texts_of(elastic_of(DP_ONLY), "pytorchjob", **IMAGE)


WRONG: list[tuple[str, Any, dict[str, str], Size]] = [  # launcher, its file, what is changed, what is then read
    (RUN_NODE, ElasticTorchrun(2), {}, Size(4, 8)),
    (RUN_NODE, ElasticTorchrun(2), {"--nnodes 2:4": "--nnodes 3:4"}, Size(0, 8)),
    (RUN_NODE, ElasticTorchrun(2), {"--nnodes 2:4": "--nnodes 4"}, Size(0, 8)),
    ("run_slurm.sbatch", ElasticSlurm(2), {}, Size(4, 8)),
    ("run_slurm.sbatch", ElasticSlurm(2), {"--nodes=2-4": "--nodes=1-4"}, Size(0, 8)),
    ("pytorchjob.yaml", ElasticPyTorchJob(2), {}, Size(4, 8)),
    ("pytorchjob.yaml", ElasticPyTorchJob(2), {"minReplicas: 2": "minReplicas: 1"}, Size(0, 8)),
    ("pytorchjob.yaml", ElasticPyTorchJob(2), {"replicas: 4": "replicas: 3"}, Size(0, 8)),
]


@pytest.mark.parametrize(("file", "known", "changes", "size"), WRONG)
def test_another_span_is_noticed(file: str, known: Any, changes: dict[str, str], size: Size) -> None:
    texts = texts_of(elastic_of(DP_ONLY), "slurm", "pytorchjob", **IMAGE)
    assert known.size(replaced(texts[file], changes)) == size
