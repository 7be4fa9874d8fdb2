"""The launch scripts: bash reads them, torchrun and sbatch know their options, Megatron gets the words of the argument file."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from moeplan.exporters.megatron import arguments, environment
from moeplan.exporters.readme import README
from moeplan.exporters.write import export
from moeplan.planner.plan import Plan, price_plan
from tests.exporters.cases import layout_of, problem_of, small_models, words

TORCHRUN, SLURM = "run_torchrun.sh", "run_slurm.sbatch"
SBATCH_OPTIONS = {"job-name", "nodes", "ntasks-per-node", "gpus-per-node", "exclusive", "time"}
SHOW = '#!/usr/bin/env bash\nprintf \'%s\\0\' "$@" > "$RECORD.$NODE_RANK"\nenv -0 > "$RECORD.$NODE_RANK.env"\n'
"""A stand-in for torchrun that records its arguments and environment."""
SRUN = """#!/usr/bin/env bash
while [[ "$1" == --* ]]; do echo "$1" >> "$RECORD.srun"; shift; done
for node in $(seq 0 $((SLURM_NNODES - 1))); do SLURM_NODEID=$node "$@"; done
"""
SCONTROL = """#!/usr/bin/env bash
[[ "$*" == 'show hostnames rack[1-4]' ]] && echo rack1 && sleep 0.2 && printf 'rack2\\nrack3\\nrack4\\n'
"""
"""Takes its time, so that a reader that leaves after the first line is noticed."""

PLANS: list[tuple[str, str, dict[str, Any]]] = [  # model, cluster, layout
    ("dense", "h100x8", {"tp": 2}),
    ("dense", "h100x2", {"cp": 2}),
    ("hybrid", "a100x16", {"pp": 2, "stages": "Et*5|t*7L"}),
    ("prediction", "h100x256", {"pp": 2, "vpp": 2, "ep": 8, "stages": "Et|(tt|)*2tmL", "ep_overlap": True}),
    ("many experts", "gb200x32", {"ep": 8, "cuda_graphs": ("attn", "moe_router"), "recompute": ("moe_act", "layernorm")}),
    ("experts", "b200x16", {"ep": 8, "sharding": "fsdp"}),
]


def plan_of(model: str, cluster: str, fields: dict[str, Any]) -> Plan:
    problem = problem_of(small_models()[model], cluster, 512, 2048)
    return price_plan(problem, layout_of(problem.model, problem.profile.cluster.gpus, **fields))


def exported(plan: Plan, directory: Path, name: str) -> Path:
    """The path of one file of a new export."""
    return {path.name: path for path in export(plan, directory)}[name]


@pytest.fixture
def stubs(tmp_path: Path) -> dict[str, str]:
    """An environment whose torchrun, srun and scontrol only record, with a Megatron checkout that is empty."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("torchrun", SHOW), ("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    kept = {k: v for k, v in os.environ.items() if k in ("HOME", "LANG", "TMPDIR")}
    return {
        **kept,
        "PATH": f"{folder}:{os.environ['PATH']}",
        "RECORD": str(tmp_path / "record"),
        "MEGATRON_LM": "/opt/mega tron",
        "SKIP_PREFLIGHT": "1",
    }


def run(script: Path, given: dict[str, str], *extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", str(script), *extra], env=given, capture_output=True, text=True, timeout=60, check=False)


def recorded(given: dict[str, str], rank: int) -> tuple[list[str], dict[str, str]]:
    """Arguments and environment with which torchrun was called on a node."""
    called = Path(f"{given['RECORD']}.{rank}").read_text().split("\0")[:-1]
    variables = dict(line.split("=", 1) for line in Path(f"{given['RECORD']}.{rank}.env").read_text().split("\0")[:-1])
    return called, variables


@pytest.mark.parametrize(("model", "cluster", "fields"), PLANS)
def test_torchrun_gets_the_plan(
    model: str, cluster: str, fields: dict[str, Any], tmp_path: Path, stubs: dict[str, str]
) -> None:
    plan = plan_of(model, cluster, fields)
    script = exported(plan, tmp_path / "a launch", TORCHRUN)
    assert os.access(script, os.X_OK)
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    nodes = plan.problem.profile.cluster.nodes
    given = {**stubs, "NODE_RANK": "0"} if nodes == 1 else {**stubs, "NODE_RANK": str(nodes - 1), "MASTER_ADDR": "node-a"}
    done = run(script, given, "--lr", "3e-4", "--data-path", "my data*")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    called, variables = recorded(given, nodes - 1)
    # 1. what bash hands on is the argument file, word for word, then what the user added
    assert called[called.index("--master-port") + 3 :] == [*words(arguments(plan)), "--lr", "3e-4", "--data-path", "my data*"]
    if plan.layout.stages and model != "hybrid":
        assert called[called.index("--pipeline-model-parallel-layout") + 1] == plan.layout.stages
    assert environment(plan).items() <= variables.items()
    # 2. torchrun's own parser
    from torch.distributed.run import get_args_parser

    parsed = get_args_parser().parse_args(called)
    assert int(parsed.nnodes) * int(parsed.nproc_per_node) == plan.layout.world
    assert (parsed.node_rank, parsed.master_port) == (nodes - 1, 29500)
    assert parsed.master_addr == ("127.0.0.1" if nodes == 1 else "node-a")
    assert parsed.training_script == f"/opt/mega tron/pretrain_{'hybrid' if model == 'hybrid' else 'gpt'}.py"
    assert parsed.training_script_args == called[called.index("--master-port") + 3 :]


def test_torchrun_script_asks_for_what_it_needs(tmp_path: Path, stubs: dict[str, str]) -> None:
    script = exported(plan_of(*PLANS[2]), tmp_path / "launch", TORCHRUN)
    without = {k: v for k, v in stubs.items() if k != "MEGATRON_LM"}
    assert "set MEGATRON_LM to a Megatron-LM checkout" in run(script, {**without, "NODE_RANK": "0"}).stderr
    assert "set MASTER_ADDR to the first node" in run(script, {**stubs, "NODE_RANK": "0"}).stderr
    assert "set NODE_RANK to 0..1" in run(script, {**stubs, "MASTER_ADDR": "node-a"}).stderr
    assert not list(tmp_path.glob("record*"))


def test_another_script_can_be_started(tmp_path: Path, stubs: dict[str, str]) -> None:
    script = exported(plan_of(*PLANS[0]), tmp_path / "launch", TORCHRUN)
    given = {**stubs, "NODE_RANK": "0", "PRETRAIN_SCRIPT": "my script.py", "MASTER_PORT": "1234"}
    assert run(script, given).returncode == 0
    called, _ = recorded(given, 0)
    assert called[called.index("--master-port") + 1 :][:2] == ["1234", "my script.py"]


def test_nodes_are_checked_first(tmp_path: Path, stubs: dict[str, str]) -> None:
    script = exported(plan_of(*PLANS[0]), tmp_path / "launch", TORCHRUN)
    (tmp_path / "bin" / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    (tmp_path / "bin" / "nvidia-smi").chmod(0o755)
    given = {**{name: value for name, value in stubs.items() if name != "SKIP_PREFLIGHT"}, "NODE_RANK": "0"}
    done = run(script, {**given, "PREFLIGHT_SKIP": "libraries"})
    assert done.returncode == 1 and "FAIL gpus: no GPU (nvidia-smi finds none, or is missing); planned: 8 x H100" in done.stderr
    assert not list(tmp_path.glob("record*"))
    rows = "\n".join(["NVIDIA H100 80GB HBM3, 81559, 4"] * 8)
    (tmp_path / "bin" / "nvidia-smi").write_text(f"#!/bin/sh\ncat <<E\n{rows}\nE\n")
    assert run(script, {**given, "PREFLIGHT_SKIP": "libraries"}).returncode == 0
    assert recorded(stubs, 0)[0][:2] == ["--nnodes", "1"]


def test_slurm_starts_every_node(tmp_path: Path, stubs: dict[str, str]) -> None:
    problem = problem_of(small_models()["dense"], "h100x32", 512, 2048)
    plan = price_plan(problem, layout_of(problem.model, 32, tp=2, pp=2, vpp=3, stages="Et|tt|tt|tt|tt|t*3L"))
    export(plan, tmp_path / "launch")
    script = tmp_path / "spool" / "slurm_script"  # Slurm runs a copy
    script.parent.mkdir()
    script.write_bytes((tmp_path / "launch" / SLURM).read_bytes())
    given = {
        **stubs, "SLURM_JOB_NODELIST": "rack[1-4]", "SLURM_NNODES": "4", "SLURM_SUBMIT_DIR": str(tmp_path / "launch"),
    }  # fmt: skip
    done = run(script, given, "--train-iters", "5")
    assert (done.returncode, done.stderr) == (0, "")
    assert Path(f"{stubs['RECORD']}.srun").read_text().split() == ["--kill-on-bad-exit=1"]
    for rank in range(4):
        called, variables = recorded(given, rank)
        assert called[: called.index("--master-port")] == [
            "--nnodes", "4", "--nproc-per-node", "8", "--node-rank", str(rank), "--master-addr", "rack1",
        ]  # fmt: skip
        assert called[-2:] == ["--train-iters", "5"]
        assert called[called.index("--pipeline-model-parallel-layout") + 1] == plan.layout.stages
        assert environment(plan).items() <= variables.items()


@pytest.mark.parametrize(("model", "cluster", "fields"), PLANS)
def test_slurm_asks_for_the_plans_nodes(model: str, cluster: str, fields: dict[str, Any], tmp_path: Path) -> None:
    plan = plan_of(model, cluster, fields)
    script = exported(plan, tmp_path / "launch", SLURM)
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", script.read_text(), re.M))
    assert len(options) == script.read_text().count("#SBATCH")
    assert set(options) == SBATCH_OPTIONS
    assert int(options["nodes"]) * int(options["gpus-per-node"]) == plan.layout.world
    assert options["ntasks-per-node"] == "1"
    assert shlex.split(options["job-name"]) == [plan.problem.model.name]


def test_names_cannot_reach_the_shell(tmp_path: Path, stubs: dict[str, str]) -> None:
    plan = plan_of(*PLANS[0])
    model = dataclasses.replace(plan.problem.model, name='my "model"\n$(touch spoiled) #')
    plan = dataclasses.replace(plan, problem=dataclasses.replace(plan.problem, model=model))
    torchrun, slurm = exported(plan, tmp_path / "launch", TORCHRUN), tmp_path / "launch" / SLURM
    assert "#SBATCH --job-name=my-model-touch-spoiled-\n" in slurm.read_text()
    assert run(torchrun, {**stubs, "NODE_RANK": "0"}).returncode == 0
    called, _ = recorded(stubs, 0)
    assert called[called.index("--master-port") + 3 :] == words(arguments(plan))
    assert not list(tmp_path.rglob("spoiled"))


@pytest.mark.parametrize(("model", "cluster", "fields"), PLANS)
def test_readme_names_the_environment(model: str, cluster: str, fields: dict[str, Any], tmp_path: Path) -> None:
    plan = plan_of(model, cluster, fields)
    text = exported(plan, tmp_path / "launch", README).read_text()
    for name, value in environment(plan).items():
        assert f"`{name}={value}`" in text
    for name in ("MEGATRON_LM", *(["MASTER_ADDR", "NODE_RANK"] if plan.problem.profile.cluster.nodes > 1 else [])):
        assert name in text, f"{README} does not mention {name}"
