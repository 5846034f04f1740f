"""Fit the fields of practice competitions: a spread of quick reference scripts each.

`TRIES` scripts are drawn evenly from the four tiers of the 100 recipes, run in the sandbox under
the limits that score policies, and graded. Those that fail or pass the limit are left out of the
field, as on a leaderboard. Every finished script is in a journal, so a killed run goes on.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from agent_tools.mle_bench import fields
from agent_tools.mle_bench.facts import TaskFacts
from agent_tools.mle_bench.practice.loading import Field, read_fields, write_fields
from agent_tools.mle_bench.recipes import Recipe, Tier, tier_recipes
from agent_tools.mle_bench.registry import Competition, Which, load_competition, load_suite
from agent_tools.sandbox import ScriptPool

TRIES: dict[Tier, int] = {"trivial": 4, "default": 10, "tuned": 10, "strong": 4}
AT_ONCE = 8  # fields whose scripts wait in the pool's queue together, at least


@dataclass(frozen=True)
class Fitted:
    """One field, fitted or found fitted: its entries and the CPU-seconds spent now."""

    competition: str
    which: Which
    entries: int
    failed: int
    cpu_s: float
    field: Field


def field_scripts(facts: TaskFacts) -> list[Recipe]:
    """`TRIES` recipes of each tier, evenly spread over what the tier has for such a task."""
    chosen: list[Recipe] = []
    for tier, wanted in TRIES.items():
        found = tier_recipes(facts, tier)
        count = min(wanted, len(found))
        chosen += [found[(2 * k + 1) * len(found) // (2 * count)] for k in range(count)]
    return chosen


def scripts_digest(recipes: Sequence[Recipe]) -> str:
    """First 16 hex digits of a SHA-256 over ids and scripts."""
    whole = hashlib.sha256()
    for recipe in recipes:
        whole.update(f"{recipe.id}\0{recipe.script}\0".encode())
    return whole.hexdigest()[:16]


def fit_one(
    competition: Competition, which: Which, pool: ScriptPool, data_dir: Path | None, versions: str
) -> Fitted:
    """The field of one competition; scripts in the journal are not run again."""
    recipes = field_scripts(competition.facts)
    spent: list[float] = []
    entries = fields.fit_field(
        competition,
        which,
        recipes,
        pool,
        data_dir=data_dir,
        progress=lambda entry: spent.append(entry.cpu_s),
    )
    ranked = fields.ranked(entries, competition.lower_is_better)
    field = Field(
        tuple((entry.recipe, entry.score) for entry in ranked if entry.score is not None),
        fields.data_digest(competition, which),
        scripts_digest(recipes),
        versions,
    )
    failed = len(entries) - len(ranked)
    return Fitted(competition.id, which, len(ranked), failed, sum(spent), field)


def fit_suite(
    suite: str,
    ids: Sequence[str],
    pool: ScriptPool,
    data_dir: Path | None = None,
    *,
    workers: int = 2,
    seconds: float | None = None,
    progress: Callable[[Fitted], None] = lambda fitted: None,
) -> list[Fitted]:
    """Fit what is not fitted among the fields of ``ids``, and write ``fields.csv`` once.

    With ``seconds`` no field is begun later than that. What is done is kept in the journal and in
    ``fields.csv``, also when a field raises.
    """
    chosen = load_suite(suite)
    versions = " ".join(f"{name}-{value}" for name, value in fields.script_versions().items())
    known = read_fields()
    todo: list[tuple[Competition, Which]] = []
    for competition_id in ids:
        competition = load_competition(competition_id, data_dir, suite=chosen)
        whiches: tuple[Which, ...] = (
            ("private", "dev") if competition.dev_public_dir else ("private",)
        )
        todo += [(competition, w) for w in whiches if not is_fitted(competition, w)]
    started = time.monotonic()
    done: list[Fitted] = []

    def one(job: tuple[Competition, Which]) -> Fitted | None:
        if seconds is not None and time.monotonic() - started > seconds:
            return None
        return fit_one(*job, pool, data_dir, versions)

    try:
        with ThreadPoolExecutor(max(2, workers // AT_ONCE)) as threads:
            for fitted in threads.map(one, todo):
                if fitted is not None:
                    done.append(fitted)
                    progress(fitted)
    finally:
        new = {(item.competition, item.which): item.field for item in done}
        listed = set(chosen.ids())
        kept = {key: field for key, field in known.items() if key[0] in listed}
        if new or kept != known:
            write_fields(kept | new)
    return done


def is_fitted(competition: Competition, which: Which) -> bool:
    """Whether ``fields.csv`` holds this field for these files and these scripts."""
    field = read_fields().get((competition.id, which))
    return (
        field is not None
        and field.data == fields.data_digest(competition, which)
        and field.scripts == scripts_digest(field_scripts(competition.facts))
    )
