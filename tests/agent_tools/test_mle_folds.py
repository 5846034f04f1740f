"""Private folds, text answers and sealed splits: what full-size suites add to a competition."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from agent_tools.errors import UserError
from agent_tools.mle_bench import cli, grading, prepare, registry
from agent_tools.mle_bench.facts import TaskFacts
from agent_tools.mle_bench.metrics import InvalidSubmissionError, grade_with


def competition_of(folder: Path, rows: int = 90) -> registry.Competition:
    private = folder / "private"
    private.mkdir(parents=True)
    answers = pd.DataFrame({"id": np.arange(rows) + 1000, "target": np.arange(rows) / 7})
    answers.to_csv(private / "test.csv", index=False)
    return registry.Competition(
        id="made-up",
        split="val",
        strata="table",
        metric="rmse",
        lower_is_better=True,
        grade_fn="agent_tools.mle_bench.competitions.tweet-sentiment.grade:grade",
        public_dir=folder / "public",
        private_dir=private,
        dev_public_dir=None,
        dev_private_dir=None,
        leaderboard=tuple(float(n) for n in range(10)),
        dev_leaderboard=None,
        description="",
        facts=TaskFacts("regression", "rmse", 9, 1, 0, 0, 0, 0.0, 0, 0.0, False),
    )


def folded(tmp_path: Path, rows: int = 90) -> registry.Competition:
    """A regression with three folds; the error of `answer + fold` is the fold's number."""
    competition = competition_of(tmp_path, rows)
    answers = pd.read_csv(competition.answers("private"))
    folds = pd.DataFrame({"id": answers["id"], "fold": np.arange(rows) % 3})
    folds.sample(frac=1, random_state=0).to_csv(
        competition.private_dir / registry.FOLDS_FILE, index=False
    )
    boards = tuple(tuple(float(k + 10 * fold) for k in range(10)) for fold in range(3))
    return replace(competition, folds=3, fold_leaderboards=boards)


def shifted(competition: registry.Competition) -> bytes:
    answers = pd.read_csv(competition.answers("private"))
    folds = pd.read_csv(competition.private_dir / registry.FOLDS_FILE).set_index("id")["fold"]
    answers["target"] += answers["id"].map(folds)
    return answers.sample(frac=1, random_state=1).to_csv(index=False).encode()


def test_a_fold_scores_its_rows_alone_and_ranks_in_its_own_field(tmp_path: Path) -> None:
    competition = folded(tmp_path)
    for fold in range(3):
        report = grading.grade(competition, shifted(competition), fold=fold)
        assert (report.score, report.fold) == (pytest.approx(fold, abs=1e-5), fold)
        assert report.gold_threshold == competition.fold_leaderboards[fold][0]
    assert report.gold and report.percentile == 100.0  # 2 is better than all of 20 … 29


def test_all_parts_come_from_one_reading_and_fail_together(tmp_path: Path) -> None:
    competition = folded(tmp_path)
    values, error = grading.scores(competition, shifted(competition), parts=(None, 0, 1, 2))
    assert error is None
    assert values == pytest.approx([np.sqrt(5 / 3), 0, 1, 2], abs=1e-4)
    broken = shifted(competition).replace(b"\n", b"\nx", 1)  # one wrong id, in one fold
    assert grading.scores(competition, broken, parts=(None, 0, 1, 2))[0] == []


@pytest.mark.parametrize(("which", "fold"), [("private", 3), ("private", -1), ("dev", 0)])
def test_an_unknown_fold_is_refused(tmp_path: Path, which: registry.Which, fold: int) -> None:
    competition = folded(tmp_path)
    with pytest.raises(UserError, match=f"no fold {fold}"):
        competition.check_fold(which, fold)


def test_a_competition_without_folds_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="leave it out"):
        competition_of(tmp_path).field("private", 0)


def test_texts_are_right_only_when_equal_to_the_letter() -> None:
    answers = pd.DataFrame({"id": [1, 2, 3, 4], "target": ["AH B", "x", None, "y"]})
    given = pd.DataFrame({"id": [4, 3, 2, 1], "target": ["Y", None, "x", "AH B"]})
    assert grade_with("exact", given, answers) == 0.75
    assert grade_with("exact", given.assign(target=["y", "nan", "x", "AH  B"]), answers) == 0.5
    with pytest.raises(InvalidSubmissionError, match="duplicate"):
        grade_with("exact", given.assign(id=1), answers)


def test_a_folder_of_images_has_one_digest_over_names_and_contents(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    (images / "a.png").write_bytes(b"1")
    (images / "b.png").write_bytes(b"2")
    before = prepare._hash_folder(tmp_path)
    assert list(before) == ["images/"]
    (images / "b.png").rename(images / "c.png")
    assert prepare._hash_folder(tmp_path) != before


def test_sealed_data_needs_its_own_flag(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = registry.Suite(
        "s",
        1,
        (
            registry.CompetitionRef("diamonds-price", "train", "table"),
            registry.CompetitionRef("food-reviews", "sealed", "text"),
        ),
    )
    made: list[str] = []
    monkeypatch.setattr(cli, "load_suite", lambda name: suite)
    monkeypatch.setattr(prepare, "prepare_competition", lambda id, *a, **k: made.append(id))
    for argv in (["prepare"], ["prepare", "--sealed"]):
        monkeypatch.setattr("sys.argv", ["x", *argv])
        with pytest.raises(SystemExit):
            cli.main()
    assert made == ["diamonds-price", "food-reviews"]
    monkeypatch.setattr("sys.argv", ["x", "prepare", "--competition", "food-reviews"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2 and "sealed" in capsys.readouterr().err
