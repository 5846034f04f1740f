"""The grading benchmark on small tables, and where nothing is prepared."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent_tools.mle_bench.lite.catalogue import LITE
from benchmarks import grading


def test_every_lite_grader_is_timed_on_a_submission_that_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grading, "MOST_ROWS", 200)
    rows = grading.lite_rows(1, tmp_path)
    assert [row["competition"] for row in rows] == list(LITE)
    for row in rows:
        assert row["grade_ms"] > 0 and row["read_ms"] > 0
        assert row["ratio"] == pytest.approx(row["grade_ms"] / row["read_ms"])


def test_an_unprepared_suite_names_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SELFEVO_DATA", str(tmp_path))
    assert grading.main(["--repeats", "1"]) == 2
    assert "python -m agent_tools.mle_bench prepare --suite" in capsys.readouterr().err
    assert grading.main(["--repeats", "0"]) == 2
