"""The flags of Megatron-DeepSpeed under the names of Megatron-LM's, so that what reads the one reads the other."""

from __future__ import annotations

from dataclasses import dataclass, field

from moeplan.exporters.megatron_deepspeed_facts import dialect
from moeplan.exporters.reading.flags import Flags, Given, catalog

_DECIDED = {
    "--use-megatron-fsdp", "--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather",
    "--optimizer-cpu-offload", "--grad-reduce-in-bf16", "--num-layers-per-virtual-pipeline-stage",
}  # fmt: skip
"""Flags of Megatron-LM that only what DeepSpeed is told answers."""


class _OwnNames(dict[str, str]):
    """Defaults under Megatron-DeepSpeed's names; those of flags that it lacks are left out."""

    def __setitem__(self, flag: str, value: str) -> None:
        own = dialect().own.get(flag, flag)
        if own in dialect().same or own in dialect().kinds:
            super().__setitem__(own, value)


@dataclass(slots=True)
class Spoken(Flags):
    """Flags of Megatron-DeepSpeed that answer to the names of Megatron-LM's."""

    defaults: dict[str, str] = field(default_factory=_OwnNames)
    implied: dict[str, Given | None] = field(default_factory=dict)
    """Flags of Megatron-LM that the command amounts to; None: it amounts to none."""

    def knows(self, flag: str) -> bool:
        """Whether Megatron-DeepSpeed's parser has a flag."""
        facts = dialect()
        if flag in facts.kinds or flag in facts.same or flag in facts.idle:
            return True
        return flag in catalog().takes and flag not in catalog().gone and flag not in catalog().planned

    def find(self, *flags: str) -> Given | None:
        """The last occurrence of the first of `flags` that the command says in its own words."""
        found = None
        for flag in flags:
            own = dialect().own.get(flag, flag)
            if self.knows(own):
                self.asked.add(own)
            if found is None and flag in self.implied:
                found = self.implied[flag]
            elif found is None and flag not in _DECIDED and self.knows(own):
                found = self.last.get(own)
        return found


def implied(flag: str, *values: object, like: Given | None = None) -> dict[str, Given | None]:
    """A flag of Megatron-LM; `like` is what says it, for messages."""
    words = tuple(map(str, values))
    return {flag: Given(like.flag if like else flag, words, like.line if like else 0)}
