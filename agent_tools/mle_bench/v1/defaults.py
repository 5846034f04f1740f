"""The default tier of the table competitions: one model as it comes, on the plainest columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

from agent_tools.mle_bench.v1.build import Plan, View, call, pipe

NUMBERS = View(
    "numbers",
    'x = both.select_dtypes("number").drop(columns="id")\nx = x.fillna(x.mean())',
)
CODES = View(
    "codes",
    """\
x = both.drop(columns="id")
for name in x.select_dtypes("object"):
    x[name] = x[name].factorize(sort=True)[0]
x = x.fillna(x.mean())""",
)
ONEHOT = View(
    "onehot",
    """\
x = pd.get_dummies(both.drop(columns="id"), dtype=float)
x = x.fillna(x.mean())""",
)
COUNTS = View(
    "counts",
    """\
x = both.drop(columns="id")
for name in x.select_dtypes("object"):
    x[name] = x[name].map(x[name].value_counts())
x = x.fillna(x.mean())""",
)
BINS = View(
    "bins",
    """\
x = both.select_dtypes("number").drop(columns="id")
x = x.apply(lambda c: pd.qcut(c, 8, labels=False, duplicates="drop")).fillna(-1)""",
)
RANKS = View(
    "ranks",
    'x = both.select_dtypes("number").drop(columns="id").rank(pct=True).fillna(0.5)',
)

_SEED = {"random_state": 0}


def regressors(few: int) -> dict[str, tuple[str, int]]:
    """Name, call and rows to fit on (0: all) of regressors as they come; ``few`` for slow ones."""
    scale = "StandardScaler()"
    return {
        "linear": ("LinearRegression()", 0),
        "ridge": (pipe(scale, "Ridge()"), 0),
        "lasso": (pipe(scale, "Lasso()"), 0),
        "elastic": (pipe(scale, "ElasticNet()"), 0),
        "tree": (call("DecisionTreeRegressor", **_SEED), 0),
        "small-tree": (call("DecisionTreeRegressor", max_depth=6, **_SEED), 0),
        "forest": (call("RandomForestRegressor", n_estimators=30, **_SEED), few),
        "extra": (call("ExtraTreesRegressor", n_estimators=30, **_SEED), few),
        "boost": (call("GradientBoostingRegressor", n_estimators=50, **_SEED), few),
        "ada": (call("AdaBoostRegressor", n_estimators=20, **_SEED), few),
        "nearest": (pipe(scale, "KNeighborsRegressor()"), few),
        "svr": (pipe(scale, "SVR()"), min(few, 3_000)),
        "sgd": (pipe(scale, call("SGDRegressor", **_SEED)), 0),
        "net": (pipe(scale, call("MLPRegressor", max_iter=20, **_SEED)), few),
    }


def classifiers(few: int) -> dict[str, tuple[str, int]]:
    """The same for classifiers."""
    scale = "StandardScaler()"
    return {
        "logistic": (pipe(scale, "LogisticRegression()"), 0),
        "weak-logistic": (pipe(scale, call("LogisticRegression", C=0.001)), 0),
        "bayes": ("GaussianNB()", 0),
        "tree": (call("DecisionTreeClassifier", **_SEED), 0),
        "small-tree": (call("DecisionTreeClassifier", max_depth=4, **_SEED), 0),
        "forest": (call("RandomForestClassifier", n_estimators=50, **_SEED), few),
        "extra": (call("ExtraTreesClassifier", n_estimators=50, **_SEED), few),
        "boost": (call("GradientBoostingClassifier", n_estimators=20, **_SEED), few),
        "ada": (call("AdaBoostClassifier", n_estimators=20, **_SEED), few),
        "nearest": (pipe(scale, "KNeighborsClassifier()"), few),
        "sgd": (pipe(scale, call("SGDClassifier", loss="log_loss", **_SEED)), 0),
        "net": (pipe(scale, call("MLPClassifier", max_iter=10, **_SEED)), few),
        "lda": (pipe(scale, call("LinearDiscriminantAnalysis", solver="lsqr", shrinkage=0.1)), 0),
    }


def default_plans(
    views: Sequence[View],
    models: dict[str, tuple[str, int]],
    *,
    once: dict[str, tuple[str, int]],
    size: int = 35,
) -> Iterator[Plan]:
    """``once`` on the first view, then every model on every view, until there are ``size``."""
    plans = [
        *(Plan(f"{views[0].name}-{name}", views[0], (m,), rows=r) for name, (m, r) in once.items()),
        *(
            Plan(f"{view.name}-{name}", view, (model,), rows=rows)
            for (name, (model, rows)), view in product(models.items(), views)
        ),
    ]
    yield from plans[:size]
