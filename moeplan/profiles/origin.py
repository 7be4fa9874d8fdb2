"""What stands behind the numbers of a profile: measurements for each curve, and runs for what was corrected since."""

from __future__ import annotations

from dataclasses import dataclass

AS_NOMINAL = "not measured in this run, nominal: "
"""Begin of the note of a nominal curve in a profile that was measured."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a curve comes from."""

    device: str
    """The device it was measured on."""
    measured: bool
    """False: scaled from a relative or from another precision."""
    note: str
    """Source of the measurement, and how it was scaled."""
    error: float
    """Median relative error of the fit on rows that it did not see."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibratedOn:
    """Measured runs that corrected a profile."""

    rows: tuple[str, ...]
    """Names of the runs that were used."""
    table_sha256: str = ""
    """SHA-256 of the file that held them; empty: there was none."""
    error_before: float = 0.0
    """Mean error on them, see `moeplan.planner.calibration.Errors`."""
    error_after: float = 0.0
    """The same after the correction."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredOn:
    """The run of `moeplan profile` that a profile comes from."""

    when: str
    """Day and time at which it began, ISO 8601."""
    device: str
    """Name of the device as its driver says it."""
    backend: str
    """"cuda", "rocm" or "cpu"; "import" where the samples come from tables of others."""
    software: str
    """Versions of torch and of the library of the collectives, or the tables."""
    ranks: int = 1
    nodes: int = 1
    samples: int = 0
    """Measurements behind the curves."""
    samples_sha256: str = ""
    """SHA-256 of their file; empty: there is none."""
    remarks: tuple[str, ...] = ()
    """What was left out and why, slow ranks."""
