"""The reference field of a competition: 100 real scripts in four tiers.

15 trivial (constants, copies, one column), 35 defaults (one model as it comes, plainest features),
35 tuned or feature-engineered, 15 strong (feature work, tuned models, averages). They are written
from a task's facts, never from its name, and are deterministic: the listed seed is in the script.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from agent_tools.errors import UserError
from agent_tools.mle_bench import recipes_table, recipes_text
from agent_tools.mle_bench.catalogue import Call, call, word_vectoriser
from agent_tools.mle_bench.compose import Choices, compose
from agent_tools.mle_bench.facts import TaskFacts

Tier = Literal["trivial", "default", "tuned", "strong"]
SIZES: dict[Tier, int] = {"trivial": 15, "default": 35, "tuned": 35, "strong": 15}


@dataclass(frozen=True)
class Recipe:
    """One entry of a field; `id` is unique in it and names what the script does."""

    id: str
    tier: Tier
    seed: int
    script: str


def field_recipes(facts: TaskFacts, n: int = 100) -> list[Recipe]:
    """The field for a task like `facts`, trivial ones first; all scripts differ.

    `n` below 100 takes the same share of each tier, from the front. Raises `UserError` for an `n`
    outside 1 … 100 or a task that the recipes cannot fill.
    """
    if not 1 <= n <= sum(SIZES.values()):
        raise UserError(f"a field of {n} recipes: ask for 1 to {sum(SIZES.values())}")
    recipes: list[Recipe] = []
    for tier, size in SIZES.items():
        found = tier_recipes(facts, tier)
        if len(found) < size:
            raise UserError(
                f"only {len(found)} {tier} recipes for a {facts.kind} task with "
                f"{facts.numeric} numeric, {facts.categorical} categorical, {facts.text} text "
                f"columns: add recipes"
            )
        recipes += found[: max(1, round(n * size / 100))]
    return recipes[:n]


def tier_recipes(facts: TaskFacts, tier: Tier) -> list[Recipe]:
    """The recipes of one tier for a task like `facts`, at most as many as a field of 100 has.

    All scripts differ, also from those of the other tiers. A task with few columns has fewer.
    """
    engineered = recipes_text if facts.text else recipes_table
    sources: dict[Tier, Iterator[tuple[str, str]]] = {
        "trivial": _trivial(facts),
        "default": _default(facts),
        "tuned": _composed(facts, engineered.tuned(facts)),
        "strong": _composed(facts, engineered.strong(facts)),
    }
    seen: set[str] = set()
    for name, source in sources.items():
        found: list[Recipe] = []
        for recipe, script in source:
            if script in seen:
                continue
            seen.add(script)
            found.append(Recipe(f"{name}-{recipe}", name, 0, script))
            if len(found) == SIZES[name]:
                break
        if name == tier:
            return found
    raise UserError(f"no tier {tier!r}: choose one of {', '.join(SIZES)}")


def _composed(facts: TaskFacts, named: Iterator[tuple[str, Choices]]) -> Iterator[tuple[str, str]]:
    return ((name, compose(facts, choices)) for name, choices in named)


# ------------------------------------------------------------------ trivial

_ONE_NUMBER = 'X, Z = [ d.select_dtypes("number").iloc[:, [{k}]] for d in (X, Z) ]'
_ONE_LENGTH = (
    'X, Z = [ d.select_dtypes("object").fillna("").apply( lambda s: {expression} ) '
    "for d in (X, Z) ]"
)
_TEXT_NUMBERS = (
    ("length", "s.str.len()"),
    ("words", 's.str.count( " " )'),
    ("exclamations", 's.str.count( "!" )'),
    ("capitals", 's.str.count( "[A-Z]" )'),
    ("commas", 's.str.count( "," )'),
    ("questions", 's.str.count( "[?]" )'),
)


def _trivial(facts: TaskFacts) -> Iterator[tuple[str, str]]:
    yield from _constants(facts)
    regression = facts.kind == "regression"
    linear = call("Ridge") if regression else call("LogisticRegression")
    stump = _tree(regression, "max_depth=1")
    for name, extra in _single_columns(facts):
        one = replace(facts, numeric=1, categorical=0, text=0)
        base = Choices(models=(linear,), extra=(extra,), floor=regression and _floor(facts))
        yield f"{name}-linear", compose(one, base)
        yield f"{name}-stump", compose(one, replace(base, models=(stump,)))
        yield (
            f"{name}-nearest",
            compose(one, replace(base, models=(_est("KNeighbors", regression, "n_neighbors=30"),))),
        )
        yield (
            f"{name}-tree",
            compose(one, replace(base, models=(_tree(regression, "max_depth=3"),))),
        )


def _constants(facts: TaskFacts) -> Iterator[tuple[str, str]]:
    reads = [
        "import numpy as np",
        "import pandas as pd",
        'train = pd.read_csv("train.csv")',
        'sub = pd.read_csv("sample_submission.csv")',
        'y = train["target"]',
    ]
    writes = ['sub.to_csv("submission.csv", index=False)']
    if facts.kind == "regression":
        rows = [
            ("copy-sample", "y.iloc[0] * 0 + sub.iloc[:, 1]"),
            ("mean", "y.mean()"),
            ("median", "y.median()"),
            ("last-value", "y.iloc[-1]"),
            ("middle-range", "( y.min() + y.max() ) / 2"),
            ("random-draw", "np.random.default_rng( 0 ).choice( y, len(sub) )"),
        ]
    elif facts.kind == "binary":
        rows = [
            ("copy-sample", "sub.iloc[:, 1] * 1"),
            ("prior", "y.mean()"),
            ("always-one", "1"),
            ("random-draw", "np.random.default_rng( 0 ).choice( y, len(sub) )"),
        ]
    else:
        prior = "y.value_counts( normalize=True ).reindex( sub.columns[1:] ).to_numpy()"
        rows = [
            ("prior", f"np.tile( {prior}, (len(sub), 1) )"),
            ("uniform", "1 / ( sub.shape[1] - 1 )"),
            ("commonest", "1.0 * np.tile( sub.columns[1:] == y.mode()[0], (len(sub), 1) )"),
            (
                "random-draw",
                "np.random.default_rng( 0 ).dirichlet( np.ones( sub.shape[1] - 1 ), len(sub) )",
            ),
        ]
    columns = "sub.columns[1:]" if facts.kind == "multiclass" else "sub.columns[1]"
    for name, value in rows:
        yield name, "\n".join([*reads, f"sub[{columns}] = {value}", *writes])


def _single_columns(facts: TaskFacts) -> Iterator[tuple[str, str]]:
    for k in range(min(facts.numeric, 6)):
        yield f"column-{k}", _ONE_NUMBER.format(k=k)
    if facts.text:
        for name, expression in _TEXT_NUMBERS:
            yield name, _ONE_LENGTH.format(expression=expression)
    if not facts.text and facts.numeric < 3:
        codes = "pd.factorize( s )[0]"
        yield "codes", _ONE_LENGTH.format(expression=codes)


# ------------------------------------------------------------------ defaults


def _default(facts: TaskFacts) -> Iterator[tuple[str, str]]:
    """One model as it comes, on plain features; the model varies fastest."""
    regression = facts.kind == "regression"
    for features, base in _plain_features(facts):
        for model in _plain_models(facts):
            choices = replace(base, models=(model,), floor=regression and _floor(facts))
            if model.name == "GaussianNB" and facts.text:
                continue
            yield f"{features}-{model.name}", compose(facts, choices)


def _plain_features(facts: TaskFacts) -> Iterator[tuple[str, Choices]]:
    none = Choices(models=())
    if facts.text:
        plain = (
            ("words", word_vectoriser("max_features=2000")),
            ("counts", Call("CountVectorizer", ("max_features=2000",))),
            ("stop", word_vectoriser('stop_words="english"', "max_features=2000")),
            ("few-words", word_vectoriser("max_features=300")),
        )
        for name, vectoriser in plain:
            yield name, replace(none, vectorisers=(vectoriser,))
        return
    if facts.categorical:
        yield "drop", replace(none, category="drop")
        codes = call("OrdinalEncoder", 'handle_unknown="use_encoded_value"', "unknown_value=-1")
        yield "codes", replace(none, category=codes)
        yield "counts", replace(none, category="frequency")
        return
    yield "raw", none
    yield "scaled", replace(none, numeric=(call("MinMaxScaler"),))
    yield "bins", replace(none, numeric=(call("KBinsDiscretizer", "n_bins=5", 'encode="ordinal"'),))


def _plain_models(facts: TaskFacts) -> tuple[Call, ...]:
    seed = "random_state=0"
    if facts.kind == "regression":
        return (
            call("LinearRegression") if not facts.text else call("Ridge", "alpha=10.0"),
            call("ElasticNet"),
            call("KNeighborsRegressor"),
            call("DecisionTreeRegressor", seed),
            call("SVR"),
            call("RandomForestRegressor", "n_estimators=50", seed)
            if facts.text
            else call("RandomForestRegressor", seed),
            call("ExtraTreesRegressor", "n_estimators=30", seed)
            if facts.text
            else call("ExtraTreesRegressor", seed),
            call("GradientBoostingRegressor", seed),
            call("AdaBoostRegressor", seed),
            call("HistGradientBoostingRegressor", seed) if not facts.text else call("LinearSVR"),
            call("Lasso", "alpha=0.1"),
            call("MLPRegressor", "max_iter=30", seed),
        )
    many = facts.classes > 3
    return (
        call("LogisticRegression", "max_iter=100"),
        call("KNeighborsClassifier"),
        call("GaussianNB") if not facts.text else call("MultinomialNB"),
        call("DecisionTreeClassifier", seed),
        call("RandomForestClassifier", seed),
        call("ExtraTreesClassifier", seed),
        call("AdaBoostClassifier", "n_estimators=30", seed),
        call("GradientBoostingClassifier", *(("n_estimators=20",) if many else ()), seed),
        call("SGDClassifier", 'loss="log_loss"', seed),
        call("BaggingClassifier", seed),
        call("SVC"),
        call("MLPClassifier", "max_iter=30", seed),
        call("HistGradientBoostingClassifier", "max_iter=30", seed)
        if not facts.text
        else call("BernoulliNB"),
    )


def _est(stem: str, regression: bool, *args: str) -> Call:
    return Call(stem + ("Regressor" if regression else "Classifier"), args)


def _tree(regression: bool, *args: str) -> Call:
    return _est("DecisionTree", regression, *args, "random_state=0")


def _floor(facts: TaskFacts) -> bool:
    return facts.metric == "rmsle"
