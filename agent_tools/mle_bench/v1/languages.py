"""Reference scripts for locale-language-id: from lengths to letter models of each language."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from agent_tools.mle_bench.catalogue import Call, call
from agent_tools.mle_bench.compose import Choices, calibrated, compose
from agent_tools.mle_bench.facts import TaskFacts
from agent_tools.mle_bench.recipes import Recipe
from agent_tools.mle_bench.v1.fill import Named, constant_classes, fill
from agent_tools.mle_bench.v1.language_texts import number_scripts

_SEED = "random_state=0"
_TOPICS = (call("TruncatedSVD", "30", _SEED),)


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


def _letters(low: int, high: int, *args: str, kind: str = "char_wb") -> Call:
    ranges = f"ngram_range=({low}, {high})"
    return Call("TfidfVectorizer", (f'analyzer="{kind}"', ranges, "sublinear_tf=True", *args))


def _counts(low: int, high: int) -> Call:
    return Call("CountVectorizer", ('analyzer="char_wb"', f"ngram_range=({low}, {high})"))


def _default(facts: TaskFacts) -> Iterator[Named]:
    features: dict[str, tuple[Call, ...]] = {
        "few-words": (_words("max_features=300"),),
        "words": (_words("max_features=2000"),),
        "letters": (Call("CountVectorizer", ('analyzer="char"', "max_features=100")),),
    }
    models = (
        call("LogisticRegression", "max_iter=100"),
        call("KNeighborsClassifier"),
        call("MultinomialNB"),
        call("DecisionTreeClassifier", _SEED),
        call("RandomForestClassifier", "n_estimators=50", _SEED),
        call("ExtraTreesClassifier", "n_estimators=50", _SEED),
        call("AdaBoostClassifier", "n_estimators=30", _SEED),
        call("SGDClassifier", 'loss="log_loss"', _SEED),
        call("BaggingClassifier", _SEED),
        call("LinearSVC"),
        call("BernoulliNB"),
        call("MLPClassifier", "max_iter=15", _SEED),
    )
    for (name, vectorisers), model in product(features.items(), models):
        yield f"{name}-{model.name}", compose(facts, Choices((model,), vectorisers=vectorisers))


def _logistic(strength: float) -> Call:
    return call("LogisticRegression", f"C={strength}", "max_iter=100")


def _bayes(alpha: float) -> Call:
    return call("MultinomialNB", f"alpha={alpha}")


def _margin(strength: float) -> Call:
    return calibrated(call("LinearSVC", f"C={strength}", _SEED))


def _tuned(facts: TaskFacts) -> Iterator[Named]:
    def script(model: Call, *vectorisers: Call, reduce: tuple[Call, ...] = ()) -> str:
        return compose(facts, Choices((model,), vectorisers=vectorisers, reduce=reduce))

    for high, strength in product((2, 3), (1.0, 5.0, 20.0)):
        yield f"letters-{high}-logistic-{strength}", script(_logistic(strength), _letters(1, high))
    for high, alpha in product((2, 3, 4), (0.03, 0.1, 0.5)):
        yield f"letters-{high}-bayes-{alpha}", script(_bayes(alpha), _letters(1, high))
        if alpha < 0.5:
            yield f"counts-{high}-bayes-{alpha}", script(_bayes(alpha), _counts(1, high))
    for strength in (0.1, 0.5):
        yield f"letters-svc-{strength}", script(_margin(strength), _letters(1, 3))
        yield f"words-svc-{strength}", script(_margin(strength), _words("min_df=2"))
    for strength in (5.0, 20.0):
        yield f"words-logistic-{strength}", script(_logistic(strength), _words())
    for alpha in (0.02, 0.1, 0.3):
        yield f"words-bayes-{alpha}", script(_bayes(alpha), _words())
    yield "words-complement", script(call("ComplementNB", "alpha=0.1"), _words())
    sparse = _letters(1, 3, "max_features=3000")
    extra = call("ExtraTreesClassifier", "n_estimators=200", _SEED)
    yield "letters-extra", script(extra, sparse)
    yield "topics-net", script(call("MLPClassifier", "max_iter=60", _SEED), sparse, reduce=_TOPICS)
    yield (
        "topics-knn",
        script(call("KNeighborsClassifier", "n_neighbors=15"), sparse, reduce=_TOPICS),
    )
    hist = call("HistGradientBoostingClassifier", "max_iter=30", _SEED)
    yield "topics-hist", script(hist, sparse, reduce=_TOPICS)


_MODEL = """\
import numpy as np
import pandas as pd
from collections import Counter, defaultdict
train, test = pd.read_csv( "train.csv" ), pd.read_csv( "test.csv" )
sub = pd.read_csv( "sample_submission.csv" )
ORDER, TEMPER = {order}, {temper}
def pieces( text ):
    text = "^" * ( ORDER - 1 ) + {clean} + "$"
    return [ text[i - ORDER + 1 : i + 1] for i in range( ORDER - 1, len(text) ) ]
def letter_model( texts ):
    # Witten-Bell: a longer context backs off to a shorter one by how many letters it was seen with
    seen = [ defaultdict( Counter ) for _ in range( ORDER ) ]
    for text in texts:
        for piece in pieces( text ):
            for n in range( ORDER ):
                seen[n][piece[ORDER - 1 - n : -1]][piece[-1]] += 1
    totals = [ {{ c: ( sum( k.values() ), len(k) ) for c, k in level.items() }} for level in seen ]
    def chance( piece ):
        p = 1 / 300
        for n in range( ORDER ):
            context = piece[ORDER - 1 - n : -1]
            if context not in totals[n]:
                break
            total, kinds = totals[n][context]
            p = ( seen[n][context][piece[-1]] + kinds * p ) / ( total + kinds )
        return p
    return chance
scores = np.zeros( (len(test), sub.shape[1] - 1) )
cut = [ pieces( text ) for text in test["text"] ]
lengths = np.array( [ len(c) for c in cut ] )
for k, language in enumerate( sub.columns[1:] ):
    chance, known = letter_model( train["text"][train["target"] == language] ), {{}}
    for row, parts in enumerate( cut ):
        for piece in parts:
            if piece not in known:
                known[piece] = np.log( chance( piece ) )
            scores[row, k] += known[piece]
scores *= TEMPER{scale}
"""
_SOFTMAX = """\
p = np.exp( scores - scores.max( 1, keepdims=True ) )
p /= p.sum( 1, keepdims=True )
"""
_WITH_MODEL = """\
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
vec = TfidfVectorizer( analyzer="char_wb", ngram_range=(1, {high}), sublinear_tf=True, min_df=2 )
A, B = vec.fit_transform( train["text"] ), vec.transform( test["text"] )
model = LogisticRegression( C={strength}, max_iter=100 ).fit( A, train["target"] )
p = {share} * p + ( 1 - {share} ) * model.predict_proba( B )
"""
_END = """\
sub[sub.columns[1:]] = p
sub.to_csv( "submission.csv", index=False )"""


def _strong(facts: TaskFacts) -> Iterator[Named]:
    raw, lower = "text", "text.lower()"
    for order, temper in product((4, 5, 6), (0.2, 0.35)):
        model = _MODEL.format(order=order, temper=temper, clean=lower, scale="")
        yield f"letter-model-{order}-{temper}", model + _SOFTMAX + _END
    for order, clean in product((4, 5), (raw, lower)):
        model = _MODEL.format(order=order, temper=0.5, clean=clean, scale="")
        mixed = _WITH_MODEL.format(high=3, strength=20.0, share=0.7)
        kind = "lower" if clean == lower else "raw"
        yield f"letter-model-{order}-{kind}-logistic", model + _SOFTMAX + mixed + _END
    for order in (4, 5, 6):
        model = _MODEL.format(
            order=order, temper=1.5, clean=lower, scale=" / np.sqrt( lengths + 10 )[:, None]"
        )
        yield f"letter-model-{order}-length", model + _SOFTMAX + _END
    for high in (4, 5):
        model = _MODEL.format(order=5, temper=0.5, clean=lower, scale="")
        mixed = _WITH_MODEL.format(high=high, strength=50.0, share=0.6)
        yield f"letter-model-5-logistic-{high}", model + _SOFTMAX + mixed + _END
