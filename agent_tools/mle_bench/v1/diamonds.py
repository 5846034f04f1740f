"""Reference scripts of diamonds-price-full: amounts that follow size and grades, on a log scale."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from agent_tools.mle_bench.facts import TaskFacts
from agent_tools.mle_bench.recipes import Recipe
from agent_tools.mle_bench.v1 import defaults
from agent_tools.mle_bench.v1.build import Plan, View, call, field_of, pipe, small_field

_LOG = {"target": "np.log1p(y)", "back": "np.expm1(pred).clip(0)"}
_GRADES = """\
ORDER = {
    "cut": ["Fair", "Good", "Very Good", "Premium", "Ideal"],
    "color": list("JIHGFED"),
    "clarity": ["I1", "SI2", "SI1", "VS2", "VS1", "VVS2", "VVS1", "IF"],
}
x = both.drop(columns="id")
for name, levels in ORDER.items():
    x[name] = x[name].map({level: place for place, level in enumerate(levels)})"""
_LOGS = """
for name in ("carat", "x", "y", "z"):
    x[name] = np.log(x[name].where(x[name] > 0, x[name].median()))"""
_DUMMIES = """
x = pd.concat([x, pd.get_dummies(both[list(ORDER)], dtype=float)], axis=1)"""
_RICH = """
size = x[["x", "y"]].mean(axis=1)
size = size.where(size > 0, 6.5 * x["carat"] ** (1 / 3))
x["volume"] = x["x"] * x["y"] * x["z"]
x["dense"] = x["carat"] / size**3
x["size"], x["spread"] = size, (x["x"] - x["y"]).abs()
x["grade"] = x["color"] + 1.2 * x["clarity"]
x["grade_size"] = x["grade"] * np.log(x["carat"])
x["step"] = (x["carat"] * 100).round() % 50
x["above"] = x["carat"] - np.floor(x["carat"] * 2) / 2"""
PLAIN = View("codes", defaults.CODES.lines, back="pred.clip(0)")
GRADES = View("grades", _GRADES, **_LOG)
LINE = View("logs", _GRADES + _LOGS, **_LOG)
WIDE = View("wide", _GRADES + _LOGS + _DUMMIES, **_LOG)
RICH = View("rich", _GRADES + _RICH, **_LOG)


def recipes(facts: TaskFacts) -> list[Recipe]:
    """The field of 100."""
    return field_of(facts.kind, small_field(facts, "trivial"), _default(), _tuned(), _strong())


def _default() -> Iterator[Plan]:
    views = [
        View(view.name, view.lines, back="pred.clip(0)")
        for view in (defaults.CODES, defaults.NUMBERS, defaults.ONEHOT)
    ]
    once = {"hist": (call("HistGradientBoostingRegressor", random_state=0), 0)}
    return defaults.default_plans(views, defaults.regressors(8_000), once=once)


def _hist(n: int, rate: float, leaves: int, seed: int = 0, **more: object) -> str:
    return call(
        "HistGradientBoostingRegressor",
        max_iter=n,
        learning_rate=rate,
        max_leaf_nodes=leaves,
        random_state=seed,
        **more,
    )


def _extra(leaf: int, n: int = 60, share: float = 1.0) -> str:
    return call(
        "ExtraTreesRegressor",
        n_estimators=n,
        min_samples_leaf=leaf,
        max_features=share,
        random_state=0,
    )


def _net(*widths: int, seed: int = 0) -> str:
    net = call(
        "MLPRegressor",
        hidden_layer_sizes=widths,
        early_stopping=True,
        max_iter=40,
        batch_size=128,
        random_state=seed,
    )
    return pipe("StandardScaler()", net)


def _tuned() -> Iterator[Plan]:
    for n, leaves, penalty in product((150, 220), (12, 16, 22), (0.0, 5.0)):
        model = _hist(n, 0.08, leaves, l2_regularization=penalty)
        yield Plan(f"grades-hist-{n}-{leaves}-{penalty:g}", GRADES, (model,))
    for rate, leaves in product((0.05, 0.12), (15, 25)):
        yield Plan(f"grades-hist-rate-{rate}-{leaves}", GRADES, (_hist(250, rate, leaves),))
        yield Plan(f"logs-hist-rate-{rate}-{leaves}", LINE, (_hist(250, rate, leaves),))
    for leaf in (2, 3):
        yield Plan(f"logs-extra-{leaf}", LINE, (_extra(leaf),))
    for widths in ((32, 32), (64, 32), (100,)):
        yield Plan(f"wide-net-{'-'.join(map(str, widths))}", WIDE, (_net(*widths),))
    # less happy choices
    knots = pipe("StandardScaler()", "SplineTransformer(n_knots=8)", "Ridge(alpha=1.0)")
    pairs = pipe("StandardScaler()", "PolynomialFeatures(2)", "Ridge(alpha=1.0)")
    yield Plan("wide-splines", WIDE, (knots,))
    yield Plan("wide-pairs", WIDE, (pairs,))
    yield Plan("logs-pairs", LINE, (pairs,))
    yield Plan("wide-ridge", WIDE, ("Ridge(alpha=1.0)",))
    yield Plan("logs-ridge", LINE, ("Ridge(alpha=1.0)",))
    yield Plan(
        "logs-tree", LINE, (call("DecisionTreeRegressor", min_samples_leaf=8, random_state=0),)
    )
    yield Plan("codes-hist-plain", PLAIN, (_hist(300, 0.1, 31),))
    yield Plan("codes-hist-plain-deep", PLAIN, (_hist(200, 0.1, 63),))
    near = pipe("StandardScaler()", call("KNeighborsRegressor", n_neighbors=8, weights="distance"))
    yield Plan("logs-nearest", LINE, (near,))
    yield Plan("grades-hist-250-31", GRADES, (_hist(250, 0.08, 31),))


def _strong() -> Iterator[Plan]:
    for n, rate, leaves in product((700, 1000), (0.035, 0.045), (30, 45)):
        hist = tuple(_hist(n, rate, leaves, seed, max_features=0.4) for seed in range(2))
        extra = _extra(2, 60)
        yield Plan(f"rich-hist-{n}-{rate}-{leaves}-extra", RICH, (*hist, extra))
    for leaves in (25, 60):
        hist = tuple(_hist(800, 0.04, leaves, seed, max_features=0.4) for seed in range(3))
        yield Plan(f"rich-three-hists-{leaves}-extra", RICH, (*hist, _extra(2, 60)), (1, 1, 1, 2))
        yield Plan(
            f"rich-three-hists-{leaves}-two-extra", RICH, (*hist, _extra(2, 60), _extra(1, 40, 0.7))
        )
    mixed = (
        _hist(800, 0.04, 20, max_features=0.4),
        _hist(800, 0.04, 40, 1, max_features=0.4),
        _hist(600, 0.04, 70, 2, max_features=0.4),
    )
    yield Plan("rich-mixed-hists-extra", RICH, (*mixed, _extra(2, 60)), (1, 1, 1, 2))
    yield Plan("grades-mixed-hists-extra", GRADES, (*mixed, _extra(2, 60)), (1, 1, 1, 2))
    yield Plan("rich-mixed-hists", RICH, mixed)
