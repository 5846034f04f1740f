"""Reference scripts of nyc-flight-airtime: routes, schedules and the winds of neighbouring days."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from agent_tools.mle_bench.facts import TaskFacts
from agent_tools.mle_bench.recipes import Recipe
from agent_tools.mle_bench.v1 import defaults
from agent_tools.mle_bench.v1.build import Plan, View, call, field_of, pipe, small_field

_CODES = """\
x = both.drop(columns=["id", "tailnum", "flight"])
for name in ("carrier", "origin", "dest"):
    x[name] = x[name].factorize(sort=True)[0]
x = x.fillna(-1)"""
_CLOCK = """
left = both["sched_dep_time"] // 100 * 60 + both["sched_dep_time"] % 100
there = both["sched_arr_time"] // 100 * 60 + both["sched_arr_time"] % 100
x["left"], x["planned"] = left, (there - left) % 1440
x["season"] = (both["month"] - 1) * 30.4 + both["day"]"""
_ROUTE = """
def mean_of(keys, values, prior, weight):
    known = pd.Series(values).groupby([both.loc[: n - 1, k] for k in keys])
    table = ((known.sum() + weight * prior) / (known.count() + weight)).rename("mean").reset_index()
    return both[keys].merge(table, on=keys, how="left")["mean"].fillna(prior).to_numpy()


base = mean_of(["origin", "dest"], y, y.mean(), 0.1)
away = base == y.mean()
base[away] = np.polyval(np.polyfit(both["distance"][:n], y, 1), both["distance"][away])
x["base"] = base
x["own"] = mean_of(["carrier", "flight", "dest"], y - base[:n], 0.0, 5)
x["plane"] = mean_of(["tailnum"], y - base[:n], 0.0, 20)
x["hours"] = mean_of(["carrier", "dest"], y - base[:n], 0.0, 10)"""
_DAYS = """
date = pd.to_datetime(both[["month", "day"]].assign(year=2013)).dt.dayofyear
ratio = pd.Series((y - base[:n]) / base[:n])
far = pd.cut(base, [0, 70, 130, 220, 999], labels=False)
for label, key in (("dest", both["dest"]), ("far", pd.Series(far))):
    sums = ratio.groupby([key[:n], date[:n]]).agg(["sum", "count"]).reset_index()
    sums.columns = ["key", "date", "sum", "count"]
    asked = pd.DataFrame({"key": key, "date": date})
    for reach in REACH:
        total, count = np.zeros(len(both)), np.zeros(len(both))
        for step in reach:
            moved = asked.assign(date=date + step).merge(sums, on=["key", "date"], how="left")
            total += moved["sum"].fillna(0).to_numpy()
            count += moved["count"].fillna(0).to_numpy()
        x[f"{label}{reach[-1]}"] = total / (count + 3) * base"""

_LEFT = {"target": 'y - x["base"].to_numpy()[:n]', "back": 'pred + x["base"].to_numpy()[n:]'}
PLAIN = View("plain", _CODES)
CLOCK = View("clock", _CODES + _CLOCK)
ROUTE = View("route", _CODES + _CLOCK + _ROUTE)
LEFT = View("left", _CODES + _CLOCK + _ROUTE, **_LEFT)
NEAR = View("near", f"REACH = [(-1, 1)]\n{_CODES}{_CLOCK}{_ROUTE}{_DAYS}", **_LEFT)
DAYS = View(
    "days",
    f"REACH = [(-1,), (1,), (-2, 2), (-5, -4, -3, 3, 4, 5)]\n{_CODES}{_CLOCK}{_ROUTE}{_DAYS}",
    **_LEFT,
)
_SOME = View(
    "codes",
    """\
x = both.drop(columns="id")
for name in x.select_dtypes("object"):
    x[name] = x[name].factorize(sort=True)[0]
x = x.fillna(x.mean())""",
)
_WIDE = View(
    "onehot",
    """\
x = pd.get_dummies(both.drop(columns=["id", "tailnum"]), dtype=np.float32)
x = x.fillna(x.mean())""",
)


def recipes(facts: TaskFacts) -> list[Recipe]:
    """The field of 100."""
    return field_of(facts.kind, small_field(facts, "trivial"), _default(), _tuned(), _strong())


def _default() -> Iterator[Plan]:
    models = {
        name: (model, rows or 60_000) for name, (model, rows) in defaults.regressors(12_000).items()
    }
    once = {"hist": (call("HistGradientBoostingRegressor", random_state=0), 60_000)}
    return defaults.default_plans([_SOME, defaults.NUMBERS, _WIDE], models, once=once)


def _hist(n: int, rate: float, leaves: int, seed: int = 0, **more: object) -> str:
    return call(
        "HistGradientBoostingRegressor",
        max_iter=n,
        learning_rate=rate,
        max_leaf_nodes=leaves,
        random_state=seed,
        **more,
    )


def _extra(leaf: int, n: int = 30) -> str:
    return call(
        "ExtraTreesRegressor",
        n_estimators=n,
        min_samples_leaf=leaf,
        max_features=0.6,
        random_state=0,
    )


def _tuned() -> Iterator[Plan]:
    some = 100_000
    for n, leaves in product((100, 200), (31, 63)):
        model = _hist(n, 0.1, leaves)
        yield Plan(f"clock-hist-{n}-{leaves}", CLOCK, (model,), rows=some)
        yield Plan(f"route-hist-{n}-{leaves}", ROUTE, (model,), rows=some)
        yield Plan(f"left-hist-{n}-{leaves}", LEFT, (model,), rows=some)
        yield Plan(
            f"left-hist-mild-{n}-{leaves}",
            LEFT,
            (_hist(n, 0.06, leaves, 0, l2_regularization=20.0),),
            rows=some,
        )
    for leaf in (3, 5, 8, 12, 16, 20):
        yield Plan(f"left-extra-{leaf}", LEFT, (_extra(leaf),), rows=40_000)
    for leaves in (15, 31, 63):
        yield Plan(f"left-hist-whole-{leaves}", LEFT, (_hist(120, 0.1, leaves),))
    # less happy choices
    for alpha in (1.0, 100.0):
        yield Plan(
            f"route-ridge-{alpha:g}", ROUTE, (pipe("StandardScaler()", f"Ridge(alpha={alpha})"),)
        )
    knots = pipe("StandardScaler()", "SplineTransformer(n_knots=5)", "Ridge(alpha=1.0)")
    yield Plan("left-splines", LEFT, (knots,), rows=some)
    yield Plan("clock-splines", CLOCK, (knots,), rows=some)
    yield Plan("plain-hist", PLAIN, (_hist(100, 0.1, 31),), rows=some)
    yield Plan("plain-extra", PLAIN, (_extra(3),), rows=30_000)
    tree = call("DecisionTreeRegressor", min_samples_leaf=20, random_state=0)
    yield Plan("route-tree", ROUTE, (tree,), rows=some)
    yield Plan("plain-tree", PLAIN, (tree,), rows=some)
    near = pipe("StandardScaler()", call("KNeighborsRegressor", n_neighbors=10))
    yield Plan("route-nearest", ROUTE, (near,), rows=20_000)
    yield Plan(
        "left-small-tree", LEFT, (call("DecisionTreeRegressor", max_depth=5, random_state=0),)
    )


def _strong() -> Iterator[Plan]:
    for view in (NEAR, DAYS):
        for n, leaves in product((150, 250), (31, 63)):
            model = _hist(n, 0.08, leaves, max_features=0.4, l2_regularization=10.0)
            yield Plan(f"{view.name}-hist-{n}-{leaves}", view, (model,), rows=150_000)
        hists = tuple(_hist(150, 0.07, leaves, leaves, max_features=0.4) for leaves in (25, 50))
        yield Plan(f"{view.name}-two-hists", view, hists, rows=150_000)
        yield Plan(f"{view.name}-two-hists-extra", view, (*hists, _extra(6)), rows=60_000)
    for leaves in (40, 80, 120):
        model = _hist(250, 0.06, leaves, max_features=0.3, l2_regularization=10.0)
        yield Plan(f"days-hist-whole-{leaves}", DAYS, (model,))
