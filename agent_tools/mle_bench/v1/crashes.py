"""Reference scripts of crash-survival: rare deaths, a few columns with known effects."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from agent_tools.mle_bench.facts import TaskFacts
from agent_tools.mle_bench.recipes import Recipe
from agent_tools.mle_bench.v1 import defaults
from agent_tools.mle_bench.v1.build import Plan, View, call, field_of, pipe, small_field

_CODES = """\
SPEED = ["1-9km/h", "10-24", "25-39", "40-54", "55+"]
x = both.drop(columns="id")
x["speed_change"] = x["speed_change"].map(SPEED.index)
for name in x.select_dtypes("object"):
    x[name] = x[name].factorize(sort=True)[0]
x["car_year"] = x["car_year"].fillna(x["car_year"].median())"""
_DUMMIES = """
x = pd.concat([x, pd.get_dummies(both[["speed_change", "airbag_state"]], dtype=float)], axis=1)"""
_RICH = """
x["car_age"] = (x["crash_year"] - x["car_year"]).clip(-1, 25)
x["old"] = (x["age"] - 55).clip(0)
x["bare"] = x["seatbelt"] * (x["speed_change"] + 1)
x["side"] = (1 - x["frontal"]) * (x["speed_change"] + 1)
x["fast"] = (x["speed_change"] - 2).clip(0) ** 2
x["fast_old"] = x["speed_change"] * x["old"] / 20"""

CODES = View("codes", defaults.CODES.lines)
SPEED = View("speed", _CODES)
WIDE = View("wide", _CODES + _DUMMIES)
RICH = View("rich", _CODES + _RICH)
BROAD = View("broad", _CODES + _RICH + _DUMMIES)
_SEED = {"random_state": 0}


def recipes(facts: TaskFacts) -> list[Recipe]:
    """The field of 100."""
    return field_of(facts.kind, small_field(facts, "trivial"), _default(), _tuned(), _strong())


def _default() -> Iterator[Plan]:
    models = defaults.classifiers(8_000)
    views = [defaults.CODES, defaults.NUMBERS, defaults.COUNTS]
    once = {"hist": (call("HistGradientBoostingClassifier", **_SEED), 0)}
    return defaults.default_plans(views, models, once=once)


def _logistic(strength: float) -> str:
    return call("LogisticRegression", C=strength, max_iter=300)


def _hist(n: int, rate: float, leaves: int, seed: int = 0) -> str:
    return call(
        "HistGradientBoostingClassifier",
        max_iter=n,
        learning_rate=rate,
        max_leaf_nodes=leaves,
        min_samples_leaf=40,
        l2_regularization=5.0,
        max_features=0.5,
        random_state=seed,
    )


def _boost(n: int, depth: int, seed: int = 0) -> str:
    return call(
        "GradientBoostingClassifier",
        n_estimators=n,
        learning_rate=0.05,
        max_depth=depth,
        subsample=0.6,
        max_features=0.4,
        min_samples_leaf=30,
        random_state=seed,
    )


def _extra(leaf: int, n: int = 150) -> str:
    return call(
        "ExtraTreesClassifier", n_estimators=n, min_samples_leaf=leaf, max_features=0.5, **_SEED
    )


def _curves(strength: float, knots: int = 5) -> str:
    return pipe("StandardScaler()", call("SplineTransformer", n_knots=knots), _logistic(strength))


def _pairs(strength: float) -> str:
    return pipe("StandardScaler()", "PolynomialFeatures(2)", _logistic(strength))


def _tuned() -> Iterator[Plan]:
    for (n, leaves), view in product(product((100, 150, 200), (4, 6)), (SPEED, WIDE)):
        yield Plan(f"{view.name}-hist-{n}-{leaves}", view, (_hist(n, 0.08, leaves),))
    for n, depth in product((100, 160, 240), (2, 3)):
        yield Plan(f"speed-boost-{n}-{depth}", SPEED, (_boost(n, depth),))
    for leaf, view in ((3, WIDE), *product((20, 40), (SPEED, WIDE))):
        yield Plan(f"{view.name}-extra-{leaf}", view, (_extra(leaf),))
    net = call("MLPClassifier", hidden_layer_sizes=(60,), max_iter=25, **_SEED)
    yield Plan("wide-net", WIDE, (pipe("StandardScaler()", net),))
    # less happy choices
    for leaf in (4, 20):
        yield Plan(f"codes-extra-{leaf}", CODES, (_extra(leaf, 60),))
    for leaf in (1, 3):
        forest = call("RandomForestClassifier", n_estimators=80, min_samples_leaf=leaf, **_SEED)
        yield Plan(f"codes-forest-{leaf}", CODES, (forest,))
    for depth in (4, 7):
        tree = call("DecisionTreeClassifier", max_depth=depth, min_samples_leaf=20, **_SEED)
        yield Plan(f"speed-tree-{depth}", SPEED, (tree,))
    near = pipe("StandardScaler()", call("KNeighborsClassifier", n_neighbors=40))
    yield Plan("wide-nearest", WIDE, (near,))
    yield Plan("speed-bayes", SPEED, ("GaussianNB()",))
    yield Plan("speed-stumps", SPEED, (call("AdaBoostClassifier", n_estimators=15, **_SEED),))
    yield Plan("wide-curves", WIDE, (_curves(0.03),))
    yield Plan("codes-boost-short", CODES, (_boost(40, 2),))


def _strong() -> Iterator[Plan]:
    for seed, (view, depth) in enumerate(product((RICH, BROAD), (2, 3))):
        boost, hist = _boost(200, depth, seed), _hist(120, 0.05, 5, seed)
        yield Plan(f"{view.name}-boost-{depth}-pairs", view, (boost, _pairs(0.03)), blend="logit")
        yield Plan(
            f"{view.name}-boost-{depth}-hist-splines-extra",
            view,
            (boost, hist, _curves(0.1), _extra(10)),
            blend="logit",
        )
    for knots in (3, 4, 5, 6, 7, 8, 10):
        parts = (_curves(0.1, knots), _pairs(0.03), _boost(200, 3, 7), _hist(120, 0.05, 5, 7))
        yield Plan(f"rich-curves-{knots}-pairs-boost-hist", RICH, parts, blend="logit")
