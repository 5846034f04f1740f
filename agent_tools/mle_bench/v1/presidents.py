"""Reference scripts for sotu-president: word counts, then words and letters, then averages."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from agent_tools.mle_bench.catalogue import MARKS, Call, call
from agent_tools.mle_bench.compose import Choices, calibrated, compose
from agent_tools.mle_bench.facts import TaskFacts
from agent_tools.mle_bench.recipes import Recipe
from agent_tools.mle_bench.v1.fill import Named, constant_classes, fill
from agent_tools.mle_bench.v1.language_texts import number_scripts

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
        yield (
            f"letters-{high}-logistic-{strength}",
            script(_logistic(strength), _letters(2, high, 5)),
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


_TWO_VIEWS = """\
import numpy as np
import pandas as pd
from scipy.sparse import hstack
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import MultinomialNB
train, test = pd.read_csv( "train.csv" ), pd.read_csv( "test.csv" )
sub = pd.read_csv( "sample_submission.csv" )
def view( vec ):
    return vec.fit_transform( train["text"] ), vec.transform( test["text"] )
A, B = view( {words} )
C, D = view( {letters} )
bayes = MultinomialNB( alpha={alpha} ).fit( A, train["target"] ).predict_proba( B )
model = LogisticRegression( C={strength}, max_iter=60 )
model.fit( hstack( [ A, C ] ).tocsr(), train["target"] )
linear = model.predict_proba( hstack( [ B, D ] ).tocsr() )
p = {mix}
sub[model.classes_] = p / p.sum( 1, keepdims=True )
sub.to_csv( "submission.csv", index=False )"""
_MEAN = "( bayes + linear ) / 2"
_GEOMETRIC = "np.sqrt( bayes * linear + 1e-12 )"


def _strong(facts: TaskFacts) -> Iterator[Named]:
    """A linear model of words and letters, averaged with a naive Bayes of word pairs."""
    spans = {"pairs": 2, "triples": 3}
    mixes = {"mean": _MEAN, "geometric": _GEOMETRIC}
    for (name, span), alpha, (mix, expression) in product(
        spans.items(), (0.03, 0.08), mixes.items()
    ):
        words = _words(MARKS, f"ngram_range=(1, {span})", "min_df=2", _SUB)
        yield (
            f"{name}-bayes-{alpha}-letters-4-{mix}",
            _TWO_VIEWS.format(
                words=words, letters=_letters(2, 4, 4), alpha=alpha, strength=3.0, mix=expression
            ),
        )
    words = _words(MARKS, "ngram_range=(1, 2)", "min_df=2", _SUB)
    for high, strength, alpha in ((3, 5.0, 0.05), (3, 2.0, 0.05), (4, 6.0, 0.05), (5, 3.0, 0.05)):
        yield (
            f"bayes-letters-{high}-{strength}",
            _TWO_VIEWS.format(
                words=words,
                letters=_letters(2, high, 4),
                alpha=alpha,
                strength=strength,
                mix=_GEOMETRIC,
            ),
        )
    both = (words, _letters(2, 4, 4))
    yield "letters-4-logistic", compose(facts, Choices((_logistic(3.0),), vectorisers=both))
    models = (_logistic(6.0), _bayes(0.1), _margin(0.15))
    yield (
        "letters-4-three",
        compose(facts, Choices(models, vectorisers=both, weights=(2, 1, 2))),
    )
    few = (words, _letters(1, 3, 3))
    yield "letters-3-three", compose(facts, Choices(models, vectorisers=few))
