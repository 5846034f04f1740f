"""Tuned and strong recipes for tasks with numeric and category columns only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from agent_tools.mle_bench.catalogue import ONE_HOT, Call, call
from agent_tools.mle_bench.compose import Choices, bagged, calibrated
from agent_tools.mle_bench.facts import TaskFacts

_SEED = "random_state=0"
_SCALE = (call("StandardScaler"),)
_NORMAL = (call("QuantileTransformer", "n_quantiles=100", 'output_distribution="normal"'),)
_POWER = (call("PowerTransformer"),)
_SPLINES = (call("StandardScaler"), call("SplineTransformer", "n_knots=5"))
_PAIRS = (call("PolynomialFeatures", "2", "interaction_only=True", "include_bias=False"),)
_CYCLE = call("SplineTransformer", "n_knots=5", 'extrapolation="periodic"')

_LOGS = (
    'size = X.select_dtypes("number").columns',
    "X[size], Z[size] = np.log1p( X[size].clip( 0 ) ), np.log1p( Z[size].clip( 0 ) )",
)
"""Sizes, amounts and counts on a log scale."""
_SEASON = (
    'days = [ c for c in X.select_dtypes("int") if 60 < X[c].max() <= 366 ]',
    "X[days], Z[days] = np.cos( X[days] / 58.1 ), np.cos( Z[days] / 58.1 )",
)
"""Day of the year as its place in the season, so that later days resemble earlier ones."""


def tuned(facts: TaskFacts) -> Iterator[tuple[str, Choices]]:
    """35 recipes: the families that suit tables, tuned; a few tuned ones of weaker families."""
    if facts.kind != "regression":
        return _tuned_classes()
    return _tuned_calendar() if facts.time else _tuned_amounts(facts)


def strong(facts: TaskFacts) -> Iterator[tuple[str, Choices]]:
    """15 recipes: feature work, tuned boosting, averages of unlike models."""
    if facts.kind != "regression":
        return _strong_classes()
    return _strong_calendar() if facts.time else _strong_amounts(facts)


# ------------------------------------------------------------------ regression


def _boost(n: int, rate: float, depth: int, share: float = 0.3) -> Call:
    return call(
        "GradientBoostingRegressor",
        f"n_estimators={n}",
        f"learning_rate={rate}",
        f"max_depth={depth}",
        "subsample=0.7",
        f"max_features={share}",
        _SEED,
    )


def _kernel(strength: float, gamma: float | None = None) -> Call:
    args = (f"C={strength}", *((f"gamma={gamma}",) if gamma else ()), "epsilon=0.04")
    return Call("SVR", args)


def _net(width: int, penalty: float) -> Call:
    return call(
        "MLPRegressor",
        f"hidden_layer_sizes=({width},)",
        'solver="lbfgs"',
        f"alpha={penalty}",
        "max_iter=300",
        _SEED,
    )


def _extra(*args: str) -> Call:
    return Call("ExtraTreesRegressor", ("n_estimators=100", *args, _SEED))


def _base(facts: TaskFacts) -> Choices:
    """Scaled columns; amounts (RMSLE) are fitted on a log scale."""
    amounts = facts.metric == "rmsle"
    return Choices(models=(), numeric=_SCALE, log_target=amounts, floor=amounts)


def _logs(facts: TaskFacts) -> tuple[str, ...]:
    return _LOGS if facts.metric == "rmsle" else ()


def _tuned_amounts(facts: TaskFacts) -> Iterator[tuple[str, Choices]]:
    base = _base(facts)
    logs = replace(base, extra=_logs(facts))
    for n, rate, depth in product((200, 300), (0.05, 0.08), (3, 4)):
        yield f"boost-{n}-{rate}-{depth}", replace(base, models=(_boost(n, rate, depth),))
    for strength, gamma in product((3.0, 10.0, 30.0, 100.0), (0.01, 0.02)):
        kernel = _kernel(strength, gamma)
        yield f"logs-svr-{strength}-{gamma}", replace(logs, models=(kernel,))
    for width, penalty in product((8, 16), (1.0, 3.0)):
        yield f"logs-net-{width}-{penalty}", replace(logs, models=(_net(width, penalty),))
    for alpha in (0.3, 1.0, 3.0):
        ridge = call("Ridge", f"alpha={alpha}")
        yield f"splines-ridge-{alpha}", replace(logs, numeric=_SPLINES, models=(ridge,))
    yield "splines-bayes", replace(logs, numeric=_SPLINES, models=(call("BayesianRidge"),))
    for name, model in (
        ("extra-all", call("ExtraTreesRegressor", "n_estimators=200", _SEED)),
        ("extra-half", _extra("max_features=0.5")),
        ("bayes", call("BayesianRidge")),
        ("ridge", call("Ridge", "alpha=1.0")),
    ):
        yield f"logs-{name}", replace(logs, models=(model,))
    # less happy choices
    plain = replace(base, log_target=False)
    hist = call("HistGradientBoostingRegressor", "max_iter=200", "learning_rate=0.05", _SEED)
    yield "hist-plain", replace(plain, models=(hist,))
    yield "boost-deep", replace(plain, models=(_boost(200, 0.1, 8, 1.0),))
    yield "forest", replace(base, models=(call("RandomForestRegressor", _SEED),))
    yield "codes-svr", replace(base, category="frequency", models=(_kernel(1.0),))
    for k in (5, 10):
        knn = call("KNeighborsRegressor", f"n_neighbors={k}", 'weights="distance"')
        yield f"knn-{k}", replace(base, models=(knn,))
    yield "tree", replace(base, models=(call("DecisionTreeRegressor", "max_depth=8", _SEED),))


def _strong_amounts(facts: TaskFacts) -> Iterator[tuple[str, Choices]]:
    logs = replace(_base(facts), extra=_logs(facts))
    ridge = call("Ridge", "alpha=1.0")
    for n, rate, depth in ((300, 0.05, 4), (400, 0.05, 3), (300, 0.08, 3), (400, 0.03, 4)):
        boost = _boost(n, rate, depth)
        yield f"boost-{n}-{rate}-svr", replace(logs, models=(boost, _kernel(30.0, 0.02)))
        yield (
            f"boost-{n}-{rate}-svr-net",
            replace(logs, models=(boost, _kernel(30.0, 0.02), _net(8, 1.0))),
        )
        yield f"boost-{n}-{rate}-net", replace(logs, models=(boost, _net(8, 1.0)))
    boost = _boost(400, 0.05, 3)
    yield "splines-boost-ridge", replace(logs, numeric=_SPLINES, models=(boost, ridge))
    yield (
        "splines-boost-ridge-svr",
        replace(logs, numeric=_SPLINES, models=(boost, ridge, _kernel(10.0, 0.02))),
    )
    yield (
        "bagged-net-boost",
        replace(logs, models=(bagged(_net(8, 1.0), True, 5), boost, _kernel(30.0, 0.02))),
    )


def _absolute(n: int, rate: float, leaf: int, *args: str) -> Call:
    return call(
        "HistGradientBoostingRegressor",
        'loss="absolute_error"',
        f"max_iter={n}",
        f"learning_rate={rate}",
        f"min_samples_leaf={leaf}",
        *args,
        _SEED,
    )


_LEAF2 = _extra("min_samples_leaf=2", "max_features=1.0")


def _tuned_calendar() -> Iterator[tuple[str, Choices]]:
    base = Choices(models=(), numeric=_SCALE)
    season = replace(base, extra=_SEASON)
    for rate, leaf in product((0.05, 0.1), (10, 20)):
        model = _absolute(200 if rate < 0.1 else 150, rate, leaf)
        yield f"absolute-{rate}-{leaf}", replace(base, models=(model,))
        yield f"pairs-absolute-{rate}-{leaf}", replace(base, numeric=_PAIRS, models=(model,))
        yield f"cycle-absolute-{rate}-{leaf}", replace(base, calendar=_CYCLE, models=(model,))
    for leaf in (1, 2, 3, 5):
        extra = _extra(f"min_samples_leaf={leaf}", "max_features=1.0")
        yield f"season-extra-{leaf}", replace(season, models=(extra,))
        yield (
            f"cycle-extra-absolute-{leaf}",
            replace(base, calendar=_CYCLE, models=(extra, _absolute(200, 0.05, 10))),
        )
    for n, depth in product((100, 200), (3, 4)):
        boost = call("GradientBoostingRegressor", f"n_estimators={n}", f"max_depth={depth}", _SEED)
        yield f"season-boost-{n}-{depth}", replace(season, models=(boost,))
    laplace = call("KernelRidge", 'kernel="laplacian"', "alpha=0.1", "gamma=0.05")
    yield "season-laplace", replace(season, calendar=_CYCLE, models=(laplace,))
    for penalty in (3.0, 10.0):
        net = _net(16, penalty)
        yield f"season-net-{penalty}", replace(season, calendar=_CYCLE, models=(net,))
    yield "season-extra-cycle", replace(season, calendar=_CYCLE, models=(_LEAF2,))
    # less happy choices
    for strength in (1.0, 10.0):
        yield f"cycle-svr-{strength}", replace(base, calendar=_CYCLE, models=(_kernel(strength),))
    yield "onehot-ridge", replace(base, calendar=ONE_HOT, models=(call("Ridge", "alpha=3.0"),))
    yield (
        "cycle-forest",
        replace(base, calendar=_CYCLE, models=(call("RandomForestRegressor", _SEED),)),
    )
    knn = call("KNeighborsRegressor", "n_neighbors=8", 'weights="distance"')
    yield "knn", replace(base, models=(knn,))
    yield "tree", replace(base, models=(call("DecisionTreeRegressor", "max_depth=8", _SEED),))
    yield "splines", replace(base, numeric=_SPLINES, models=(call("Ridge", "alpha=1.0"),))


def _strong_calendar() -> Iterator[tuple[str, Choices]]:
    season = Choices(models=(), numeric=_SCALE, extra=_SEASON)
    boost = call("GradientBoostingRegressor", _SEED)
    deep = call(
        "GradientBoostingRegressor", "n_estimators=200", "max_depth=4", "subsample=0.7", _SEED
    )
    absolute = _absolute(200, 0.05, 10)
    laplace = call("KernelRidge", 'kernel="laplacian"', "alpha=0.1", "gamma=0.05")
    sets: dict[str, tuple[Call, ...]] = {
        "extra-boost": (_LEAF2, boost),
        "extra-deep": (_LEAF2, deep),
        "extra-boost-absolute": (_LEAF2, boost, absolute),
        "extra-boost-laplace": (_LEAF2, boost, laplace),
        "extra-absolute-svr": (_LEAF2, absolute, _kernel(3.0)),
        "boost-laplace": (boost, laplace),
        "boost-net": (boost, _net(16, 3.0)),
        "extra-boost-net": (_LEAF2, boost, _net(16, 3.0)),
    }
    for name, models in sets.items():
        yield f"season-{name}", replace(season, models=models)
        yield f"season-cycle-{name}", replace(season, calendar=_CYCLE, models=models)


# ------------------------------------------------------------------ classes


def _logistic(strength: float) -> Call:
    return call("LogisticRegression", f"C={strength}", "max_iter=300")


def _discriminant(shrinkage: float | None) -> Call:
    value = '"auto"' if shrinkage is None else str(shrinkage)
    return call("LinearDiscriminantAnalysis", 'solver="lsqr"', f"shrinkage={value}")


def _classes_net(penalty: float, width: int = 100) -> Call:
    return call(
        "MLPClassifier",
        f"hidden_layer_sizes=({width},)",
        f"alpha={penalty}",
        "max_iter=200",
        _SEED,
    )


def _tuned_classes() -> Iterator[tuple[str, Choices]]:
    base = Choices(models=(), numeric=_SCALE)
    for strength in (1.0, 3.0, 10.0, 30.0):
        yield f"logistic-{strength}", replace(base, models=(_logistic(strength),))
        yield (
            f"power-logistic-{strength}",
            replace(base, numeric=_POWER, models=(_logistic(strength),)),
        )
    for shrinkage in (None, 0.02, 0.05, 0.1, 0.2):
        model = _discriminant(shrinkage)
        yield f"discriminant-{shrinkage or 'auto'}", replace(base, models=(model,))
        yield (
            f"power-discriminant-{shrinkage or 'auto'}",
            replace(base, numeric=_POWER, models=(model,)),
        )
    for penalty in (0.01, 0.1, 0.5):
        yield f"net-{penalty}", replace(base, models=(_classes_net(penalty),))
        yield f"power-net-{penalty}", replace(base, numeric=_POWER, models=(_classes_net(penalty),))
        yield (
            f"normal-net-{penalty}",
            replace(base, numeric=_NORMAL, models=(_classes_net(penalty),)),
        )
    yield "logistic-net", replace(base, models=(_logistic(1.0), _classes_net(0.1)))
    # less happy choices
    margin = calibrated(call("SVC", "C=10.0"))
    yield "svc", replace(base, models=(margin,))
    seed = _SEED
    for name, model in (
        ("hist", call("HistGradientBoostingClassifier", "max_iter=50", "max_leaf_nodes=7", seed)),
        ("extra", call("ExtraTreesClassifier", "n_estimators=200", "max_features=0.5", seed)),
        ("forest", call("RandomForestClassifier", "n_estimators=200", "min_samples_leaf=2", seed)),
        ("knn", call("KNeighborsClassifier", "n_neighbors=10", 'weights="distance"')),
        ("bayes", call("GaussianNB", "var_smoothing=0.01")),
        ("logistic-weak", _logistic(0.03)),
        ("extra-leaf", call("ExtraTreesClassifier", "min_samples_leaf=5", seed)),
    ):
        yield name, replace(base, models=(model,))


def _strong_classes() -> Iterator[tuple[str, Choices]]:
    base = Choices(models=(), numeric=_SCALE)
    for shrinkage in (None, 0.05, 0.1):
        name = shrinkage or "auto"
        model = _discriminant(shrinkage)
        yield f"discriminant-{name}-logistic", replace(base, models=(model, _logistic(10.0)))
        yield f"discriminant-{name}-net", replace(base, models=(model, _classes_net(0.1)))
        yield (
            f"discriminant-{name}-logistic-net",
            replace(base, models=(model, _logistic(10.0), _classes_net(0.1))),
        )
        yield (
            f"discriminant-{name}-bagged",
            replace(base, models=(bagged(model, False, 10), _logistic(10.0))),
        )
        yield (
            f"power-discriminant-{name}-logistic",
            replace(base, numeric=_POWER, models=(model, _logistic(10.0))),
        )
