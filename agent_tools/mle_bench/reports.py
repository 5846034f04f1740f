"""MLE-bench's grading: its JSONL input, its report fields, its files.

The report file holds exactly what MLE-bench writes. What we know beyond that (why a submission is
invalid, percentile, where the thresholds came from, a hash of the evaluator) lies in a second file
beside it. Graded against reported thresholds there is no grading report at all, only a file whose
name and first key say so.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from agent_tools.errors import UserError
from agent_tools.mle_bench.folders import FolderCompetition, FolderRegistry
from agent_tools.mle_bench.grade_process import GRADE_SECONDS, score_submission
from agent_tools.mle_bench.leaderboards import Board
from agent_tools.mle_bench.medals import percentile, reaches

REPORT = "grading_report"
DETAILS = "grading_details"
REPORTED = "reported_thresholds"
MARK = "reported by third parties; for planning, never for a claim"
WAIT_SECONDS = 5.0


@dataclass(frozen=True)
class CompetitionReport:
    """MLE-bench's report of one submission, field by field.

    The three medal flags exclude each other. A NaN score is valid and earns nothing. Where no
    submission was named, ``submission_path`` is the text ``None``, as MLE-bench writes it.
    """

    competition_id: str
    score: float | None
    gold_threshold: float
    silver_threshold: float
    bronze_threshold: float
    median_threshold: float
    any_medal: bool
    gold_medal: bool
    silver_medal: bool
    bronze_medal: bool
    above_median: bool
    submission_exists: bool
    valid_submission: bool
    is_lower_better: bool
    created_at: datetime
    submission_path: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, in MLE-bench's order."""
        return asdict(self) | {"created_at": self.created_at.isoformat()}

    def to_marked_dict(self) -> dict[str, Any]:
        """The same for reported thresholds: marked, and one that nobody reported is null."""
        values = self.to_dict()
        for name in values:
            if name.endswith("_threshold") and math.isnan(values[name]):
                values[name] = None
        return {"reported_thresholds": MARK} | values

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> CompetitionReport:
        """The report in a file of either harness; keys beyond the fields are ignored.

        Raises `UserError` for a missing field.
        """
        try:
            values = {name: data[name] for name in cls.__dataclass_fields__}
            values["created_at"] = datetime.fromisoformat(values["created_at"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"not a competition report of MLE-bench ({type(error).__name__}: {error}): "
                "grade again"
            ) from None
        return cls(**values)


@dataclass(frozen=True)
class Graded:
    """A report and what MLE-bench's has no field for.

    ``error`` is the reason of an invalid submission. ``percentile`` is None against reported
    thresholds, 0 for an invalid submission.
    """

    report: CompetitionReport
    error: str | None
    grader_fault: bool
    percentile: float | None
    board: Board
    evaluator: str

    def details(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "competition_id": self.report.competition_id,
            "submission_path": self.report.submission_path,
            "error": self.error,
            "grader_fault": self.grader_fault,
            "percentile": self.percentile,
            "leaderboard": self.board.origin,
            "leaderboard_rows": len(self.board.scores),
            "leaderboard_sha256": self.board.sha256,
            "evaluator_sha256": self.evaluator,
            "notes": list(self.board.notes),
        }


@dataclass(frozen=True)
class GradingLine:
    """One line of the JSONL input; ``submission`` None is a run that submitted nothing."""

    competition_id: str
    submission: Path | None


@dataclass(frozen=True)
class GradingFiles:
    """What `grade_jsonl` wrote. ``report`` is the marked file where thresholds were reported."""

    report: Path
    details: Path | None
    graded: tuple[Graded, ...]


def grade_submission(
    competition: FolderCompetition,
    submission: Path | None,
    board: Board,
    *,
    timeout: float = GRADE_SECONDS,
) -> Graded:
    """Grade one file in another process and rank its score in the leaderboard.

    Raises `UserError` where the competition is not prepared or its grader cannot be loaded.
    """
    competition.require_prepared()
    # MLE-bench turns null into a path named None, which does not exist.
    path = Path("None") if submission is None else submission
    scored = score_submission(competition.spec, path, timeout=timeout)
    report = rank(competition.id, scored.score, board, exists=scored.exists, path=str(path))
    place = None
    if board.scores:
        valid = scored.score is not None and not math.isnan(scored.score)
        place = percentile(scored.score, board.scores, board.lower_is_better) if valid else 0.0  # type: ignore[arg-type]
    return Graded(
        report=report,
        error="no submission" if submission is None else scored.error,
        grader_fault=scored.grader_fault,
        percentile=place,
        board=board,
        evaluator=evaluator_hash(competition, board),
    )


def rank(
    competition_id: str, score: float | None, board: Board, *, exists: bool, path: str
) -> CompetitionReport:
    """Medals of a rounded score: as good as a threshold is enough, the median must be beaten."""
    limits, lower = board.thresholds, board.lower_is_better
    place = math.nan if score is None else score
    gold = reaches(place, limits.gold, lower)
    silver = not gold and reaches(place, limits.silver, lower)
    bronze = not gold and not silver and reaches(place, limits.bronze, lower)
    return CompetitionReport(
        competition_id=competition_id,
        score=score,
        gold_threshold=limits.gold,
        silver_threshold=limits.silver,
        bronze_threshold=limits.bronze,
        median_threshold=limits.median,
        any_medal=gold or silver or bronze,
        gold_medal=gold,
        silver_medal=silver,
        bronze_medal=bronze,
        above_median=place < limits.median if lower else place > limits.median,
        submission_exists=exists,
        valid_submission=score is not None,
        is_lower_better=lower,
        created_at=datetime.now(),
        submission_path=path,
    )


def summary(reports: Sequence[CompetitionReport]) -> dict[str, Any]:
    """MLE-bench's grading report: eight totals and the list of competition reports."""
    gold = sum(report.gold_medal for report in reports)
    silver = sum(report.silver_medal for report in reports)
    bronze = sum(report.bronze_medal for report in reports)
    return {
        "total_runs": len(reports),
        "total_runs_with_submissions": sum(report.submission_exists for report in reports),
        "total_valid_submissions": sum(report.valid_submission for report in reports),
        "total_medals": gold + silver + bronze,
        "total_gold_medals": gold,
        "total_silver_medals": silver,
        "total_bronze_medals": bronze,
        "total_above_median": sum(report.above_median for report in reports),
        "competition_reports": [report.to_dict() for report in reports],
    }


def read_grading_lines(path: Path) -> list[GradingLine]:
    """MLE-bench's JSONL: blank lines and lines that start ``#`` or ``//`` are skipped.

    Further keys (``logs_path``, ``code_path``) are ignored. Raises `UserError` with the number of
    the line that is wrong.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text ({error}): name a JSONL file") from None
    lines = []
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.strip()
        if stripped and not stripped.startswith(("#", "//")):
            lines.append(_grading_line(f"{path}, line {number}", stripped))
    return lines


def _grading_line(where: str, text: str) -> GradingLine:
    shape = '{"competition_id": "…", "submission_path": "….csv" or null}'
    try:
        data = json.loads(text)
    except ValueError:
        raise UserError(f"{where}: is not JSON: write {shape}") from None
    if not isinstance(data, dict) or not isinstance(data.get("competition_id"), str):
        raise UserError(f"{where}: needs a text competition_id: write {shape}")
    submission = data.get("submission_path", 0)
    if submission is not None and not isinstance(submission, str):
        raise UserError(f"{where}: needs submission_path, a text or null: write {shape}")
    return GradingLine(data["competition_id"], None if submission is None else Path(submission))


def boards_of(
    competitions: Iterable[FolderCompetition],
    *,
    reported: bool = False,
    verify: bool = True,
    allow_short: bool = False,
) -> dict[str, Board]:
    """The leaderboard of each competition, by id; all are checked before anything is graded."""
    return {
        item.id: item.reported() if reported else item.board(verify=verify, allow_short=allow_short)
        for item in competitions
    }


def grade_jsonl(
    lines: Sequence[GradingLine],
    output_dir: Path,
    registry: FolderRegistry,
    *,
    reported: bool = False,
    verify: bool = True,
    allow_short: bool = False,
    timeout: float = GRADE_SECONDS,
    progress: Callable[[Graded], None] = lambda graded: None,
) -> GradingFiles:
    """Grade all lines, in order, and write the report; ``output_dir`` is made, its parents not.

    Everything that would stop the work halfway (an unknown id, missing data, a leaderboard that is
    not right) is found before the first submission is graded.
    """
    if not output_dir.parent.is_dir():
        raise UserError(f"{output_dir.parent} does not exist: make it, or choose another folder")
    competitions = {id_: registry.get(id_) for id_ in {line.competition_id for line in lines}}
    for competition in competitions.values():
        competition.require_prepared()
    boards = boards_of(
        competitions.values(), reported=reported, verify=verify, allow_short=allow_short
    )
    output_dir.mkdir(exist_ok=True)
    graded = []
    for line in lines:
        id_ = line.competition_id
        one = grade_submission(competitions[id_], line.submission, boards[id_], timeout=timeout)
        progress(one)
        graded.append(one)
    return write_reports(graded, output_dir)


def write_reports(graded: Sequence[Graded], output_dir: Path) -> GradingFiles:
    """Write ``<UTC timestamp>_grading_report.json`` and ``…_grading_details.json``.

    If any thresholds were reported, ``<UTC timestamp>_reported_thresholds.json`` instead: neither
    harness takes it for a grading report.
    """
    main = summary([one.report for one in graded])
    details = {"engine": "selfevo", "competitions": [one.details() for one in graded]}
    if any(one.board.origin == "reported" for one in graded):
        path = _fresh(output_dir, REPORTED)
        main["competition_reports"] = [one.report.to_marked_dict() for one in graded]
        _write(path, {"reported_thresholds": MARK} | main | {"details": details})
        return GradingFiles(path, None, tuple(graded))
    path = _fresh(output_dir, REPORT)
    beside = path.with_name(path.name.replace(REPORT, DETAILS))
    _write(beside, {"report": path.name} | details)
    _write(path, main)
    return GradingFiles(path, beside, tuple(graded))


def evaluator_hash(competition: FolderCompetition, board: Board) -> str:
    """SHA-256, in hex, over what decides a score: grader, its source file, answers, thresholds."""
    digest = hashlib.sha256(competition.grade_fn.encode())
    module = competition.grade_fn.partition(":")[0].replace(".", "/")
    for path in [*(root / f"{module}.py" for root in competition.roots), competition.answers]:
        if path.is_file():
            digest.update(_file_digest(path, path.stat().st_mtime_ns))
    digest.update(repr((board.thresholds, board.lower_is_better)).encode())
    return digest.hexdigest()


@lru_cache(maxsize=128)  # answers may have 100 MB, and each run would read them again
def _file_digest(path: Path, modified_ns: int) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def timestamp() -> str:
    """Now in UTC, as MLE-bench names its files: ``2026-02-26T09-30-00-UTC``."""
    return time.strftime("%Y-%m-%dT%H-%M-%S-%Z", time.gmtime())


def _fresh(folder: Path, name: str) -> Path:
    # The name has seconds only, so a second report within one would replace the first.
    deadline = time.monotonic() + WAIT_SECONDS
    while (path := folder / f"{timestamp()}_{name}.json").exists():
        if time.monotonic() > deadline:
            raise UserError(f"{path} exists and the clock stands still: choose another folder")
        time.sleep(0.05)
    return path


def _write(path: Path, data: dict[str, Any]) -> None:
    # NaN stays the literal NaN: MLE-bench writes it so, and reads it back.
    scratch = path.with_name(f".{path.name}.new")
    scratch.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    scratch.rename(path)
