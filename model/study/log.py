"""The log: one line of JSON for each finished variant and seed, and who is at work on which.

Several processes share a log. A line is written in one piece and flushed to disk, so a kill leaves
whole lines (a last line without its end is ignored). A run is claimed by a lock on a file beside
the log, which the system drops with its process.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from model.errors import ModelError
from model.study.corpus import Corpus
from model.study.costs import Plan

VERSION = 1
Line = dict[str, Any]


def setting_of(plan: Plan, corpus: Corpus) -> str:
    """Names what lines must share to be compared: size and corpus."""
    text = json.dumps([VERSION, asdict(plan.size), corpus.digest], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def recipe_of(plan: Plan, corpus: Corpus) -> str:
    """Names what two runs of one seed must share to be the same run."""
    text = json.dumps([setting_of(plan, corpus), asdict(plan.variant), asdict(plan.config)])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def read_log(paths: Iterable[Path]) -> list[Line]:
    """All whole lines of these files, each (recipe, seed) once.

    Raises ModelError for a file that is missing, or a line (but the last) that is not ours.
    """
    lines: dict[tuple[str, int], Line] = {}
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise ModelError(f"{path}: cannot be read ({error.strerror}); name a log") from None
        rows = text.split("\n")
        for number, row in enumerate(rows, 1):
            if not row.strip():
                continue
            try:
                line = json.loads(row)
                lines[line["recipe"], line["seed"]] = line
            except (ValueError, KeyError, TypeError):
                if number < len(rows):
                    raise ModelError(
                        f"{path}:{number}: not a line of this study; remove it"
                    ) from None
    return list(lines.values())


def append(path: Path, line: Line) -> None:
    """Add one line, whole, and wait until it is on disk."""
    data = json.dumps(line).encode() + b"\n"
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            _cut_broken_end(descriptor, size)
        os.write(descriptor, data)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cut_broken_end(descriptor: int, size: int) -> None:
    """Remove what a killed writer left after the last whole line."""
    whole = os.pread(descriptor, size, 0).rfind(b"\n") + 1
    os.ftruncate(descriptor, whole)


def finished(path: Path) -> set[tuple[str, int]]:
    """(recipe, seed) of the runs in a log; none where there is no log yet."""
    lines = read_log([path]) if path.exists() else []
    return {(line["recipe"], line["seed"]) for line in lines}


@contextmanager
def claim(log: Path, recipe: str, seed: int) -> Iterator[bool]:
    """Whether this process alone holds that run, for as long as the context lasts."""
    folder = log.with_name(f"{log.name}.claims")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{recipe}-{seed}"
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        try:
            yield True
        finally:
            path.unlink(missing_ok=True)
