"""Scripts of the full-size fields: a view of the columns and some models become one program.

Every script stands alone: it reads the three public files from its working folder and writes
``submission.csv``, with one thread and a fixed seed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from agent_tools.errors import UserError
from agent_tools.mle_bench.catalogue import MODULE_OF
from agent_tools.mle_bench.facts import TaskFacts
from agent_tools.mle_bench.recipes import SIZES, Recipe, Tier, field_recipes

MODULES = MODULE_OF | {"make_pipeline": "sklearn.pipeline", "rankdata": "scipy.stats"}
_NAMES = re.compile(rf"\b({'|'.join(MODULES)})\b")

_READ = """\
train, test = pd.read_csv("train.csv"), pd.read_csv("test.csv")
sample = pd.read_csv("sample_submission.csv")
both = pd.concat([train.drop(columns="target"), test], ignore_index=True)
n, y = len(train), train["target"].to_numpy()"""
_WRITE = 'sample.to_csv("submission.csv", index=False)'


@dataclass(frozen=True)
class View:
    """Feature work: ``lines`` make ``x``, one row for each row of ``both``, from its columns.

    ``target`` is what models are fitted to, in terms of ``y``; ``back`` turns their mean ``pred``
    into what is submitted.
    """

    name: str
    lines: str
    target: str = "y"
    back: str = "pred"


@dataclass(frozen=True)
class Plan:
    """One entry: a view, models whose predictions are averaged, and how.

    ``rows`` fits on that many training rows only. ``blend`` is "mean", "rank" (of ranks, for
    AUC) or "logit" (of the logits of probabilities of two classes).
    """

    name: str
    view: View
    models: tuple[str, ...]
    weights: tuple[float, ...] = ()
    rows: int = 0
    blend: str = "mean"


def script(kind: str, plan: Plan) -> str:
    """Text of the program for a competition of ``kind``; ends with a newline."""
    if not plan.models:
        raise UserError(f"recipe {plan.name} has no models: name at least one")
    view = plan.view
    lines = [_READ, view.lines.strip("\n"), "a, b = x[:n], x[n:]", f"t = {view.target}"]
    if plan.rows:
        lines += [
            f"some = np.random.default_rng(0).permutation(n)[:{plan.rows}]",
            "a, t = (a.iloc[some] if hasattr(a, 'iloc') else a[some]), t[some]",
        ]
    lines += [f"models = [\n    {_listed(plan.models)}\n]", *_predict(kind, plan)]
    if kind == "multiclass":
        lines.append("sample[models[0].classes_] = pred")
    else:
        lines.append(f'sample["target"] = {view.back}')
    return with_imports("\n".join([*lines, _WRITE]))


def with_imports(body: str) -> str:
    """``body`` after the imports of whatever names it uses."""
    found: dict[str, set[str]] = {}
    for name in set(_NAMES.findall(body)):
        found.setdefault(MODULES[name], set()).add(name)
    lines = ["import re"] if re.search(r"\bre\.", body) else []
    lines += ["import numpy as np"] if "np." in body else []
    lines.append("import pandas as pd")
    lines += [
        f"from {module} import {', '.join(sorted(found[module]))}" for module in sorted(found)
    ]
    return "\n".join([*lines, "", body, ""])


def _predict(kind: str, plan: Plan) -> list[str]:
    if kind == "regression":
        return ["parts = [m.fit(a, t).predict(b) for m in models]", _average(plan)]
    which = "" if kind == "multiclass" else "[:, 1]"
    lines = [f"parts = [m.fit(a, t).predict_proba(b){which} for m in models]"]
    if plan.blend == "rank":
        lines.append("parts = [rankdata(p) / len(p) for p in parts]")
    if plan.blend == "logit":
        lines.append("parts = [p.clip(1e-9, 1 - 1e-9) for p in parts]")
        lines.append("parts = [np.log(p / (1 - p)) for p in parts]")
    lines.append(_average(plan))
    if plan.blend == "logit":
        lines.append("pred = 1 / (1 + np.exp(-pred))")
    return lines


def _average(plan: Plan) -> str:
    if len(plan.models) == 1:
        return "pred = parts[0]"
    weights = f", weights={list(plan.weights)}" if plan.weights else ""
    return f"pred = np.average(parts, axis=0{weights})"


def _listed(models: Sequence[str]) -> str:
    return ",\n    ".join(models) + ","


def field_of(
    kind: str,
    trivial: Iterable[tuple[str, str]],
    default: Iterable[Plan],
    tuned: Iterable[Plan],
    strong: Iterable[Plan],
) -> list[Recipe]:
    """The four tiers as recipes; `UserError` unless sizes are right and all scripts differ."""
    texts: dict[Tier, list[tuple[str, str]]] = {
        "trivial": list(trivial),
        "default": [(plan.name, script(kind, plan)) for plan in default],
        "tuned": [(plan.name, script(kind, plan)) for plan in tuned],
        "strong": [(plan.name, script(kind, plan)) for plan in strong],
    }
    return recipes_of(texts)


def recipes_of(texts: dict[Tier, list[tuple[str, str]]]) -> list[Recipe]:
    """Named scripts of each tier as recipes; `UserError` unless sizes are right and all differ."""
    for tier, size in SIZES.items():
        if len(texts[tier]) != size:
            raise UserError(f"{len(texts[tier])} {tier} recipes, {size} are needed")
    recipes = [
        Recipe(f"{tier}-{name}", tier, 0, text)
        for tier, rows in texts.items()
        for name, text in rows
    ]
    for what, values in (("id", [r.id for r in recipes]), ("script", [r.script for r in recipes])):
        twice = [value for value, count in Counter(values).items() if count > 1]
        if twice:
            raise UserError(f"two recipes have one {what}: {twice[0][:200]}")
    return recipes


def small_field(facts: TaskFacts, tier: Tier) -> Iterator[tuple[str, str]]:
    """A tier of the field that small tasks have, as (name, script)."""
    for recipe in field_recipes(facts):
        if recipe.tier == tier:
            yield recipe.id.removeprefix(f"{tier}-"), recipe.script


def call(name: str, **arguments: object) -> str:
    """The text of a call: ``call("Ridge", alpha=1.0)`` is ``Ridge(alpha=1.0)``."""
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"


def pipe(*steps: str) -> str:
    """The text of a pipeline of steps."""
    return f"make_pipeline({', '.join(steps)})"
