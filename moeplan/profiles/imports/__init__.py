"""Measurements of others as samples: tables of aiconfigurator, output of nccl-tests."""

from __future__ import annotations

import json
from collections.abc import Iterable

from moeplan.profiles.samples import SCHEMA, Environment, Sample
from moeplan.records import to_mapping


def samples_text(environment: Environment, samples: Iterable[Sample]) -> str:
    """Text of a file of samples."""
    lines = [{**to_mapping(environment), "schema": SCHEMA}, *map(to_mapping, samples)]
    return "".join(json.dumps(line) + "\n" for line in lines)
