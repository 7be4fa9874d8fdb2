"""moeplan: how to train a Mixture-of-Experts model on a GPU cluster.

The public names are loaded when first used, so that `import moeplan` is light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from moeplan._version import VERSION

if TYPE_CHECKING:
    from moeplan.costmodels.layout import Layout as Layout
    from moeplan.costmodels.model import Model as Model
    from moeplan.costmodels.model_catalog import load_model as load_model
    from moeplan.costmodels.workload import Workload as Workload
    from moeplan.planner.plan import Plan as Plan
    from moeplan.planner.plan import load_plan as load_plan
    from moeplan.planner.problem import Problem as Problem
    from moeplan.planner.solve import solve as solve
    from moeplan.profiles.hardware import Cluster as Cluster
    from moeplan.profiles.hardware import load_cluster as load_cluster
    from moeplan.profiles.nominal import nominal as nominal
    from moeplan.profiles.profile import Profile as Profile

__version__ = VERSION

_HOME = {
    "Cluster": "profiles.hardware",
    "Layout": "costmodels.layout",
    "Model": "costmodels.model",
    "Plan": "planner.plan",
    "Problem": "planner.problem",
    "Profile": "profiles.profile",
    "Workload": "costmodels.workload",
    "load_cluster": "profiles.hardware",
    "load_model": "costmodels.model_catalog",
    "load_plan": "planner.plan",
    "nominal": "profiles.nominal",
    "solve": "planner.solve",
}

__all__ = [
    "Cluster",
    "Layout",
    "Model",
    "Plan",
    "Problem",
    "Profile",
    "Workload",
    "load_cluster",
    "load_model",
    "load_plan",
    "nominal",
    "solve",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"moeplan.{_HOME[name]}"), name)
    raise AttributeError(f"module 'moeplan' has no attribute '{name}'")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
