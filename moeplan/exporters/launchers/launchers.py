"""All launchers. A new one is a file, a line here, and a row in its test."""

from __future__ import annotations

from moeplan.errors import UnknownNameError
from moeplan.exporters.launchers.base import Launcher
from moeplan.exporters.launchers.kubernetes import IndexedJob, PyTorchJob, TrainJob
from moeplan.exporters.launchers.ray import Ray
from moeplan.exporters.launchers.skypilot import SkyPilot
from moeplan.exporters.launchers.slurm import Slurm
from moeplan.exporters.launchers.torchrun import Rendezvous, Torchrun

LAUNCHERS: tuple[Launcher, ...] = (
    Torchrun(),
    Rendezvous(),
    Slurm(),
    TrainJob(),
    PyTorchJob(),
    IndexedJob(),
    SkyPilot(),
    Ray(),
)
USUAL = ("torchrun", "slurm")
"""Launchers that are written where none is named."""


def launcher(name: str) -> Launcher:
    """The launcher of a name."""
    for known in LAUNCHERS:
        if known.name == name:
            return known
    raise UnknownNameError("launcher", name, [known.name for known in LAUNCHERS])
