"""Other frameworks as judges of exports: their packages in a cache, and one process each that answers for many cases.

A judge is a script that reads cases from a JSON file and writes verdicts to another; it runs by itself, so that what a
framework does to a process (patches, environment, process groups) stays there. `MOEPLAN_CACHE` (default: `.cache`) holds the
packages.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
VERSIONS = {
    "deepspeed": "0.19.8", "torchtitan": "0.3.0", "megatron-bridge": "0.6.2", "transformers": "5.18.0", "skypilot": "0.14.1",
}  # fmt: skip
"""What exports are judged by."""
_SDIST = ("deepspeed",)
_LIBRARIES = {  # what a package imports, beside what torch and we bring
    "deepspeed": (
        "hjson==3.1.0", "msgpack==1.2.4", "psutil==7.2.2", "py-cpuinfo==9.0.0", "einops==0.8.2", "ninja==1.13.2",
        "tqdm==4.70.1", "pydantic==2.14.3", "pydantic-core==2.50.4", "annotated-types==0.8.0", "typing-inspection==0.4.5",
    ),
    "torchtitan": (
        "tyro==1.0.17", "docstring-parser==0.18.0", "typeguard==4.6.0", "einops==0.8.2", "tokenizers==0.23.3",
        "safetensors==0.8.0", "spmd_types==0.2.3", "torchdata==0.11.0", "torch_checkpointing==0.1.1",
    ),
    "megatron-bridge": ("omegaconf==2.3.1", "hydra-core==1.3.8", "antlr4-python3-runtime==4.9.3"),
    "transformers": (
        "transformers==5.18.0", "tokenizers==0.23.3", "safetensors==0.8.0", "regex==2026.11.15", "huggingface-hub==2.4.0",
        "tqdm==4.70.1", "httpx2==2.16.2", "httpcore2==2.16.2", "anyio==4.16.0", "h11==0.16.0", "truststore==0.10.5",
        "idna==3.20",
    ),
}  # fmt: skip


class Unavailable(Exception):
    """Packages that can be had neither from the cache nor from the network."""


def folder(name: str) -> Path:
    """The folder that holds a framework and what it imports, unpacked once."""
    cache = Path(os.environ.get("MOEPLAN_CACHE") or ROOT / ".cache")
    target = cache / f"{name}-{VERSIONS[name]}"
    if not target.is_dir():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=cache) as work:
                made = Path(work) / "made"
                made.mkdir()
                _fill(name, made, Path(work))
                with contextlib.suppress(OSError):  # another process was faster
                    made.rename(target)
        except OSError as error:
            raise Unavailable(f"cannot write to the cache {cache}: {error.strerror}") from None
    return target


def _fill(name: str, made: Path, work: Path) -> None:
    requirement = f"{name}=={VERSIONS[name]}"
    if libraries := _LIBRARIES.get(name):
        _pip("install", "--no-deps", "--target", str(made), *libraries)
    if name == "transformers":
        return
    if name in _SDIST:  # building a wheel takes half a minute, and its sources are all Python
        _pip("download", "--no-deps", "--no-binary=:all:", "--no-build-isolation", "--dest", str(work), requirement)
        with tarfile.open(next(work.glob("*.tar.gz"))) as source:
            source.extractall(work, filter="data")
        unpacked = next(p for p in work.glob(f"{name}-*") if p.is_dir())
        for part in ("deepspeed", "op_builder", "accelerator"):
            (unpacked / part).rename(made / part)
        return
    wanted = ("--only-binary=:all:", "--python-version", "3.12", "--no-deps", "--dest", str(work))
    _pip("download", *wanted, requirement)
    with zipfile.ZipFile(next(work.glob("*.whl"))) as wheel:
        wheel.extractall(made)


def _pip(command: str, *words: str) -> None:
    options = ("--quiet", "--disable-pip-version-check", "--retries", "1", *(("--no-compile",) if command == "install" else ()))
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pip", command, *options, *words],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise Unavailable(f"pip {command} {words[-1]} did not finish within 300 s") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["no reason given"]
        raise Unavailable(f"pip {command} {words[-1]}: {lines[-1]}")


def environment(*names: str) -> dict[str, str]:
    """Variables of a process that imports frameworks; skips the test where one cannot be had."""
    try:
        paths = [str(folder(name)) for name in names]
    except Unavailable as error:
        pytest.skip(str(error))
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}  # compiling takes seconds
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *paths]),
        "PYTHONWARNINGS": "ignore",
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
    }


def verdicts(judge: str, cases: Sequence[dict[str, Any]], work: Path, *names: str) -> list[dict[str, Any]]:
    """What a judge (a script of this folder) says to every case."""
    variables = environment(*names)
    asked, answered = work / f"{judge}_cases.json", work / f"{judge}_verdicts.json"
    asked.write_text(json.dumps(list(cases)), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", f"tests.exporters.judges.{judge}", str(asked), str(answered)],
        cwd=ROOT,
        env=variables,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return list(json.loads(answered.read_text(encoding="utf-8")))


def verdicts_of_parts(
    judge: str, parts: Mapping[str, Sequence[dict[str, Any]]], work: Path, *names: str
) -> dict[str, list[dict[str, Any]]]:
    """What a judge says to every case of some named parts."""
    found = iter(verdicts(judge, [case for part in parts.values() for case in part], work, *names))
    return {name: [next(found) for _ in part] for name, part in parts.items()}


def serve(judge: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Main program of a judge: a refusal is what the framework raises."""
    out = []
    for case in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        try:
            out.append({"accepted": True, **judge(case)})
        except (Exception, SystemExit) as error:  # whatever it is, it is the verdict
            out.append({"accepted": False, "message": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"})
    Path(sys.argv[2]).write_text(json.dumps(out), encoding="utf-8")
