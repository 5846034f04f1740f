"""Odd submissions, one a line: what MLE-bench refuses, takes as it is, or takes differently.

Expectations were taken from the original graders, run on the same files; SAME is the score of
the submission before the edit.
"""

from __future__ import annotations

import io
from typing import NamedTuple

import pandas as pd
import pytest
from lite_cases import Edit, answers_of, cell, column, columns, drop, grade, rows, submission_of
from lite_cases import through_csv as reread

from agent_tools.mle_bench.lite.tables import read_table
from agent_tools.mle_bench.metrics import InvalidSubmissionError

SAME = "same"
CACTUS, CATS, APTOS = (
    "aerial-cactus-identification",
    "dogs-vs-cats-redux-kernels-edition",
    ("aptos2019-blindness-detection"),
)
DENOISE, DOGS, LEAF = "denoising-dirty-documents", "dog-breed-identification", "leaf-classification"
SPOOKY, NOMAD, TAXI = (
    "spooky-author-identification",
    "nomad2018-predict-transparent-conductors",
    "new-york-city-taxi-fare-prediction",
)
JIGSAW, PLANT, RANZCR = (
    "jigsaw-toxic-comment-classification-challenge",
    "plant-pathology-2020-fgvc7",
    "ranzcr-clip-catheter-line-classification",
)
INSULTS, BIRDS, DEC = (
    "detecting-insults-in-social-commentary",
    "mlsp-2013-birds",
    "tabular-playground-series-dec-2021",
)
EN, RU = (
    "text-normalization-challenge-english-language",
    "text-normalization-challenge-russian-language",
)


class Case(NamedTuple):
    """An edit and what follows: SAME, a score, "other" for another score, or refused words."""

    competition_id: str
    name: str
    edit: Edit
    want: str | float


def add(name: str, value: float, row: int = 0) -> Edit:
    """Add to one cell."""
    return lambda table: cell(name, table[name].iloc[row] + value, row)(table)


def scaled(factor: float) -> Edit:
    """Multiply every column but the id."""
    return lambda table: table.assign(
        **{name: table[name] * factor for name in table.columns if name != "id"}
    )


def one_hot_integers(table: pd.DataFrame) -> pd.DataFrame:
    names = [name for name in table.columns if name != "id"]
    return table.assign(**{name: int(name == names[0]) for name in names})


def swapped(first: str, second: str) -> Edit:
    """Exchange two columns with their names, so that only the places change."""
    swap = {first: second, second: first}
    return columns(lambda names: [swap.get(name, name) for name in names])


def repeat_key(key: str, row: int, of: int) -> Edit:
    """Give one row the key of another."""
    return lambda table: cell(key, table[key].iloc[of], row)(table)


NO_NUMBER, MISSING, INFINITE = "no number", "missing values", "infinite values"
RANGE, SUM, KEYS, COUNT = "between 0 and 1", "sum to 1", "differ from those", "rows, expected"
CASES = [
    # AUC of one column of probabilities
    Case(CACTUS, "empty cell", cell("has_cactus", ""), MISSING),
    Case(CACTUS, "the word NA", cell("has_cactus", "NA"), MISSING),
    Case(CACTUS, "the word nan in every row", column("has_cactus", "nan"), MISSING),
    Case(CACTUS, "inf", cell("has_cactus", "inf"), INFINITE),
    Case(CACTUS, "-inf", cell("has_cactus", "-inf"), INFINITE),
    Case(CACTUS, "below 0", cell("has_cactus", -1e-9), RANGE),
    Case(CACTUS, "above 1", cell("has_cactus", 1 + 1e-9), RANGE),
    Case(CACTUS, "a word", cell("has_cactus", "yes"), NO_NUMBER),
    Case(CACTUS, "a word among booleans", cell("has_cactus", True), NO_NUMBER),
    Case(CACTUS, "a digit separator", cell("has_cactus", "0_1"), NO_NUMBER),
    Case(CACTUS, "an integer beyond 64 bits", cell("has_cactus", 10**30), "between 0 and 1|no num"),
    Case(CACTUS, "all 0", column("has_cactus", 0), 0.5),
    Case(CACTUS, "all 1, as integers", column("has_cactus", 1), 0.5),
    Case(CACTUS, "all True", column("has_cactus", True), 0.5),
    Case(CACTUS, "-0.0", column("has_cactus", "-0.0"), 0.5),
    Case(CACTUS, "halved", lambda t: t.assign(has_cactus=t["has_cactus"] / 2), SAME),
    Case(CACTUS, "turned round", lambda t: t.assign(has_cactus=1 - t["has_cactus"]), "other"),
    Case(CACTUS, "a further column", column("note", "x"), SAME),
    Case(CACTUS, "columns in another order", columns(lambda names: names[::-1]), SAME),
    Case(CACTUS, "no id column", drop("id"), "missing column 'id'"),
    Case(CACTUS, "no target column", drop("has_cactus"), "missing column 'has_cactus'"),
    Case(CACTUS, "a space in the name", lambda t: t.rename(columns={"id": " id"}), "missing"),
    Case(CACTUS, "one row less", rows(slice(1, None)), COUNT),
    Case(CACTUS, "one row twice", rows([*range(30), 0]), COUNT),
    Case(CACTUS, "no rows", rows(slice(0)), COUNT),
    Case(CACTUS, "one id in place of another", repeat_key("id", 0, 1), "duplicate"),
    Case(CACTUS, "an unknown id", cell("id", "nobody"), KEYS),
    Case(CACTUS, "a missing id", cell("id", ""), KEYS),
    Case(CACTUS, "upper-case ids", lambda t: t.assign(id=t["id"].str.upper()), KEYS),
    Case(CACTUS, "numbers for ids", lambda t: t.assign(id=range(30)), KEYS),
    Case(CACTUS, "two target columns", lambda t: pd.concat([t, t["has_cactus"]], axis=1), SAME),
    Case(BIRDS, "whole ids as floats", lambda t: t.assign(Id=t["Id"].astype(float)), SAME),
    Case(BIRDS, "ids off by half", lambda t: t.assign(Id=t["Id"] + 0.5), KEYS),
    Case(BIRDS, "one id of text", cell("Id", "12a"), KEYS),
    Case(BIRDS, "one id missing", cell("Id", ""), KEYS),
    Case(INSULTS, "repeated comments", rows(slice(None)), SAME),
    Case(INSULTS, "another comment", cell("Comment", "hello"), KEYS),
    Case(INSULTS, "a comment of NA", cell("Comment", "NA"), KEYS),
    Case(INSULTS, "one comment less often", repeat_key("Comment", 0, 1), KEYS),
    Case(INSULTS, "dates beside", column("Date", "20120618"), SAME),
    # mean AUC of columns
    Case(RANZCR, "the two labels nobody scores", column("CVC - Normal", 0.5), SAME),
    Case(RANZCR, "one label missing", drop("CVC - Borderline"), "missing column"),
    Case(RANZCR, "one label out of range", cell("NGT - Normal", 1.01), RANGE),
    Case(PLANT, "any size of score", scaled(1), SAME),
    Case(PLANT, "scores above 1", lambda t: t.assign(rust=t["rust"] * 7 - 3), SAME),
    Case(PLANT, "infinite score", cell("rust", "inf"), INFINITE),
    Case(PLANT, "a digit separator is a number", column("rust", "1_0"), "other"),
    Case(PLANT, "a further column", column("note", 1), "unknown column 'note'"),
    Case(PLANT, "columns swapped", swapped("rust", "scab"), SAME),
    Case(JIGSAW, "scores above 1", lambda t: t.assign(toxic=t["toxic"] * 9), SAME),
    Case(JIGSAW, "columns swapped count by place", swapped("toxic", "threat"), "other"),
    Case(JIGSAW, "id last", columns(lambda names: [*names[1:], "id"]), SAME),
    Case(JIGSAW, "a further column", column("comment_text", "x"), "unknown column"),
    Case(JIGSAW, "an unknown id", cell("id", "nobody"), KEYS),
    Case(JIGSAW, "one row less", rows(slice(1, None)), COUNT),
    Case(JIGSAW, "missing value", cell("threat", ""), MISSING),
    # log loss
    Case(SPOOKY, "sums off by 1e-6", add("EAP", 1e-6), "close"),
    Case(SPOOKY, "sums off by 1e-5, numpy's tolerance", add("EAP", 1e-5), "close"),
    Case(SPOOKY, "sums off by 1.2e-5", add("EAP", 1.2e-5), SUM),
    Case(SPOOKY, "sums short by 1.2e-5", add("EAP", -1.2e-5), SUM),
    Case(SPOOKY, "percentages", scaled(100), RANGE),
    Case(SPOOKY, "id not first", columns(lambda names: [*names[1:], "id"]), "first column"),
    Case(SPOOKY, "classes in another order", columns(lambda n: ["id", *n[:0:-1]]), SAME),
    Case(SPOOKY, "a further column", column("note", 0), "unknown column"),
    Case(SPOOKY, "a class missing", drop("MWS"), "missing column"),
    Case(SPOOKY, "integers 0 and 1", one_hot_integers, "other"),
    Case(SPOOKY, "a missing value that keeps the sum", cell("EAP", ""), MISSING),
    Case(LEAF, "a further column of 0", column("Quercus_New", 0), "unknown column"),
    Case(LEAF, "a class renamed", lambda t: t.rename(columns={"Acer_A": "Acer_a"}), "unknown"),
    Case(LEAF, "ids as floats", lambda t: t.assign(id=t["id"].astype(float)), SAME),
    Case(LEAF, "rows that sum to 2", scaled(2), f"{RANGE}|{SUM}"),
    Case(DOGS, "a further column", column("note", "x"), SAME),
    Case(DOGS, "a probability below 0", add("breed-a", -2), RANGE),
    Case(CATS, "one sure and wrong row", lambda t: t.assign(label=0.5), 0.6931471805599453),
    Case(CATS, "above 1", cell("label", 1.5), RANGE),
    Case(CATS, "missing", cell("label", "NA"), MISSING),
    Case(CATS, "ids with .jpg", lambda t: t.assign(id=t["id"].astype(str) + ".jpg"), KEYS),
    # whole-number labels
    Case(APTOS, "labels as floats", lambda t: t.assign(diagnosis=t["diagnosis"] * 1.0), SAME),
    Case(APTOS, "half a label", cell("diagnosis", 2.5), "whole numbers"),
    Case(APTOS, "beyond an integer", cell("diagnosis", 1e300), "whole numbers"),
    Case(APTOS, "an unused label", cell("diagnosis", 17), "other"),
    Case(APTOS, "a label of text", cell("diagnosis", "severe"), NO_NUMBER),
    Case(APTOS, "one label for all", column("diagnosis", 0), 0.0),
    Case(APTOS, "one row twice", rows([*range(30), 0]), COUNT),
    Case(DEC, "labels as floats", lambda t: t.assign(Cover_Type=t["Cover_Type"] * 1.0), SAME),
    Case(DEC, "a rounding error", add("Cover_Type", 1e-9), "whole numbers"),
    Case(DEC, "a label that nobody has", column("Cover_Type", 99), 0.0),
    Case(DEC, "missing", cell("Cover_Type", "null"), MISSING),
    # regressions
    Case(DENOISE, "outside 0 to 1", lambda t: t.assign(value=t["value"] * 255), "other"),
    Case(DENOISE, "missing", cell("value", ""), MISSING),
    Case(DENOISE, "infinite", cell("value", "inf"), INFINITE),
    Case(DENOISE, "a pixel twice", repeat_key("id", 0, 1), "duplicate"),
    Case(TAXI, "no keys at all", column("key", None), "other"),
    Case(TAXI, "keys with a letter before", lambda t: t.assign(key="k" + t["key"]), SAME),
    Case(TAXI, "one other key, which sorts first", cell("key", 3), "other"),
    Case(TAXI, "one row less", rows(slice(1, None)), COUNT),
    Case(TAXI, "negative fares", lambda t: t.assign(fare_amount=-t["fare_amount"]), "other"),
    Case(NOMAD, "no id", drop("id"), SAME),
    Case(NOMAD, "ids of nobody", lambda t: t.assign(id=range(30)), SAME),
    Case(NOMAD, "a little below 0", cell("bandgap_energy_ev", -0.5), "other"),
    Case(NOMAD, "-1", cell("bandgap_energy_ev", -1), "above -1"),
    Case(NOMAD, "missing", cell("bandgap_energy_ev", "nan"), MISSING),
    # text
    Case(EN, "missing for missing", lambda t: t.fillna("null"), SAME),
    Case(EN, "all missing", column("after", ""), "other"),
    Case(EN, "a further column", column("before", "x"), SAME),
    Case(EN, "one token less", rows(slice(1, None)), COUNT),
    Case(EN, "an id twice", repeat_key("id", 0, 1), "duplicate"),
    Case(EN, "a space more", lambda t: t.assign(after=t["after"].fillna("") + " "), "other"),
    Case(RU, "missing for missing", lambda t: t.fillna("N/A"), SAME),
    Case(RU, "a column of numbers is text", column("after", 5), "other"),
    Case(RU, "a column of truth is text", column("after", True), "other"),
]


def outcome(competition_id: str, submission: pd.DataFrame) -> float | str:
    try:
        return grade(competition_id, submission, answers_of(competition_id))
    except InvalidSubmissionError as error:
        return str(error)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.competition_id[:12]}: {case.name}")
def test_an_odd_submission(case: Case) -> None:
    submission = submission_of(case.competition_id, answers_of(case.competition_id))
    before = grade(case.competition_id, submission, answers_of(case.competition_id))
    found = outcome(case.competition_id, reread(case.edit(submission)))
    if case.want == SAME:
        assert found == pytest.approx(before, abs=1e-12)
    elif case.want == "close":
        assert isinstance(found, float) and abs(found - before) < 1e-5
    elif case.want == "other":
        assert isinstance(found, float) and abs(found - before) > 1e-4
    elif isinstance(case.want, float):
        assert found == pytest.approx(case.want, abs=1e-12)
    else:
        assert isinstance(found, str), f"scored {found}, expected a refusal"
        assert any(words in found for words in case.want.split("|")), found
        assert len(found.splitlines()) == 1


@pytest.mark.parametrize("text", ["", "\n", "id\n", "\ufeff", "just words\n", "a,b\n1,2\n"])
@pytest.mark.parametrize("competition_id", [CACTUS, SPOOKY, LEAF, NOMAD, JIGSAW, EN, APTOS, TAXI])
def test_files_without_the_columns_are_refused(competition_id: str, text: str) -> None:
    try:
        submission = read_table(io.BytesIO(text.encode()))
    except ValueError:
        pytest.skip("pandas reads no table from this")
    assert isinstance(outcome(competition_id, submission), str)


def test_a_text_of_which_a_token_is_missing_equals_any_other_missing_token() -> None:
    answers = read_table(io.BytesIO(b'"id","after"\n"0_0","NA"\n"0_1","one"\n"0_2",""\n'))
    said = b"id,after\n0_0,null\n0_1,one\n0_2,nan\n"
    assert grade(EN, read_table(io.BytesIO(said)), answers) == 1.0
    assert grade(RU, read_table(io.BytesIO(said.replace(b"null", b"none"))), answers) == 2 / 3


def test_numbers_are_compared_as_pandas_writes_them() -> None:
    answers = read_table(io.BytesIO(b"id,after\na,5\nb,five\n"))
    whole = b"id,after\na,5\nb,6\n"
    split = b"id,after\na,5.0\nb,6.5\n"
    assert grade(EN, read_table(io.BytesIO(whole)), answers) == 0.5
    assert grade(EN, read_table(io.BytesIO(split)), answers) == 0.0


def test_jigsaw_takes_an_id_twice_if_as_many_rows_remain() -> None:
    answers = answers_of(JIGSAW)
    submission = answers.astype(dict.fromkeys(answers.columns[1:], float))
    scored, unscored = list(answers["id"][:2]), list(answers["id"][-2:])
    assert (answers.iloc[-2:, 1:] == -1).all(axis=None)
    twice = submission.replace({"id": {scored[0]: scored[1]}})
    assert 0.5 < grade(JIGSAW, twice, answers) < 1
    with pytest.raises(InvalidSubmissionError, match="duplicate"):
        grade(JIGSAW, submission.replace({"id": {scored[0]: unscored[0]}}), answers)
    # Rows that nobody scores may be anything.
    assert grade(JIGSAW, submission.replace({"id": {unscored[0]: unscored[1]}}), answers) == 1.0


def test_a_refusal_tells_nothing_of_the_answers() -> None:
    answers = answers_of(CACTUS)
    for edit in (cell("id", "nobody"), repeat_key("id", 0, 1), rows(slice(1, None))):
        submission = reread(edit(submission_of(CACTUS, answers)))
        words = outcome(CACTUS, submission)
        assert isinstance(words, str)
        assert not any(str(key) in words for key in answers["id"])
