"""What a framework refuses: named rules over layouts.

The rules are Megatron's (megatron-core 0.19.2: its argument checks, configuration classes, process groups, and what a running
step asserts), for the fields that a layout has; the few that are not say whose they are.
"""

from __future__ import annotations

import numpy as np

from moeplan.costmodels.layout import Layout, Layouts
from moeplan.planner.feature_rules import FEATURE_RULES
from moeplan.planner.layout_rules import LAYOUT_RULES
from moeplan.planner.problem import Problem
from moeplan.planner.rules import LEVELS, Level, Rule, Violation

__all__ = ["LEVELS", "RULES", "Level", "Rule", "Violation", "violations"]

RULES: tuple[Rule, ...] = tuple(sorted((*LAYOUT_RULES, *FEATURE_RULES), key=lambda rule: LEVELS.index(rule.level)))
"""All rules, in the order in which a search applies them."""


def violations(problem: Problem, layout: Layout) -> list[Violation]:
    """All rules that `layout` breaks; none: the framework accepts it."""
    one = Layouts.of([layout])
    return [Violation(r.name, r.reason(problem, layout), r.hint) for r in RULES if np.any(r.broken(problem, one))]
