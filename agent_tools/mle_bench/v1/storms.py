"""Reference scripts of storm-status: classes of records that belong to tracks of storms."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from agent_tools.mle_bench.facts import TaskFacts
from agent_tools.mle_bench.recipes import Recipe
from agent_tools.mle_bench.v1 import defaults
from agent_tools.mle_bench.v1.build import Plan, View, call, field_of, pipe, small_field

_PLAIN = """\
x = both.drop(columns=["id", "storm"])
x["season"] = x["month"] * 30.4 + x["day"]"""
_PHYSICS = """
x["deficit"] = 1013 - x["pressure"] - 0.0065 * x["wind"] ** 2
x["north"] = (x["lat"] > 30) * (x["lat"] - 30)
x["west"] = x["long"] * np.cos(np.radians(x["lat"]))
x["ratio"] = x["tropicalstorm_force_diameter"] / (1 + x["wind"])"""
_TRACK = """
time = pd.to_datetime(both[["year", "month", "day", "hour"]])
order = pd.DataFrame({"storm": both["storm"], "time": time}).sort_values(["storm", "time"]).index
storm = both.loc[order, "storm"]
track = x.loc[order].groupby(storm)
more = {"age": track.cumcount(), "left": track.cumcount(ascending=False)}
more["length"] = more["age"] + more["left"]
for name in ("wind", "pressure", "lat", "long"):
    for step in STEPS:
        more[f"{name}{step}"] = track[name].shift(step) - x.loc[order, name]
for name in ("wind", "pressure"):
    seen = track[name]
    more[f"{name}_max"], more[f"{name}_min"] = seen.cummax(), seen.cummin()
    more[f"{name}_most"], more[f"{name}_least"] = seen.transform("max"), seen.transform("min")
x = pd.concat([x, pd.DataFrame(more).loc[x.index]], axis=1)"""
_PLACE = """
more = {}
for name in ("wind", "lat", "long"):
    more[f"{name}_start"] = track[name].transform("first")
    more[f"{name}_end"] = track[name].transform("last")
place = x.loc[order, ["lat", "long"]].groupby(storm)
speed = (place.shift(-1) - place.shift(1)) / 2
more["north_speed"], more["east_speed"] = speed["lat"], speed["long"]
peak = track["wind"].transform(lambda w: w.to_numpy().argmax())
more["since_peak"] = track.cumcount() - peak
more["calm"] = (x.loc[order, "wind"] < 34).groupby(storm).cumsum()
x = pd.concat([x, pd.DataFrame(more).loc[x.index]], axis=1)"""

PLAIN = View("plain", _PLAIN)
PHYSICS = View("physics", _PLAIN + _PHYSICS)
FILLED = View("filled", _PLAIN + _PHYSICS + "\nx = x.fillna(0)")
TRACK = View("track", f"STEPS = (1, -1, 2, -2)\n{_PLAIN}{_PHYSICS}{_TRACK}")
PATH = View("path", f"STEPS = (1, -1, 2, -2, 4, -4)\n{_PLAIN}{_PHYSICS}{_TRACK}{_PLACE}")
SHORT = View("short", f"STEPS = (1, -1)\n{_PLAIN}{_TRACK}")


def _back(view: View) -> View:
    return View(view.name, view.lines + "\nx = x.fillna(-999)")


def recipes(facts: TaskFacts) -> list[Recipe]:
    """The field of 100."""
    return field_of(facts.kind, small_field(facts, "trivial"), _default(), _tuned(), _strong())


def _default() -> Iterator[Plan]:
    views = [defaults.NUMBERS, defaults.RANKS, defaults.BINS]
    once = {"hist": (call("HistGradientBoostingClassifier", max_iter=40, random_state=0), 0)}
    return defaults.default_plans(views, defaults.classifiers(8_000), once=once)


def _hist(n: int, rate: float, leaves: int, seed: int = 0, **more: object) -> str:
    return call(
        "HistGradientBoostingClassifier",
        max_iter=n,
        learning_rate=rate,
        max_leaf_nodes=leaves,
        random_state=seed,
        **more,
    )


def _trees(kind: str, leaf: int, n: int = 150, seed: int = 0, **more: object) -> str:
    return call(
        f"{kind}Classifier", n_estimators=n, min_samples_leaf=leaf, random_state=seed, **more
    )


def _tuned() -> Iterator[Plan]:
    zeros = View("zeros", _PLAIN + "\nx = x.fillna(0)")
    for leaf, share in product((2, 4, 6), (0.6, None)):
        model = _trees("ExtraTrees", leaf, 80, max_features=share)
        yield Plan(f"filled-extra-{leaf}-{share or 'all'}", FILLED, (model,))
    for leaf in (1, 2, 4):
        yield Plan(f"zeros-forest-{leaf}", zeros, (_trees("RandomForest", leaf, 60),))
    for leaf in (1, 4):
        model = _trees("RandomForest", leaf, 80, max_features=0.3)
        yield Plan(f"filled-forest-{leaf}", FILLED, (model,))
    for leaf in (1, 2, 4):
        extra = _trees("ExtraTrees", leaf, 80, max_features=0.8)
        yield Plan(f"filled-extra-forest-{leaf}", FILLED, (extra, _trees("RandomForest", leaf, 60)))
        hist = _hist(50, 0.1, 6)
        yield Plan(f"filled-hist-extra-{leaf}", FILLED, (hist, extra))
    for n, leaves in ((60, 6), (40, 8), (80, 5)):
        yield Plan(f"plain-hist-{n}-{leaves}", PLAIN, (_hist(n, 0.1, leaves),))
        yield Plan(f"physics-hist-{n}-{leaves}", PHYSICS, (_hist(n, 0.1, leaves),))
    # less happy choices
    curves = pipe("SplineTransformer(n_knots=6)", "LogisticRegression(max_iter=60)")
    yield Plan("filled-splines", FILLED, (pipe("StandardScaler()", curves),))
    line = pipe("StandardScaler()", "LogisticRegression(C=10.0, max_iter=100)")
    yield Plan("filled-logistic", FILLED, (line,))
    for depth in (8, 12):
        tree = call("DecisionTreeClassifier", max_depth=depth, min_samples_leaf=5, random_state=0)
        yield Plan(f"filled-tree-{depth}", FILLED, (tree,))
    for near in (5, 15):
        model = call("KNeighborsClassifier", n_neighbors=near, weights="distance")
        yield Plan(f"filled-nearest-{near}", FILLED, (pipe("StandardScaler()", model),))
    for width in (20, 40):
        net = call("MLPClassifier", hidden_layer_sizes=(width,), max_iter=20, random_state=0)
        yield Plan(f"filled-net-{width}", FILLED, (pipe("StandardScaler()", net),))
    yield Plan("filled-extra-shallow", FILLED, (_trees("ExtraTrees", 1, 80, max_depth=10),))
    yield Plan("filled-forest-shallow", FILLED, (_trees("RandomForest", 1, 60, max_depth=8),))
    yield Plan("filled-forest-pruned", FILLED, (_trees("RandomForest", 25, 60),))
    yield Plan("filled-lda", FILLED, (pipe("StandardScaler()", "LinearDiscriminantAnalysis()"),))


def _strong() -> Iterator[Plan]:
    for view in (SHORT, TRACK, PATH):
        quick = _hist(80, 0.08, 6, max_features=0.3)
        slow = _hist(120, 0.05, 8, 1, max_features=0.3, l2_regularization=20.0)
        extra = _trees("ExtraTrees", 1, 120, max_features=0.4)
        yield Plan(f"{view.name}-quick", view, (quick,))
        yield Plan(f"{view.name}-slow", view, (slow,))
        yield Plan(f"{view.name}-both", view, (quick, slow))
        yield Plan(f"{view.name}-slow-extra", _back(view), (slow, extra), (2, 1))
        yield Plan(f"{view.name}-both-extra", _back(view), (quick, slow, extra))
