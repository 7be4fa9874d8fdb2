"""Options that say how nodes fail and what a change costs, and how they become numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from moeplan.errors import UsageError

if TYPE_CHECKING:
    from moeplan.planner.elastic.availability import Availability
    from moeplan.planner.elastic.saves import Overheads

F = TypeVar("F", bound=Callable[..., Any])

_RATES = [
    click.option(
        "--node-mtbf", metavar="TIME", help="Time between failures of a node, like 20d.  [default: 153.8d, Meta's RSC-1]"
    ),
    click.option(
        "--job-mtbf", metavar="TIME", help="Time between failures of the job whatever its size.  [default: there are none]"
    ),
    click.option("--repair", metavar="TIME", help="Time until a node is back.  [default: 6h]"),
    click.option("--notice", metavar="TIME", help="Warning before a node leaves.  [default: none]"),
]
_COSTS = [
    click.option("--detect", metavar="TIME", help="Time to notice a failure.  [default: 15s, torchrun's keep-alives]"),
    click.option("--group", metavar="TIME", help="Time to build groups.  [default: 6.6s and 0.5s for each axis, Parcae]"),
    click.option("--warm", metavar="TIME", help="Time to start processes and warm up.  [default: 30s, Parcae]"),
    click.option(
        "--storage-bandwidth", metavar="SIZE", help="Bytes per second of the whole job, like 50GB.  [default: 1GB a node]"
    ),
    click.option(
        "--live", is_flag=True, help="Processes outlive a change and send state over the fabric, not through storage."
    ),
]


def availability_options(function: F) -> F:
    """Add the options that say how nodes fail and come back."""
    return _with(_RATES, function)


def overhead_options(function: F) -> F:
    """Add the options that say what a change costs."""
    return _with(_COSTS, function)


def _with(options: list[Any], function: F) -> F:
    for option in reversed(options):
        function = option(function)
    return function


def rates_of(**given: str | None) -> Availability:
    """How nodes fail, from the texts of the options that were given."""
    from moeplan.planner.elastic.availability import Availability

    values = _seconds(given)
    if "job_mtbf" in values:
        values["job_rate"] = 1.0 / _above_zero("--job-mtbf", values.pop("job_mtbf"))
    for name in ("node_mtbf", "repair", "notice"):
        if name in values:
            values[f"{name}_s"] = values.pop(name)
    return Availability(**values)


def overheads_of(*, storage_bandwidth: str | None = None, live: bool = False, **given: str | None) -> Overheads:
    """What a change costs, from the texts of the options that were given."""
    from moeplan.planner.elastic.saves import Overheads
    from moeplan.units import parse_bytes

    values = {f"{name}_s": value for name, value in _seconds(given).items()}
    if storage_bandwidth is not None:
        text = storage_bandwidth.strip().removesuffix("/s")
        values["storage_bytes_per_s"] = _above_zero("--storage-bandwidth", parse_bytes(text))
    return Overheads(live=live, **values)


def _seconds(given: dict[str, str | None]) -> dict[str, float]:
    """Seconds of the texts that were given; a negative one is refused with the name of its option."""
    from moeplan.units import parse_seconds

    values = {}
    for name, text in given.items():
        if text is None:
            continue
        if text.strip().startswith("-"):
            raise UsageError(f"--{name.replace('_', '-')} {text}: a time cannot be negative", hint="give 0 or more, like 6h")
        values[name] = parse_seconds(text)
    return values


def _above_zero(option: str, value: float) -> float:
    if value <= 0.0:
        raise UsageError(f"{option} must be above 0", hint="leave it out for the default")
    return value
