"""The random grammar of solution scripts, and invented tasks to describe them by.

This is what the policy is supervised on: valid programs with ordinary habits, good and bad ones
mixed. Nothing here is tuned to score well; what is good has to be learnt by RL.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal, TypeVar

from agent_tools.mle_bench.catalogue import (
    CALENDAR,
    ENCODERS,
    FAMILIES,
    MARKS,
    NO_PROBABILITIES,
    TREATMENTS,
    Call,
    Family,
    call,
)
from agent_tools.mle_bench.compose import Choices, Output, calibrated, compose
from agent_tools.mle_bench.facts import TaskFacts

T = TypeVar("T")

TRAIN_COMPETITIONS = ("tweet-sentiment", "diamonds-price", "food-reviews")
"""Competitions whose descriptions may be supervised on; goes into the data's manifest."""

_MAX_WORDS = 150


def sample_script(facts: TaskFacts, rng: random.Random) -> str:
    """One random script for a task like `facts`; deterministic for a given `rng` state.

    Scripts of more than 150 words, which a short reply could not hold, are drawn again.
    """
    while True:
        script = compose(facts, sample_choices(facts, rng))
        if len(script.split()) <= _MAX_WORDS:
            return script


def sample_choices(facts: TaskFacts, rng: random.Random) -> Choices:
    """The random decisions behind `sample_script`."""
    text = facts.text > 0
    table = facts.numeric + facts.categorical > 0
    vectorisers = _vectorisers(rng) if text and (not table or rng.random() < 0.85) else ()
    sparse = bool(vectorisers)
    reduce = _reduction(rng, sparse)
    dense = not sparse or any(step.name == "TruncatedSVD" for step in reduce)
    models = _models(facts, rng, sparse, dense)
    log_target = facts.kind == "regression" and rng.random() < _log_odds(facts)
    output: Output = "probability"
    if len(models) == 1 and facts.kind != "regression":
        output = _output(facts, models[0], rng)
        if output == "probability" and models[0].name not in {"DummyClassifier"}:
            odds = 0.5 if models[0].name in NO_PROBABILITIES else 0.06
            if rng.random() < odds and facts.metric != "accuracy":
                method: Literal["sigmoid", "isotonic"] = (
                    "sigmoid" if rng.random() < 0.7 else "isotonic"
                )
                models = (calibrated(models[0], method),)
    return Choices(
        models=models,
        numeric=() if sparse and rng.random() < 0.3 else _weighted(rng, TREATMENTS),
        impute=None if facts.missing == 0 and rng.random() < 0.15 else _imputation(rng),
        category=_weighted(rng, ENCODERS),  # type: ignore[arg-type]
        calendar=rng.choice(CALENDAR) if rng.random() < (0.5 if facts.time else 0.06) else None,
        vectorisers=vectorisers,
        reduce=reduce,
        log_target=log_target,
        floor=facts.metric == "rmsle" and rng.random() < 0.97,
        output=output,
        weights=_weights(rng, len(models)),
    )


def _weighted(rng: random.Random, options: Sequence[tuple[T, float]]) -> T:
    return rng.choices([value for value, _ in options], [odds for _, odds in options])[0]


def _imputation(rng: random.Random) -> Literal["mean", "median"]:
    return "mean" if rng.random() < 0.6 else "median"


def _log_odds(facts: TaskFacts) -> float:
    if facts.metric == "rmsle":
        return 0.3
    # a target that goes below -1 has no log: rare outside skewed targets
    return 0.12 if facts.skew_or_balance > 1.0 else 0.02


def _output(facts: TaskFacts, model: Call, rng: random.Random) -> Output:
    if facts.metric == "accuracy":
        return "probability"  # labels are right there
    if model.name in NO_PROBABILITIES and facts.metric == "auc":
        return "score" if rng.random() < 0.6 else "probability"
    return "label" if rng.random() < 0.15 else "probability"


def _weights(rng: random.Random, n: int) -> tuple[int, ...]:
    if n < 2 or rng.random() < 0.7:
        return ()
    return tuple(rng.choice((1, 2, 3)) for _ in range(n))


def _vectorisers(rng: random.Random) -> tuple[Call, ...]:
    kind = rng.random()
    if kind < 0.55:
        return (_word(rng),)
    if kind < 0.8:
        return (_char(rng),)
    return (_word(rng), _char(rng))


def _word(rng: random.Random) -> Call:
    rows = (
        ("", "", 'stop_words="english"', "lowercase=False"),
        ("", "", "ngram_range=(1, 2)", "ngram_range=(1, 3)"),
        ("", "min_df=2", "min_df=5"),
        ("", "", "max_features=500", "max_features=2000"),
        ("", "", "", MARKS),
    )
    args = [value for row in rows if (value := rng.choice(row))]
    if rng.random() < 0.25:
        return Call("CountVectorizer", (*args, *(["binary=True"] if rng.random() < 0.4 else [])))
    if rng.random() < 0.4:
        args.append("sublinear_tf=True")
    return Call("TfidfVectorizer", tuple(args))


def _char(rng: random.Random) -> Call:
    low, high = rng.choice(((1, 3), (2, 3), (2, 4), (2, 5), (3, 5)))
    args = [f'analyzer="{rng.choice(("char", "char_wb"))}"', f"ngram_range=({low}, {high})"]
    # one of the two bounds the number of n-grams
    rows = rng.choice(
        (
            (("min_df=2", "min_df=5"), ("",)),
            (("", "min_df=2"), ("max_features=2000", "max_features=5000")),
        )
    )
    args += [value for row in rows if (value := rng.choice(row))]
    if rng.random() < 0.4:
        args.append("sublinear_tf=True")
    return Call("TfidfVectorizer", tuple(args))


def _reduction(rng: random.Random, sparse: bool) -> tuple[Call, ...]:
    if sparse:
        if rng.random() < 0.3:
            size = rng.choice(("20", "50", "100"))
            return (call("TruncatedSVD", size, "random_state=0"),)
        return ()
    if rng.random() < 0.06:
        return (call("PCA", rng.choice(("0.9", "0.99")), "random_state=0"),)
    return ()


def _models(facts: TaskFacts, rng: random.Random, sparse: bool, dense: bool) -> tuple[Call, ...]:
    roll = rng.random()
    n = 1 if roll < 0.65 else 2 if roll < 0.85 else 3
    picked: list[Call] = []
    families: set[str] = set()
    while len(picked) < n:
        family = _family(facts, rng, sparse, dense)
        model = family.sample(facts.kind == "regression", rng.choice)
        averaged = n > 1
        if averaged and (model.name in NO_PROBABILITIES or family.name in {"dummy", *families}):
            continue
        families.add(family.name)
        picked.append(_affordable(model, facts, wide=sparse and not dense))
    return tuple(picked)


def _family(facts: TaskFacts, rng: random.Random, sparse: bool, dense: bool) -> Family:
    regression = facts.kind == "regression"
    odds = []
    for family in FAMILIES:
        weight = family.weights[1 if sparse else 0]
        if (family.regressor if regression else family.classifier) is None:
            weight = 0.0
        if family.name == "boost" and (facts.classes > 3 or sparse):
            weight *= 0.4  # one tree a class and round, without histograms: often too slow
        if family.name in {"kernel-svm", "mlp"} and sparse and not dense:
            weight *= 0.5  # quadratic in rows or wide in inputs: slow on thousands of n-grams
        if family.dense and not dense:
            weight *= 0.05  # sparse features into a dense-only model: a rare, honest error
        if family.name == "text-bayes" and (dense or facts.numeric > 0):
            weight *= 0.05  # negative features: the same
        odds.append(weight)
    return rng.choices(FAMILIES, odds)[0]


def _affordable(model: Call, facts: TaskFacts, *, wide: bool) -> Call:
    """Fewer trees where each costs much: one a class and round, or over thousands of n-grams."""
    boosting = model.name in {"GradientBoostingClassifier", "HistGradientBoostingClassifier"}
    forest = model.name.startswith(("RandomForest", "ExtraTrees", "GradientBoosting"))
    if not (boosting and facts.classes > 3) and not (forest and wide):
        return model
    fewer = {"n_estimators": "n_estimators=50", "max_iter": "max_iter=50"}
    return Call(
        model.name,
        tuple(
            fewer.get(arg.partition("=")[0], arg) if isinstance(arg, str) else arg
            for arg in model.args
        ),
    )


_METRICS: dict[str, tuple[tuple[str, float], ...]] = {
    "binary": (("auc", 3.0), ("logloss", 2.0), ("accuracy", 1.0)),
    "multiclass": (("logloss", 3.0), ("accuracy", 2.0)),
    "regression": (("rmse", 3.0), ("mae", 2.0), ("rmsle", 2.0)),
}


def invented_facts(rng: random.Random) -> TaskFacts:
    """A task that does not exist: any kind, metric and mix of columns, for supervised training."""
    kind: Literal["binary", "multiclass", "regression"] = rng.choice(
        ("binary", "multiclass", "regression")
    )
    metric = _weighted(rng, _METRICS[kind])
    shape = rng.choices(("table", "numbers", "text", "mixed"), (3, 3, 3, 2))[0]
    numeric = 0 if shape == "text" else rng.choice((1, 2, 3, 4, 5, 6, 7, 8, 10, 15, 25, 40, 60, 90))
    categorical = 0
    if shape == "table" or (shape == "mixed" and rng.random() < 0.5):
        categorical = rng.choice((1, 1, 2, 3, 4, 5, 8, 12))
    text = rng.choice((1, 1, 1, 2)) if shape in ("text", "mixed") else 0
    levels = rng.choice((2, 3, 5, 7, 8, 12, 20, 40)) if categorical else 0
    has_table = numeric + categorical > 0
    missing = round(rng.uniform(0.01, 0.3), 2) if has_table and rng.random() < 0.3 else 0.0
    classes = {"binary": 2, "regression": 0}.get(kind, rng.randint(3, 12))
    if kind == "regression":
        balance = round(rng.uniform(-1.0, 4.0), 1)
    elif kind == "binary":
        balance = round(rng.uniform(0.05, 0.5), 2)
    else:
        balance = round(rng.uniform(0.02, 1.0 / classes), 2)
    return TaskFacts(
        kind=kind,
        metric=metric,
        rows=rng.choice((200, 300, 400, 500, 600, 800, 1000, 1000, 1000, 1500, 2000)),
        numeric=numeric,
        categorical=categorical,
        text=text,
        levels=levels,
        missing=missing,
        classes=classes,
        skew_or_balance=balance,
        time=has_table and rng.random() < 0.2,
    )
