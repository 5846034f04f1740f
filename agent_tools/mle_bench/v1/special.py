"""Reference scripts of the competitions whose data is no plain table, by competition id."""

from __future__ import annotations

from collections.abc import Callable

from agent_tools.mle_bench.facts import TaskFacts
from agent_tools.mle_bench.recipes import Recipe
from agent_tools.mle_bench.v1 import (
    denoise,
    digits,
    languages,
    leaves,
    lemmas,
    phones,
    presidents,
    vowels,
)

SPECIAL_RECIPES: dict[str, Callable[[TaskFacts], list[Recipe]]] = {
    "mnist5k": digits.recipes,
    "vowel-speaker-full": vowels.recipes,
    "locale-language-id": languages.recipes,
    "sotu-president": presidents.recipes,
    "cmudict-g2p": phones.recipes,
    "russian-lemma": lemmas.recipes,
    "photo-denoise": denoise.recipes,
    "flavia-leaf": leaves.recipes,
}
