"""Reference scripts of the full-size competitions: 100 a competition, written for its task."""

from __future__ import annotations

from collections.abc import Callable

from agent_tools.mle_bench.facts import TaskFacts
from agent_tools.mle_bench.recipes import Recipe

RECIPES: dict[str, Callable[[TaskFacts], list[Recipe]]] = {}
"""Recipes by competition id; those not named here have theirs written from their facts."""
