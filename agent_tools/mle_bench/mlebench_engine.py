"""``--engine mlebench``: the user's installed MLE-bench does the work, in its own environment.

For what we have no preparer for, and as the second opinion on any grade. We start the program,
bound its time and read the files it writes; nothing of it is imported. It is exercised here against
a stand-in that follows its command line, not against the program itself, which needs Kaggle data.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from agent_tools.errors import InfraError, UserError
from agent_tools.mle_bench.reports import CompetitionReport

PROGRAM_VARIABLE = "SELFEVO_MLEBENCH_PROGRAM"
GRADE_SECONDS = 6 * 3600.0
PREPARE_SECONDS = 48 * 3600.0  # the largest competition is 116 GB
MARK = "Competition report:"


@dataclass(frozen=True)
class MlebenchEngine:
    """The program, and its data folder (None leaves it to the program)."""

    program: Path
    data_dir: Path | None = None

    def grade_jsonl(
        self, submission: Path, output_dir: Path, timeout: float = GRADE_SECONDS
    ) -> Path:
        """``mlebench grade``: the report file that it wrote.

        Raises `InfraError` if it fails, is too slow or writes none.
        """
        before = set(_reports(output_dir))
        self._run(
            "grade", "--submission", str(submission), "--output-dir", str(output_dir),
            timeout=timeout,
        )  # fmt: skip
        made = sorted(set(_reports(output_dir)) - before)
        if len(made) != 1:
            raise InfraError(
                f"{self.program} wrote {len(made)} reports into {output_dir} instead of one: run "
                "`mlebench grade` by hand and see"
            )
        return made[0]

    def grade_sample(
        self, submission: Path, competition_id: str, timeout: float = GRADE_SECONDS
    ) -> CompetitionReport:
        """``mlebench grade-sample``: the report, read from its log."""
        log = self._run("grade-sample", str(submission), competition_id, timeout=timeout)
        start = log.find("{", log.rfind(MARK)) if MARK in log else -1
        try:
            data, _ = json.JSONDecoder().raw_decode(log, start) if start >= 0 else ({}, 0)
        except ValueError:
            data = {}
        if not data:
            raise InfraError(f"{self.program} printed no report: run `mlebench grade-sample` by "
                             "hand and see")  # fmt: skip
        return CompetitionReport.from_dict(data)

    def prepare(self, competition_id: str, timeout: float = PREPARE_SECONDS) -> None:
        """``mlebench prepare``: downloads with the user's Kaggle key and prepares.

        It may ask questions (the rules must be accepted in a browser), so it keeps the terminal.
        """
        self._run("prepare", "-c", competition_id, timeout=timeout, terminal=True)

    def _run(self, *args: str, timeout: float, terminal: bool = False) -> str:
        data = ["--data-dir", str(self.data_dir)] if self.data_dir else []
        pipe = None if terminal else subprocess.PIPE
        try:
            process = subprocess.Popen(
                [str(self.program), *args, *data],
                stdin=None if terminal else subprocess.DEVNULL,
                stdout=pipe,
                stderr=subprocess.STDOUT if pipe else None,
                text=True,
                errors="replace",
                # In a session of its own it could not ask on the terminal.
                start_new_session=not terminal,
            )
        except OSError as error:
            raise UserError(f"{self.program}: cannot be started ({error.strerror}): reinstall it, "
                            f"or set {PROGRAM_VARIABLE}") from None  # fmt: skip
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            raise InfraError(
                f"{self.program} {args[0]} took longer than {timeout:g} s: try again with fewer "
                "competitions"
            ) from None
        finally:
            _stop(process, whole_group=not terminal)
        if process.returncode != 0:
            last = ((output or "").strip().splitlines() or ["see above"])[-1]
            raise InfraError(
                f"{self.program} {args[0]} ended with exit code {process.returncode} ({last}): "
                "run it by hand and see"
            )
        return output or ""


def find_engine(data_dir: Path | None = None) -> MlebenchEngine:
    """The program named by ``SELFEVO_MLEBENCH_PROGRAM``, else ``mlebench`` on the path.

    Raises `UserError` with how to install it.
    """
    named = os.environ.get(PROGRAM_VARIABLE, "").strip()
    found = shutil.which(named or "mlebench")
    if found is None:
        what = f"{PROGRAM_VARIABLE}={named}" if named else "mlebench"
        raise UserError(
            f"{what} is no program on this machine: in an environment of its own, clone "
            "github.com/openai/mle-bench, run `git lfs pull` and `pip install -e .` there, then "
            f"set {PROGRAM_VARIABLE} to its bin/mlebench"
        )
    return MlebenchEngine(Path(found).absolute(), data_dir)


def _reports(folder: Path) -> list[Path]:
    return list(folder.glob("*_grading_report.json"))


def _stop(process: subprocess.Popen[str], *, whole_group: bool) -> None:
    if process.poll() is None or whole_group:
        with suppress(ProcessLookupError):
            if whole_group:
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
    process.wait(timeout=30)
