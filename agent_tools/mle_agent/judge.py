"""Grade a group of runs, in a process of its own: `python -m agent_tools.mle_agent judge OUT`.

The search never sees an answer and this process never runs a script. Rows of `scores.jsonl` are the
submissions that the runs selected by themselves. `best_on_test.jsonl` has, for each run, the
candidate that scores best on the test: it selects by the answers, so it is shown beside the result
and never used.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from agent_tools.errors import InfraError, UserError
from agent_tools.mle_agent import leaks
from agent_tools.mle_agent.executor import SUBMISSION
from agent_tools.mle_agent.journal import Measure
from agent_tools.mle_agent.run_group import Group, Task, write_rows
from agent_tools.mle_agent.sources import LITE, folder_competition
from agent_tools.mle_bench import grading, reports
from agent_tools.mle_bench.evaluator import evaluator_hash
from agent_tools.mle_bench.folders import FolderCompetition
from agent_tools.mle_bench.grade_process import score_submission
from agent_tools.mle_bench.grading import GradeReport, grade
from agent_tools.mle_bench.registry import load_competition, load_suite
from agent_tools.paths import repo_root

_LIMIT_S = 3600.0


def judge_elsewhere(out: Path, data_dir: Path | None) -> None:
    """Grade in a child process. Raises UserError or InfraError with its message."""
    argv = [sys.executable, "-m", "agent_tools.mle_agent", "judge", str(out)]
    if data_dir is not None:
        argv += ["--data-dir", str(data_dir)]
    try:
        done = subprocess.run(
            argv, capture_output=True, text=True, timeout=_LIMIT_S, cwd=repo_root()
        )
    except subprocess.TimeoutExpired as error:
        raise InfraError(f"grading took over {_LIMIT_S:.0f} s: run `{' '.join(argv)}`") from error
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1].removeprefix("error: ")
        kind = UserError if done.returncode == UserError.exit_code else InfraError
        raise kind(f"grading failed: {last}")


def judge(group: Group, data_dir: Path | None = None) -> None:
    """Grade all ended runs of a group and write its three files of rows.

    Raises `UserError` where data or a leaderboard is missing.
    """
    rows: list[dict[str, Any]] = []
    best_rows: list[dict[str, Any]] = []
    found_rows: list[dict[str, Any]] = []
    graders: dict[str, Grader] = {}
    for task in group.about.tasks():
        if not group.is_done(task):
            continue
        if task.competition not in graders:
            graders[task.competition] = _grader(group.about.suite, task.competition, data_dir)
        grader = graders[task.competition]
        folder = group.run_folder(task)
        findings = leaks.scan(
            _files(folder / "code"),
            _files(folder / "logs"),
            folder / "submission" / SUBMISSION,
            grader.private_dir,
        )
        for fold in grader.folds:
            report = grader.grade(folder / "submission" / SUBMISSION, fold)
            rows.append(_row(group, task, grader, void(report, findings), fold))
        best = void(_best(grader, folder), findings)
        best_rows.append(_row(group, task, grader, best, None))
        found_rows += [
            {"competition": task.competition, "seed": task.seed, "run": folder.name} | asdict(found)
            for found in findings
        ]
    write_rows(group.out / "findings.jsonl", found_rows)
    write_rows(group.out / "best_on_test.jsonl", best_rows)
    write_rows(group.out / "scores.jsonl", rows)


def fault(suite: str, competition_id: str, submission: bytes, data_dir: Path | None) -> str | None:
    """Why a submission could not be graded, or None; nothing about how good it is."""
    if suite != LITE:
        competition = load_competition(competition_id, data_dir, suite=load_suite(suite))
        return grading.score(competition, submission)[1]
    found = folder_competition(competition_id, data_dir)
    found.require_prepared()
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / SUBMISSION
        path.write_bytes(submission)
        scored = score_submission(found.spec, path, tell_score=False)
    return None if scored.score is not None else scored.error or "it has no score"


@dataclass(frozen=True)
class Grader:
    """How one competition is graded. `grade` takes a file and a fold, None for the whole test.

    `board` is what scores are ranked in: ``fitted`` for our own fields; for MLE-bench's, the
    `Board.origin` of the user's file.
    """

    grade: Callable[[Path, int | None], GradeReport]
    private_dir: Path
    lower_is_better: bool
    split: str
    folds: tuple[int | None, ...]
    evaluator: str
    board: str


def _grader(suite: str, competition_id: str, data_dir: Path | None) -> Grader:
    if suite == LITE:
        return _lite_grader(folder_competition(competition_id, data_dir))
    chosen = load_suite(suite)
    competition = load_competition(competition_id, data_dir, suite=chosen)
    folds = tuple(range(competition.folds)) if competition.folds > 1 else ()
    return Grader(
        grade=lambda path, fold: grade(competition, path, fold=fold),
        private_dir=competition.private_dir,
        lower_is_better=competition.lower_is_better,
        split=competition.split,
        folds=(None, *folds),
        evaluator=evaluator_hash(chosen),
        board="fitted",
    )


def _lite_grader(found: FolderCompetition) -> Grader:
    """MLE-bench's rules, by `agent_tools.mle_bench.reports`; needs the real leaderboard."""
    board = found.board()

    def graded(path: Path, fold: int | None) -> GradeReport:
        made = reports.grade_submission(found, path if path.is_file() else None, board)
        report = made.report
        return GradeReport(
            competition_id=found.id,
            which="private",
            score=report.score,
            valid=report.valid_submission,
            error=made.error,
            percentile=made.percentile or 0.0,
            any_medal=report.any_medal,
            gold=report.gold_medal,
            silver=report.silver_medal,
            bronze=report.bronze_medal,
            above_median=report.above_median,
            gold_threshold=report.gold_threshold,
            silver_threshold=report.silver_threshold,
            bronze_threshold=report.bronze_threshold,
            median_threshold=report.median_threshold,
            is_lower_better=report.is_lower_better,
            submission_exists=report.submission_exists,
        )

    return Grader(
        grade=graded,
        private_dir=found.private_dir,
        lower_is_better=board.lower_is_better,
        split="test",
        folds=(None,),
        evaluator=reports.evaluator_hash(found, board),
        board=board.origin,
    )


def void(report: GradeReport, findings: list[leaks.Finding]) -> GradeReport:
    """The report as it stands, or that of an invalid submission where anything was found."""
    if not findings:
        return report
    return replace(
        report,
        score=None,
        valid=False,
        error=f"void: {findings[0].text()}",
        percentile=0.0,
        any_medal=False,
        gold=False,
        silver=False,
        bronze=False,
        above_median=False,
    )


def _best(grader: Grader, folder: Path) -> GradeReport:
    """The report of the candidate with the best test score; of the submission where none."""
    lower = grader.lower_is_better
    best = grader.grade(folder / "submission" / SUBMISSION, None)
    for path in _files(folder / "candidates"):
        report = grader.grade(path, None)
        if report.score is not None and (
            best.score is None
            or Measure(report.score, lower).better_than(Measure(best.score, lower))
        ):
            best = report
    return best


def _row(
    group: Group, task: Task, grader: Grader, report: GradeReport, fold: int | None
) -> dict[str, Any]:
    about = group.about
    cost = group.record(task)["cost"]
    medal = next((m for m in ("gold", "silver", "bronze") if getattr(report, m)), None)
    return {
        "commit": about.commit,
        "checkpoint": about.checkpoint or about.model,
        "suite": about.suite,
        "suite_version": about.suite_version,
        "split": grader.split,
        "fold": fold,
        "seed": task.seed,
        "competition": task.competition,
        "score": report.score,
        "percentile": report.percentile,
        "thresholds": {
            "gold": report.gold_threshold,
            "silver": report.silver_threshold,
            "bronze": report.bronze_threshold,
            "median": report.median_threshold,
        },
        "medal": medal,
        "above_median": report.above_median,
        "valid": report.valid,
        "error": report.error,
        "cost": cost,
        "evaluator_hash": grader.evaluator,
        "board": grader.board,
        "campaign": about.campaign,
        "round": about.round,
        # the same again under the names of `rl.evaluate`'s rows
        "index": 0,
        "status": "ok" if report.valid else "error",
        "any_medal": report.any_medal,
        **{name: medal == name for name in ("gold", "silver", "bronze")},
        "cpu_s": cost["cpu_s"],
        "wall_s": cost["wall_s"],
        "tokens": cost["tokens"],
    }


def _files(folder: Path) -> Iterable[Path]:
    """Ordinary files of a folder the agent filled; links are not followed."""
    return sorted(p for p in folder.rglob("*") if p.is_file() and not p.is_symlink())
