"""When a table may be a practice competition. Each rule is a function; `check` applies them all.

By hand, when a table is chosen (reasons are in ``excluded.yaml``):

1. Real observations: no simulated, invented or text-book data.
2. No privacy: no names of private people, no exact places or days of theirs, nothing on HIV,
   addiction, sexual behaviour, suicide, police or criminal records. Race, ethnicity and religion
   are neither target nor feature (drop reason ``person``).
3. Not in scikit-learn, scipy or statsmodels, which policies' scripts may import or which agents
   have at hand; not Titanic, Boston, iris or penguins, which everybody has seen.
4. One table a study (``family``), none of a study that another suite uses.

By code:

5. At least 300 rows, 100 of them in the test; at least 10 rows of each class.
6. No column gives the answer away: predicting from it alone stays below `ONE_COLUMN`.
7. The best of the field is clearly better than a constant (`SIGNAL`), and is not perfect.
8. At least 20 scripts of the field have a score, with at least 10 different scores.
9. No table repeats another or a table of another suite: no two share a twentieth of the sketch of
   any three columns (`near_duplicates`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt
import pandas as pd

from agent_tools.mle_bench.metrics import CEILING, LOWER_IS_BETTER, METRICS
from agent_tools.mle_bench.registry import Competition

LEAST_ROWS = 300
LEAST_TEST = 100
LEAST_CLASS = 10
ONE_COLUMN = 0.97
SIGNAL = 0.05  # of a constant's error; for AUC twice as much above one half
LEAST_ENTRIES = 20
LEAST_SCORES = 10
SHARED = 0.05
BINS = 30

Array = npt.NDArray[np.float64]
Sketches = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Finding:
    """A broken rule: its number in this module's list, and what was found."""

    competition: str
    rule: int
    text: str


@dataclass(frozen=True)
class Table:
    """A prepared competition in memory; answers have one column, or one a class."""

    train: pd.DataFrame
    test: pd.DataFrame
    answers: Array


def read(competition: Competition) -> Table:
    """The private part of a competition."""
    public = competition.public("private")
    answers = pd.read_csv(competition.answers("private"), float_precision="round_trip")
    return Table(
        pd.read_csv(public / "train.csv", float_precision="round_trip"),
        pd.read_csv(public / "test.csv", float_precision="round_trip"),
        answers.iloc[:, 1:].to_numpy(dtype=np.float64),
    )


def check(competition: Competition) -> list[Finding]:
    """Rules 5 and 6, and with a fitted field 7 and 8."""
    table = read(competition)
    found = [*check_rows(competition, table), *check_columns(competition, table)]
    if competition.leaderboard:
        found += check_field(competition, table)
    return found


def check_rows(competition: Competition, table: Table) -> list[Finding]:
    """Rule 5."""
    found = []
    rows = len(table.train) + len(table.test)
    if rows < LEAST_ROWS or len(table.test) < LEAST_TEST:
        found.append(Finding(competition.id, 5, f"{rows} rows, {len(table.test)} in the test"))
    if competition.facts.kind != "regression":
        least = int(table.train["target"].value_counts().min())
        ones = table.answers if table.answers.shape[1] > 1 else _both(table.answers)
        least = min(least, int(ones.sum(axis=0).min()))
        if least < LEAST_CLASS:
            found.append(Finding(competition.id, 5, f"a class has {least} rows"))
    return found


def check_columns(competition: Competition, table: Table) -> list[Finding]:
    """Rule 6: R², AUC or accuracy on the test of the mean answer by a column's bins or values."""
    found = []
    for name in table.train.columns[1:-1]:
        share = one_column(competition, table, name)
        if share > ONE_COLUMN:
            found.append(Finding(competition.id, 6, f"column {name} alone reaches {share:.3f}"))
    return found


def one_column(competition: Competition, table: Table, name: str) -> float:
    """How well one column predicts the answers: R², AUC or accuracy, at most 1."""
    key, other = _bins(table.train[name], table.test[name])
    target = table.train["target"]
    if competition.facts.kind == "multiclass":
        sample = pd.read_csv(competition.public("private") / "sample_submission.csv", nrows=1)
        one_hot = pd.DataFrame({c: (target == c).astype(float) for c in sample.columns[1:]})
        shares = one_hot.groupby(key.to_numpy()).mean()
        likely = shares.reindex(other.to_numpy()).fillna(one_hot.mean()).to_numpy()
        return METRICS["accuracy"](table.answers, likely)
    means = target.groupby(key.to_numpy()).mean()
    guess = means.reindex(other.to_numpy()).fillna(target.mean()).to_numpy(dtype=np.float64)
    if competition.facts.kind == "binary":
        area = METRICS["auc"](table.answers, guess[:, None])
        return max(area, 1 - area)
    truth = table.answers[:, 0]
    return float(1 - np.mean((truth - guess) ** 2) / max(np.var(truth), 1e-12))


def _bins(train: pd.Series, test: pd.Series) -> tuple[pd.Series, pd.Series]:
    if train.dtype.kind not in "iuf" or train.nunique() <= BINS:
        return train.astype(str), test.astype(str)
    edges = np.unique(np.nanquantile(train.to_numpy(dtype=np.float64), np.linspace(0, 1, BINS)))
    train, test = (values.fillna(edges[0] - 1) for values in (train, test))
    return pd.Series(np.digitize(train, edges[1:-1])), pd.Series(np.digitize(test, edges[1:-1]))


def check_field(competition: Competition, table: Table) -> list[Finding]:
    """Rules 7 and 8, on the private field."""
    board = competition.leaderboard
    found = []
    if len(board) < LEAST_ENTRIES or len(set(board)) < LEAST_SCORES:
        found.append(
            Finding(competition.id, 8, f"{len(board)} entries, {len(set(board))} different scores")
        )
    gain = field_gain(competition, table)
    if gain < SIGNAL:
        found.append(Finding(competition.id, 7, f"the best is only {gain:.3f} above a constant"))
    if abs(board[0] - CEILING[competition.metric]) < 1e-3 * max(abs(board[-1]), 1.0):
        found.append(Finding(competition.id, 7, f"the best, {board[0]}, is perfect"))
    return found


def field_gain(competition: Competition, table: Table) -> float:
    """Share of a constant's error that the best entry removes; for AUC its height above 1/2."""
    best, metric = competition.leaderboard[0], competition.metric
    if not LOWER_IS_BETTER[metric]:
        return (best - 0.5) / 2
    constant = constant_score(competition, table)
    return 1 - best / constant


def constant_score(competition: Competition, table: Table) -> float:
    """Score of the constant that suits the metric, taken from the training rows."""
    target, rows = table.train["target"], len(table.answers)
    if competition.facts.kind == "multiclass":
        sample = pd.read_csv(competition.public("private") / "sample_submission.csv", nrows=1)
        shares = target.value_counts(normalize=True).reindex(sample.columns[1:]).to_numpy()
        return METRICS[competition.metric](table.answers, np.tile(shares, (rows, 1)))
    if competition.metric == "mae":
        value = float(target.median())
    elif competition.metric == "rmsle":
        value = float(np.expm1(np.log1p(target).mean()))
    else:
        value = float(target.mean())
    return METRICS[competition.metric](table.answers, np.full((rows, 1), value))


def _both(ones: Array) -> Array:
    return np.hstack([ones, 1 - ones])


def near_duplicates(tables: Mapping[str, Sketches]) -> list[tuple[str, str, float]]:
    """Rule 9: pairs of tables that share more than `SHARED` of a sketch, with the largest share.

    The share estimates Jaccard's index of two sets of value triples: of the smallest hashes of
    their union, those that both sets hold.
    """
    holders: dict[str, list[tuple[str, str]]] = {}
    for table, sketches in tables.items():
        for columns, hashes in sketches.items():
            for value in hashes:
                holders.setdefault(value, []).append((table, columns))
    pairs = {
        (one, other)
        for held in holders.values()
        for one, other in combinations(held, 2)
        if one[0] != other[0]
    }
    most: dict[tuple[str, str], float] = {}
    for (left, ours), (right, theirs) in pairs:
        share = similarity(tables[left][ours], tables[right][theirs])
        if share > SHARED:
            most[left, right] = max(most.get((left, right), 0.0), round(share, 3))
    return [(left, right, share) for (left, right), share in sorted(most.items())]


def similarity(left: Sequence[str], right: Sequence[str]) -> float:
    """Jaccard's index of two sets from their smallest hashes (bottom-k sketches)."""
    one, two = set(left), set(right)
    if not one & two:
        return 0.0
    union = sorted(one | two)[: min(len(one), len(two))]
    return len([h for h in union if h in one and h in two]) / len(union)
