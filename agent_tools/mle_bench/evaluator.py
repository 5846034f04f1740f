"""One name for everything that decides what a submission is worth in a suite."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from agent_tools.mle_bench.registry import SUITES, Suite, load_config

RULES = 1  # raise it when grading, medal rule or percentile change what a submission scores
NAMED = ("config.yaml", "grade.py", "leaderboard.csv", "dev_leaderboard.csv")


def evaluator_hash(suite: Suite) -> str:
    """12 hex digits over the suite's file and its competitions' graders and fields.

    Scores may be compared only where it is equal: another split, field or grader gives another.
    """
    digest = hashlib.sha256(f"{RULES} {suite.name} {suite.version}\n".encode())
    for path in _files(suite):
        digest.update(f"{path.parent.name}/{path.name}\n".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:12]


def _files(suite: Suite) -> Iterator[Path]:
    yield SUITES / f"{suite.name}.yaml"
    folders = dict.fromkeys(load_config(id_).folder for id_ in suite.ids())
    for folder in folders:
        yield from (folder / name for name in NAMED if (folder / name).is_file())
