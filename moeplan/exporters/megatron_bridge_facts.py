"""Facts about Megatron-Bridge: which override says what a flag of Megatron-LM says, and which recipe is which model.

Both run Megatron-Core, so that a plan in Megatron's flags is a plan in overrides; flags/megatron_bridge.yaml is the dictionary,
read forwards by the exporter and backwards by the importer. Overrides are KEY=VALUE in Hydra's syntax; the last of a key wins.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moeplan.exporters.base import Flag
from moeplan.records import from_mapping, load_yaml

DTYPES = {"fp32": "torch.float32", "bf16": "torch.bfloat16", "fp16": "torch.float16"}
"""Bridge's names of number formats."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyFact:
    """One override."""

    flag: str
    """The flag of Megatron-LM that says the same."""
    form: Literal["word", "switch", "unless", "list", "text", "dtype"]
    absent: str = ""
    """Its value where the flag is absent; empty: none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BridgeFacts:
    """What is known of Megatron-Bridge."""

    framework: str
    written_for: str
    versions: tuple[str, ...]
    keys: Mapping[str, KeyFact]
    covered: tuple[str, ...]
    """Flags that need no override."""
    precisions: Mapping[str, str]
    """Bridge's precision recipes by ours."""
    recipes: Mapping[str, str]
    """Recipes by models of the catalog."""


@functools.cache
def bridge_facts() -> BridgeFacts:
    """The facts of flags/megatron_bridge.yaml."""
    where = "megatron_bridge.yaml"
    return from_mapping(BridgeFacts, load_yaml(Path(__file__).parent / "flags" / where, "flag file"), f"flags/{where}")


def value_of(fact: KeyFact, flag: Sequence[str] | None) -> str:
    """The value of an override, of a flag with its values or None where it is absent; empty: no override."""
    if fact.form == "switch":
        return "false" if flag is None else "true"
    if fact.form == "unless":
        return "true" if flag is None else "false"
    if flag is None:
        return fact.absent
    if fact.form == "list":
        return f"[{','.join(flag[1:])}]"
    if fact.form == "text":
        return f"'{flag[1]}'"
    return DTYPES[flag[1]] if fact.form == "dtype" else flag[1]


def overrides_of(flags: Iterable[Flag]) -> dict[str, str]:
    """The overrides that say what flags of Megatron-LM say, by key."""
    given = {flag[0]: flag for flag in flags}
    found = {key: value_of(fact, given.get(fact.flag)) for key, fact in bridge_facts().keys.items()}
    return {key: value for key, value in found.items() if value}


def flags_of(overrides: Mapping[str, str]) -> list[Flag]:
    """The flags of Megatron-LM that say what overrides say, those of their keys that are known."""
    out: dict[str, Flag] = {}
    for key, fact in bridge_facts().keys.items():
        value = overrides.get(key)
        if value is None or value in ("null", "None", "[]", ""):
            continue
        if fact.form in ("switch", "unless"):
            if (value.lower() == "true") == (fact.form == "switch"):
                out[fact.flag] = (fact.flag,)
        elif fact.form == "list":
            out[fact.flag] = (fact.flag, *(word.strip() for word in value.strip("[]").split(",")))
        elif fact.form == "dtype":
            out[fact.flag] = (fact.flag, {theirs: ours for ours, theirs in DTYPES.items()}.get(value, value))
        else:
            out[fact.flag] = (fact.flag, value.strip("'\""))
    return list(out.values())
