"""Kubernetes: a TrainJob (Kubeflow Trainer 2), a PyTorchJob (training operator 1) or a plain indexed Job.

Each file holds a ConfigMap with what a node needs of the export, and the job, whose pods run the node script from it: one pod a
node, all its GPUs. Pods get shared memory for NCCL. The image must hold the framework, and the variables of the job must name
places in it (or on the claim that is mounted).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from moeplan.exporters.base import Job
from moeplan.exporters.launchers.base import RUN_NODE, Launcher, Option, Size, kubernetes_name

PORT = 29500
MOUNT = "/launch"
"""Where a pod finds the files of the export."""
_LABEL = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
_OPTIONS = (
    Option(name="image", meaning="a container image that holds the framework", required=True, pattern=r"[\w.\-/:@]+"),
    Option(name="namespace", meaning="a namespace of Kubernetes", pattern=_LABEL),
    Option(name="claim", meaning="a persistent volume claim to mount (see mount)", pattern=rf"{_LABEL}(\.{_LABEL})*"),
    Option(name="mount", meaning="an absolute path for the claim", default="/workspace", pattern=r"/[\w./-]+"),
    Option(
        name="rdma",
        meaning="the resource that gives a pod its adapters, like rdma/hca_shared_devices",
        pattern=r"[\w.-]+/[\w.-]+",
    ),
)


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as blocks, so that the files in a ConfigMap can be read."""


def _block(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _block)


def dump(documents: list[dict[str, Any]], remarks: list[str]) -> str:
    """Documents as YAML under comments."""
    body = yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=1000, allow_unicode=True)
    return "".join(f"# {line}\n" for line in remarks) + body


def load(text: str, kind: str) -> dict[str, Any]:
    """The one document of a kind."""
    found = [document for document in yaml.safe_load_all(text) if document["kind"] == kind]
    return found[0] if len(found) == 1 else {}


def _gpu(job: Job) -> str:
    return "nvidia.com/gpu" if job.vendor == "nvidia" else "amd.com/gpu"


def _resources(job: Job, values: Mapping[str, str]) -> dict[str, Any]:
    limits: dict[str, Any] = {_gpu(job): job.per_node}
    if values["rdma"]:
        limits[values["rdma"]] = 1
    return {"limits": limits, "requests": dict(limits)}


def _gpus(resources: Mapping[str, Any]) -> int:
    """GPUs that both limits and requests name; 0 where they differ."""
    asked = [{k: v for k, v in resources[part].items() if k.endswith(".com/gpu")} for part in ("limits", "requests")]
    return int(next(iter(asked[0].values()))) if asked[0] == asked[1] and len(asked[0]) == 1 else 0


def _metadata(name: str, values: Mapping[str, str]) -> dict[str, Any]:
    return {"name": name, **({"namespace": values["namespace"]} if values["namespace"] else {})}


def _config(job: Job, values: Mapping[str, str], files: Mapping[str, str]) -> dict[str, Any]:
    name = f"{kubernetes_name(job.name)}-launch"
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": _metadata(name, values), "data": dict(files)}


def _volumes(job: Job, values: Mapping[str, str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Volumes of a pod, and where its container has them."""
    volumes: list[dict[str, Any]] = [
        {"name": "launch", "configMap": {"name": f"{kubernetes_name(job.name)}-launch"}},
        {"name": "shared-memory", "emptyDir": {"medium": "Memory"}},
    ]
    mounts = [{"name": "launch", "mountPath": MOUNT}, {"name": "shared-memory", "mountPath": "/dev/shm"}]
    if values["claim"]:
        volumes.append({"name": "claim", "persistentVolumeClaim": {"claimName": values["claim"]}})
        mounts.append({"name": "claim", "mountPath": values["mount"]})
    return volumes, mounts


def _security(values: Mapping[str, str]) -> dict[str, Any]:
    """Adapters need pinned memory."""
    return {"securityContext": {"capabilities": {"add": ["IPC_LOCK"]}}} if values["rdma"] else {}


def _container(job: Job, values: Mapping[str, str], name: str, env: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "name": name,
        "image": values["image"],
        "command": ["bash", f"{MOUNT}/{RUN_NODE}"],
        **({"env": env} if env else {}),
        "resources": _resources(job, values),
        **_security(values),
        "volumeMounts": _volumes(job, values)[1],
    }


def _remarks(job: Job, file: str) -> list[str]:
    return [f"{job.nodes} pods of {job.per_node} GPUs; kubectl apply -f {file}"]


class TrainJob(Launcher):
    """Kubeflow Trainer 2: the operator makes pods from a runtime and tells each its rank."""

    name = "trainjob"
    file = "trainjob.yaml"
    start = "`kubectl apply -f trainjob.yaml` (Kubeflow Trainer 2.3 or later)"
    needs_node_script = True
    needs_variables = True
    options = (*_OPTIONS, Option(name="runtime", meaning="a training runtime", default="torch-distributed", pattern=_LABEL))

    def text(self, job: Job, values: Mapping[str, str], files: Mapping[str, str]) -> str:
        """Volumes are patched into the runtime's container `node`."""
        volumes, mounts = _volumes(job, values)
        container = {"name": "node", **_security(values), "volumeMounts": mounts}
        pods = {"name": "node", "template": {"spec": {"template": {"spec": {"volumes": volumes, "containers": [container]}}}}}
        train = {
            "apiVersion": "trainer.kubeflow.org/v1alpha1",
            "kind": "TrainJob",
            "metadata": _metadata(kubernetes_name(job.name), values),
            "spec": {
                "runtimeRef": {"name": values["runtime"]},
                "trainer": {
                    "image": values["image"],
                    "numNodes": job.nodes,
                    "numProcPerNode": job.per_node,
                    "command": ["bash", f"{MOUNT}/{RUN_NODE}"],
                    "resourcesPerNode": _resources(job, values),
                },
                "runtimePatches": [
                    {
                        "manager": "moeplan/export",
                        "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [pods]}}},
                    }
                ],
            },
        }
        return dump([_config(job, values, files), train], _remarks(job, self.file))

    def size(self, text: str) -> Size:
        """From the trainer; its resources must say the same."""
        trainer = load(text, "TrainJob")["spec"]["trainer"]
        agree = _gpus(trainer["resourcesPerNode"]) == trainer["numProcPerNode"]
        return Size(trainer["numNodes"], trainer["numProcPerNode"] if agree else 0)


class PyTorchJob(Launcher):
    """Kubeflow's training operator 1: a master and workers."""

    name = "pytorchjob"
    file = "pytorchjob.yaml"
    start = "`kubectl apply -f pytorchjob.yaml` (Kubeflow training operator 1.7 or later)"
    needs_node_script = True
    needs_variables = True
    options: tuple[Option, ...] = _OPTIONS

    def text(self, job: Job, values: Mapping[str, str], files: Mapping[str, str]) -> str:
        """Master and workers are the same pod; the operator gives rank and address in PET_*."""
        pod = {"containers": [_container(job, values, "pytorch", [])], "volumes": _volumes(job, values)[0]}
        specs = {"Master": 1, "Worker": job.nodes - 1}
        train = {
            "apiVersion": "kubeflow.org/v1",
            "kind": "PyTorchJob",
            "metadata": _metadata(kubernetes_name(job.name), values),
            "spec": {
                "nprocPerNode": str(job.per_node),
                "pytorchReplicaSpecs": {
                    kind: {"replicas": count, "restartPolicy": "Never", "template": {"spec": pod}}
                    for kind, count in specs.items()
                    if count
                },
            },
        }
        return dump([_config(job, values, files), train], _remarks(job, self.file))

    def size(self, text: str) -> Size:
        """From the replicas, each of which must ask for as many GPUs as it has processes."""
        spec = load(text, "PyTorchJob")["spec"]
        replicas = list(spec["pytorchReplicaSpecs"].values())
        per = {_gpus(c["resources"]) for r in replicas for c in r["template"]["spec"]["containers"]}
        agree = per == {int(spec["nprocPerNode"])}
        return Size(sum(r["replicas"] for r in replicas), int(spec["nprocPerNode"]) if agree else 0)


class IndexedJob(Launcher):
    """Nothing but Kubernetes: an indexed Job, and a headless Service by which the pods find the first one."""

    name = "job"
    file = "job.yaml"
    start = "`kubectl apply -f job.yaml`"
    needs_node_script = True
    needs_variables = True
    options = _OPTIONS

    def text(self, job: Job, values: Mapping[str, str], files: Mapping[str, str]) -> str:
        """The index of a pod is the rank of its node; a pod that fails ends the job."""
        name = kubernetes_name(job.name)
        rank = {"fieldRef": {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}
        env: list[dict[str, Any]] = [
            {"name": "NODE_RANK", "valueFrom": rank},
            {"name": "MASTER_ADDR", "value": f"{name}-0.{name}"},
        ]
        service = {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": _metadata(name, values),
            "spec": {
                "clusterIP": "None",
                "publishNotReadyAddresses": True,
                "selector": {"job-name": name},
                "ports": [{"name": "master", "port": PORT}],
            },
        }
        pod = {
            "subdomain": name,
            "restartPolicy": "Never",
            "containers": [_container(job, values, "node", env)],
            "volumes": _volumes(job, values)[0],
        }
        indexed = {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": _metadata(name, values),
            "spec": {
                "completionMode": "Indexed",
                "completions": job.nodes,
                "parallelism": job.nodes,
                "backoffLimit": 0,
                "template": {"spec": pod},
            },
        }
        return dump([_config(job, values, files), service, indexed], _remarks(job, self.file))

    def size(self, text: str) -> Size:
        """From completions, which all run at once."""
        spec = load(text, "Job")["spec"]
        per = {_gpus(c["resources"]) for c in spec["template"]["spec"]["containers"]}
        together = spec["completions"] if spec["completions"] == spec["parallelism"] else 0
        return Size(together, per.pop() if len(per) == 1 else 0)


def embedded(text: str) -> Iterator[tuple[str, str]]:
    """The files in the ConfigMap of a launch file."""
    yield from load(text, "ConfigMap")["data"].items()
