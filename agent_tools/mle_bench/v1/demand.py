"""Reference scripts of electricity-demand-full: calendar, season and the warmth of past hours."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from agent_tools.mle_bench.facts import TaskFacts
from agent_tools.mle_bench.recipes import Recipe
from agent_tools.mle_bench.v1 import defaults
from agent_tools.mle_bench.v1.build import Plan, View, call, field_of, pipe, small_field

_PLAIN = """\
x = both.drop(columns="id")"""
_NO_DATE = """\
x = both.drop(columns=["id", "day_of_year", "month"])"""
_SEASON = """
day = both["day_of_year"]
x["sun"] = np.cos(2 * np.pi * (day + 10) / 365)
x["warm_season"] = np.cos(2 * np.pi * (day - 20) / 365)
x["summer_time"] = ((day <= 96) | (day >= 278)).astype(float)
x["cool"], x["heat"] = (both["temperature"] - 20).clip(0), (14 - both["temperature"]).clip(0)"""
_CYCLES = """
for name, span in (("hour", 24), ("weekday", 7)):
    for wave in (1, 2, 3):
        angle = 2 * np.pi * wave * both[name] / span
        x[f"{name}_sin{wave}"], x[f"{name}_cos{wave}"] = np.sin(angle), np.cos(angle)"""
_PAST = """
order = both.sort_values(["day_of_year", "hour"]).index
warmth = both.loc[order, "temperature"]
past = {f"mean{w}": warmth.rolling(w, min_periods=1).mean() for w in WINDOWS}
past |= {f"lag{k}": warmth.shift(k).bfill() for k in (2, 6, 12)}
by_day = warmth.groupby(both.loc[order, "day_of_year"])
past["day_max"], past["day_min"] = by_day.transform("max"), by_day.transform("min")
work = both.loc[order, "workday"]
past["work_before"], past["work_after"] = work.shift(48).bfill(), work.shift(-48).ffill()
x = pd.concat([x, pd.DataFrame(past).loc[x.index]], axis=1)"""
_HALVES = """
x["half"] = both["workday"] * 48 + both["hour"] * 2"""

PLAIN = View("plain", _PLAIN)
SEASON = View("season", _NO_DATE + _SEASON)
CYCLES = View("cycles", _NO_DATE + _SEASON + _CYCLES)
HALVES = View("halves", _NO_DATE + _SEASON + _HALVES)
PAST = View("past", f"WINDOWS = (6, 48)\n{_NO_DATE}{_SEASON}{_PAST}")
LONG = View("long", f"WINDOWS = (4, 12, 24, 48, 144)\n{_NO_DATE}{_SEASON}{_PAST}{_HALVES}")
_SEED = {"random_state": 0}


def recipes(facts: TaskFacts) -> list[Recipe]:
    """The field of 100."""
    return field_of(facts.kind, small_field(facts, "trivial"), _default(), _tuned(), _strong())


def _default() -> Iterator[Plan]:
    views = [defaults.NUMBERS, defaults.RANKS, defaults.BINS]
    once = {"hist": (call("HistGradientBoostingRegressor", **_SEED), 0)}
    return defaults.default_plans(views, defaults.regressors(6_000), once=once)


def _hist(n: int, rate: float, leaves: int, seed: int = 0, **more: object) -> str:
    return call(
        "HistGradientBoostingRegressor",
        loss="absolute_error",
        max_iter=n,
        learning_rate=rate,
        max_leaf_nodes=leaves,
        random_state=seed,
        **more,
    )


def _extra(leaf: int, n: int = 100, share: float = 1.0) -> str:
    return call(
        "ExtraTreesRegressor", n_estimators=n, min_samples_leaf=leaf, max_features=share, **_SEED
    )


def _boost(n: int, depth: int) -> str:
    return call(
        "GradientBoostingRegressor",
        n_estimators=n,
        max_depth=depth,
        learning_rate=0.08,
        subsample=0.6,
        max_features=0.5,
        **_SEED,
    )


def _net(*widths: int, seed: int = 0) -> str:
    net = call("MLPRegressor", hidden_layer_sizes=widths, alpha=0.1, max_iter=40, random_state=seed)
    return pipe("StandardScaler()", net)


def _tuned() -> Iterator[Plan]:
    for (leaf, share), view in product(product((3, 5, 8, 12), (0.4, 0.6)), (SEASON, HALVES)):
        yield Plan(f"{view.name}-extra-{leaf}-{share}", view, (_extra(leaf, 80, share),))
    for leaf, share in product((5, 8), (0.3, 0.5)):
        yield Plan(f"cycles-extra-{leaf}-{share}", CYCLES, (_extra(leaf, 80, share),))
    for leaf in (3, 5, 8):
        yield Plan(f"cycles-extra-net-{leaf}", CYCLES, (_extra(leaf, 80, 0.5), _net(32, 16)))
    for widths in ((32, 16), (48, 24)):
        yield Plan(f"cycles-net-{'-'.join(map(str, widths))}", CYCLES, (_net(*widths),))
    # less happy choices
    for n in (100, 300):
        yield Plan(f"plain-hist-{n}", PLAIN, (_hist(n, 0.1, 31),))
    yield Plan("plain-extra", PLAIN, (_extra(1, 60),))
    forest = call("RandomForestRegressor", n_estimators=30, min_samples_leaf=3, **_SEED)
    yield Plan("season-forest", SEASON, (forest,))
    for alpha in (1.0, 30.0):
        line = pipe("StandardScaler()", "SplineTransformer(n_knots=8)", f"Ridge(alpha={alpha})")
        yield Plan(f"cycles-splines-{alpha:g}", CYCLES, (line,))
    pairs = pipe("StandardScaler()", "PolynomialFeatures(2)", "Ridge(alpha=10.0)")
    yield Plan("season-pairs", SEASON, (pairs,))
    yield Plan("cycles-ridge", CYCLES, (pipe("StandardScaler()", "Ridge(alpha=1.0)"),))
    near = pipe("StandardScaler()", call("KNeighborsRegressor", n_neighbors=8, weights="distance"))
    yield Plan("season-nearest", SEASON, (near,))
    yield Plan("season-tree", SEASON, (call("DecisionTreeRegressor", min_samples_leaf=8, **_SEED),))


def _strong() -> Iterator[Plan]:
    for view in (PAST, LONG):
        hist, extra = _hist(250, 0.06, 16, max_features=0.4), _extra(2, 80, 0.5)
        boost, net = _boost(250, 4), _net(32, 16)
        yield Plan(f"{view.name}-extra", view, (extra,))
        yield Plan(f"{view.name}-hist-extra", view, (hist, extra))
        yield Plan(f"{view.name}-boost-extra", view, (boost, extra))
        yield Plan(f"{view.name}-hist-boost-extra", view, (hist, boost, extra))
        yield Plan(f"{view.name}-boost-net", view, (boost, net))
        yield Plan(f"{view.name}-boost-extra-net", view, (boost, extra, net))
        yield Plan(f"{view.name}-hist-boost-extra-net", view, (hist, boost, extra, net))
    yield Plan("long-extra-small-share", LONG, (_extra(2, 120, 0.3),))
