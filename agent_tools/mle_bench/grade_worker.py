"""Grades one submission in a process of its own; run by path, never imported by the harness.

It stands alone (pandas and the grader are all it needs), so it also runs under the interpreter of
somebody else's environment. Standard input is one JSON object: ``roots`` (put on the import path),
``grade_fn``, ``submission``, ``answers``, ``memory`` (bytes of address space, 0 for no limit) and
``tell_score``. Standard output is one JSON object: ``{"score": number or null}``, or how far it
came and what was raised there: ``{"stage", "kind", "text"}``.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any


class Stage:
    """Where the process is; what is raised is reported with it."""

    name = "start"


def main() -> None:
    """Answer the request on standard input."""
    # What a grader prints must not mix with the result, which the hook below still has to write.
    result = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def report(kind: type[BaseException], error: BaseException, _: TracebackType | None) -> None:
        json.dump({"stage": Stage.name, "kind": kind.__name__, "text": str(error)}, result)
        result.close()

    sys.excepthook = report
    request = json.load(sys.stdin)
    if request["memory"]:
        resource.setrlimit(resource.RLIMIT_AS, (request["memory"], request["memory"]))
    score = grade(request)
    json.dump({"score": score if request["tell_score"] else None}, result)
    result.close()


def grade(request: dict[str, Any]) -> float:
    """The score, rounded as MLE-bench rounds it: by `round` of whatever the grader returned."""
    Stage.name = "import"
    sys.path[:0] = request["roots"]
    module, _, name = request["grade_fn"].partition(":")
    function = getattr(import_module(module), name)
    Stage.name = "answers"
    answers = read_answers(Path(request["answers"]))
    Stage.name = "read"
    submission = read_csv(Path(request["submission"]))
    Stage.name = "grade"
    return float(round(function(submission, answers), 5))


def read_csv(path: Path) -> Any:
    """Floats parsed exactly, default NA handling; an empty file is an empty frame."""
    import pandas as pd

    try:
        return pd.read_csv(path, float_precision="round_trip")
    except pd.errors.EmptyDataError:
        return pd.DataFrame()


def read_answers(path: Path) -> Any:
    """A frame from ``.csv``, a list of dictionaries from ``.jsonl``."""
    if path.suffix == ".jsonl":
        with path.open(encoding="utf-8") as file:
            return [json.loads(line) for line in file]
    if path.suffix == ".csv":
        return read_csv(path)
    raise ValueError(f"answers must be .csv or .jsonl, not {path.name}")


if __name__ == "__main__":
    main()
