"""Units: constants, parsing and formatting.

Inside moeplan every quantity is in seconds, bytes, FLOP, bytes/s or FLOP/s. Other units exist only in data-file keys
(`_gib`, `_us`, `_tflops`, `_gb_per_s`) and in what is shown to people; the conversions are here and nowhere else.
"""

from __future__ import annotations

import math
import re

from moeplan.errors import UsageError

KIB, MIB, GIB, TIB = 2**10, 2**20, 2**30, 2**40
KB, MB, GB, TB = 10**3, 10**6, 10**9, 10**12
US, MS = 1e-6, 1e-3
TERA = 1e12
HOUR_S = 3600.0

_SIZES = {"": 1, "b": 1, "kib": KIB, "mib": MIB, "gib": GIB, "tib": TIB, "kb": KB, "mb": MB, "gb": GB, "tb": TB}
_TIMES = {"": 1.0, "us": US, "ms": MS, "s": 1.0, "m": 60.0, "min": 60.0, "h": HOUR_S, "d": 24 * HOUR_S}


def parse_bytes(text: str) -> float:
    """Bytes of "80GiB", "1.5 TB" or a plain number of bytes; refuses anything else."""
    return _parse(text, _SIZES, "a size", "80GiB")


def parse_seconds(text: str) -> float:
    """Seconds of "90s", "250ms", "2m" or a plain number of seconds; refuses anything else."""
    return _parse(text, _TIMES, "a duration", "90s")


def _parse(text: str, units: dict[str, float] | dict[str, int], what: str, example: str) -> float:
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].lower() not in units:
        raise UsageError(f"'{text}' is not {what}", hint=f"write it like {example}")
    value = float(match[1]) * units[match[2].lower()]
    if value == math.inf:
        raise UsageError(f"'{text}' is too large for {what}", hint=f"write it like {example}")
    return value


def format_bytes(n: float) -> str:
    """A size for people, in binary units: "74.3 GiB"."""
    for unit, size in (("TiB", TIB), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(n) >= size:
            return f"{n / size:.{1 if abs(n) < 1000 * size else 0}f} {unit}"
    return f"{n:.0f} B"


def format_seconds(t: float) -> str:
    """A duration for people, with three significant digits: "12.0 s", "4.56 ms"."""
    if t == 0:
        return "0 s"
    unit, size = next(((u, s) for u, s in (("us", US), ("ms", MS)) if abs(t) < 1000 * s), ("s", 1.0))
    return f"{t / size:#.3g}".rstrip(".") + f" {unit}" if abs(t) < 999.5 * size else f"{t / size:,.0f} {unit}"


def format_duration(t: float) -> str:
    """A long time for people: "154 days", "6.0 h", "35 min", "12.3 s"."""
    for unit, size in (("days", 24 * HOUR_S), ("h", HOUR_S), ("min", 60.0)):
        if t >= 2 * size:
            return f"{t / size:.{0 if t >= 100 * size else 1}f} {unit}"
    return format_seconds(t)


def format_count(n: float) -> str:
    """A count for people: "671.0 B", "1.2 M", "512"."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e4)):
        if abs(n) >= size:
            return f"{n / (1e3 if unit == 'k' else size):.1f} {unit}"
    return f"{n:.0f}"
