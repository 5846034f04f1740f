"""Leaderboards: the medal rule for every N with ties, verification, and every way to be wrong."""

from __future__ import annotations

import csv
import hashlib
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from agent_tools.errors import UserError
from agent_tools.mle_bench import leaderboards, medals
from agent_tools.mle_bench.leaderboards import Board, lite_boards, read_board, reported_board
from agent_tools.mle_bench.reports import rank
from tests.agent_tools.mle_layout import write_board

LITE = "spooky-author-identification"
MEDALS = ("gold", "silver", "bronze")


def naive_ranks(n: int) -> list[int]:
    """Ranks of gold, silver and bronze as the facts page tells them, without our code."""
    if n <= 99:
        return [max(1, math.floor(n * share / 100)) for share in (10, 20, 40)]
    if n <= 249:
        return [10, math.floor(n * 20 / 100), math.floor(n * 40 / 100)]
    if n <= 999:
        return [10 + math.floor(n * 2 / 1000), 50, 100]
    return [10 + math.floor(n * 2 / 1000), math.floor(n * 5 / 100), math.floor(n * 10 / 100)]


def board_of(scores: list[float]) -> Board:
    limits = leaderboards.positional_thresholds(scores)
    return Board("x", "unverified", tuple(scores), scores[0] < scores[-1], limits, None, ())


def given(board: Board, score: float) -> tuple[str | None, bool]:
    report = rank("x", score, board, exists=True, path="s.csv")
    flags = [name for name in ("gold", "silver", "bronze") if getattr(report, f"{name}_medal")]
    assert len(flags) <= 1 and report.any_medal == bool(flags)
    return (flags[0] if flags else None), report.above_median


def test_medals_equal_a_naive_restatement_for_every_team_count_with_ties() -> None:
    rng = np.random.default_rng(0)
    for n in range(1, 5001):
        # Few distinct values, so that thresholds lie inside ties.
        scores = np.sort(np.round(rng.normal(size=n), int(rng.integers(0, 3)))).tolist()
        if n % 2:
            scores.reverse()
        lower = scores[0] < scores[-1]
        ranks = naive_ranks(n)
        limits = [scores[place - 1] for place in ranks]
        half = n // 2
        middle = scores[half] if n % 2 else (scores[half - 1] + scores[half]) / 2
        board = board_of(scores)
        tries = {scores[p] for r in (1, *ranks, n, half + 1) for p in (r - 1, r) if p < n}
        for score in sorted(tries | {value + 1e-5 for value in tries}):
            beaten = [score <= limit if lower else score >= limit for limit in limits]
            medal = next((m for m, b in zip(MEDALS, beaten, strict=True) if b), None)
            above = score < middle if lower else score > middle
            assert given(board, score) == (medal, above), (n, score)


def test_sorted_leaderboards_give_the_same_thresholds_in_both_harness_parts() -> None:
    rng = np.random.default_rng(1)
    for n in (1, 7, 99, 100, 249, 250, 999, 1000, 1314):
        scores = np.sort(rng.normal(size=n)).tolist()
        assert leaderboards.positional_thresholds(scores) == medals.medal_thresholds(scores, True)


def test_thresholds_are_taken_by_position_and_never_sorted(tmp_path: Path) -> None:
    scores = [float(n) for n in range(1, 101)]
    scores[9], scores[60] = scores[60], scores[9]  # rank 10 now holds 61
    board = read_board(write_board(tmp_path / "leaderboard.csv", scores), "some-competition")
    assert board.thresholds.gold == 61.0 and board.thresholds.silver == 20.0
    assert board.lower_is_better and any("not sorted" in note for note in board.notes)


def test_scores_are_parsed_as_mle_bench_parses_leaderboards(tmp_path: Path) -> None:
    """pandas' default parser is not exact, and MLE-bench uses it here (not for submissions)."""
    rng = np.random.default_rng(0)
    texts = [repr(value) for value in sorted(rng.random(3000).tolist())]
    path = write_board(tmp_path / "leaderboard.csv", texts)
    board = read_board(path, "some-competition")
    assert list(board.scores) == pd.read_csv(path)["score"].tolist()
    assert list(board.scores) != [float(text) for text in texts]


def test_rows_without_a_score_count_as_teams_and_are_noted(tmp_path: Path) -> None:
    scores: list[object] = [*range(1, 50), ""]
    board = read_board(write_board(tmp_path / "l.csv", scores), "some-competition")
    assert len(board.scores) == 50 and board.thresholds.gold == 5.0
    assert board.thresholds.median == 25.0  # of the 49 that there are
    assert any("no score" in note for note in board.notes)


# --- the list of MLE-bench Lite ------------------------------------------------------------------


def test_the_list_has_the_22_competitions_with_sizes_hashes_and_directions() -> None:
    boards = lite_boards()
    assert len(boards) == 22 and list(boards) == sorted(boards)
    for board in boards.values():
        assert len(board.sha256) == 64 and board.size > 2_000
        better = [round(score, 3) for score in (board.gold, board.bronze, board.median)]
        assert better == sorted(better, reverse=not board.lower_is_better), board.competition_id
    assert boards[LITE].lower_is_better and boards[LITE].silver == 0.26996
    assert boards["aptos2019-blindness-detection"].silver is None


def listed(
    monkeypatch: pytest.MonkeyPatch, folder: Path, path: Path, *, sha256: str | None = None
) -> None:
    """Put a file of ours into the list, as if it were the competition's leaderboard."""
    with leaderboards.REPORTED.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        if row["competition"] == LITE:
            row["leaderboard_csv_bytes"] = str(path.stat().st_size)
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            row["leaderboard_csv_sha256"] = sha256 or digest
    listing = folder / "list.csv"
    with listing.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    monkeypatch.setattr(leaderboards, "REPORTED", listing)
    lite_boards.cache_clear()


@pytest.fixture(autouse=True)
def _fresh_list(monkeypatch: pytest.MonkeyPatch) -> object:
    yield
    monkeypatch.undo()
    lite_boards.cache_clear()


def lite_file(tmp_path: Path) -> Path:
    return write_board(tmp_path / "leaderboard.csv", [n / 1000 for n in range(1, 1245)])


def test_a_pulled_file_is_verified_by_size_and_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = lite_file(tmp_path)
    listed(monkeypatch, tmp_path, path)
    board = read_board(path, LITE)
    assert board.origin == "verified" and board.notes == ()
    assert board.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert board.thresholds.gold == 0.012 and board.thresholds.bronze == 0.124


def test_a_wrong_size_and_a_wrong_hash_are_refused_with_the_way_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = lite_file(tmp_path)
    with pytest.raises(UserError, match=r"bytes where the list has 67,155: .*git lfs pull"):
        read_board(path, LITE)
    listed(monkeypatch, tmp_path, path, sha256="0" * 64)
    with pytest.raises(UserError, match=r"SHA-256 [0-9a-f]{12}… where the list has 000000000000…"):
        read_board(path, LITE)
    assert read_board(path, LITE, verify=False).origin == "unverified"


def test_an_lfs_pointer_and_a_missing_file_say_what_to_run(tmp_path: Path) -> None:
    path = tmp_path / "leaderboard.csv"
    with pytest.raises(UserError, match=r"no leaderboard .*git lfs pull"):
        read_board(path, LITE)
    path.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 9\n")
    with pytest.raises(UserError, match=r"Git LFS pointer.*git lfs pull.*leaderboard.csv"):
        read_board(path, LITE)


# --- leaderboards that are not right -------------------------------------------------------------


def test_a_leaderboard_sorted_the_wrong_way_is_refused_where_the_direction_is_known(
    tmp_path: Path,
) -> None:
    path = write_board(tmp_path / "leaderboard.csv", range(100, 0, -1))
    with pytest.raises(UserError, match=r"sorted worst first.*lower is better in spooky"):
        read_board(path, LITE, verify=False)
    with pytest.raises(UserError, match="sorted worst first"):
        read_board(path, "our-own", lower_is_better=True)
    # Where nobody knows, MLE-bench's inference decides.
    assert not read_board(path, "some-competition").lower_is_better


def test_an_all_tied_leaderboard_reads_as_higher_is_better_with_a_note(tmp_path: Path) -> None:
    board = read_board(write_board(tmp_path / "l.csv", [0.5] * 60), "some-competition")
    assert not board.lower_is_better and any("tied" in note for note in board.notes)
    report = rank("some-competition", 0.5, board, exists=True, path="s.csv")
    assert report.gold_medal and not report.above_median


def test_twenty_rows_are_one_page_of_an_api_and_refused(tmp_path: Path) -> None:
    path = write_board(tmp_path / "leaderboard.csv", range(1, 21))
    with pytest.raises(UserError, match=r"only 20 rows.*one page"):
        read_board(path, "some-competition")
    assert read_board(path, "some-competition", allow_short=True).thresholds.gold == 2.0
    assert read_board(write_board(path, range(1, 22)), "some-competition").thresholds.gold == 2.0


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("rank,team\n1,a\n", "column `score`"),
        ("score\n", "no rows"),
        ("score\ngood\n", "not a table of scores"),
        ("", "not a table of scores"),
        ("score\n\xff\xfe", "not a table of scores"),
    ],
)
def test_a_file_that_is_no_leaderboard_is_a_user_error(
    tmp_path: Path, text: str, word: str
) -> None:
    path = tmp_path / "leaderboard.csv"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=word):
        read_board(path, "some-competition")


# --- reported thresholds -------------------------------------------------------------------------


def test_reported_thresholds_are_marked_and_exist_for_lite_only() -> None:
    board = reported_board(LITE)
    assert board.origin == "reported" and board.scores == () and board.sha256 is None
    assert any("never for a claim" in note for note in board.notes)
    assert rank(LITE, 0.2, board, exists=True, path="s").silver_medal
    with pytest.raises(UserError, match="22 competitions"):
        reported_board("diamonds-price")


def test_where_nobody_reported_silver_bronze_is_what_can_be_said() -> None:
    board = reported_board("aptos2019-blindness-detection")
    assert math.isnan(board.thresholds.silver) and any("silver" in note for note in board.notes)
    report = rank("aptos2019-blindness-detection", 0.92, board, exists=True, path="s")
    assert report.any_medal and report.bronze_medal and not report.silver_medal
    assert report.to_marked_dict()["silver_threshold"] is None
    assert "never" in report.to_marked_dict()["reported_thresholds"]
