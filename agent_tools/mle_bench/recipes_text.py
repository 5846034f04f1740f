"""Tuned and strong recipes for tasks with a text column."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from agent_tools.mle_bench.catalogue import MARKS as MARKS_ARGUMENT
from agent_tools.mle_bench.catalogue import Call, call, char_vectoriser, word_vectoriser
from agent_tools.mle_bench.compose import Choices, bagged, calibrated
from agent_tools.mle_bench.facts import TaskFacts

_SUB = "sublinear_tf=True"
WORDS = word_vectoriser("ngram_range=(1, 2)", _SUB)
MARKS = word_vectoriser(MARKS_ARGUMENT, "ngram_range=(1, 2)", _SUB)
MARKS_TRI = word_vectoriser(MARKS_ARGUMENT, "ngram_range=(1, 3)", _SUB)


def _chars(low: int, high: int, min_df: int = 3) -> Call:
    return char_vectoriser(low, high, f"min_df={min_df}", _SUB)


def tuned(facts: TaskFacts) -> Iterator[tuple[str, Choices]]:
    """35 recipes: n-gram ranges and penalties that people settle on, some of them less well."""
    return _tuned_regression() if facts.kind == "regression" else _tuned_classes()


def strong(facts: TaskFacts) -> Iterator[tuple[str, Choices]]:
    """15 recipes: word and character n-grams together, well penalised, averaged."""
    return _strong_regression() if facts.kind == "regression" else _strong_classes()


def _ridge(alpha: float) -> Call:
    return call("Ridge", f"alpha={alpha}")


def _tuned_regression() -> Iterator[tuple[str, Choices]]:
    sets: dict[str, tuple[Call, ...]] = {
        "char24": (_chars(2, 4),),
        "char25": (_chars(2, 5),),
        "char35": (_chars(3, 5),),
        "char26": (_chars(2, 6),),
        "char14": (_chars(1, 4),),
        "word-char": (WORDS, _chars(2, 5)),
    }
    for (name, vectorisers), alpha in product(sets.items(), (0.2, 0.3, 0.5, 0.8)):
        yield f"{name}-ridge-{alpha}", Choices(models=(_ridge(alpha),), vectorisers=vectorisers)
    for alpha in (0.3, 0.5, 1.0):
        yield f"marks-ridge-{alpha}", Choices(models=(_ridge(alpha),), vectorisers=(MARKS,))
    yield "char25-svr", Choices(models=(call("LinearSVR", "C=1.0"),), vectorisers=(_chars(2, 5),))
    # less happy choices
    for alpha in (3.0, 8.0):
        yield f"words-ridge-{alpha}", Choices(models=(_ridge(alpha),), vectorisers=(WORDS,))
    yield "words-svr", Choices(models=(call("LinearSVR", "C=0.1"),), vectorisers=(WORDS,))
    yield "words-knn", _neighbours("KNeighborsRegressor")
    yield "words-boost", _on_topics(call("GradientBoostingRegressor", "random_state=0"))
    yield "words-extra", _on_topics(call("ExtraTreesRegressor", "random_state=0"))
    yield "words-topics", _on_topics(_ridge(1.0))


def _strong_regression() -> Iterator[tuple[str, Choices]]:
    for high, alpha in product((4, 5, 6), (0.2, 0.35, 0.5)):
        yield (
            f"marks-char2{high}-ridge-{alpha}",
            Choices(models=(_ridge(alpha),), vectorisers=(MARKS, _chars(2, high, 2))),
        )
    svr = call("LinearSVR", "C=0.6", "random_state=0")
    for high in (4, 5):
        yield (
            f"marks-char2{high}-ridge-svr",
            Choices(models=(_ridge(0.4), svr), vectorisers=(MARKS, _chars(2, high, 2))),
        )
        yield (
            f"marks3-char1{high}-ridge",
            Choices(models=(_ridge(0.3),), vectorisers=(MARKS_TRI, _chars(1, high, 2))),
        )
    yield (
        "marks-char15-bag",
        Choices(models=(_ridge(0.3),), vectorisers=(MARKS, WORDS, _chars(1, 5, 2))),
    )
    yield (
        "marks-words-char25-ridge",
        Choices(models=(_ridge(0.35),), vectorisers=(MARKS, WORDS, _chars(2, 5, 2))),
    )


def _logistic(strength: float) -> Call:
    return call("LogisticRegression", f"C={strength}", "max_iter=200")


def _bayes(alpha: float) -> Call:
    return call("MultinomialNB", f"alpha={alpha}")


def _margin(strength: float) -> Call:
    return calibrated(call("LinearSVC", f"C={strength}", "random_state=0"))


def _tuned_classes() -> Iterator[tuple[str, Choices]]:
    sets: dict[str, tuple[Call, ...]] = {
        "words": (WORDS,),
        "marks": (MARKS,),
        "words3": (word_vectoriser("ngram_range=(1, 3)", _SUB),),
        "words-df2": (word_vectoriser("ngram_range=(1, 2)", "min_df=2", _SUB),),
    }
    for (name, vectorisers), strength in product(sets.items(), (1.0, 3.0, 10.0)):
        yield (
            f"{name}-logistic-{strength}",
            Choices(models=(_logistic(strength),), vectorisers=vectorisers),
        )
    for (name, vectorisers), strength in product(sets.items(), (0.1, 0.3)):
        yield (
            f"{name}-svc-{strength}",
            Choices(models=(_margin(strength),), vectorisers=vectorisers),
        )
    for name, vectorisers in sets.items():
        both = (_logistic(10.0), _bayes(0.2))
        yield f"{name}-logistic-bayes", Choices(models=both, vectorisers=vectorisers)
    for low, high in ((2, 4), (3, 4)):
        yield (
            f"char{low}{high}-logistic",
            Choices(models=(_logistic(3.0),), vectorisers=(_chars(low, high),)),
        )
    huber = call("SGDClassifier", 'loss="log_loss"', "alpha=0.0003", "random_state=0")
    for name in ("words", "marks"):
        yield f"{name}-sgd", Choices(models=(huber,), vectorisers=sets[name])
    # less happy choices
    stop = (word_vectoriser("ngram_range=(1, 2)", 'stop_words="english"', _SUB),)
    for strength in (1.0, 10.0):
        yield f"stop-logistic-{strength}", Choices((_logistic(strength),), vectorisers=stop)
    yield "words-knn", _neighbours("KNeighborsClassifier")
    yield "words-topics", _on_topics(_logistic(1.0))
    yield "words-extra", _on_topics(call("ExtraTreesClassifier", "random_state=0"))
    yield "words-bayes", Choices(models=(_bayes(1.0),), vectorisers=(WORDS,))
    yield "words-complement", Choices(models=(call("ComplementNB"),), vectorisers=(WORDS,))


def _strong_classes() -> Iterator[tuple[str, Choices]]:
    wide = word_vectoriser(MARKS_ARGUMENT, "ngram_range=(1, 2)", _SUB)
    sets = {
        "words-char24": (WORDS, _chars(2, 4)),
        "words-char34": (WORDS, _chars(3, 4)),
        "marks-char24": (wide, _chars(2, 4)),
        "marks-char34": (wide, _chars(3, 4)),
    }
    for name, vectorisers in sets.items():
        for strength, alpha in ((5.0, 0.1), (10.0, 0.2)):
            yield (
                f"{name}-logistic-bayes-{alpha}",
                Choices((_logistic(strength), _bayes(alpha)), vectorisers=vectorisers),
            )
        yield (
            f"{name}-three",
            Choices((_logistic(5.0), _bayes(0.1), _margin(0.2)), vectorisers=vectorisers),
        )
    for name in ("words-char34", "marks-char34"):
        yield (
            f"{name}-bayes-twice",
            Choices((_logistic(10.0), _bayes(0.1)), vectorisers=sets[name], weights=(1, 2)),
        )
    yield (
        "marks-bagged",
        Choices((bagged(_logistic(10.0), False, 5), _bayes(0.1)), vectorisers=(MARKS,)),
    )


def _neighbours(name: str) -> Choices:
    return Choices(models=(call(name, "n_neighbors=20"),), vectorisers=(WORDS,))


def _on_topics(model: Call) -> Choices:
    topics = call("TruncatedSVD", "20", "random_state=0")
    return Choices(models=(model,), vectorisers=(word_vectoriser(),), reduce=(topics,))
