"""The graders of the 22 competitions: ``grade(submission, answers)``, two frames to one float.

One function a competition, named after it with underscores, for import strings such as
``agent_tools.mle_bench.lite.graders:leaf_classification``. A bad submission raises
`InvalidSubmissionError`, bad answers an assertion. The score is not rounded; it may be infinite
or NaN where the original's is. Neither frame is changed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd

from agent_tools.mle_bench.lite import checks, scores
from agent_tools.mle_bench.lite.catalogue import JIGSAW_LABELS, PLANT_LABELS, RANZCR_LABELS
from agent_tools.mle_bench.metrics import InvalidSubmissionError


def aerial_cactus_identification(submission: pd.DataFrame, answers: pd.DataFrame) -> float:
    """AUC of ``has_cactus``; higher is better."""
    return _auc(submission, answers, "id", "has_cactus")


def aptos2019_blindness_detection(submission: pd.DataFrame, answers: pd.DataFrame) -> float:
    """Quadratic weighted kappa of whole-number labels; higher is better."""
    checks.need_columns(submission, answers, ("id_code", "diagnosis"))
    theirs, ours = checks.in_key_order(submission, answers, "id_code")
    predicted = checks.whole_numbers(submission["diagnosis"])[theirs]
    return scores.quadratic_kappa(checks.whole_numbers(answers["diagnosis"])[ours], predicted)


def denoising_dirty_documents(submission: pd.DataFrame, answers: pd.DataFrame) -> float:
    """RMSE over all pixels of all test images, 0 to 1; lower is better."""
    checks.need_columns(submission, answers, ("id", "value"))
    theirs, ours = checks.in_key_order(submission, answers, "id")
    predicted = checks.numbers(submission["value"], lenient=True)[theirs]
    return scores.rmse(checks.numbers(answers["value"])[ours], predicted)


def detecting_insults_in_social_commentary(
    submission: pd.DataFrame, answers: pd.DataFrame
) -> float:
    """AUC of ``Insult``; a row's key is the text of its comment; higher is better."""
    return _auc(submission, answers, "Comment", "Insult")


def dog_breed_identification(submission: pd.DataFrame, answers: pd.DataFrame) -> float:
    """Log loss over 120 breeds; further columns are ignored; lower is better."""
    return _log_loss(submission, answers)


def dogs_vs_cats_redux_kernels_edition(submission: pd.DataFrame, answers: pd.DataFrame) -> float:
    """Binary log loss of ``label`` (1 is a dog); lower is better."""
    checks.need_columns(submission, answers, ("id", "label"))
    theirs, ours = checks.in_key_order(submission, answers, "id")
    predicted = checks.numbers(submission["label"])
    checks.need_probabilities(predicted, "'label'")
    return scores.binary_log_loss(checks.flags(answers["label"])[ours], predicted[theirs])


def histopathologic_cancer_detection(submission: pd.DataFrame, answers: pd.DataFrame) -> float:
    """AUC of ``label``; higher is better."""
    return _auc(submission, answers, "id", "label")


def jigsaw_toxic_comment_classification_challenge(
    submission: pd.DataFrame, answers: pd.DataFrame
) -> float:
    """Mean AUC of six columns, without the rows whose answers are -1; higher is better.

    As in the original, columns are paired by position and not by name, any finite number is a
    score, and an id may stand twice in place of another if as many rows remain.
    """
    wanted = ("id", *JIGSAW_LABELS)
    checks.need_columns(submission, answers, wanted)
    checks.need_only_columns(submission, wanted)
    checks.need_rows(submission, answers)
    names = [name for name in answers.columns if name != "id"]
    keep = answers[names].sum(axis=1).to_numpy() >= 0
    theirs, ours = _kept_rows(submission["id"], answers["id"], keep)
    truth = checks.table_of_flags(answers.iloc[ours], names)
    placed = [name for name in submission.columns if name != "id"]
    return scores.mean_auc(
        truth, checks.table_of_numbers(submission.iloc[theirs], placed, lenient=True)
    )


def _kept_rows(
    their_ids: pd.Series, our_ids: pd.Series, keep: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Rows of the submission and of the answers that are kept, in one order."""
    kept = np.flatnonzero(keep)
    if checks.equal(their_ids, our_ids):
        return kept, kept
    found, wanted = pd.Index(their_ids), pd.Index(our_ids)
    places = wanted.get_indexer_for(found)
    if found.hasnans or (places < 0).any():
        raise InvalidSubmissionError("values of 'id' differ from those of the test set")
    if found.is_unique:
        return found.get_indexer(wanted[kept]), kept
    rows = pd.Series(np.arange(len(found)), index=found).sort_index().to_numpy()
    theirs = rows[keep[places[rows]]]
    if len(theirs) != len(kept):
        raise InvalidSubmissionError("duplicate values of 'id'")
    return theirs, kept[checks.sorted_rows(our_ids.iloc[kept])]


def leaf_classification(submission: pd.DataFrame, answers: pd.DataFrame) -> float:
    """Log loss over 99 species, with exactly their columns; lower is better."""
    checks.need_only_columns(submission, list(answers.columns))
    return _log_loss(submission, answers)


def mlsp_2013_birds(submission: pd.DataFrame, answers: pd.DataFrame) -> float:
    """AUC over all pairs of recording and species, in one pool; higher is better."""
    return _auc(submission, answers, "Id", "Probability")


def new_york_city_taxi_fare_prediction(submission: pd.DataFrame, answers: pd.DataFrame) -> float:
    """RMSE of the fare; rows are sorted by key, but keys are not compared; lower is better."""
    checks.need_columns(submission, answers, ("key", "fare_amount"))
    checks.need_rows(submission, answers)
    theirs: checks.Rows = checks.EVERY_ROW
    ours: checks.Rows = checks.EVERY_ROW
    if not checks.equal(submission["key"], answers["key"]):
        theirs = checks.sorted_rows(submission["key"])
        ours = checks.sorted_rows(answers["key"])
    predicted = checks.numbers(submission["fare_amount"], lenient=True)[theirs]
    return scores.rmse(checks.numbers(answers["fare_amount"])[ours], predicted)


def nomad2018_predict_transparent_conductors(
    submission: pd.DataFrame, answers: pd.DataFrame
) -> float:
    """Mean of the RMSLE of two energies; rows are paired by position; lower is better.

    Predictions must be above -1; scikit-learn 1.5 refused all below 0.
    """
    names = ("formation_energy_ev_natom", "bandgap_energy_ev")
    checks.need_columns(submission, answers, names)
    checks.need_rows(submission, answers)
    predicted = [checks.numbers(submission[name], lenient=True) for name in names]
    if min(column.min(initial=0.0) for column in predicted) <= -1:
        raise InvalidSubmissionError("predictions must be above -1")
    truth = [checks.numbers(answers[name]) for name in names]
    first, second = map(scores.rmsle, truth, predicted)
    return (first + second) / 2


def plant_pathology_2020_fgvc7(submission: pd.DataFrame, answers: pd.DataFrame) -> float:
    """Mean AUC of four columns; any finite number is a score; higher is better."""
    wanted = ("image_id", *PLANT_LABELS)
    checks.need_columns(submission, answers, wanted)
    checks.need_only_columns(submission, wanted)
    theirs, ours = checks.in_key_order(submission, answers, "image_id")
    predicted = checks.table_of_numbers(submission, PLANT_LABELS, lenient=True)
    return scores.mean_auc(checks.table_of_flags(answers, PLANT_LABELS)[ours], predicted[theirs])


def random_acts_of_pizza(submission: pd.DataFrame, answers: pd.DataFrame) -> float:
    """AUC of ``requester_received_pizza``; higher is better."""
    return _auc(submission, answers, "request_id", "requester_received_pizza")


def ranzcr_clip_catheter_line_classification(
    submission: pd.DataFrame, answers: pd.DataFrame
) -> float:
    """Mean AUC of nine columns; further columns are ignored; higher is better."""
    return _auc(submission, answers, "StudyInstanceUID", *RANZCR_LABELS)


def siim_isic_melanoma_classification(submission: pd.DataFrame, answers: pd.DataFrame) -> float:
    """AUC of ``target``; higher is better."""
    return _auc(submission, answers, "image_name", "target")


def spooky_author_identification(submission: pd.DataFrame, answers: pd.DataFrame) -> float:
    """Log loss over three authors, whose columns follow the id; lower is better."""
    checks.need_only_columns(submission, list(answers.columns))
    if len(submission.columns) and submission.columns[0] != "id":
        raise InvalidSubmissionError("the first column must be 'id'")
    return _log_loss(submission, answers)


def tabular_playground_series_dec_2021(submission: pd.DataFrame, answers: pd.DataFrame) -> float:
    """Accuracy of ``Cover_Type``, a whole number; higher is better.

    Text is refused; scikit-learn 1.5 scored it 0.
    """
    checks.need_columns(submission, answers, ("Id", "Cover_Type"))
    theirs, ours = checks.in_key_order(submission, answers, "Id")
    predicted = checks.whole_numbers(submission["Cover_Type"])[theirs]
    return float(np.mean(predicted == checks.whole_numbers(answers["Cover_Type"])[ours]))


def tabular_playground_series_may_2022(submission: pd.DataFrame, answers: pd.DataFrame) -> float:
    """AUC of ``target``; higher is better."""
    return _auc(submission, answers, "id", "target")


def text_normalization_challenge_english_language(
    submission: pd.DataFrame, answers: pd.DataFrame
) -> float:
    """Share of tokens whose text is equal; higher is better."""
    return _equal_text(submission, answers)


def text_normalization_challenge_russian_language(
    submission: pd.DataFrame, answers: pd.DataFrame
) -> float:
    """Share of tokens whose text is equal; higher is better."""
    return _equal_text(submission, answers)


def the_icml_2013_whale_challenge_right_whale_redux(
    submission: pd.DataFrame, answers: pd.DataFrame
) -> float:
    """AUC of ``probability``; higher is better."""
    return _auc(submission, answers, "clip", "probability")


def _auc(submission: pd.DataFrame, answers: pd.DataFrame, key: str, *targets: str) -> float:
    """Mean AUC of columns of probabilities, rows matched by ``key``; more columns are ignored."""
    checks.need_columns(submission, answers, (key, *targets))
    theirs, ours = checks.in_key_order(submission, answers, key)
    predicted = checks.table_of_numbers(submission, targets)
    checks.need_probabilities(predicted, "predictions")
    return scores.mean_auc(checks.table_of_flags(answers, targets)[ours], predicted[theirs])


def _log_loss(submission: pd.DataFrame, answers: pd.DataFrame) -> float:
    """Log loss of one column of probabilities a class, as the answers have them."""
    classes: Sequence[str] = [name for name in answers.columns if name != "id"]
    checks.need_columns(submission, answers, ("id", *classes))
    theirs, ours = checks.in_key_order(submission, answers, "id")
    predicted = checks.table_of_numbers(submission, classes)
    checks.need_probabilities(predicted, "predictions")
    checks.need_rows_that_sum_to_one(submission[classes])
    truth = checks.table_of_flags(answers, classes)
    assert (truth.sum(axis=1) == 1).all(), "answers need one class a row"
    return scores.log_loss(truth[ours], predicted[theirs])


def _equal_text(submission: pd.DataFrame, answers: pd.DataFrame) -> float:
    """Share of rows with equal ``after``, compared as text.

    A cell that pandas reads as missing ("", NA, null, nan …) is the text ``nan``, so that any of
    them equals any other; whole columns of numbers or booleans are written as pandas writes them.
    """
    checks.need_columns(submission, answers, ("id", "after"))
    theirs, ours = checks.in_key_order(submission, answers, "id")
    said = submission["after"].astype(str).to_numpy(dtype=object)[theirs]
    meant = answers["after"].astype(str).to_numpy(dtype=object)[ours]
    return float(np.mean(said == meant))
