"""What every launcher must do: start the plan's ranks, be read back, refuse what would make an invalid file."""

from __future__ import annotations

import pytest

from moeplan.cli.export import LAUNCHERS as NAMES
from moeplan.errors import ExportError, UnknownNameError, UsageError
from moeplan.exporters import write
from moeplan.exporters.launchers.base import RUN_NODE, Size, kubernetes_name, option_values
from moeplan.exporters.launchers.launchers import LAUNCHERS, launcher
from moeplan.exporters.megatron import MEGATRON_CORE, Megatron
from tests.exporters.launchers.rows import MORE, SETTINGS, SIZES, job_on, plan_on, replaced, text_of, texts_of


def test_every_launcher_has_a_row_and_a_word() -> None:
    assert [known.name for known in LAUNCHERS] == list(SETTINGS) == list(NAMES)
    assert len({known.file for known in LAUNCHERS}) == len(LAUNCHERS)
    assert {name: {o.name for o in launcher(name).options} >= set(more) for name, more in MORE.items()} == dict.fromkeys(
        MORE, True
    )


@pytest.mark.parametrize("cluster", SIZES)
@pytest.mark.parametrize("name", SETTINGS)
def test_starts_the_ranks_of_the_plan(name: str, cluster: str) -> None:
    for settings in ({}, MORE.get(name, {})):
        text = text_of(name, cluster, settings)
        assert launcher(name).size(text) == Size(*SIZES[cluster])
        assert text.endswith("\n") and "\n\n\n\n" not in text


WRONG = [  # launcher, what is changed by hand or by a fault, what it then starts
    ("torchrun", {"--nnodes 4": "--nnodes 3"}, "3 x 8 = 24"),
    ("torchrun", {"--nproc-per-node 8": "--nproc-per-node 64"}, "4 x 64 = 256"),
    ("rendezvous", {"--nnodes 4": "--nnodes 1:4"}, None),
    ("slurm", {"--gpus-per-node=8": "--gpus-per-node=64"}, "4 x 64 = 256"),
    ("slurm", {"--nodes=4": "--nodes=4-8"}, "0 x 8 = 0"),
    ("trainjob", {"numNodes: 4": "numNodes: 32"}, "32 x 8 = 256"),
    ("trainjob", {"nvidia.com/gpu: 8": "nvidia.com/gpu: 64"}, "4 x 0 = 0"),
    ("pytorchjob", {"replicas: 3": "replicas: 4"}, "5 x 8 = 40"),
    ("pytorchjob", {"nprocPerNode: '8'": "nprocPerNode: '64'"}, "4 x 0 = 0"),
    ("job", {"completions: 4": "completions: 8"}, "0 x 8 = 0"),
    ("job", {"nvidia.com/gpu: 8": "nvidia.com/gpu: 1"}, "4 x 1 = 4"),
    ("skypilot", {"num_nodes: 4": "num_nodes: 32"}, "32 x 8 = 256"),
    ("skypilot", {"H100:8": "H100:64"}, "4 x 64 = 256"),
    ("ray", {"\nPER_NODE = 8": "\nPER_NODE = 64"}, "4 x 64 = 256"),
]


@pytest.mark.parametrize(("name", "changes", "size"), WRONG)
def test_another_size_is_noticed(name: str, changes: dict[str, str], size: str | None) -> None:
    texts = texts_of(name)
    known = launcher(name)
    carried = {n: t for n, t in texts.items() if n not in (known.file, "README.md")}
    write.check_launch(known, job_on("h100x32"), texts[known.file], carried)
    text = replaced(texts[known.file], changes)
    if size is None:
        with pytest.raises(ValueError, match="1:4"):
            known.size(text)
        return
    with pytest.raises(ExportError, match=f"{known.file} starts {size} processes, the plan has 4 x 8 = 32"):
        write.check_launch(known, job_on("h100x32"), text, carried)


@pytest.mark.parametrize("name", ["trainjob", "pytorchjob", "job"])
def test_other_files_inside_are_noticed(name: str) -> None:
    texts = texts_of(name)
    carried = {n: t for n, t in texts.items() if n not in (launcher(name).file, "README.md")}
    assert set(carried) == {"megatron.args", RUN_NODE, "preflight.py", "plan.json"}
    text = replaced(texts[launcher(name).file], {"--tensor-model-parallel-size 2": "--tensor-model-parallel-size 4"})
    with pytest.raises(ExportError, match="does not carry the files of the export as they are"):
        write.check_launch(launcher(name), job_on("h100x32"), text, carried)


def test_the_node_script_comes_with_those_that_start_it() -> None:
    for known in LAUNCHERS:
        assert (RUN_NODE in texts_of(known.name)) == (known.needs_node_script or known.name == "torchrun")
        assert (RUN_NODE in text_of(known.name)) >= known.needs_node_script


@pytest.mark.parametrize("name", SETTINGS)
def test_says_what_it_must_be_told(name: str) -> None:
    for missing in SETTINGS[name]:
        settings = {key: value for key, value in SETTINGS[name].items() if key != missing}
        with pytest.raises(UsageError, match=rf"launcher '{name}' needs {missing}: .*\(give --set {missing}=\.\.\."):
            write.compose(plan_on("h100x32"), Megatron(), MEGATRON_CORE, [name], settings)


IMPOSSIBLE = [  # launcher, option, value
    ("torchrun", "port", "http"),
    ("slurm", "time", "an hour"),
    ("slurm", "partition", "gpu; rm -rf /"),
    ("job", "image", "my image"),
    ("job", "namespace", "My_Team"),
    ("trainjob", "rdma", "hca"),
    ("pytorchjob", "mount", "data"),
    ("skypilot", "accelerator", "H100:8"),
]


@pytest.mark.parametrize(("name", "option", "value"), IMPOSSIBLE)
def test_refuses_impossible_values(name: str, option: str, value: str) -> None:
    with pytest.raises(UsageError, match=f"{option}='.*' of launcher '{name}' is not (an?|the|SkyPilot's) "):
        option_values(launcher(name), job_on("h100x8"), SETTINGS[name] | {option: value})


def test_refuses_settings_that_nothing_takes() -> None:
    with pytest.raises(UsageError, match=r"no launcher of this export takes 'imagine' \(did you mean 'image'"):
        text_of("job", settings={"imagine": "x"})
    with pytest.raises(UsageError, match="no launcher of this export takes 'image'"):
        text_of("torchrun", settings={"image": "x"})
    with pytest.raises(UsageError, match="MEGATRON_LM='/a b' is not a plain path"):
        text_of("torchrun", settings={"MEGATRON_LM": "/a b"})
    with pytest.raises(UnknownNameError, match="unknown launcher 'slrum'.*slurm"):
        launcher("slrum")


def test_names_for_kubernetes() -> None:
    assert kubernetes_name("Qwen3-30B_A3B.x") == "qwen3-30b-a3b-x"
    assert kubernetes_name("3x") == "job-3x"
    assert kubernetes_name("-.-") == "job"
    assert kubernetes_name("a" * 39 + "--b") == "a" * 39
