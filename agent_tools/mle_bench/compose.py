"""The script language: choices about a solution become a short, real scikit-learn program.

A script reads `train.csv`, `test.csv` and `sample_submission.csv` from its working folder and
writes `submission.csv`. Column names come from the CSV headers, so one text serves any
competition of the same kind. Words are separated by single spaces, inside brackets too: a
tokenizer that splits at white space then spends one token on each decision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from agent_tools.errors import UserError
from agent_tools.mle_bench.catalogue import (
    MODULE_OF,
    NO_PROBABILITIES,
    ONE_HOT,
    Arg,
    Call,
    Keyword,
    call,
)
from agent_tools.mle_bench.facts import TaskFacts

Output = Literal["probability", "score", "label"]


@dataclass(frozen=True)
class Choices:
    """What a solution does.

    `models`: one estimator, or two to four whose predictions are averaged (`weights`, if given).
    `numeric`: steps after imputation (`impute`: "mean", "median" or None). `category`: an encoder,
    "frequency" or "drop". `calendar`: an extra treatment of numeric columns with few values.
    `vectorisers`: text features, joined when several. `reduce`: steps after all features.
    `log_target`: fit log(1 + y). `floor`: clip predictions at zero. `output`: "label" submits hard
    labels even where probabilities are scored (an honest mistake), "score" a squashed decision
    function. `extra`: lines of feature work on X and Z, straight after they are read.
    """

    models: tuple[Call, ...]
    numeric: tuple[Call, ...] = ()
    impute: Literal["mean", "median"] | None = "mean"
    category: Call | Literal["frequency", "drop"] = ONE_HOT
    calendar: Call | None = None
    vectorisers: tuple[Call, ...] = ()
    reduce: tuple[Call, ...] = ()
    log_target: bool = False
    floor: bool = False
    output: Output = "probability"
    weights: tuple[int, ...] = ()
    extra: tuple[str, ...] = ()


def compose(facts: TaskFacts, choices: Choices) -> str:
    """Text of the script, ending without a newline.

    `facts` matter only where they must: kind and metric (what is submitted), and whether there
    are text, category and numeric columns. Raises `UserError` for choices that make no script.
    """
    _check(facts, choices)
    text = bool(choices.vectorisers) and facts.text > 0
    target = 'np.log1p( train["target"] )' if choices.log_target else 'train["target"]'
    body = [
        'train = pd.read_csv("train.csv")',
        'test = pd.read_csv("test.csv")',
        'sub = pd.read_csv("sample_submission.csv")',
        f"X, Z, y = train[test.columns[1:]], test.iloc[:, 1:], {target}",
        *choices.extra,
    ]
    used: list[Call] = []
    if text:
        body += _text_lines(choices, used)
    if not text or facts.numeric or facts.categorical:
        body += _table_lines(facts, choices, text, used)
    if choices.reduce:
        reduce = _pipeline(choices.reduce)
        used.append(reduce)
        body += [f"red = {reduce}", "A, B = red.fit_transform( A, y ), red.transform( B )"]
    body += _model_lines(facts, choices, used)
    return "\n".join([*_imports(used, body), *body])


def _check(facts: TaskFacts, choices: Choices) -> None:
    if not choices.models:
        raise UserError("choices.models is empty: name at least one estimator")
    if choices.weights and len(choices.weights) != len(choices.models):
        raise UserError(
            f"choices.weights has {len(choices.weights)} entries for {len(choices.models)} models:"
            " give one a model"
        )
    if choices.log_target and facts.kind != "regression":
        raise UserError(f"choices.log_target on a {facts.kind} task: it needs a regression")
    unknown = {name for model in choices.models for name in model.names()} - set(MODULE_OF)
    if unknown:
        raise UserError(f"unknown estimator {sorted(unknown)[0]}: add it to catalogue.MODULE_OF")


def _text_lines(choices: Choices, used: list[Call]) -> list[str]:
    vec = choices.vectorisers[0]
    if len(choices.vectorisers) > 1:
        vec = Call("make_union", choices.vectorisers)
    used.append(vec)
    return [
        'W = [ d.select_dtypes("object").fillna("").agg(" ".join, axis=1) for d in (X, Z) ]',
        f"vec = {vec}",
        "A, B = vec.fit_transform( W[0] ), vec.transform( W[1] )",
    ]


def _table_lines(facts: TaskFacts, choices: Choices, text: bool, used: list[Call]) -> list[str]:
    """Features of numeric and category columns; with `text` they are stacked beside A and B."""
    lines: list[str] = []
    parts: list[tuple[str, Call | None, str]] = []  # (name, transformer, columns)
    if choices.category == "frequency" and facts.categorical:
        lines += [
            _category_columns(text),
            "for c in category: Z[c], X[c] = "
            "Z[c].map( X[c].value_counts() ), X[c].map( X[c].value_counts() )",
        ]
    elif isinstance(choices.category, Call) and facts.categorical:
        lines.append(_category_columns(text))
        parts.append(("cat", _encoder(facts, choices.category), "category"))
    numeric = facts.numeric > 0 or (choices.category == "frequency" and facts.categorical > 0)
    if numeric:
        lines.append('numeric = X.select_dtypes("number").columns')
        steps = choices.numeric
        if choices.impute:
            strategy = () if choices.impute == "mean" else (f'strategy="{choices.impute}"',)
            steps = (Call("SimpleImputer", strategy), *steps)
        parts.insert(0, ("num", _pipeline(steps) if steps else None, "numeric"))
        if choices.calendar:
            lines.append("few = [ c for c in numeric if X[c].nunique() < 60 ]")
            calendar = choices.calendar
            if choices.impute and facts.missing > 0:
                calendar = call("make_pipeline", call("SimpleImputer"), calendar)
            parts.append(("cal", calendar, "few"))
    if not parts:
        # nothing but columns that this solution drops: a constant keeps the script running
        return [] if text else ["A, B = np.ones( (len(X), 1) ), np.ones( (len(Z), 1) )"]
    named: list[str] = []
    for name, transformer, columns in parts:
        if transformer is not None:
            used.append(transformer)
            lines.append(f"{name} = {transformer}")
            named.append(f"({name}, {columns})")
        else:
            named.append(f'("passthrough", {columns})')
    if len(parts) == 1:
        name, transformer, columns = parts[0]
        return lines + _single_part(name, transformer, columns, text, used)
    used.append(call("make_column_transformer"))
    dense = "" if text else ", sparse_threshold=0"
    lines.append(f"prep = make_column_transformer( {', '.join(named)}{dense} )")
    return lines + _apply("prep", "", text, used)


def _encoder(facts: TaskFacts, encoder: Call) -> Call:
    # left to itself, TargetEncoder takes a regression target of whole numbers for classes
    if encoder.name == "TargetEncoder" and facts.kind == "regression":
        return Call(encoder.name, ('target_type="continuous"', *encoder.args))
    return encoder


def _category_columns(text: bool) -> str:
    if text:
        return 'category = [ c for c in X.select_dtypes("object") if X[c].nunique() < 60 ]'
    return 'category = X.select_dtypes("object").columns'


def _single_part(
    name: str, transformer: Call | None, columns: str, text: bool, used: list[Call]
) -> list[str]:
    if transformer is not None:
        return _apply(name, f"[{columns}]", text, used)
    if not text:
        return [f"A, B = X[{columns}], Z[{columns}]"]
    used.append(call("hstack"))
    return [
        f"A = hstack( [ A, X[{columns}] ] ).tocsr()",
        f"B = hstack( [ B, Z[{columns}] ] ).tocsr()",
    ]


def _apply(name: str, columns: str, text: bool, used: list[Call]) -> list[str]:
    """Fit a feature step on X and apply it to Z; the target reaches encoders that learn from it."""
    fit = f"{name}.fit_transform( X{columns}, y )"
    if not text:
        return [f"A, B = {fit}, {name}.transform( Z{columns} )"]
    used.append(call("hstack"))
    return [
        f"A = hstack( [ A, {fit} ] ).tocsr()",
        f"B = hstack( [ B, {name}.transform( Z{columns} ) ] ).tocsr()",
    ]


def _model_lines(facts: TaskFacts, choices: Choices, used: list[Call]) -> list[str]:
    used.extend(choices.models)
    binary, regression = facts.kind == "binary", facts.kind == "regression"
    labels = not regression and (
        choices.output == "label"
        or (facts.metric == "accuracy" and binary)
        or (choices.models[0].name in NO_PROBABILITIES and choices.output != "score")
    )
    method = "predict_proba"
    if regression or (labels and len(choices.models) == 1):
        method = "predict"
    elif choices.output == "score":
        method = "decision_function"
    lines, predicted = _fit_predict(choices, method)
    if binary and method == "predict_proba":
        predicted += "[:, 1]"
    lines.append(f"pred = {predicted}")
    if method == "decision_function":
        lines.append("pred = 1 / ( 1 + np.exp( -pred ) )")
    if facts.kind == "multiclass" and method == "predict":
        lines.append("pred = 1.0 * ( pred[:, None] == model.classes_ )")
    if binary and labels and method == "predict_proba":
        lines.append("pred = 1 * ( pred > 0.5 )")
    if choices.log_target:
        lines.append("pred = np.expm1( pred )")
    if choices.floor:
        lines.append("pred = np.clip( pred, 0, None )")
    columns = "sub.columns[1:]" if facts.kind == "multiclass" else "sub.columns[1]"
    return [*lines, f"sub[{columns}] = pred", 'sub.to_csv("submission.csv", index=False)']


def _fit_predict(choices: Choices, method: str) -> tuple[list[str], str]:
    """Lines that name the estimators, and the expression of their (averaged) predictions."""
    if len(choices.models) == 1:
        return [f"model = {choices.models[0]}"], f"model.fit( A, y ).{method}( B )"
    names = [f"m{i}" for i in range(1, len(choices.models) + 1)]
    lines = [f"{name} = {model}" for name, model in zip(names, choices.models, strict=True)]
    each = f"[ m.fit( A, y ).{method}( B ) for m in ({', '.join(names)}) ]"
    if choices.weights:
        weights = ", ".join(str(weight) for weight in choices.weights)
        return lines, f"np.average( {each}, axis=0, weights=[ {weights} ] )"
    return lines, f"np.mean( {each}, axis=0 )"


def _pipeline(steps: Sequence[Call]) -> Call:
    if len(steps) == 1:
        return steps[0]
    args: tuple[Arg, ...] = tuple(steps)
    return Call("make_pipeline", args)


def _imports(used: Sequence[Call], body: Sequence[str]) -> list[str]:
    modules: dict[str, set[str]] = {}
    for tree in used:
        for name in tree.names():
            modules.setdefault(MODULE_OF[name], set()).add(name)
    lines = ["import numpy as np"] if any("np." in line for line in body) else []
    lines.append("import pandas as pd")
    for module in sorted(modules):
        lines.append(f"from {module} import {', '.join(sorted(modules[module]))}")
    return lines


def calibrated(model: Call, method: Literal["sigmoid", "isotonic"] = "sigmoid") -> Call:
    """`model` with cross-fitted probability calibration (3 folds)."""
    args: tuple[Arg, ...] = (model, "cv=3")
    if method != "sigmoid":
        args = (model, f'method="{method}"', "cv=3")
    return Call("CalibratedClassifierCV", args)


def bagged(model: Call, regression: bool, n: int) -> Call:
    """`n` copies of `model` fitted on bootstrap samples and averaged."""
    name = "BaggingRegressor" if regression else "BaggingClassifier"
    return call(name, Keyword("estimator", model), f"n_estimators={n}", "random_state=0")
