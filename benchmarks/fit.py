"""What no microbenchmark shows, fitted to published runs: `python -m benchmarks.fit RUNS.csv`.

Every parameter has a physical meaning and belongs to a device, a kernel or a framework: shares of kernel rates that a step
sustains, memory passes, host time of a launch, hidden shares of exchange. All rows are priced anew with each parameter moved
by 5 %, which gives the sensitivity of every prediction to it; then

    minimise  sum_i w_i rho(log(predicted_i / measured_i))  +  sum_p ((log p - log prior_p) / spread_p)^2

with rho linear beyond 6 % (a row far off is no reason to bend the rest), w_i = 1 / sqrt(rows of the same source, model, GPU and
precision) (a run that was published by nine releases is not nine facts), and priors that keep what the rows do not show. The
error is printed as fitted, and with each model, then each source, left out of the fit that predicts it (by the same
sensitivities). Rows are left out only for what their source says: a known regression, or figures digitised by eye.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.accuracy.rows import compared, published_rows, results
from benchmarks.accuracy.scores import error_figures
from moeplan.costmodels import constants, kernels, layer, workload
from moeplan.planner import estimate
from moeplan.planner.robust import robust_change, shared_votes
from moeplan.profiles import nominal

STEP = 0.05
"""Change of a parameter's logarithm that its sensitivity is taken from."""
ROBUST = 0.06
"""Log error beyond which a row pulls no harder."""


@dataclass(frozen=True)
class Parameter:
    """A fitted number."""

    name: str
    prior: float
    spread: float
    """Standard deviation of its logarithm around the prior."""
    use: Callable[[float], None]
    """Price with this value from now on."""


def _sustained(kind: str, *devices: str) -> Callable[[float], None]:
    def use(value: float) -> None:
        for device in devices:
            nominal._catalog("sustained").setdefault(device, {})[kind] = value

    return use


def _era(field: str, *names: str, key: str = "", unit: float = 1.0) -> Callable[[float], None]:
    def use(value: float) -> None:
        eras = workload._eras()
        for name in names:
            new: Any = {**getattr(eras[name], field), key: value * unit} if key else value * unit
            eras[name] = dataclasses.replace(eras[name], **{field: new})

    return use


def _constant(name: str) -> Callable[[float], None]:
    return lambda value: setattr(kernels, name, value)


def _host(field: str) -> Callable[[float], None]:
    def use(value: float) -> None:
        new = dataclasses.replace(constants.HOST, **{field: value})
        for module in (constants, layer):
            setattr(module, "HOST", new)  # noqa: B010

    return use


def _permutes(value: float) -> None:
    kernels.PERMUTE_PASSES.update(fused=value, separate=2.0 * value)


_BLACKWELL = ("B200", "GB200", "B300", "GB300")
_MEGATRON = ("te-2024", "deepep-2025", "fsdp-2025", "hybridep-2025", "graphs-2026")
_PYTORCH = ("llm-foundry", "pytorch-eager", "pytorch-compiled", "pytorch-compiled-2025")

PARAMETERS = (
    Parameter("A100 bf16", 0.85, 0.15, _sustained("bf16", "A100")),
    Parameter("A100 attention", 0.85, 0.15, _sustained("attention", "A100")),
    Parameter("H100 bf16", 0.85, 0.15, _sustained("bf16", "H100")),
    Parameter("H100 quantized", 0.85, 0.15, _sustained("quantized", "H100")),
    Parameter("H100 attention", 0.85, 0.15, _sustained("attention", "H100")),
    Parameter("H100-96GB bf16", 0.85, 0.15, _sustained("bf16", "H100-96GB")),
    Parameter("H100-96GB quantized", 0.85, 0.15, _sustained("quantized", "H100-96GB")),
    Parameter("Blackwell bf16", 0.85, 0.15, _sustained("bf16", *_BLACKWELL)),
    Parameter("B200 quantized", 0.85, 0.15, _sustained("quantized", "B200")),
    Parameter("GB200 quantized", 0.85, 0.15, _sustained("quantized", "GB200")),
    Parameter("GB300, B300 quantized", 0.85, 0.15, _sustained("quantized", "GB300", "B300")),
    Parameter("Blackwell attention", 0.85, 0.15, _sustained("attention", *_BLACKWELL)),
    Parameter("b200-simumax bf16", 0.9, 0.1, _sustained("bf16", "b200-simumax")),
    Parameter("b200-simumax attention", 0.9, 0.1, _sustained("attention", "b200-simumax")),
    Parameter("permute passes", 4.0, 0.3, _permutes),
    Parameter("scan passes", 6.0, 0.3, _constant("SCAN_PASSES")),
    Parameter("launches per quantised expert", 4.0, 0.4, _host("quantized_expert_factor")),
    Parameter("launches of MoE", 45.0, 0.4, _host("moe")),
    Parameter("launches under overlap", 1.3, 0.2, _host("overlapped")),
    Parameter("sharpness of host and device", 3.0, 0.4, _host("sharpness")),
    Parameter("host us, x86", 8.0, 0.4, _era("host_s_per_kernel", *_MEGATRON, *_PYTORCH, key="x86", unit=1e-6)),
    Parameter("host us, Grace", 6.0, 0.4, _era("host_s_per_kernel", *_MEGATRON, key="grace", unit=1e-6)),
    Parameter("eager traffic", 2.0, 0.3, _era("traffic", "pytorch-eager", "llm-foundry")),
    Parameter("FSDP hidden, PyTorch", 0.1, 0.5, _era("fsdp_hidden_compute", *_PYTORCH)),
)


def predict(rows: Sequence[Mapping[str, str]]) -> np.ndarray:
    """Step seconds of every row with the values in use; nan where it cannot be priced."""
    nominal._built.cache_clear()
    estimate.profile_of.cache_clear()
    priced = estimate.price_runs(rows)
    return np.array([float(p.cost.total) if p.cost is not None else np.nan for p in priced])


def sensitivities(rows: Sequence[Mapping[str, str]], values: np.ndarray, base: np.ndarray) -> np.ndarray:
    """Change of log seconds for a change of each log parameter, [rows, parameters]."""
    out = np.zeros((len(rows), len(PARAMETERS)))
    for j, parameter in enumerate(PARAMETERS):
        parameter.use(float(values[j] * np.exp(STEP)))
        out[:, j] = np.log(predict(rows) / base) / STEP
        parameter.use(float(values[j]))
    return out


def change(error: np.ndarray, slopes: np.ndarray, weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Change of the log parameters that minimises the objective."""
    prior = np.log([p.prior for p in PARAMETERS]) - np.log(values)
    spread = np.array([p.spread for p in PARAMETERS])
    return np.asarray(np.clip(robust_change(error, slopes, weights, scale=ROBUST, spread=spread, pull=prior), -0.5, 0.5))


def summary(error: np.ndarray) -> str:
    """Median, mean and share within 10 % of relative errors, from log errors."""
    off = error_figures(np.exp(error))
    return f"median {100 * off.median:.1f} %, mean {100 * off.mean:.1f} %, within 10 %: {100 * off.within:.0f} %"


def left_out(keys: Sequence[str], error: np.ndarray, slopes: np.ndarray, weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Log errors of every row by the fit to the rows of other keys."""
    out = np.zeros(len(error))
    names = np.array(keys)
    for key in sorted(set(keys)):
        mine = names == key
        delta = change(error[~mine], slopes[~mine], weights[~mine], values)
        out[mine] = error[mine] + slopes[mine] @ delta
    return out


def main() -> None:
    """Fit, print values and errors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument(
        "--rounds", type=int, default=2, help="Rounds of sensitivities and change; 0: errors of the values in use."
    )
    options = parser.parse_args()
    runs = compared(results(published_rows(options.runs)))
    rows = [r.row for r in runs]
    base = np.array([r.predicted_s for r in runs])
    error = np.log(base / np.array([r.measured_s for r in runs]))
    weights = shared_votes([(r.family, r.row["model"], r.row["gpu"], r.row["precision"]) for r in runs])
    values = np.array([p.prior for p in PARAMETERS])
    judged = {}
    if options.rounds == 0:
        print(f"values in use: {summary(error)}")
    for round_ in range(options.rounds + 1 if options.rounds else 0):
        for parameter, value in zip(PARAMETERS, values, strict=True):
            parameter.use(float(value))
        before, base = base, predict(rows)
        error = error + np.log(base / before)
        print(f"round {round_}: {summary(error)}", flush=True)
        if round_ == options.rounds:
            break
        slopes = sensitivities(rows, values, base)
        values = values * np.exp(change(error, slopes, weights, values))
    if options.rounds:
        for parameter, value in zip(PARAMETERS, values, strict=True):
            print(f"  {parameter.name:32s} {value:.3f}")
        for what, keys in (("model", [r["model"] for r in rows]), ("source", [r.family for r in runs])):
            judged[what] = left_out(keys, error, slopes, weights, values)
            print(f"each {what} left out: {summary(judged[what])}")
    for name, kind, families in (
        ("dense of mbridge, nemo, dgxc", "dense", ("mbridge", "nemo", "dgxc")),
        ("MoE of mbridge, folding", "MoE", ("mbridge", "folding")),
    ):
        mask = np.array([r.kind == kind and r.family in families for r in runs])
        print(f"{name}: {summary(error[mask])}")
        for what, errors in judged.items():
            print(f"   each {what} left out: {summary(errors[mask])}")
    by: dict[tuple[str, str, str], list[float]] = collections.defaultdict(list)
    for r, e in zip(runs, error, strict=True):
        by[r.family, r.row["gpu"], r.row["model"]].append(float(e))
    for key, some in sorted(by.items()):
        print(f"  {' '.join(key):50s} {len(some):3d} rows, {100 * float(np.expm1(np.median(some))):+6.1f} %")


if __name__ == "__main__":
    main()
