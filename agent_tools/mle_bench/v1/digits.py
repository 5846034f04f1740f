"""Reference scripts for mnist5k: from sums of ink to nets on edge directions of shifted images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from agent_tools.mle_bench.catalogue import Call, call
from agent_tools.mle_bench.compose import Choices, calibrated, compose
from agent_tools.mle_bench.facts import TaskFacts
from agent_tools.mle_bench.recipes import Recipe
from agent_tools.mle_bench.v1.fill import Named, constant_classes, fill

_SEED = "random_state=0"
_LOAD = (
    "from PIL import Image",
    'load = lambda d: np.array( [ np.asarray( Image.open( "images/" + f ) ) for f in d["image"] ] )',
    "P, Q = load( X ) / 255, load( Z ) / 255",
)
_TABLE = "X, Z = [ pd.DataFrame( {expression} ) for p in (P, Q) ]"
_PIXELS = "p.reshape( len(p), -1 )"
_SHRUNK = "p.reshape( -1, 14, 2, 14, 2 ).mean( (2, 4) ).reshape( len(p), -1 )"
_COARSE = "p.reshape( -1, 7, 4, 7, 4 ).mean( (2, 4) ).reshape( len(p), -1 )"
_SUMS = "np.hstack( [ p.sum( 1 ), p.sum( 2 ) ] )"
_UPRIGHT = (
    "from scipy.ndimage import affine_transform",
    "def upright( p ):",
    "    y, x = np.mgrid[:28, :28]",
    "    cy, cx = ( y * p ).sum() / p.sum(), ( x * p ).sum() / p.sum()",
    "    slant = ( ( x - cx ) * ( y - cy ) * p ).sum() / ( ( y - cy ) ** 2 * p ).sum()",
    "    turn = np.array( [ [ 1, 0 ], [ slant, 1 ] ] )",
    "    return affine_transform( p, turn, np.array( [ cy, cx ] ) - turn @ [ 13.5, 13.5 ], order=1 )",
    "P, Q = [ np.array( [ upright( i ) for i in p ] ) for p in (P, Q) ]",
)
"""Slanted digits are sheared upright and put in the middle."""
_SHIFTED = (
    "moves = [ (0, 0), (0, 1), (0, -1), (1, 0), (-1, 0) ]",
    "P, y = np.concatenate( [ np.roll( P, m, (1, 2) ) for m in moves ] ), pd.concat( [ y ] * 5 )",
)
"""Each training image also one pixel up, down, left and right."""


def _edges(bins: int, step: int) -> tuple[str, ...]:
    """Histograms of edge directions over overlapping cells, ``step`` pixels apart."""
    return (
        "from scipy.ndimage import gaussian_filter",
        "def edges( p ):",
        "    gy, gx = np.gradient( p, axis=(1, 2) )",
        f"    turn = np.arctan2( gy, gx ) / ( 2 * np.pi ) * {bins}",
        "    parts = []",
        f"    for b in range( {bins} ):",
        f"        near = np.clip( 1 - np.abs( ( turn - b + {bins} / 2 ) % {bins} - {bins} / 2 ), 0, 1 )",
        f"        smooth = gaussian_filter( near * np.hypot( gx, gy ), (0, {step / 2}, {step / 2}) )",
        f"        parts.append( smooth[:, {step // 2}::{step}, {step // 2}::{step}] )",
        "    f = np.stack( parts, 1 ).reshape( len(p), -1 )",
        "    return np.sqrt( f / f.sum( 1, keepdims=True ) ) * 5",
    )


def recipes(facts: TaskFacts) -> list[Recipe]:
    """The 100 scripts; only the kind and metric of ``facts`` matter."""
    pixels = replace(facts, numeric=784, categorical=0, text=0, missing=0.0)
    return fill(
        trivial=[*constant_classes(), *_trivial(pixels)],
        default=_default(pixels),
        tuned=_tuned(pixels),
        strong=_strong(pixels),
    )


def _script(
    facts: TaskFacts,
    expression: str,
    *models: Call,
    before: tuple[str, ...] = (),
    numeric: tuple[Call, ...] = (),
    reduce: tuple[Call, ...] = (),
    weights: tuple[int, ...] = (),
) -> str:
    extra = (*_LOAD, *before, _TABLE.format(expression=expression))
    return compose(
        facts,
        Choices(models, numeric, None, extra=extra, reduce=reduce, weights=weights),
    )


def _trivial(facts: TaskFacts) -> Iterator[Named]:
    numbers = {
        "ink": "p.sum( (1, 2) )[:, None]",
        "width": "( p.max( 1 ) > 0.5 ).sum( 1 )[:, None]",
        "middle": "p[:, 14, 14][:, None]",
        "top": "p[:, :9].sum( (1, 2) )[:, None]",
    }
    models = {
        "linear": call("LogisticRegression"),
        "stump": call("DecisionTreeClassifier", "max_depth=1", _SEED),
        "tree": call("DecisionTreeClassifier", "max_depth=3", _SEED),
    }
    for (name, expression), (kind, model) in product(numbers.items(), models.items()):
        yield f"{name}-{kind}", _script(facts, expression, model)


def _default(facts: TaskFacts) -> Iterator[Named]:
    models = (
        call("LogisticRegression", "max_iter=100"),
        call("KNeighborsClassifier"),
        call("GaussianNB"),
        call("DecisionTreeClassifier", _SEED),
        call("RandomForestClassifier", _SEED),
        call("ExtraTreesClassifier", _SEED),
        call("AdaBoostClassifier", "n_estimators=30", _SEED),
        call("HistGradientBoostingClassifier", "max_iter=30", _SEED),
        call("SGDClassifier", 'loss="log_loss"', _SEED),
        call("BaggingClassifier", _SEED),
        call("SVC"),
        call("MLPClassifier", "max_iter=30", _SEED),
    )
    for name, expression in (("sums", _SUMS), ("coarse", _COARSE), ("shrunk", _SHRUNK)):
        for model in models:
            yield f"{name}-{model.name}", _script(facts, expression, model)


def _net(width: int, penalty: float, rounds: int = 40, seed: int = 0) -> Call:
    return call(
        "MLPClassifier",
        f"hidden_layer_sizes=({width},)",
        f"alpha={penalty}",
        f"max_iter={rounds}",
        f"random_state={seed}",
    )


def _pca(parts: int) -> tuple[Call, ...]:
    return (call("PCA", str(parts), _SEED),)


def _logistic(strength: float) -> Call:
    return call("LogisticRegression", f"C={strength}", "max_iter=100")


def _margin(strength: float) -> Call:
    return calibrated(call("SVC", f"C={strength}"))


def _tuned(facts: TaskFacts) -> Iterator[Named]:
    for parts, strength in product((25, 40, 60), (3.0, 5.0, 10.0)):
        yield (
            f"upright-pca-{parts}-svc-{strength}",
            _script(facts, _PIXELS, _margin(strength), before=_UPRIGHT, reduce=_pca(parts)),
        )
    for width, penalty in product((100, 150, 200), (0.1, 0.5, 1.0)):
        model = _net(width, penalty)
        yield f"upright-net-{width}-{penalty}", _script(facts, _SHRUNK, model, before=_UPRIGHT)
    for strength in (0.3, 1.0):
        for bins, step in ((8, 7), (9, 7)):
            edges = _edges(bins, step)
            name = f"edges-{bins}-{step}-logistic-{strength}"
            model = _logistic(strength)
            yield name, _script(facts, "edges( p )", model, before=edges)
            yield (
                f"upright-{name}",
                _script(facts, "edges( p )", model, before=(*_UPRIGHT, *edges)),
            )
    hist = call("HistGradientBoostingClassifier", "max_iter=80", "learning_rate=0.15", _SEED)
    yield "hist", _script(facts, _SHRUNK, hist)
    yield "upright-hist", _script(facts, _SHRUNK, hist, before=_UPRIGHT)
    # less happy choices
    yield "logistic-0.05", _script(facts, _PIXELS, _logistic(0.05))
    yield "net-100-1.0", _script(facts, _PIXELS, _net(100, 1.0))
    yield "pca-40-svc", _script(facts, _PIXELS, _margin(5.0), reduce=_pca(40))
    trees = ("n_estimators=300", "max_features=0.1", _SEED)
    yield "extra", _script(facts, _PIXELS, Call("ExtraTreesClassifier", trees))
    model = call("LinearDiscriminantAnalysis", 'solver="lsqr"', "shrinkage=0.2")
    yield "upright-discriminant", _script(facts, _PIXELS, model, before=_UPRIGHT)
    near = call("KNeighborsClassifier", "n_neighbors=5", 'weights="distance"')
    yield "upright-knn", _script(facts, _PIXELS, near, before=_UPRIGHT, reduce=_pca(40))
    quadratic = call("QuadraticDiscriminantAnalysis", "reg_param=0.1")
    yield "pca-quadratic", _script(facts, _PIXELS, quadratic, reduce=_pca(40))


def _strong(facts: TaskFacts) -> Iterator[Named]:
    for bins, step in ((8, 4), (9, 5)):
        edges = _edges(bins, step)
        for upright in (False, True):
            before = (*(_UPRIGHT if upright else ()), *edges)
            name = f"{'upright-' if upright else ''}edges-{bins}-{step}"
            yield f"{name}-svc", _script(facts, "edges( p )", _margin(10.0), before=before)
            yield (
                f"{name}-net-svc",
                _script(facts, "edges( p )", _margin(10.0), _net(200, 0.3), before=before),
            )
            shifted = (*(_UPRIGHT if upright else ()), *_SHIFTED, *edges)
            yield (
                f"shifted-{name}-net",
                _script(facts, "edges( p )", _net(150, 0.3, 12), before=shifted),
            )
    nets = tuple(_net(150, 0.3, 10, seed) for seed in range(2))
    yield (
        "shifted-upright-edges-nets",
        _script(facts, "edges( p )", *nets, before=(*_UPRIGHT, *_SHIFTED, *_edges(8, 5))),
    )
    yield (
        "upright-edges-three",
        _script(
            facts,
            "edges( p )",
            *(_margin(10.0), _net(200, 0.3), _logistic(3.0)),
            before=(*_UPRIGHT, *_edges(8, 5)),
            weights=(2, 2, 1),
        ),
    )
    yield (
        "upright-edges-three-nets",
        _script(
            facts,
            "edges( p )",
            *(_net(200, 0.3, 40, seed) for seed in range(3)),
            before=(*_UPRIGHT, *_edges(8, 5)),
        ),
    )
