"""Reference scripts of flavia-leaf: many classes, few rows, numbers that follow the leaf's shape.

Those of a table with such facts, but for tuned entries that plain boosting would beat.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from agent_tools.mle_bench.catalogue import Call, call
from agent_tools.mle_bench.compose import Choices, compose
from agent_tools.mle_bench.facts import TaskFacts
from agent_tools.mle_bench.recipes import Recipe, field_recipes

_SCALE = (call("StandardScaler"),)
_POWER = (call("PowerTransformer"),)
_OUT = (
    "tuned-power-discriminant-",
    "tuned-discriminant-",
    "tuned-forest",
    "tuned-svc",
    "tuned-logistic-weak",
)


def recipes(facts: TaskFacts) -> list[Recipe]:
    """The field of 100."""
    found = field_recipes(facts)
    kept = [recipe for recipe in found if not recipe.id.startswith(_OUT)]
    scripts = {recipe.script for recipe in kept}
    for name, choices in _more():
        script = compose(facts, choices)
        if len(kept) < len(found) and script not in scripts:
            kept.append(Recipe(f"tuned-{name}", "tuned", 0, script))
    return kept


def _logistic(strength: float) -> Call:
    return call("LogisticRegression", f"C={strength}", "max_iter=300")


def _net(width: int, penalty: float) -> Call:
    return call(
        "MLPClassifier",
        f"hidden_layer_sizes=({width},)",
        f"alpha={penalty}",
        "max_iter=200",
        "random_state=0",
    )


def _more() -> Iterator[tuple[str, Choices]]:
    treatments = {"scaled": _SCALE, "power": _POWER}
    for (name, numeric), strength in product(treatments.items(), (2.0, 5.0, 50.0)):
        yield f"{name}-logit-{strength}", Choices((_logistic(strength),), numeric=numeric)
    for (name, numeric), width in product(treatments.items(), (50, 100, 200)):
        yield f"{name}-wide-net-{width}", Choices((_net(width, 0.3),), numeric=numeric)
    for name, numeric in treatments.items():
        both = (_logistic(10.0), _net(100, 0.1))
        yield f"{name}-logit-and-net", Choices(both, numeric=numeric)
