"""A small checkout in MLE-bench's layout, written by us: competitions, graders, data, splits."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

GRADE_HELPERS = '''\
"""The exception that graders of a checkout raise."""


class InvalidSubmissionError(Exception):
    """The submission cannot be graded."""
'''

# Mean absolute error of `y`; lower is better.
GRADE = """\
from mlebench.grade_helpers import InvalidSubmissionError


def grade(submission, answers):
    if "y" not in submission.columns:
        raise InvalidSubmissionError("Submission must have a column y")
    if len(submission) != len(answers):
        raise InvalidSubmissionError("Submission must have as many rows as the answers")
    return float((submission["y"] - answers["y"]).abs().mean())
"""

PREPARE = """\
from pathlib import Path


def prepare(raw: Path, public: Path, private: Path):
    (private / "test.csv").write_text((raw / "all.csv").read_text())
"""

CONFIG = """\
id: {id}
name: A competition
competition_type: simple
awards_medals: true
prizes: null
description: mlebench/competitions/{id}/description.md

dataset:
  answers: {id}/prepared/private/{answers}
  sample_submission: {id}/prepared/public/sample_submission.csv

grader:
  name: mean-absolute-error
  grade_fn: mlebench.competitions.{id}.grade:grade

preparer: mlebench.competitions.{id}.prepare:prepare
"""

# 100 teams: gold 10, silver 20, bronze 40, median 50.5.
BOARD = tuple(float(place) for place in range(1, 101))


@dataclass
class Checkout:
    """``root`` is the checkout, ``data`` MLE-bench's data folder."""

    root: Path
    data: Path
    ids: list[str] = field(default_factory=list)

    @property
    def competitions(self) -> Path:
        return self.root / "mlebench" / "competitions"

    def folder(self, competition_id: str) -> Path:
        return self.competitions / competition_id

    def private(self, competition_id: str) -> Path:
        return self.data / competition_id / "prepared" / "private"

    def add(
        self,
        competition_id: str,
        *,
        board: Sequence[object] | None = BOARD,
        grade: str = GRADE,
        answers: str | None = "id,y\n1,0.0\n2,0.0\n",
        answers_name: str = "test.csv",
        config: str = CONFIG,
    ) -> Checkout:
        """Add a competition; ``board`` None leaves the leaderboard out, ``answers`` None the data.

        Submitting ``y = s`` in both rows scores s.
        """
        folder = self.folder(competition_id)
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(config.format(id=competition_id, answers=answers_name))
        (folder / "description.md").write_text(f"# {competition_id}\n")
        (folder / "grade.py").write_text(grade)
        (folder / "prepare.py").write_text(PREPARE)
        if board is not None:
            write_board(folder / "leaderboard.csv", board)
        if answers is not None:
            self.private(competition_id).mkdir(parents=True)
            (self.private(competition_id) / answers_name).write_text(answers)
        self.ids.append(competition_id)
        return self

    def submission(self, path: Path, score: object) -> Path:
        """A file that scores ``score`` here."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"id,y\n1,{score}\n2,{score}\n")
        return path


def make_checkout(folder: Path) -> Checkout:
    """An empty checkout and its data folder."""
    checkout = Checkout(folder / "mle-bench", folder / "mle-data")
    checkout.competitions.mkdir(parents=True)
    (checkout.root / "mlebench" / "grade_helpers.py").write_text(GRADE_HELPERS)
    return checkout


def write_board(path: Path, scores: Sequence[object]) -> Path:
    """A leaderboard with the columns that Kaggle-derived files have."""
    rows = [f"{score},{place},True" for place, score in enumerate(scores)]
    path.write_text("score,teamId,hasTeamName\n" + "\n".join(rows) + "\n")
    return path


def write_jsonl(path: Path, rows: Sequence[dict[str, object] | str]) -> Path:
    """Lines of JSON; text is written as it is."""
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_text(text)
    return path


def command(*args: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run one of the commands of `cli_compat` as a process."""
    program = (
        "import sys\n"
        "from agent_tools.mle_bench import cli, cli_compat\n"
        "if not any(c.name == 'lite-status' for c in cli.app.registered_commands):\n"
        "    cli.app.registered_commands += cli_compat.app.registered_commands\n"
        "cli.main()\n"
    )
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, args)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=cwd,
    )
