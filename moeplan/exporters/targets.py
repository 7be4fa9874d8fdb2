"""All targets of an export. A new one is a file, a line here, and a row in its test."""

from __future__ import annotations

from moeplan.errors import UnknownNameError
from moeplan.exporters.base import Exporter
from moeplan.exporters.deepspeed import DeepSpeed
from moeplan.exporters.megatron import Megatron
from moeplan.exporters.neutral import Neutral

EXPORTERS: tuple[Exporter, ...] = (Megatron(), DeepSpeed(), Neutral())


def exporter(name: str) -> Exporter:
    """The exporter of a name."""
    for known in EXPORTERS:
        if known.name == name:
            return known
    raise UnknownNameError("target", name, [known.name for known in EXPORTERS])
