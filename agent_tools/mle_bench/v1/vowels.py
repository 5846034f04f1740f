"""Reference scripts for vowel-speaker-full: summaries of series, then of their course in time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from agent_tools.mle_bench.catalogue import Call, call
from agent_tools.mle_bench.compose import Choices, bagged, calibrated, compose
from agent_tools.mle_bench.facts import TaskFacts
from agent_tools.mle_bench.recipes import Recipe
from agent_tools.mle_bench.v1.fill import Named, constant_classes, fill

_SEED = "random_state=0"
_SCALE = (call("StandardScaler"),)
_POWER = (call("PowerTransformer"),)
_LOAD = (
    'S, T = pd.read_csv("train_series.csv"), pd.read_csv("test_series.csv")',
    "def table( f, s, ids ):",
    '    rows = { i: f( d.to_numpy()[:, 2:] ) for i, d in s.groupby( "id" ) }',
    "    return pd.DataFrame( [ np.ravel( rows[i] ) for i in ids ] )",
)
_APPLY = 'X, Z = table( f, S, train["id"] ), table( f, T, test["id"] )'
_MEANS = "f = lambda v: v.mean( 0 )"
_FIRST = "f = lambda v: v[0]"
_SPREAD = "f = lambda v: v.std( 0 )"
_MOMENTS = "f = lambda v: [ v.mean( 0 ), v.std( 0 ) ]"
_RANGE = "f = lambda v: [ v.min( 0 ), v.max( 0 ) ]"
_QUARTILES = "f = lambda v: np.vstack( [ v.mean( 0 ), v.std( 0 ), np.quantile( v, [ 0.25, 0.5, 0.75 ], 0 ) ] )"


def _course(points: int) -> tuple[str, ...]:
    """Each series read off at ``points`` places from its begin to its end."""
    return (
        "def f( v ):",
        f"    at = np.linspace( 0, len(v) - 1, {points} )",
        "    return [ np.interp( at, np.arange( len(v) ), c ) for c in v.T ]",
    )


def _course_and_moments(points: int) -> tuple[str, ...]:
    return (
        "def f( v ):",
        f"    at = np.linspace( 0, len(v) - 1, {points} )",
        "    course = [ np.interp( at, np.arange( len(v) ), c ) for c in v.T ]",
        "    parts = [ v.mean( 0 ), v.std( 0 ), *np.quantile( v, [ 0.25, 0.5, 0.75 ], 0 ) ]",
        "    return np.concatenate( [ np.ravel( course ), *parts, np.diff( v, axis=0 ).std( 0 ) ] )",
    )


def recipes(facts: TaskFacts) -> list[Recipe]:
    """The 100 scripts; only the kind and metric of ``facts`` matter."""
    numbers = replace(facts, numeric=60, categorical=0, text=0, missing=0.0)
    return fill(
        trivial=[*constant_classes(), *_trivial(numbers)],
        default=_default(numbers),
        tuned=_tuned(numbers),
        strong=_strong(numbers),
    )


def _script(
    facts: TaskFacts,
    feature: str | tuple[str, ...],
    *models: Call,
    numeric: tuple[Call, ...] = (),
    reduce: tuple[Call, ...] = (),
) -> str:
    lines = (feature,) if isinstance(feature, str) else feature
    extra = (*_LOAD, *lines, _APPLY)
    return compose(facts, Choices(models, numeric, None, extra=extra, reduce=reduce))


def _trivial(facts: TaskFacts) -> Iterator[Named]:
    numbers = {
        "frames": "f = lambda v: [ len(v) ]",
        "first-coefficient": "f = lambda v: v[:, :1].mean( 0 )",
        "last-coefficient": "f = lambda v: v[:, -1:].mean( 0 )",
        "loudest": "f = lambda v: [ v.max() ]",
    }
    models = {
        "linear": call("LogisticRegression"),
        "stump": call("DecisionTreeClassifier", "max_depth=1", _SEED),
        "tree": call("DecisionTreeClassifier", "max_depth=3", _SEED),
    }
    for (name, feature), (kind, model) in product(numbers.items(), models.items()):
        yield f"{name}-{kind}", _script(facts, feature, model)


def _default(facts: TaskFacts) -> Iterator[Named]:
    models = (
        call("LogisticRegression"),
        call("KNeighborsClassifier"),
        call("GaussianNB"),
        call("DecisionTreeClassifier", _SEED),
        call("RandomForestClassifier", _SEED),
        call("AdaBoostClassifier", _SEED),
        call("GradientBoostingClassifier", "n_estimators=20", _SEED),
        call("HistGradientBoostingClassifier", "max_iter=30", _SEED),
        call("SGDClassifier", 'loss="log_loss"', _SEED),
        call("BaggingClassifier", _SEED),
        call("SVC"),
        call("MLPClassifier", "max_iter=50", _SEED),
    )
    features = (("first-frame", _FIRST), ("spread", _SPREAD), ("means", _MEANS))
    for (name, feature), model in product(features, models):
        yield f"{name}-{model.name}", _script(facts, feature, model)


def _logistic(strength: float) -> Call:
    return call("LogisticRegression", f"C={strength}", "max_iter=500")


def _discriminant(shrinkage: float) -> Call:
    return call("LinearDiscriminantAnalysis", 'solver="lsqr"', f"shrinkage={shrinkage}")


def _net(penalty: float, width: int = 100, seed: int = 0) -> Call:
    return call(
        "MLPClassifier",
        f"hidden_layer_sizes=({width},)",
        f"alpha={penalty}",
        "max_iter=200",
        f"random_state={seed}",
    )


def _tuned(facts: TaskFacts) -> Iterator[Named]:
    features: dict[str, str | tuple[str, ...]] = {
        "moments": _MOMENTS,
        "quartiles": _QUARTILES,
        "range": _RANGE,
    }
    for name, feature in features.items():
        for strength in (0.3, 1.0, 10.0):
            model = _logistic(strength)
            yield f"{name}-logistic-{strength}", _script(facts, feature, model, numeric=_SCALE)
        for shrinkage in (0.02, 0.1):
            model = _discriminant(shrinkage)
            yield f"{name}-discriminant-{shrinkage}", _script(facts, feature, model, numeric=_SCALE)
        yield f"{name}-svc", _script(facts, feature, calibrated(call("SVC")), numeric=_SCALE)
        yield f"{name}-net", _script(facts, feature, _net(0.1), numeric=_SCALE)
        extra = call("ExtraTreesClassifier", "n_estimators=300", _SEED)
        yield f"{name}-extra", _script(facts, feature, extra)
    for points in (3, 6, 12):
        course = _course(points)
        yield (
            f"course-{points}-knn",
            _script(facts, course, call("KNeighborsClassifier", "n_neighbors=8"), numeric=_SCALE),
        )
        forest = call("RandomForestClassifier", "n_estimators=300", _SEED)
        yield f"course-{points}-forest", _script(facts, course, forest)
    hist = call("HistGradientBoostingClassifier", "max_iter=60", "max_leaf_nodes=7", _SEED)
    yield "quartiles-hist", _script(facts, _QUARTILES, hist)
    yield "course-3-hist", _script(facts, _course(3), hist)
    yield "quartiles-bayes", _script(facts, _QUARTILES, call("GaussianNB"), numeric=_POWER)
    bag = bagged(call("DecisionTreeClassifier"), False, 50)
    yield "quartiles-bagged", _script(facts, _QUARTILES, bag)
    yield (
        "moments-knn",
        _script(
            facts, _MOMENTS, call("KNeighborsClassifier", 'weights="distance"'), numeric=_SCALE
        ),
    )


def _strong(facts: TaskFacts) -> Iterator[Named]:
    for points in (2, 4, 6):
        rich = _course_and_moments(points)
        for shrinkage in (0.05, 0.15):
            yield (
                f"rich-{points}-discriminant-{shrinkage}",
                _script(facts, rich, _discriminant(shrinkage), numeric=_SCALE),
            )
        discriminant = _discriminant(0.1)
        margin = calibrated(call("SVC", "C=10.0", "gamma=0.003"))
        yield (
            f"rich-{points}-discriminant-logistic",
            _script(facts, rich, discriminant, _logistic(1.0), numeric=_SCALE),
        )
        yield (
            f"rich-{points}-discriminant-net",
            _script(facts, rich, discriminant, _net(0.3, 150), numeric=_SCALE),
        )
        yield (
            f"rich-{points}-bagged-svc",
            _script(
                facts, rich, bagged(discriminant, False, 10), discriminant, margin, numeric=_SCALE
            ),
        )
