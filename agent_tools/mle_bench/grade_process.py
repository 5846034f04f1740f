"""Scores a submission in another process, so that neither the file nor its grader can harm ours.

MLE-bench turns every exception of a grader into "no score". Here a process that ends with one does
the same, and the reason is kept; what the user can mend (a grader that cannot be imported, answers
that cannot be read) is an error instead, because it would fail every submission alike.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from agent_tools.errors import InfraError, UserError

WORKER = Path(__file__).resolve().with_name("grade_worker.py")
GRADE_SECONDS = 900.0
MEMORY_FREE = 8 << 30  # address space of the grader; most of it is never used
MEMORY_A_BYTE = 40  # and per byte of the answers
SIZE_FREE = 64 << 20  # a submission may have this many bytes
SIZE_A_BYTE = 16  # and per byte of the answers: class probabilities are longer than labels
TEXT = 2_000


@dataclass(frozen=True)
class GraderSpec:
    """What scores a competition: an import string and where it is found.

    Attributes:
        grade_fn: ``package.module:function``.
        roots: folders put on the import path.
        python: the interpreter, which needs pandas and whatever the grader imports.
        answers: a ``.csv`` or ``.jsonl`` file.
    """

    grade_fn: str
    roots: tuple[Path, ...]
    answers: Path
    python: Path = Path(sys.executable)


@dataclass(frozen=True)
class Scored:
    """A rounded score (may be NaN), or None and the reason.

    ``exists`` is MLE-bench's "submission exists": a file whose name ends ``.csv``. ``grader_fault``
    marks a reason that is no `InvalidSubmissionError` but some other exception of the grader.
    """

    score: float | None
    exists: bool
    error: str | None = None
    grader_fault: bool = False


def score_submission(
    spec: GraderSpec,
    submission: Path,
    *,
    tell_score: bool = True,
    timeout: float = GRADE_SECONDS,
) -> Scored:
    """Score a file. With ``tell_score`` False a valid submission scores 0.0, whatever it is worth.

    Raises `UserError` where the grader cannot be imported or the answers cannot be read.
    """
    if submission.suffix.lower() != ".csv":
        return Scored(
            None, False, f"a submission must be a file ending .csv, not {submission.name}"
        )
    if submission.is_symlink():  # an agent could point it at the answers
        return Scored(None, False, "the submission is a link, not a file")
    if not submission.is_file():
        return Scored(None, False, "no submission")
    limit = SIZE_FREE + SIZE_A_BYTE * _size(spec.answers)
    size = submission.stat().st_size
    if size > limit:
        return Scored(None, True, f"{size:,} bytes, more than the {limit:,} that are read")
    reply = _ask(spec, submission, tell_score, timeout)
    if "score" in reply:
        value = reply["score"]
        return Scored(float(value) if value is not None else 0.0, True)
    kind, text = reply["kind"], printable(reply["text"])
    shown = f"{kind}: {text}" if text else kind
    match reply["stage"]:
        case "start" | "import":
            raise UserError(
                f"the grader {spec.grade_fn} cannot be loaded by {spec.python} ({shown}): install "
                "what it needs there, or choose another interpreter with --python"
            )
        case "answers":
            raise UserError(f"the answers {spec.answers} cannot be read ({shown}): prepare again")
        case "read":
            return Scored(None, True, f"is not a CSV file: {shown}")
        case _ if kind == "InvalidSubmissionError":
            return Scored(None, True, text)
        case _:
            return Scored(None, True, f"the grader failed with {shown}", grader_fault=True)


def _ask(spec: GraderSpec, submission: Path, tell_score: bool, timeout: float) -> dict[str, str]:
    request = {
        "roots": [str(root.absolute()) for root in spec.roots],
        "grade_fn": spec.grade_fn,
        "submission": str(submission.absolute()),
        "answers": str(spec.answers.absolute()),
        "memory": MEMORY_FREE + MEMORY_A_BYTE * _size(spec.answers),
        "tell_score": tell_score,
    }
    try:
        process = subprocess.Popen(
            [str(spec.python), "-I", "-B", str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
            env={"PATH": os.environ.get("PATH", ""), "LC_ALL": "C.UTF-8"},
        )
    except OSError as error:
        raise UserError(
            f"{spec.python} cannot be started ({error.strerror}): see --python"
        ) from None
    try:
        output, _ = process.communicate(json.dumps(request), timeout=timeout)
    except subprocess.TimeoutExpired:
        return _fault("TimeoutExpired", f"grading took longer than {timeout:g} s")
    finally:
        _kill_group(process)
    try:
        reply = json.loads(output)
    except ValueError:
        code = process.returncode
        if code == -signal.SIGKILL:
            raise InfraError(
                f"the grader of {submission} was killed, probably for memory: try again"
            ) from None
        return _fault("SystemExit", f"the process ended with exit code {code} and no score")
    assert isinstance(reply, dict)
    return reply


def _fault(kind: str, text: str) -> dict[str, str]:
    return {"stage": "grade", "kind": kind, "text": text}


def _kill_group(process: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # also what the grader may have started
    process.wait(timeout=10)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def printable(text: str) -> str:
    """Without control characters but for line ends, cut to 2,000 characters."""
    return re.sub(r"[^\n\x20-\x7e\xa0-\U0010ffff]+", " ", text)[:TEXT].strip()
