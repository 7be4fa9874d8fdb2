"""Launch files judged by the schemas of those who will read them."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.exporters import judges
from tests.exporters.launchers.rows import MORE, SIZES, text_of

CASES = [(cluster, more) for cluster in SIZES for more in (False, True)]


def documents(name: str, cluster: str, more: bool) -> dict[str, Any]:
    text = text_of(name, cluster, MORE[name] if more else {})
    return {document.get("kind", "task"): document for document in yaml.safe_load_all(text)}


def judge(document: dict[str, Any]) -> None:
    """Kubernetes' own schema, unknown keys refused."""
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


def lost(given: Any, kept: Any, place: str = "") -> Iterator[str]:
    """Keys of a document that did not survive the round trip through models that drop what they do not know."""
    if isinstance(given, dict):
        for key, value in given.items():
            if key in kept:
                yield from lost(value, kept[key], f"{place}.{key}")
            else:
                yield f"{place}.{key}"
    elif isinstance(given, list):
        for one, other in zip(given, kept, strict=True):
            yield from lost(one, other, place)


@pytest.mark.parametrize(("cluster", "more"), CASES)
def test_indexed_job(cluster: str, more: bool) -> None:
    found = documents("job", cluster, more)
    assert list(found) == ["ConfigMap", "Service", "Job"]
    for document in found.values():
        judge(document)
        assert document["metadata"].get("namespace") == ("team" if more else None)
    name = found["Service"]["metadata"]["name"]
    pod = found["Job"]["spec"]["template"]["spec"]
    assert found["Service"]["spec"]["selector"] == {"job-name": found["Job"]["metadata"]["name"]}
    assert (pod["subdomain"], pod["containers"][0]["env"][1]["value"]) == (name, f"{found['Job']['metadata']['name']}-0.{name}")
    check_volumes(found["ConfigMap"], pod["volumes"], pod["containers"][0]["volumeMounts"], more)


def check_volumes(config: dict[str, Any], volumes: list[dict[str, Any]], mounts: list[dict[str, Any]], more: bool) -> None:
    assert (
        [v["name"] for v in volumes] == [m["name"] for m in mounts] == ["launch", "shared-memory", *(["claim"] if more else [])]
    )
    assert volumes[0]["configMap"]["name"] == config["metadata"]["name"]
    assert mounts[1]["mountPath"] == "/dev/shm"


@pytest.mark.parametrize(("cluster", "more"), CASES)
def test_train_job(cluster: str, more: bool) -> None:
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="kubeflow-trainer-api is not installed")
    found = documents("trainjob", cluster, more)
    assert list(found) == ["ConfigMap", "TrainJob"]
    judge(found["ConfigMap"])
    model = models.TrainerV1alpha1TrainJob.from_dict(found["TrainJob"])
    assert not list(lost(found["TrainJob"], model.to_dict()))
    assert model.spec.trainer.num_nodes * model.spec.trainer.num_proc_per_node == SIZES[cluster][0] * SIZES[cluster][1]
    patched = found["TrainJob"]["spec"]["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"][0]
    pod = patched["template"]["spec"]["template"]["spec"]
    check_volumes(found["ConfigMap"], pod["volumes"], pod["containers"][0]["volumeMounts"], more)


def test_lost_keys_are_noticed() -> None:
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="kubeflow-trainer-api is not installed")
    document = documents("trainjob", "h100x8", False)["TrainJob"]
    document["spec"]["trainer"]["numProcsPerNode"] = 8
    assert list(lost(document, models.TrainerV1alpha1TrainJob.from_dict(document).to_dict())) == [
        ".spec.trainer.numProcsPerNode"
    ]


# Keys of a PyTorchJob in kubeflow.org/v1 (Kubeflow training operator 1.9, API reference); its pods are Kubernetes' own.
PYTORCH_SPEC = {"elasticPolicy", "nprocPerNode", "pytorchReplicaSpecs", "runPolicy"}
PYTORCH_REPLICA = {"replicas", "restartPolicy", "template"}


@pytest.mark.parametrize(("cluster", "more"), CASES)
def test_pytorch_job(cluster: str, more: bool) -> None:
    found = documents("pytorchjob", cluster, more)
    judge(found["ConfigMap"])
    job = found["PyTorchJob"]
    assert (job["apiVersion"], set(job)) == ("kubeflow.org/v1", {"apiVersion", "kind", "metadata", "spec"})
    assert set(job["spec"]) <= PYTORCH_SPEC and isinstance(job["spec"]["nprocPerNode"], str)
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert list(replicas) == (["Master", "Worker"] if SIZES[cluster][0] > 1 else ["Master"])
    assert replicas["Master"]["replicas"] == 1
    for replica in replicas.values():
        assert set(replica) == PYTORCH_REPLICA and replica["restartPolicy"] in ("Always", "OnFailure", "Never", "ExitCode")
        pod = replica["template"]["spec"]
        judge({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "one"}, "spec": pod})
        assert [c["name"] for c in pod["containers"]] == ["pytorch"]  # the operator looks for this name
        check_volumes(found["ConfigMap"], pod["volumes"], pod["containers"][0]["volumeMounts"], more)


def test_amd_gpus_have_another_name() -> None:
    for name in ("trainjob", "pytorchjob", "job"):
        assert "amd.com/gpu: 8" in text_of(name, "mi300xx16") and "nvidia.com" not in text_of(name, "mi300xx16")


SPOILED: list[tuple[dict[str, Any], str]] = [
    ({"num_node": 2}, "'num_node' was unexpected"),
    ({"num_nodes": "2"}, "'2' is not of type 'integer'"),
    ({"resources": {"accelerator": "H100:8"}}, "'accelerator' was unexpected"),
    ({"resources": {"cloud": "nowhere"}}, "'nowhere' is not one of"),
    ({"run": ["bash"]}, "is not of type 'string'"),
]


def test_skypilot_task(tmp_path: Path) -> None:
    pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    tasks = [documents("skypilot", cluster, more)["task"] for cluster, more in CASES]
    assert [task["num_nodes"] for task in tasks] == [SIZES[cluster][0] for cluster, _ in CASES]
    found = judges.verdicts("skypilot", [*tasks, *({**tasks[0], **change} for change, _ in SPOILED)], tmp_path, "skypilot")
    for task, verdict in zip(tasks, found, strict=False):
        assert verdict["accepted"], f"{task}: {verdict}"
    for (change, words), verdict in zip(SPOILED, found[len(tasks) :], strict=True):
        assert not verdict["accepted"] and words in verdict["message"], f"{change}: {verdict}"


def test_skypilot_names_of_devices() -> None:
    assert "accelerators: A100-80GB:8" in text_of("skypilot", "a100x16")
    assert "accelerators: H100-SXM:8" in text_of("skypilot", settings=MORE["skypilot"])


@pytest.mark.parametrize("cluster", SIZES)
def test_ray_script_compiles(cluster: str) -> None:
    text = text_of("ray", cluster)
    compile(text, "run_ray.py", "exec")
    assert {name.split(".")[0] for name in re.findall(r"^(?:import|from) (\S+)", text, re.M)} <= set(sys.stdlib_module_names)
