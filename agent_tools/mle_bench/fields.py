"""Fit a competition's field: 100 reference scripts, run and graded as a policy's scripts are.

Each finished script is appended to a journal under the data folder, so a killed run goes on
where it stopped. When all have a score, ``leaderboard.csv`` (or ``dev_leaderboard.csv``) is
written to the repository. Graders read only its ``score`` column; the others say what was fitted
and with which versions.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import subprocess
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

from agent_tools.errors import InfraError, UserError
from agent_tools.mle_bench.grading import scores as score_submission
from agent_tools.mle_bench.recipes import Recipe, field_recipes
from agent_tools.mle_bench.registry import COMPETITIONS, Competition, Which
from agent_tools.paths import data_dir as default_data_dir
from agent_tools.paths import script_python
from agent_tools.sandbox import Limits, ScriptJob, ScriptPool, ScriptResult

FIELD_SIZE = 100
PACKAGES = ("numpy", "pandas", "scikit-learn")
SUBMISSION = "submission.csv"


@dataclass(frozen=True)
class Entry:
    """One fitted script. ``score`` is None where it failed, and ``error`` says how; ``folds`` are
    the scores of the same submission on each private fold."""

    recipe: str
    tier: str
    seed: int
    script: str  # first 16 hex digits of the script's SHA-256
    data: str  # the same of the files it was fitted and scored on
    status: str
    score: float | None
    error: str | None
    cpu_s: float
    wall_s: float
    folds: tuple[float, ...] = ()


def field_limits(competition: Competition) -> Limits:
    """The limits that score policies, but for the wall limit: it guards against scripts that
    sleep, and on a busy machine would throw out scripts of a fixed field that compute within
    their CPU-seconds."""
    cpu = competition.limits.cpu_seconds
    return Limits(
        cpu_seconds=cpu,
        wall_seconds=max(60.0, 4 * cpu),
        memory_mb=competition.limits.memory_mb,
    )


def recipes_of(competition: Competition) -> list[Recipe]:
    """The 100 reference scripts of a competition: its own, or those written from its facts."""
    from agent_tools.mle_bench.v1 import RECIPES

    own = RECIPES.get(competition.id)
    return own(competition.facts) if own else field_recipes(competition.facts, FIELD_SIZE)


def fit_field(
    competition: Competition,
    which: Which,
    recipes: Sequence[Recipe],
    pool: ScriptPool,
    *,
    data_dir: Path | None = None,
    progress: Callable[[Entry], None] = lambda entry: None,
) -> list[Entry]:
    """Entries in the order of the recipes; those in the journal with the same script are kept.

    A changed script, data file or recipe makes a new entry. Raises `InfraError` if the sandbox
    failed on any (the others are in the journal, so the next run tries only those again).
    """
    folder = work_dir(competition, which, data_dir)
    (folder / "submissions").mkdir(parents=True, exist_ok=True)
    data = data_digest(competition, which)
    done = {_key(entry): entry for entry in _read_journal(folder / "rows.jsonl")}
    keys = {
        recipe.id: (recipe.id, recipe.seed, script_digest(recipe.script), data)
        for recipe in recipes
    }
    todo = [recipe for recipe in recipes if keys[recipe.id] not in done]
    public, limits = competition.public(which), field_limits(competition)
    futures = {
        pool.submit(ScriptJob(code=recipe.script, inputs=public, limits=limits)): recipe
        for recipe in todo
    }
    infra: list[str] = []
    for future in as_completed(futures):
        recipe, result = futures[future], future.result()
        if result.status == "infra":
            infra.append(f"{recipe.id}: {_last_line(result.stderr)}")
            continue
        entry = _entry(competition, which, recipe, result, data)
        if entry.score is not None:
            path = submission_path(folder, entry)
            path.write_bytes(result.files[SUBMISSION])
        _append(folder / "rows.jsonl", entry)
        done[_key(entry)] = entry
        progress(entry)
    if infra:
        raise InfraError(
            f"{competition.id}: the sandbox failed on {len(infra)} scripts ({infra[0]}): "
            "run the same command again"
        )
    return [done[keys[recipe.id]] for recipe in recipes]


def run_script(
    competition: Competition, which: Which, script: str, pool: ScriptPool
) -> tuple[float | None, str | None, ScriptResult]:
    """Run one script in the sandbox and grade it: score or reason, and the sandbox's result."""
    job = ScriptJob(code=script, inputs=competition.public(which), limits=field_limits(competition))
    result = pool.run([job])[0]
    if result.status == "infra":
        raise InfraError(f"the sandbox failed: {_last_line(result.stderr)}: try again")
    found, error = _score(competition, which, result)
    return (found[0] if found else None), error, result


def write_leaderboard(
    competition: Competition, which: Which, entries: Sequence[Entry], folder: Path | None = None
) -> Path:
    """Write the field best first (ties by recipe id) into the competition's folder.

    Raises `UserError` unless there are exactly 100 entries that all have a score, because the
    medal ranks depend on their number.
    """
    failed = [entry for entry in entries if entry.score is None]
    if failed or len(entries) != FIELD_SIZE:
        first = f"; {failed[0].recipe}: {failed[0].error}" if failed else ""
        raise UserError(
            f"{competition.id} ({which}): {len(entries) - len(failed)} of {FIELD_SIZE} reference "
            f"scripts have a score{first}: mend the recipes and fit again"
        )
    name = "leaderboard.csv" if which == "private" else "dev_leaderboard.csv"
    path = (folder or COMPETITIONS / competition.id) / name
    versions = script_versions()
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        order = ranked(entries, competition.lower_is_better)
        folds = [f"fold_{k}" for k in range(len(order[0].folds))]
        columns = ["recipe", "tier", "seed", "cpu_s", "script", "data"]
        writer.writerow(["score", *folds, *columns, *versions])
        for entry in order:
            writer.writerow(
                [
                    f"{entry.score:.5f}",
                    *(f"{value:.5f}" for value in entry.folds),
                    *(entry.recipe, entry.tier, entry.seed, f"{entry.cpu_s:.2f}"),
                    *(entry.script, entry.data, *versions.values()),
                ]
            )
    temporary.replace(path)
    return path


def ranked(entries: Iterable[Entry], lower_is_better: bool) -> list[Entry]:
    """Entries that have a score, best first; equal scores in the order of their recipe ids."""
    sign = 1.0 if lower_is_better else -1.0
    valid = [(entry.score, entry) for entry in entries if entry.score is not None]
    return [entry for _, entry in sorted(valid, key=lambda pair: (sign * pair[0], pair[1].recipe))]


def work_dir(competition: Competition, which: Which, data_dir: Path | None = None) -> Path:
    """``<data>/fields/<id>/<which>``: the journal and the submissions of a field."""
    return (data_dir or default_data_dir()) / "fields" / competition.id / which


def submission_path(folder: Path, entry: Entry) -> Path:
    """Where the submission of an entry with a score lies."""
    return folder / "submissions" / f"{entry.recipe}-{entry.script}.csv"


def script_digest(script: str) -> str:
    """First 16 hex digits of the SHA-256 of a script's text."""
    return hashlib.sha256(script.encode()).hexdigest()[:16]


def data_digest(competition: Competition, which: Which) -> str:
    """The same over training table, test table, answers, and whatever more is public."""
    digest = hashlib.sha256()
    public = competition.public(which)
    for path in (public / "train.csv", public / "test.csv", competition.answers(which)):
        digest.update(path.read_bytes())
    named = ("train.csv", "test.csv", "sample_submission.csv", "description.md")
    for path in sorted(public.rglob("*")):
        if path.is_file() and path.relative_to(public).as_posix() not in named:
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def script_versions() -> dict[str, str]:
    """Versions of Python and of the packages in the script environment."""
    code = (
        "import json, platform, sys; from importlib.metadata import version; "
        "print(json.dumps({'python': platform.python_version()} "
        "| {name: version(name) for name in sys.argv[1:]}))"
    )
    argv = [str(script_python()), "-I", "-c", code, *PACKAGES]
    try:
        result = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
        raise UserError(
            f"{script_python()} lacks one of {', '.join(PACKAGES)}: run `make setup`"
        ) from None
    versions: dict[str, str] = json.loads(result.stdout)
    return versions


def _entry(
    competition: Competition, which: Which, recipe: Recipe, result: ScriptResult, data: str
) -> Entry:
    found, error = _score(competition, which, result)
    return Entry(
        recipe=recipe.id,
        tier=recipe.tier,
        seed=recipe.seed,
        script=script_digest(recipe.script),
        data=data,
        status=result.status,
        score=found[0] if found else None,
        error=error,
        cpu_s=round(result.cpu_s, 3),
        wall_s=round(result.wall_s, 3),
        folds=tuple(found[1:]),
    )


def _score(
    competition: Competition, which: Which, result: ScriptResult
) -> tuple[list[float], str | None]:
    """The score on the whole test and on each private fold."""
    if result.status != "ok":
        return [], f"{result.status}: {_last_line(result.stderr)}"
    if SUBMISSION not in result.files:
        return [], f"no {SUBMISSION} was written"
    folds = range(competition.folds if which == "private" and competition.folds > 1 else 0)
    return score_submission(competition, result.files[SUBMISSION], which, (None, *folds))


def _key(entry: Entry) -> tuple[str, int, str, str]:
    return entry.recipe, entry.seed, entry.script, entry.data


def _append(path: Path, entry: Entry) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(entry)) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _read_journal(path: Path) -> list[Entry]:
    """All whole lines; a line that a kill cut short is left out and cut from the file."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    rows = [json.loads(line) for line in whole.splitlines()]
    return [Entry(**row | {"folds": tuple(row.get("folds", ()))}) for row in rows]


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1][:200]
