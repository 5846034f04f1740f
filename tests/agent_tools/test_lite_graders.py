"""Each of the 22 graders against scikit-learn, the metrics against naive ones, and the floors."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pandas as pd
import pytest
from lite_cases import CLASSES, answers_of, grade, submission_of, through_csv
from sklearn import metrics as sk

from agent_tools.mle_bench.lite import scores
from agent_tools.mle_bench.lite.catalogue import LITE


def _has_general_floor(competition_id: str) -> bool:
    metric = LITE[competition_id].metric
    return ("auc" in metric or "log loss" in metric or metric == "quadratic kappa") and (
        competition_id != "spooky-author-identification"
    )


def reference(competition_id: str, submission: pd.DataFrame, answers: pd.DataFrame) -> float:
    """The score by scikit-learn, rows sorted by key as MLE-bench does."""
    lite = LITE[competition_id]
    names = list(lite.targets) or CLASSES[competition_id]
    if not competition_id.startswith("nomad"):
        submission, answers = submission.sort_values(lite.key), answers.sort_values(lite.key)
    true, said = answers[names].to_numpy(), submission[names].to_numpy()
    if competition_id.startswith("jigsaw"):
        kept = (true >= 0).all(axis=1)
        true, said = true[kept], said[kept]
    match lite.metric:
        case "auc":
            return float(sk.roc_auc_score(true[:, 0], said[:, 0]))
        case "mean column auc":
            return float(sk.roc_auc_score(true, said, average="macro"))
        case "log loss":
            return float(sk.log_loss(true.argmax(axis=1), said, labels=range(len(names))))
        case "binary log loss":
            return float(sk.log_loss(true[:, 0], said[:, 0]))
        case "rmse":
            return float(sk.root_mean_squared_error(true[:, 0], said[:, 0]))
        case "mean column rmsle":
            return float(sk.root_mean_squared_log_error(true, said))
        case "quadratic kappa":
            return float(sk.cohen_kappa_score(true[:, 0], said[:, 0], weights="quadratic"))
        case "accuracy":
            return float(sk.accuracy_score(true[:, 0], said[:, 0]))
        case _:
            # A missing cell is the text nan, for both sides.
            return float(np.mean([str(a) == str(b) for a, b in zip(true, said, strict=True)]))


@pytest.mark.parametrize("competition_id", LITE)
def test_a_grader_agrees_with_scikit_learn(competition_id: str) -> None:
    for seed in range(5):
        answers = answers_of(competition_id, seed, rows=40 + seed)
        submission = submission_of(competition_id, answers, seed + 10)
        expected = reference(competition_id, submission, answers)
        assert grade(competition_id, submission, answers) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("competition_id", LITE)
def test_the_order_of_rows_does_not_matter_but_for_nomad(competition_id: str) -> None:
    answers = answers_of(competition_id)
    if competition_id.startswith("detecting"):
        answers = answers.drop_duplicates("Comment")  # repeated comments go by their place
    submission = submission_of(competition_id, answers)
    score = grade(competition_id, submission, answers)
    again = through_csv(submission.iloc[::-1])
    if competition_id.startswith("nomad"):
        assert grade(competition_id, again, answers) != pytest.approx(score, abs=1e-4)
        return
    assert grade(competition_id, again, answers) == pytest.approx(score, abs=1e-12)
    lite = LITE[competition_id]
    in_order = submission.set_index(lite.key).loc[answers[lite.key]].reset_index()
    assert grade(competition_id, through_csv(in_order), answers) == pytest.approx(score, abs=1e-12)


@pytest.mark.parametrize("competition_id", LITE)
def test_the_answers_are_a_perfect_submission(competition_id: str) -> None:
    answers = answers_of(competition_id)
    lite = LITE[competition_id]
    best = grade(competition_id, answers, answers)
    assert best == pytest.approx(0.0 if lite.lower_is_better else 1.0, abs=1e-12)
    other = grade(competition_id, submission_of(competition_id, answers), answers)
    assert (best < other) == lite.lower_is_better and best != other


# The other floors depend on the real data.
@pytest.mark.parametrize("competition_id", [i for i in LITE if _has_general_floor(i)])
def test_a_constant_submission_scores_the_published_floor(competition_id: str) -> None:
    lite = LITE[competition_id]
    answers = answers_of(competition_id)
    if lite.metric in ("auc", "mean column auc"):
        constant = answers.assign(**dict.fromkeys(lite.targets, 0.5))
    elif lite.metric == "binary log loss":
        constant = answers.assign(label=0.5)
    elif lite.metric == "quadratic kappa":
        constant = answers.assign(diagnosis=0)
    else:
        n = {"dog-breed-identification": 120, "leaf-classification": 99}[competition_id]
        names = [f"class-{number}" for number in range(n)]
        answers = pd.DataFrame(np.eye(n, dtype=int), columns=names)
        answers.insert(0, "id", range(n))
        constant = answers.assign(**dict.fromkeys(names, 1 / n))
    assert round(grade(competition_id, constant, answers), 5) == lite.floor


def test_nobody_needs_scikit_learn_to_grade() -> None:
    import subprocess
    import sys

    code = (
        "import sys; import agent_tools.mle_bench.lite.graders as g, agent_tools.mle_bench.lite."
        "preparers; sys.exit('sklearn' in sys.modules or 'scipy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_auc_of_ties_and_of_many_rows() -> None:
    rng = np.random.default_rng(0)
    for rows in (2, 3, 10, 500, 20_000):
        labels = rng.permutation(np.arange(rows) % 2 == 1)
        for digits in (0, 1, 2, 8):
            said = rng.random(rows).round(digits)
            expected = sk.roc_auc_score(labels, said)
            assert scores.auc(labels, said) == pytest.approx(expected, abs=1e-13)
    tiny = np.array([0.0, 5e-324, 1e-320, 1e-300])  # neighbours at the smallest scale differ
    assert scores.auc(np.array([False, True, False, True]), tiny) == 0.75


def naive_kappa(true: list[int], said: list[int]) -> float:
    labels = sorted({*true, *said})
    places = {label: place for place, label in enumerate(labels)}
    pairs = [(places[a], places[b]) for a, b in zip(true, said, strict=True)]
    seen = sum((a - b) ** 2 for a, b in pairs) / len(pairs)
    chance = sum((a - b) ** 2 for a, _ in pairs for _, b in pairs) / len(pairs) ** 2
    return 1 - seen / chance


def test_kappa_counts_places_among_the_labels_that_occur() -> None:
    rng = np.random.default_rng(1)
    for _ in range(50):
        labels = rng.choice([-3, 0, 1, 2, 3, 4, 17], rng.integers(2, 6), replace=False)
        true, said = rng.choice(labels, 25), rng.choice(labels, 25)
        if len({*true.tolist(), *said.tolist()}) < 2:
            continue
        ours = scores.quadratic_kappa(true, said)
        assert ours == pytest.approx(naive_kappa(true.tolist(), said.tolist()), abs=1e-12)
        expected = sk.cohen_kappa_score(true, said, weights="quadratic")
        assert ours == pytest.approx(expected, abs=1e-12)


def test_kappa_of_one_label_alone_is_nan_as_in_scikit_learn() -> None:
    one = np.array([2, 2, 2])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert math.isnan(sk.cohen_kappa_score(one, one, weights="quadratic"))
    assert math.isnan(scores.quadratic_kappa(one, one))


def test_kappa_of_as_many_labels_as_rows_needs_no_table_of_pairs() -> None:
    many = np.arange(200_000)
    assert scores.quadratic_kappa(many, many) == 1.0


def test_log_loss_is_clipped_by_the_float_epsilon_and_not_rescaled() -> None:
    truth = np.array([[True, False], [False, True]])
    sure = np.array([[0.0, 1.0], [0.0, 1.0]])
    expected = sk.log_loss([0, 1], sure)
    assert scores.log_loss(truth, sure) == pytest.approx(expected, rel=1e-12)
    assert scores.log_loss(truth, sure) == pytest.approx(-math.log(2**-52) / 2, rel=1e-9)
    off = np.array([[0.5, 0.500005], [0.5, 0.500005]])
    expected = -(math.log(0.5) + math.log(0.500005)) / 2
    assert scores.log_loss(truth, off) == pytest.approx(expected, rel=1e-12)


def test_an_error_too_large_for_a_float_is_infinite() -> None:
    answers = answers_of("denoising-dirty-documents")
    assert grade("denoising-dirty-documents", answers.assign(value=1e200), answers) == math.inf


def test_bad_answers_are_an_assertion() -> None:
    answers = answers_of("aerial-cactus-identification")
    submission = submission_of("aerial-cactus-identification", answers)
    for bad in (answers.drop(columns="has_cactus"), answers.assign(has_cactus=1)):
        with pytest.raises(AssertionError):
            grade("aerial-cactus-identification", submission, bad)
