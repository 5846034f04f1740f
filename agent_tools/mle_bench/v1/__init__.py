"""Reference scripts of the full-size competitions: 100 a competition, written for its task."""

from __future__ import annotations

from collections.abc import Callable

from agent_tools.mle_bench.facts import TaskFacts
from agent_tools.mle_bench.recipes import Recipe, field_recipes
from agent_tools.mle_bench.v1 import crashes, demand, diamonds, flights, mails, storms
from agent_tools.mle_bench.v1.special import SPECIAL_RECIPES

RECIPES: dict[str, Callable[[TaskFacts], list[Recipe]]] = {
    "tweet-sentiment-full": field_recipes,
    "diamonds-price-full": diamonds.recipes,
    "food-reviews-full": field_recipes,
    "spam-mail": mails.recipes,
    "storm-status": storms.recipes,
    "crash-survival": crashes.recipes,
    "electricity-demand-full": demand.recipes,
    "nyc-flight-airtime": flights.recipes,
    **SPECIAL_RECIPES,
}
"""Recipes by competition id; those not named here have theirs written from their facts."""
