"""All targets of an export. A new one is a file, a line here, and a row in its test."""

from __future__ import annotations

from moeplan.errors import UnknownNameError
from moeplan.exporters.base import Exporter
from moeplan.exporters.deepspeed import DeepSpeed
from moeplan.exporters.megatron import Megatron
from moeplan.exporters.megatron_bridge import MegatronBridge
from moeplan.exporters.neutral import Neutral
from moeplan.exporters.torchtitan import TorchTitan

EXPORTERS: tuple[Exporter, ...] = (Megatron(), MegatronBridge(), DeepSpeed(), TorchTitan(), Neutral())


def exporter(name: str) -> Exporter:
    """The exporter of a name."""
    for known in EXPORTERS:
        if known.name == name:
            return known
    raise UnknownNameError("target", name, [known.name for known in EXPORTERS])
