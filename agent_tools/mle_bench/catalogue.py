"""Model families, encoders, numeric treatments and vectorisers that solution scripts choose from.

Pure data: `Call` trees that `compose` turns into text. The random grammar draws from the grids
here, and the recipes of the reference field start from the same names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Union

Arg = Union[str, "Call", "Keyword"]


@dataclass(frozen=True)
class Call:
    """A Python call: `str(Call("Ridge", ("alpha=1.0",)))` is `Ridge( alpha=1.0 )`."""

    name: str
    args: tuple[Arg, ...] = ()

    def __str__(self) -> str:
        if not self.args:
            return f"{self.name}()"
        return f"{self.name}( {', '.join(str(arg) for arg in self.args)} )"

    def names(self) -> Iterator[str]:
        """Every called name in the tree, the outermost first."""
        yield self.name
        for arg in self.args:
            if isinstance(arg, Keyword):
                arg = arg.value
            if isinstance(arg, Call):
                yield from arg.names()


@dataclass(frozen=True)
class Keyword:
    """A keyword argument whose value is itself a call: `estimator=Ridge()`."""

    name: str
    value: Call

    def __str__(self) -> str:
        return f"{self.name}={self.value}"


def call(name: str, *args: Arg) -> Call:
    """Short constructor: `call("Ridge", "alpha=1.0")`."""
    return Call(name, args)


MODULE_OF = {
    "CalibratedClassifierCV": "sklearn.calibration",
    "make_column_transformer": "sklearn.compose",
    "PCA": "sklearn.decomposition",
    "TruncatedSVD": "sklearn.decomposition",
    "LinearDiscriminantAnalysis": "sklearn.discriminant_analysis",
    "QuadraticDiscriminantAnalysis": "sklearn.discriminant_analysis",
    "DummyClassifier": "sklearn.dummy",
    "DummyRegressor": "sklearn.dummy",
    "AdaBoostClassifier": "sklearn.ensemble",
    "AdaBoostRegressor": "sklearn.ensemble",
    "BaggingClassifier": "sklearn.ensemble",
    "BaggingRegressor": "sklearn.ensemble",
    "ExtraTreesClassifier": "sklearn.ensemble",
    "ExtraTreesRegressor": "sklearn.ensemble",
    "GradientBoostingClassifier": "sklearn.ensemble",
    "GradientBoostingRegressor": "sklearn.ensemble",
    "HistGradientBoostingClassifier": "sklearn.ensemble",
    "HistGradientBoostingRegressor": "sklearn.ensemble",
    "RandomForestClassifier": "sklearn.ensemble",
    "RandomForestRegressor": "sklearn.ensemble",
    "StackingClassifier": "sklearn.ensemble",
    "StackingRegressor": "sklearn.ensemble",
    "CountVectorizer": "sklearn.feature_extraction.text",
    "TfidfVectorizer": "sklearn.feature_extraction.text",
    "SelectKBest": "sklearn.feature_selection",
    "SimpleImputer": "sklearn.impute",
    "KernelRidge": "sklearn.kernel_ridge",
    "Nystroem": "sklearn.kernel_approximation",
    "BayesianRidge": "sklearn.linear_model",
    "ElasticNet": "sklearn.linear_model",
    "HuberRegressor": "sklearn.linear_model",
    "Lasso": "sklearn.linear_model",
    "LinearRegression": "sklearn.linear_model",
    "LogisticRegression": "sklearn.linear_model",
    "QuantileRegressor": "sklearn.linear_model",
    "Ridge": "sklearn.linear_model",
    "RidgeClassifier": "sklearn.linear_model",
    "SGDClassifier": "sklearn.linear_model",
    "SGDRegressor": "sklearn.linear_model",
    "BernoulliNB": "sklearn.naive_bayes",
    "ComplementNB": "sklearn.naive_bayes",
    "GaussianNB": "sklearn.naive_bayes",
    "MultinomialNB": "sklearn.naive_bayes",
    "KNeighborsClassifier": "sklearn.neighbors",
    "KNeighborsRegressor": "sklearn.neighbors",
    "MLPClassifier": "sklearn.neural_network",
    "MLPRegressor": "sklearn.neural_network",
    "make_pipeline": "sklearn.pipeline",
    "make_union": "sklearn.pipeline",
    "KBinsDiscretizer": "sklearn.preprocessing",
    "MinMaxScaler": "sklearn.preprocessing",
    "OneHotEncoder": "sklearn.preprocessing",
    "OrdinalEncoder": "sklearn.preprocessing",
    "PolynomialFeatures": "sklearn.preprocessing",
    "PowerTransformer": "sklearn.preprocessing",
    "QuantileTransformer": "sklearn.preprocessing",
    "RobustScaler": "sklearn.preprocessing",
    "SplineTransformer": "sklearn.preprocessing",
    "StandardScaler": "sklearn.preprocessing",
    "TargetEncoder": "sklearn.preprocessing",
    "LinearSVC": "sklearn.svm",
    "LinearSVR": "sklearn.svm",
    "SVC": "sklearn.svm",
    "SVR": "sklearn.svm",
    "DecisionTreeClassifier": "sklearn.tree",
    "DecisionTreeRegressor": "sklearn.tree",
    "hstack": "scipy.sparse",
}
"""Where each name that a script may call is imported from."""

NO_PROBABILITIES = frozenset({"LinearSVC", "SVC", "RidgeClassifier"})
"""Classifiers without `predict_proba`: they give labels, or a decision function, or are wrapped."""


@dataclass(frozen=True)
class Family:
    """One model family: class names for regression and classification (None: no such class).

    `grid` holds the values an argument may take, "" meaning "leave it out". `dense` marks
    estimators that refuse sparse input; `weights` are the random grammar's odds on (tables, text).
    """

    name: str
    regressor: str | None
    classifier: str | None
    grid: tuple[tuple[str, ...], ...]
    fixed: tuple[str, ...] = ()
    regressor_only: tuple[tuple[str, ...], ...] = ()
    classifier_only: tuple[tuple[str, ...], ...] = ()
    dense: bool = False
    weights: tuple[float, float] = (1.0, 1.0)

    def sample(self, regression: bool, choose: Callable[[tuple[str, ...]], str]) -> Call:
        """Draw one configuration; `choose` picks one value of a grid row."""
        name = self.regressor if regression else self.classifier
        if name is None:
            raise ValueError(f"family {self.name} has no {'re' if regression else 'classifi'}er")
        rows = (self.regressor_only if regression else self.classifier_only) + self.grid
        picked = [value for row in rows if (value := choose(row))]
        return Call(name, (*picked, *self.fixed))


_TREES = ("n_estimators=50", "n_estimators=100", "n_estimators=200")
_LEAF = ("", "min_samples_leaf=2", "min_samples_leaf=5", "min_samples_leaf=10")
_SEED = ("random_state=0",)

FAMILIES: tuple[Family, ...] = (
    Family(
        "linear",
        "Ridge",
        "LogisticRegression",
        (),
        regressor_only=(
            ("alpha=0.1", "alpha=0.3", "alpha=1.0", "alpha=3.0", "alpha=10.0", "alpha=30.0"),
        ),
        classifier_only=(
            ("C=0.03", "C=0.1", "C=0.3", "C=1.0", "C=3.0", "C=10.0"),
            ("max_iter=200", "max_iter=500"),
        ),
        weights=(1.0, 3.0),
    ),
    Family(
        "sparse-linear",
        "ElasticNet",
        None,
        (("alpha=0.001", "alpha=0.01", "alpha=0.1", "alpha=1.0"), ("l1_ratio=0.1", "l1_ratio=0.9")),
        weights=(0.5, 0.5),
    ),
    Family(
        "sgd",
        "SGDRegressor",
        "SGDClassifier",
        (),
        fixed=_SEED,
        regressor_only=(("alpha=0.00001", "alpha=0.0001", "alpha=0.001"), ("", 'penalty="l1"')),
        classifier_only=(
            ('loss="log_loss"', 'loss="modified_huber"'),
            ("alpha=0.00001", "alpha=0.0001", "alpha=0.001"),
        ),
        weights=(0.6, 1.0),
    ),
    Family(
        "knn",
        "KNeighborsRegressor",
        "KNeighborsClassifier",
        (
            ("n_neighbors=3", "n_neighbors=5", "n_neighbors=15", "n_neighbors=30"),
            ("", 'weights="distance"'),
        ),
        weights=(1.0, 0.7),
    ),
    Family("bayes", "BayesianRidge", "GaussianNB", (), dense=True, weights=(0.7, 0.2)),
    Family(
        "text-bayes",
        None,
        "MultinomialNB",
        (("alpha=0.03", "alpha=0.1", "alpha=0.3", "alpha=1.0"),),
        weights=(0.0, 1.2),
    ),
    Family(
        "discriminant",
        None,
        "LinearDiscriminantAnalysis",
        (("", 'solver="lsqr", shrinkage=0.1', 'solver="lsqr", shrinkage="auto"'),),
        dense=True,
        weights=(0.7, 0.2),
    ),
    Family(
        "tree",
        "DecisionTreeRegressor",
        "DecisionTreeClassifier",
        (("", "max_depth=4", "max_depth=8", "max_depth=12"), _LEAF),
        fixed=_SEED,
        weights=(0.7, 0.4),
    ),
    Family(
        "forest",
        "RandomForestRegressor",
        "RandomForestClassifier",
        (_TREES, ("", "max_features=0.3", 'max_features="sqrt"'), _LEAF),
        fixed=_SEED,
        weights=(1.2, 0.6),
    ),
    Family(
        "extra",
        "ExtraTreesRegressor",
        "ExtraTreesClassifier",
        (_TREES, ("", "max_features=0.3", 'max_features="sqrt"'), _LEAF),
        fixed=_SEED,
        weights=(1.2, 0.6),
    ),
    Family(
        "hist",
        "HistGradientBoostingRegressor",
        "HistGradientBoostingClassifier",
        (
            ("max_iter=50", "max_iter=100", "max_iter=200"),
            ("learning_rate=0.03", "learning_rate=0.05", "learning_rate=0.1", "learning_rate=0.3"),
            ("", "max_leaf_nodes=7", "max_leaf_nodes=15"),
            ("", "l2_regularization=1.0"),
        ),
        fixed=_SEED,
        dense=True,
        weights=(1.4, 0.3),
    ),
    Family(
        "boost",
        "GradientBoostingRegressor",
        "GradientBoostingClassifier",
        (
            ("n_estimators=50", "n_estimators=100", "n_estimators=200", "n_estimators=300"),
            ("learning_rate=0.03", "learning_rate=0.05", "learning_rate=0.1", "learning_rate=0.3"),
            ("", "max_depth=2", "max_depth=4"),
            ("", "subsample=0.5", "subsample=0.8"),
            ("", "", "max_features=0.3"),
        ),
        fixed=_SEED,
        weights=(1.2, 0.5),
    ),
    Family(
        "linear-svm",
        "LinearSVR",
        "LinearSVC",
        (("C=0.1", "C=0.3", "C=1.0", "C=3.0"),),
        weights=(0.5, 1.2),
    ),
    Family(
        "kernel-svm",
        "SVR",
        "SVC",
        (("C=0.3", "C=1.0", "C=3.0", "C=10.0"), ("", "gamma=0.01", "gamma=0.1")),
        weights=(0.8, 0.5),
    ),
    Family(
        "mlp",
        "MLPRegressor",
        "MLPClassifier",
        (
            ("hidden_layer_sizes=(32,)", "hidden_layer_sizes=(64,)", "hidden_layer_sizes=(100,)"),
            ("alpha=0.0001", "alpha=0.01", "alpha=1.0"),
            ("", "early_stopping=True"),
        ),
        fixed=("max_iter=100", *_SEED),
        weights=(0.7, 0.3),
    ),
    Family("dummy", "DummyRegressor", "DummyClassifier", (), weights=(0.15, 0.1)),
)
FAMILY = {family.name: family for family in FAMILIES}

ONE_HOT = call("OneHotEncoder", 'handle_unknown="ignore"')
ENCODERS: tuple[tuple[Call | str, float], ...] = (
    (ONE_HOT, 3.0),
    (call("OneHotEncoder", "min_frequency=5", 'handle_unknown="ignore"'), 1.0),
    (call("OneHotEncoder", "min_frequency=20", 'handle_unknown="ignore"'), 1.0),
    (
        call(
            "OrdinalEncoder",
            'handle_unknown="use_encoded_value"',
            "unknown_value=-1",
            "encoded_missing_value=-1",
        ),
        2.0,
    ),
    (call("TargetEncoder", *_SEED), 0.5),
    ("frequency", 1.0),
    ("drop", 1.5),
)
"""Category encoders with the random grammar's odds; "frequency" replaces a level by its count."""

TREATMENTS: tuple[tuple[tuple[Call, ...], float], ...] = (
    ((), 2.5),
    ((call("StandardScaler"),), 3.0),
    ((call("MinMaxScaler"),), 1.0),
    ((call("RobustScaler"),), 1.0),
    ((call("QuantileTransformer", "n_quantiles=100"),), 1.0),
    ((call("QuantileTransformer", "n_quantiles=100", 'output_distribution="normal"'),), 1.0),
    ((call("PowerTransformer"),), 1.0),
    ((call("KBinsDiscretizer", "n_bins=5", 'encode="onehot-dense"'),), 0.5),
    ((call("KBinsDiscretizer", "n_bins=10", 'encode="onehot-dense"'),), 0.5),
    ((call("StandardScaler"), call("PolynomialFeatures", "2")), 0.7),
    ((call("StandardScaler"), call("SplineTransformer", "n_knots=5")), 0.5),
)
"""What happens to numeric columns after imputation, with odds."""

CALENDAR: tuple[Call, ...] = (
    ONE_HOT,
    call("SplineTransformer", "n_knots=5", 'extrapolation="periodic"'),
    call("SplineTransformer", "n_knots=10", 'extrapolation="periodic"'),
)
"""Treatments of numeric columns with few distinct values (hour, weekday, month)."""

MARKS = r'token_pattern=r"\w+|[^\w\s]+"'
"""Vectoriser argument: runs of punctuation are words too, so emoticons count."""


def word_vectoriser(*args: str) -> Call:
    """Tf-idf over words."""
    return Call("TfidfVectorizer", args)


def char_vectoriser(low: int, high: int, *args: str) -> Call:
    """Tf-idf over character n-grams inside words."""
    return Call("TfidfVectorizer", ('analyzer="char_wb"', f"ngram_range=({low}, {high})", *args))
