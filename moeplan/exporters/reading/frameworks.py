"""Files of frameworks other than Megatron-LM, told apart and read as a run: DeepSpeed, torchtitan and Megatron-Bridge.

A DeepSpeed JSON says no model: `config.json` beside it does, and its sequence length comes from `deepspeed.args` beside it or
from further arguments (`--seq_length N`). Of an export the whole directory is read, whichever of its files is named.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from moeplan.costmodels.hf_config import read_config
from moeplan.costmodels.layout import Layout
from moeplan.costmodels.model import Model
from moeplan.costmodels.model_catalog import MODELS, named_model
from moeplan.costmodels.workload import Workload
from moeplan.errors import FileError, SchemaError
from moeplan.exporters.base import read_arguments
from moeplan.exporters.flag_facts import load_facts
from moeplan.exporters.launchers.base import RUN_NODE
from moeplan.exporters.launchers.torchrun import Torchrun
from moeplan.exporters.megatron_bridge_facts import bridge_facts
from moeplan.exporters.reading import bridge, deepspeed, torchtitan
from moeplan.exporters.reading.flags import Flags, Given
from moeplan.exporters.reading.imported import Imported
from moeplan.exporters.reading.sources import MOST_BYTES, read_launches
from moeplan.records import read_text

_EXPORTS = {
    deepspeed.ARGUMENTS: deepspeed.CONFIG,
    torchtitan.ARGUMENTS: torchtitan.RECIPE,
    bridge.ARGUMENTS: bridge.ARGUMENTS,
}
"""The file that says most, by the argument file that tells in a directory or a launch file whose export it is."""
_LENGTHS = ("--seq_length", "--seq-length", "--max_seq_length")


def read_other(
    path: Path,
    *,
    settings: Mapping[str, str],
    positional: Sequence[str],
    add: Sequence[str],
    gpus: int | None,
    era: str,
) -> Imported | None:
    """The run that a file of another framework describes; None where it is no such file."""
    if path.is_dir():
        path = next((path / name for name in _EXPORTS if (path / name).is_file()), path)
    if not path.is_file() or path.stat().st_size > MOST_BYTES:
        return None
    text = read_text(path, "launch script")
    for name, file in _EXPORTS.items():
        named = path.name == name or name in text or RUN_NODE in text
        if named and (path.parent / name).is_file() and (path.parent / file).is_file():
            path, gpus = path.parent / file, gpus or _started(path.parent)
            text = read_text(path, "launch script")
            break
    if path.suffix == ".json" and re.search(r'"(zero_optimization|train_micro_batch_size_per_gpu|train_batch_size)"', text):
        return _deepspeed(path, add, gpus, era)
    if path.suffix == ".py" and "torchtitan" in text and "Trainer.Config" in text:
        return _torchtitan(path, text, gpus, era)
    if re.search(r"^[^#\n]*\brun_recipe\.py\b", text, re.M) or re.search(r"^'?(model|train)\.\w+=", text, re.M):
        return _bridge(path, text, settings, positional, add, gpus, era)
    return None


def _started(folder: Path) -> int | None:
    """Processes that the launch file of an export starts."""
    script = folder / RUN_NODE
    if not script.is_file():
        return None
    size = Torchrun().size(read_text(script, "launch script"))
    return size.nodes * size.per_node or None


def _named(model: Model) -> Model:
    """The model of the catalog that is the same, if there is one; prediction layers may be left out."""
    for path in MODELS.iterdir():
        known = named_model(path.stem)
        if known and (known.family, known.hidden, len(known.layers)) == (model.family, model.hidden, len(model.layers)):
            same = dataclasses.replace(known, mtp=model.mtp)
            if same == dataclasses.replace(model, name=known.name, source=known.source, remarks=known.remarks):
                return same
    return model


def _deepspeed(path: Path, add: Sequence[str], gpus: int | None, era: str) -> Imported:
    folder = path.parent
    words = list(add)
    if (folder / deepspeed.ARGUMENTS).is_file():
        words += read_arguments(read_text(folder / deepspeed.ARGUMENTS, "argument file"))[1]
    lengths = [after for word, after in zip(words, words[1:], strict=False) if word in _LENGTHS and after.isdigit()]
    if not lengths:
        raise FileError(f"'{path}' does not say the sequence length", hint="say it with --add '--seq_length 4096'")
    if not (folder / deepspeed.MODEL).is_file():
        raise FileError(f"'{path}' says no model", hint=f"put the model's {deepspeed.MODEL} beside it")
    data, where = deepspeed.load_json(path), f"configuration '{path}'"
    published = deepspeed.load_json(folder / deepspeed.MODEL)
    if not isinstance(published, dict):
        raise SchemaError(f"configuration '{folder / deepspeed.MODEL}': expected a JSON object")
    model = _named(read_config(published, name=str(published.get("_name_or_path") or folder.name).rsplit("/", 1)[-1].lower()))
    remarks: list[str] = []
    workload, layout = deepspeed.read_settings(data, model, int(lengths[0]), gpus, remarks, where=where, era=era)
    facts = load_facts("deepspeed")
    known = {name.split(".")[0] for name in facts.flags}
    unknown = [Given(f"{key}", (str(value),)) for key, value in data.items() if key not in known]
    return _imported(path, "configuration", f"DeepSpeed {facts.written_for}", (model, workload, layout), remarks, unknown)


def _torchtitan(path: Path, text: str, gpus: int | None, era: str) -> Imported:
    where, remarks, facts = f"recipe '{path}'", list[str](), load_facts("torchtitan")
    found = torchtitan.read_recipe(text, where)
    parts = torchtitan.read_fields(found, gpus, remarks, where=where, era=era)
    unknown = [
        Given(name, (str(value),))
        for name, value in found.items()
        if name not in facts.flags and name.partition(".")[2] not in ("module", "attn_backend")
    ]
    return _imported(path, "recipe", f"torchtitan {facts.written_for}", parts, remarks, unknown)


def _bridge(
    path: Path,
    text: str,
    settings: Mapping[str, str],
    positional: Sequence[str],
    add: Sequence[str],
    gpus: int | None,
    era: str,
) -> Imported:
    world = gpus
    if "run_recipe.py" in text:
        launches = [x for x in read_launches(text, path, settings, positional)[1] if "run_recipe" in x.program]
        if not launches:
            raise FileError(f"'{path}' starts no run_recipe.py that can be followed")
        words, world = list(launches[-1].words), gpus or launches[-1].world
    else:
        words = [word for n, line in enumerate(text.splitlines(), 1) for word in _line_words(line, f"'{path}', line {n}")]
    recipe, found = bridge.read_words([*words, *add])
    if world is None:
        raise FileError(f"'{path}' does not say on how many GPUs it runs", hint="say it with --gpus N")
    if not recipe:
        raise FileError(f"'{path}' names no recipe", hint="say it with --add '--recipe NAME'")
    facts, remarks, faults = bridge_facts(), list[str](), list[str]()
    parts = bridge.read_overrides(recipe, found, world, remarks, faults, era)
    always = [key for key, fact in facts.keys.items() if fact.absent or fact.form in ("switch", "unless")]
    if missing := [key for key in always if key not in found]:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        remarks.append(f"not overridden, so the recipe's value and read as Megatron's default: {', '.join(missing[:5])}{more}")
    known = {*facts.keys, "mixed_precision", "comm_overlap"}
    known |= {f"model.{name}" for name in ("overlap_p2p_comm", "batch_p2p_comm", "cuda_graph_scope")}
    unknown = [Given(key, (value,)) for key, value in found.items() if key not in known]
    title = f"Megatron-Bridge {facts.written_for}"
    return _imported(path, "overrides", title, parts, remarks, unknown, faults)


def _line_words(line: str, where: str) -> list[str]:
    """Words of a line of overrides; none of one that sets a variable."""
    try:
        return [] if "export" in line else shlex.split(line, comments=True)
    except ValueError as error:
        raise SchemaError(f"{where}: {str(error).lower()}", hint="close the quotes") from None


def _imported(
    path: Path,
    kind: str,
    framework: str,
    parts: tuple[Model, Workload, Layout],
    remarks: Sequence[str],
    unknown: Sequence[Given],
    faults: Sequence[str] = (),
) -> Imported:
    model, workload, layout = parts
    return Imported(
        path=str(path),
        kind=kind,
        framework=framework,
        program="",
        model=model,
        workload=workload,
        layout=layout,
        flags=Flags(unknown),
        remarks=tuple(dict.fromkeys(remarks)),
        faults=tuple(faults),
    )
