"""Reference scripts for sotu-president: word counts, then words and letters, then averages."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from agent_tools.mle_bench.catalogue import MARKS, Call, call
from agent_tools.mle_bench.compose import Choices, calibrated, compose
from agent_tools.mle_bench.facts import TaskFacts
from agent_tools.mle_bench.recipes import Recipe
from agent_tools.mle_bench.v1.fill import Named, constant_classes, fill
from agent_tools.mle_bench.v1.texts import number_scripts

_SEED = "random_state=0"
_SUB = "sublinear_tf=True"
_TOPICS = (call("TruncatedSVD", "50", _SEED),)


def recipes(facts: TaskFacts) -> list[Recipe]:
    """The 100 scripts; only the kind and metric of ``facts`` matter."""
    return fill(
        trivial=[*constant_classes(), *number_scripts(facts)],
        default=_default(facts),
        tuned=_tuned(facts),
        strong=_strong(facts),
    )


def _words(*args: str) -> Call:
    return Call("TfidfVectorizer", args)


def _letters(low: int, high: int, min_df: int = 3) -> Call:
    ranges = f"ngram_range=({low}, {high})"
    return Call("TfidfVectorizer", ('analyzer="char_wb"', ranges, f"min_df={min_df}", _SUB))


def _default(facts: TaskFacts) -> Iterator[Named]:
    features: dict[str, tuple[Call, ...]] = {
        "few-words": (_words("max_features=300"),),
        "counts": (Call("CountVectorizer", ("max_features=500",)),),
        "stop": (_words('stop_words="english"', "max_features=1000"),),
    }
    models = (
        call("LogisticRegression", "max_iter=100"),
        call("KNeighborsClassifier", "n_neighbors=15"),
        call("MultinomialNB"),
        call("DecisionTreeClassifier", "max_depth=12", _SEED),
        call("RandomForestClassifier", "n_estimators=30", "min_samples_leaf=2", _SEED),
        call("ExtraTreesClassifier", "n_estimators=30", "min_samples_leaf=2", _SEED),
        call("AdaBoostClassifier", "n_estimators=30", _SEED),
        call("SGDClassifier", 'loss="log_loss"', _SEED),
        call("LinearSVC"),
        call("BernoulliNB"),
        call("MLPClassifier", "hidden_layer_sizes=(30,)", "max_iter=6", _SEED),
        call("ComplementNB"),
    )
    for (name, vectorisers), model in product(features.items(), models):
        yield f"{name}-{model.name}", compose(facts, Choices((model,), vectorisers=vectorisers))


def _logistic(strength: float) -> Call:
    return call("LogisticRegression", f"C={strength}", "max_iter=60")


def _bayes(alpha: float) -> Call:
    return call("MultinomialNB", f"alpha={alpha}")


def _margin(strength: float) -> Call:
    return calibrated(call("LinearSVC", f"C={strength}", _SEED))


def _tuned(facts: TaskFacts) -> Iterator[Named]:
    def script(model: Call, *vectorisers: Call, reduce: tuple[Call, ...] = ()) -> str:
        return compose(facts, Choices((model,), vectorisers=vectorisers, reduce=reduce))

    sets: dict[str, Call] = {
        "words": _words("min_df=2", _SUB),
        "pairs": _words("ngram_range=(1, 2)", "min_df=2", _SUB),
        "marks": _words(MARKS, "ngram_range=(1, 2)", "min_df=2", _SUB),
    }
    for (name, vectoriser), strength in product(sets.items(), (1.0, 3.0, 8.0)):
        yield f"{name}-logistic-{strength}", script(_logistic(strength), vectoriser)
    for (name, vectoriser), alpha in product(sets.items(), (0.05, 0.2, 0.5)):
        yield f"{name}-bayes-{alpha}", script(_bayes(alpha), vectoriser)
    for (name, vectoriser), strength in product(sets.items(), (0.05, 0.2)):
        yield f"{name}-svc-{strength}", script(_margin(strength), vectoriser)
    for high, strength in ((3, 1.0), (3, 3.0), (4, 2.0)):
        yield f"letters-{high}-logistic-{strength}", script(
            _logistic(strength), _letters(2, high, 5)
        )
    for high in (4, 5):
        yield f"letters-{high}-bayes", script(_bayes(0.1), _letters(2, high, 5))
        yield f"letters-{high}-svc", script(_margin(0.1), _letters(2, high, 5))
    few = _words("max_features=3000", _SUB)
    yield "topics-net", script(call("MLPClassifier", "max_iter=12", _SEED), few, reduce=_TOPICS)
    yield "topics-logistic", script(_logistic(1.0), few, reduce=_TOPICS)
    yield "words-complement", script(call("ComplementNB", "alpha=0.5"), sets["words"])
    yield "pairs-complement", script(call("ComplementNB", "alpha=0.3"), sets["pairs"])
    yield "words-bernoulli", script(call("BernoulliNB", "alpha=0.1"), sets["words"])


def _strong(facts: TaskFacts) -> Iterator[Named]:
    marks = _words(MARKS, "ngram_range=(1, 2)", "min_df=2", _SUB)
    triples = _words(MARKS, "ngram_range=(1, 3)", "min_df=2", _SUB)
    for name, words in (("marks", marks), ("triples", triples)):
        for high, strength in ((4, 3.0), (5, 4.0)):
            both = (words, _letters(2, high, 4))
            yield (
                f"{name}-letters-{high}-logistic-{strength}",
                compose(facts, Choices((_logistic(strength),), vectorisers=both)),
            )
        for high, alpha in ((4, 0.1), (5, 0.1)):
            both = (words, _letters(2, high, 4))
            yield (
                f"{name}-letters-{high}-logistic-bayes",
                compose(facts, Choices((_logistic(6.0), _bayes(alpha)), vectorisers=both)),
            )
            yield (
                f"{name}-letters-{high}-logistic-svc",
                compose(facts, Choices((_logistic(6.0), _margin(0.15)), vectorisers=both)),
            )
        yield (
            f"{name}-letters-4-three",
            compose(
                facts,
                Choices(
                    (_logistic(6.0), _bayes(0.1), _margin(0.15)),
                    vectorisers=(words, _letters(2, 4, 4)),
                    weights=(2, 1, 2),
                ),
            ),
        )
    yield (
        "marks-letters-3-logistic-svc",
        compose(
            facts,
            Choices((_logistic(6.0), _margin(0.15)), vectorisers=(marks, _letters(1, 3, 3))),
        ),
    )
