"""What calibration is worth: `python -m benchmarks.calibration RUNS.csv`.

The runs of each source on each device are taken for one machine. A few of them, drawn at random, calibrate its nominal profile;
the error on runs of other layouts is printed before and after. Twice: as published, where the nominal profile already is right
on average (nothing is to be gained, what is left are errors of single layouts), and with the times of each machine changed to
those of one whose factors are drawn from the priors.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from moeplan.planner.calibration import MEASURED, SPREADS, calibrate
from moeplan.planner.estimate import price_runs, profile_for_runs, read_table
from moeplan.profiles.nominal import nominal
from moeplan.profiles.profile import SUSTAINED, Profile

COUNTS = (1, 3, 8)
"""Runs to calibrate on."""
HELD = 12
"""Runs at most to look at the error on."""

Row = Mapping[str, str]


def machines(rows: Sequence[Row]) -> list[tuple[Profile, list[Row], list[str]]]:
    """Nominal profile, rows and model with degrees of each row, of every source and device with enough of them."""
    timed = [row for row in rows if row.get(MEASURED) and "digitised" not in row.get("notes", "").lower()]
    found: dict[tuple[str, str, int, str], list[tuple[Row, str]]] = collections.defaultdict(list)
    clusters = {}
    for row, priced in zip(timed, price_runs(timed), strict=True):
        if priced.run is None or priced.cost is None:
            continue
        cluster, x = priced.run.cluster, priced.run.layout
        key = (row["id"].split("-")[0], cluster.device.name, cluster.domain_gpus, cluster.machine)
        clusters[key] = cluster
        found[key].append((row, f"{priced.run.model.name} {x.tp} {x.cp} {x.pp} {x.ep} {x.etp} {x.sharding}"))
    return [
        (nominal(clusters[k]), [r for r, _ in v], [g for _, g in v]) for k, v in found.items() if len({g for _, g in v}) > 2
    ]


def seconds(rows: Sequence[Row], profile: Profile) -> np.ndarray:
    """Step seconds of rows."""
    priced = price_runs(rows, profile_for=profile_for_runs(profile))
    return np.array([float(p.cost.total) if p.cost is not None else np.nan for p in priced])


def other_machine(profile: Profile, rows: Sequence[Row], draw: np.random.Generator) -> list[Row]:
    """The rows as measured on a machine whose factors are drawn from the priors."""
    factors = {name: float(np.exp(draw.normal(0.0, spread))) for name, spread in SPREADS.items()}
    truth = dataclasses.replace(
        profile,
        sustained={k: profile.sustained[k] * factors[k] for k in SUSTAINED},
        host=factors["host"],
        exposed=factors["exposed"],
    )
    ratio = seconds(rows, truth) / seconds(rows, profile)
    return [{**row, MEASURED: f"{float(row[MEASURED]) * r:.6g}"} for row, r in zip(rows, ratio, strict=True)]


def mean_error(rows: Sequence[Row], profile: Profile) -> float:
    """Mean log error."""
    measured = np.array([float(row[MEASURED]) for row in rows])
    return float(np.mean(np.abs(np.log(seconds(rows, profile) / measured))))


def trial(
    profile: Profile, rows: Sequence[Row], groups: Sequence[str], count: int, draw: np.random.Generator
) -> tuple[float, float] | None:
    """Error on other layouts before and after calibrating on `count` rows."""
    picked = draw.permutation(len(rows))[:count]
    seen = {groups[i] for i in picked}
    held = [i for i in draw.permutation(len(rows)) if groups[i] not in seen][:HELD]
    if len(held) < 2 or len(picked) < count:
        return None
    others = [rows[i] for i in held]
    before = mean_error(others, profile)
    result = calibrate(profile, [rows[i] for i in picked])
    return before, mean_error(others, result.profile) if result.accepted else before


def main() -> None:
    """Print errors before and after, and how often it got better or worse."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--trials", type=int, default=4, help="Trials of each machine and count.")
    options = parser.parse_args()
    known = machines(read_table(options.runs))
    for changed in (False, True):
        print("other machines" if changed else "as published", flush=True)
        for count in COUNTS:
            draw, ends = np.random.default_rng(count), []
            for profile, rows, groups in known:
                for _ in range(options.trials):
                    times = other_machine(profile, rows, draw) if changed else list(rows)
                    end = trial(profile, times, groups, count, draw)
                    if end is not None:
                        ends.append(end)
            before, after = np.array(ends).T
            better, worse = np.mean(after < before - 0.003), np.mean(after > before + 0.003)
            print(
                f"  {count} runs, {len(ends)} trials: {before.mean():.1%} before, {after.mean():.1%} after; "
                f"better {better:.0%}, worse {worse:.0%}, as it was {1 - better - worse:.0%}",
                flush=True,
            )


if __name__ == "__main__":
    main()
