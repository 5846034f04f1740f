"""Reference scripts of spam-mail: n-grams of words and characters, and well-kept probabilities."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from agent_tools.mle_bench.catalogue import MARKS, Call, call, char_vectoriser, word_vectoriser
from agent_tools.mle_bench.compose import Choices, calibrated, compose
from agent_tools.mle_bench.facts import TaskFacts
from agent_tools.mle_bench.recipes import Recipe
from agent_tools.mle_bench.v1.build import recipes_of, small_field

_SUB = "sublinear_tf=True"
_WORDS = word_vectoriser("min_df=2", _SUB)
_PAIRS = word_vectoriser("ngram_range=(1, 2)", "min_df=2", _SUB)
_MARKS = word_vectoriser(MARKS, "ngram_range=(1, 2)", "min_df=2", _SUB)
_CUT = (
    "X, Z = X.copy(), Z.copy()",
    'X["text"], Z["text"] = X["text"].str[:1000], Z["text"].str[:1000]',
)
"""The first half of a long mail says enough and halves the cost of character n-grams."""


def _chars(low: int, high: int) -> Call:
    return char_vectoriser(low, high, "min_df=4", _SUB)


def _logistic(strength: float) -> Call:
    return call("LogisticRegression", f"C={strength}", "max_iter=200")


def _margin(strength: float) -> Call:
    return calibrated(call("LinearSVC", f"C={strength}", "random_state=0"))


def recipes(facts: TaskFacts) -> list[Recipe]:
    """The field of 100 of spam-mail."""
    return recipes_of(
        {
            "trivial": list(small_field(facts, "trivial")),
            "default": list(small_field(facts, "default")),
            "tuned": [(name, compose(facts, choices)) for name, choices in _tuned()],
            "strong": [(name, compose(facts, choices)) for name, choices in _strong()],
        }
    )


def _tuned() -> Iterator[tuple[str, Choices]]:
    sets = {"words": (_WORDS,), "pairs": (_PAIRS,), "marks": (_MARKS,)}
    for (name, vectorisers), strength in product(sets.items(), (10.0, 30.0, 100.0, 300.0)):
        yield (
            f"{name}-logistic-{strength:g}",
            Choices(models=(_logistic(strength),), vectorisers=vectorisers),
        )
    for (name, vectorisers), strength in product(sets.items(), (0.3, 1.0, 3.0)):
        yield (
            f"{name}-svc-{strength:g}",
            Choices(models=(_margin(strength),), vectorisers=vectorisers),
        )
    for high in (3, 4):
        yield (
            f"first-char2{high}-logistic",
            Choices(models=(_logistic(30.0),), vectorisers=(_chars(2, high),), extra=_CUT),
        )
    for strength in (30.0, 100.0):
        stop = word_vectoriser('stop_words="english"', "min_df=2", _SUB)
        yield (
            f"stop-logistic-{strength:g}",
            Choices(models=(_logistic(strength),), vectorisers=(stop,)),
        )
    # less happy choices
    for name in sets:
        yield (
            f"{name}-bayes",
            Choices(
                models=(calibrated(call("MultinomialNB", "alpha=0.1")),), vectorisers=sets[name]
            ),
        )
        yield f"{name}-logistic-2", Choices(models=(_logistic(2.0),), vectorisers=sets[name])
    sgd = call("SGDClassifier", 'loss="log_loss"', "alpha=0.0001", "random_state=0")
    yield "words-sgd", Choices(models=(sgd,), vectorisers=(_WORDS,))
    forest = call("ExtraTreesClassifier", "n_estimators=60", "min_samples_leaf=2", "random_state=0")
    few = word_vectoriser("max_features=1000", _SUB)
    yield "few-words-extra", Choices(models=(forest,), vectorisers=(few,))
    topics = call("TruncatedSVD", "40", "random_state=0")
    yield "topics-logistic", Choices((_logistic(10.0),), vectorisers=(_WORDS,), reduce=(topics,))
    yield "few-words-logistic", Choices(models=(_logistic(10.0),), vectorisers=(few,))


def _strong() -> Iterator[tuple[str, Choices]]:
    for low, high in ((2, 4), (3, 4), (3, 5)):
        vectorisers = (_MARKS, _chars(low, high))
        for strength in (100.0, 300.0):
            yield (
                f"marks-char{low}{high}-logistic-{strength:g}",
                Choices(models=(_logistic(strength),), vectorisers=vectorisers),
            )
        for strength in (0.3, 1.0):
            yield (
                f"marks-char{low}{high}-logistic-svc-{strength:g}",
                Choices(models=(_logistic(300.0), _margin(strength)), vectorisers=vectorisers),
            )
    for low, high in ((2, 4), (3, 4), (3, 5)):
        yield (
            f"marks-words-char{low}{high}-logistic",
            Choices(models=(_logistic(200.0),), vectorisers=(_MARKS, _WORDS, _chars(low, high))),
        )
