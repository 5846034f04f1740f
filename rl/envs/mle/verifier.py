"""Scores what a script left behind; runs outside the sandbox, where the answers are."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from agent_tools.mle_bench.grading import grade
from agent_tools.mle_bench.registry import Competition, Which, load_competition
from agent_tools.sandbox.types import ScriptResult
from rl.envs.mle.prompts import one_line
from rl.types import ScriptOutcome

SUBMISSION = "submission.csv"


class VerifierProtocol(Protocol):
    """What the environment needs of a verifier."""

    def competition(self, competition_id: str) -> Competition: ...

    def score(
        self, competition_id: str, script: str, result: ScriptResult, which: Which
    ) -> ScriptOutcome: ...


class Verifier:
    """Grades submissions of prepared competitions; safe to call from many threads.

    `competitions` are used as given; others are loaded from `data_dir` when first asked for.
    """

    def __init__(
        self,
        competitions: Mapping[str, Competition] | None = None,
        *,
        data_dir: Path | None = None,
    ) -> None:
        self._known = dict(competitions or {})
        self._data_dir = data_dir
        self._lock = threading.Lock()

    def competition(self, competition_id: str) -> Competition:
        """The competition; `UserError` for an unknown id or missing data."""
        with self._lock:
            if competition_id not in self._known:
                self._known[competition_id] = load_competition(competition_id, self._data_dir)
            return self._known[competition_id]

    def score(
        self, competition_id: str, script: str, result: ScriptResult, which: Which
    ) -> ScriptOutcome:
        """Outcome of one executed script: percentile and medals among the field of `which`.

        A script that did not end `ok`, or whose submission is malformed, is invalid with
        percentile 0 and one line of reason; `infra` faults are the caller's to exclude.
        """
        submission = result.files.get(SUBMISSION) if result.status == "ok" else None
        if submission is None:
            return ScriptOutcome(
                script=script,
                status="error" if result.status == "ok" else result.status,
                valid=False,
                score=None,
                percentile=0.0,
                cpu_s=result.cpu_s,
                wall_s=result.wall_s,
                message=_fault(result),
            )
        report = grade(self.competition(competition_id), submission, which)
        return ScriptOutcome(
            script=script,
            status="ok",
            valid=report.valid,
            score=report.score,
            percentile=report.percentile,
            any_medal=report.any_medal,
            gold=report.gold,
            silver=report.silver,
            bronze=report.bronze,
            above_median=report.above_median,
            cpu_s=result.cpu_s,
            wall_s=result.wall_s,
            message=one_line(report.error or ""),
        )


def _fault(result: ScriptResult) -> str:
    if result.status == "timeout":
        return f"time limit reached after {result.cpu_s:.1f} CPU seconds"
    if result.status == "memory":
        return "memory limit reached"
    if result.status == "ok":
        return f"no {SUBMISSION}"
    return one_line(result.stderr) or f"script ended as {result.status}"
