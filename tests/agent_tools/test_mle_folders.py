"""Competition folders of both harnesses, read by ours; and ours as MLE-bench would read them."""

from __future__ import annotations

import inspect
from importlib import import_module
from pathlib import Path

import pandas as pd
import pytest
from ruamel.yaml import YAML

from agent_tools.errors import UserError
from agent_tools.mle_bench import folders, grading
from agent_tools.mle_bench.folders import FolderRegistry, read_config, registry_of, source_of
from agent_tools.mle_bench.leaderboards import lite_boards
from agent_tools.mle_bench.prepare import prepare_competition
from agent_tools.mle_bench.registry import COMPETITIONS, competition_ids, load_competition
from agent_tools.mle_bench.reports import grade_submission
from agent_tools.paths import repo_root
from tests.agent_tools.mle_layout import Checkout, make_checkout


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkout:
    monkeypatch.delenv(folders.CHECKOUT_VARIABLE, raising=False)
    monkeypatch.delenv(folders.DATA_VARIABLE, raising=False)
    return make_checkout(tmp_path).add("some-competition").add("another-one")


def registry(checkout: Checkout) -> FolderRegistry:
    return registry_of(checkout=checkout.root, data_dir=checkout.data)


def test_ours_the_checkouts_and_lite_are_one_registry(checkout: Checkout) -> None:
    ids = registry(checkout).ids()
    assert ids == sorted(ids) and len(ids) == len(set(ids))
    assert {"diamonds-price", "some-competition", "another-one", *lite_boards()} <= set(ids)


def test_a_competition_of_a_checkout_is_read_as_its_config_says(checkout: Checkout) -> None:
    found = registry(checkout).get("some-competition")
    private = checkout.data / "some-competition" / "prepared" / "private"
    assert found.name == "A competition" and found.competition_type == "simple"
    assert found.description == "# some-competition\n"
    assert found.answers == found.gold_submission == private / "test.csv"
    assert found.sample_submission.parent == private.parent / "public"
    assert found.grade_fn == "mlebench.competitions.some-competition.grade:grade"
    assert found.roots == (checkout.root,) and found.lower_is_better is None
    assert found.missing() is None
    assert "public" in str(found.missing(grading_only=False))


def test_gold_submission_of_the_config_is_used(checkout: Checkout) -> None:
    path = checkout.folder("some-competition") / "config.yaml"
    line = "dataset:\n  gold_submission: some-competition/prepared/private/gold.csv"
    path.write_text(path.read_text().replace("dataset:", line))
    assert registry(checkout).get("some-competition").gold_submission.name == "gold.csv"


def test_the_checkout_may_be_named_by_the_environment(
    checkout: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(folders.CHECKOUT_VARIABLE, str(checkout.root))
    monkeypatch.setenv(folders.DATA_VARIABLE, str(checkout.data))
    assert registry_of().get("some-competition").missing() is None


def test_the_default_data_folder_is_mle_benchs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(folders.DATA_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert folders.mlebench_data_dir() == tmp_path / "mle-bench" / "data"


def test_any_folder_of_competitions_is_a_source(checkout: Checkout) -> None:
    made = source_of(checkout.competitions, checkout.data)
    assert made.root == checkout.root  # found from the description's path
    found = FolderRegistry((made,)).get("another-one")
    assert found.spec.grade_fn.startswith("mlebench.competitions.another-one")


def test_a_lite_competition_needs_no_checkout_and_uses_our_grader(tmp_path: Path) -> None:
    made = FolderRegistry((), lite_data=tmp_path)
    for id_, known in lite_boards().items():
        found = made.get(id_)
        name = id_.replace("-", "_")
        assert found.grade_fn == f"agent_tools.mle_bench.lite.graders:{name}"
        module, _, function = found.grade_fn.partition(":")
        assert callable(getattr(import_module(module), function))
        assert found.lower_is_better == known.lower_is_better and found.leaderboard is None
        assert f"private/{found.answers.name}" in found.checksums
    theirs = FolderRegistry((), lite_data=tmp_path, graders="theirs").get("leaf-classification")
    assert theirs.grade_fn == "mlebench.competitions.leaf-classification.grade:grade"


def test_in_a_checkout_lite_competitions_get_our_grader_unless_theirs_is_asked_for(
    checkout: Checkout,
) -> None:
    checkout.add("leaf-classification")
    ours = registry(checkout).get("leaf-classification")
    assert ours.grade_fn == "agent_tools.mle_bench.lite.graders:leaf_classification"
    assert ours.roots == (repo_root(),) and ours.leaderboard is not None
    theirs = registry_of(checkout=checkout.root, data_dir=checkout.data, graders="theirs")
    assert theirs.get("leaf-classification").roots == (checkout.root,)


# --- our folders, read the way MLE-bench reads ---------------------------------------------------


@pytest.mark.parametrize("competition_id", competition_ids())
def test_our_folders_hold_what_mle_bench_reads(competition_id: str) -> None:
    """MLE-bench's registry, restated: keys, paths from the root, import strings, parameters."""
    folder = COMPETITIONS / competition_id
    config = YAML(typ="safe", pure=True).load((folder / "config.yaml").read_text())
    assert config["id"] == folder.name and "_" not in folder.name
    assert all(isinstance(config[key], str) and config[key] for key in ("name", "competition_type"))
    assert (repo_root() / config["description"]).read_text()
    for key, part in (("answers", "private"), ("sample_submission", "public")):
        assert config["dataset"][key].startswith(f"{competition_id}/prepared/{part}/")
    assert set(config["grader"]) == {"name", "grade_fn"}
    module, name = config["grader"]["grade_fn"].split(":")
    grade = getattr(import_module(module), name)
    assert list(inspect.signature(grade).parameters) == ["submission", "answers"]
    module, name = config["preparer"].split(":")
    prepare = getattr(import_module(module), name)
    assert list(inspect.signature(prepare).parameters) == ["raw", "public", "private"]
    board = folder / "leaderboard.csv"
    if board.is_file():  # fitted last
        first = board.read_text().splitlines()[0].split(",")
        assert "score" in first


def test_our_folders_go_through_the_same_reader(tmp_path: Path) -> None:
    found = registry_of(data_dir=tmp_path).get("diamonds-price")
    assert found.lower_is_better is True and found.board().lower_is_better
    assert len(found.board().scores) == 100 and found.board().origin == "unverified"


@pytest.fixture(scope="module")
def prepared_tweets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our data folder with tweet-sentiment prepared in it."""
    data = tmp_path_factory.mktemp("data")
    prepare_competition("tweet-sentiment", data)
    return data


@pytest.mark.parametrize("error", [0.0, 1.005, 1.04, 1.1, 2.0])
def test_our_competition_is_graded_alike_by_three_readers(
    prepared_tweets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: float
) -> None:
    """Our suite's grading, the compatible one, and MLE-bench's steps restated here."""
    monkeypatch.setenv("SELFEVO_DATA", str(prepared_tweets))
    found = registry_of(data_dir=tmp_path).get("tweet-sentiment")
    answers = pd.read_csv(found.answers, float_precision="round_trip")
    path = tmp_path / "submission.csv"
    answers.assign(target=answers["target"] + error).to_csv(path, index=False)

    report = grade_submission(found, path, found.board()).report
    ours = grading.grade(load_competition("tweet-sentiment"), path)
    assert (report.score, report.is_lower_better) == (ours.score, ours.is_lower_better)
    for name in ("gold", "silver", "bronze"):
        assert getattr(report, f"{name}_medal") == getattr(ours, name)
    assert report.above_median == ours.above_median

    config = YAML(typ="safe", pure=True).load(
        (COMPETITIONS / "tweet-sentiment" / "config.yaml").read_text()
    )
    module, name = config["grader"]["grade_fn"].split(":")
    data = prepared_tweets / "competitions"
    theirs = getattr(import_module(module), name)(
        pd.read_csv(path, float_precision="round_trip"),
        pd.read_csv(data / config["dataset"]["answers"], float_precision="round_trip"),
    )
    scores = pd.read_csv(COMPETITIONS / "tweet-sentiment" / "leaderboard.csv")["score"]
    assert round(theirs, 5) == report.score
    limits = [scores.iloc[rank - 1] for rank in (10, 20, 40)]
    assert [report.gold_threshold, report.silver_threshold, report.bronze_threshold] == limits
    assert report.median_threshold == scores.median()
    assert report.any_medal == (round(theirs, 5) <= limits[2])


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("id_", ["my_task", "spooky_author-identification", "a__b"])
def test_an_id_with_an_underscore_is_refused(checkout: Checkout, id_: str) -> None:
    checkout.add(id_)
    with pytest.raises(UserError, match=r"underscore.*hyphens"):
        registry(checkout).get(id_)


@pytest.mark.parametrize("id_", ["", "..", "../x", "a/b", "a b", ".hidden"])
def test_an_id_that_is_no_folder_name_is_refused(checkout: Checkout, id_: str) -> None:
    with pytest.raises(UserError, match="competition id"):
        registry(checkout).get(id_)


def test_an_unknown_id_names_some_that_exist(checkout: Checkout) -> None:
    with pytest.raises(
        UserError, match=r"no competition 'nope': choose one of aerial-cactus.*more"
    ):
        registry(checkout).get("nope")


def test_one_id_in_two_folders_is_refused(checkout: Checkout, tmp_path: Path) -> None:
    other = make_checkout(tmp_path / "other").add("some-competition")
    both = registry_of(checkout=checkout.root, folders=[other.competitions], data_dir=checkout.data)
    with pytest.raises(UserError, match=r"some-competition is in .* and "):
        both.get("some-competition")


def test_a_folder_without_competitions_is_no_source(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no competition.*openai/mle-bench"):
        source_of(tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "word"),
    [
        ("id: some-competition", "id: other", "id is 'other'"),
        ("name: A competition", "title: x", "needs a text 'name'"),
        ("name: mean-absolute-error", "name: 3", "needs a text 'grader.name'"),
        ("dataset:", "data:", "needs a mapping 'dataset'"),
        ("  answers:", "  answer:", "needs a text 'dataset.answers'"),
        ("grade:grade", "grade.grade", "grader.grade_fn must be package.module:function"),
        ("prepare:prepare", "prepare", "preparer must be package.module:function"),
        ("description.md", "nowhere.md", "does not exist"),
        ("id: some-competition", "id: [", "is not YAML"),
    ],
)
def test_a_wrong_config_names_file_and_key(
    checkout: Checkout, old: str, new: str, word: str
) -> None:
    path = checkout.folder("some-competition") / "config.yaml"
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(UserError) as caught:
        read_config(source_of(checkout.root, checkout.data), "some-competition")
    assert word in str(caught.value) and "config.yaml" in str(caught.value)


def test_a_config_that_is_a_list_is_refused(checkout: Checkout) -> None:
    (checkout.folder("some-competition") / "config.yaml").write_text("- 1\n")
    with pytest.raises(UserError, match="must be a mapping"):
        read_config(source_of(checkout.root, checkout.data), "some-competition")


def test_missing_kaggle_data_says_what_to_fetch_where_and_how_it_is_verified(
    tmp_path: Path,
) -> None:
    found = FolderRegistry((), lite_data=tmp_path).get("leaf-classification")
    with pytest.raises(UserError) as caught:
        found.require_prepared()
    text = str(caught.value)
    assert "\n" not in text
    for word in (
        "kaggle.com/c/leaf-classification/rules",
        str(tmp_path / "leaf-classification"),
        "MD5 043bdec7fadb7922978b7484217b6007",
        "lite-prepare leaf-classification",
    ):
        assert word in text
    with pytest.raises(UserError, match=r"--checkout FOLDER or set SELFEVO_MLEBENCH"):
        found.board()


def test_missing_data_of_ours_names_our_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SELFEVO_DATA", str(tmp_path))
    with pytest.raises(
        UserError, match="prepare --suite offline-small-v0 --competition diamonds-price"
    ):
        registry_of(data_dir=tmp_path).get("diamonds-price").require_prepared()


def test_md5_and_table_hashes_cover_what_mle_bench_covers(tmp_path: Path) -> None:
    for name in ("a.csv", "b.json", "c.png", "d.txt"):
        (tmp_path / name).write_text("")
    (tmp_path / "folder.csv").mkdir()
    empty = "d41d8cd98f00b204e9800998ecf8427e"
    assert folders.table_hashes(tmp_path) == {"a.csv": empty, "b.json": empty}
