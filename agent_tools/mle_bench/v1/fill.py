"""Turn named scripts of four tiers into a field of exactly 100 recipes."""

from __future__ import annotations

from collections.abc import Iterable

from agent_tools.errors import UserError
from agent_tools.mle_bench.recipes import SIZES, Recipe, Tier

Named = tuple[str, str]  # what the script does, and its text


def fill(
    *,
    trivial: Iterable[Named],
    default: Iterable[Named],
    tuned: Iterable[Named],
    strong: Iterable[Named],
) -> list[Recipe]:
    """The field, trivial entries first; of each tier the first ones that differ are taken.

    Raises `UserError` for a tier that is too short or a name that comes twice.
    """
    sources: dict[Tier, Iterable[Named]] = {
        "trivial": trivial,
        "default": default,
        "tuned": tuned,
        "strong": strong,
    }
    recipes: list[Recipe] = []
    seen: set[str] = set()
    for tier, named in sources.items():
        chosen: dict[str, str] = {}
        for name, script in named:
            if script in seen or len(chosen) == SIZES[tier]:
                continue
            if name in chosen:
                raise UserError(f"two {tier} recipes are called {name}: rename one")
            seen.add(script)
            chosen[name] = script
        if len(chosen) < SIZES[tier]:
            raise UserError(f"{len(chosen)} {tier} recipes of {SIZES[tier]}: add some")
        recipes += [Recipe(f"{tier}-{n}", tier, 0, script) for n, script in chosen.items()]
    return recipes


def constant_classes() -> list[Named]:
    """Five entries that look at no feature: for probabilities of several classes."""
    shares = "y.value_counts( normalize=True ).reindex( sub.columns[1:] ).to_numpy()"
    draw = "np.random.default_rng( 0 ).dirichlet( np.ones( sub.shape[1] - 1 ), len(sub) )"
    values = {
        "prior": f"np.tile( {shares}, (len(sub), 1) )",
        "uniform": "1 / ( sub.shape[1] - 1 )",
        "commonest": "1.0 * np.tile( sub.columns[1:] == y.mode()[0], (len(sub), 1) )",
        "random-draw": draw,
        "half-prior": f"np.tile( 0.5 * {shares} + 0.5 / ( sub.shape[1] - 1 ), (len(sub), 1) )",
    }
    return [
        (
            name,
            "\n".join(
                [
                    "import numpy as np",
                    "import pandas as pd",
                    'train = pd.read_csv("train.csv")',
                    'sub = pd.read_csv("sample_submission.csv")',
                    'y = train["target"]',
                    f"sub[sub.columns[1:]] = {value}",
                    'sub.to_csv("submission.csv", index=False)',
                ]
            ),
        )
        for name, value in values.items()
    ]
