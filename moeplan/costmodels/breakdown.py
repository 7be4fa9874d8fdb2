"""A cost as named parts that sum to it.

A total is never shown without its parts: `explain` prints their shares, and a test can hit one of them. Parts are numbers
or arrays of one shape; names are paths ("layers/attention core"), so that parts can be grouped by what stands before a "/".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class Breakdown:
    """Named parts of one cost."""

    unit: Literal["seconds", "bytes"]
    parts: Mapping[str, Any]
    """Part name -> number or array; the total is their sum."""

    @property
    def total(self) -> Any:
        """Sum of all parts."""
        return sum(self.parts.values())

    def __getitem__(self, name: str) -> Any:
        """The part of that name; a name that ends in "/" sums all parts below it."""
        if name.endswith("/"):
            return sum(v for k, v in self.parts.items() if k.startswith(name))
        return self.parts[name]

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        """Pairs of name and value, in the order they were added."""
        return iter(self.parts.items())

    def shares(self) -> dict[str, float]:
        """Every part as a share of the total; only for scalar costs."""
        total = float(self.total)
        return {name: float(value) / total if total else 0.0 for name, value in self}

    def at(self, i: int) -> Breakdown:
        """The scalar breakdown of element `i`."""
        return Breakdown(unit=self.unit, parts={name: float(_element(value, i)) for name, value in self})

    def nonzero(self) -> Breakdown:
        """The same without parts that are zero everywhere; only for scalar costs."""
        return Breakdown(unit=self.unit, parts={name: value for name, value in self if value})


def _element(value: Any, i: int) -> Any:
    return value[i] if getattr(value, "ndim", 0) else value
