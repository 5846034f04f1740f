"""Signs that a run saw what it must not: source packages, or the answers.

Nothing here is needed to keep answers away (they are never where scripts run); it finds out when
that failed. A finding voids the submission and is reported with its place.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from agent_tools.errors import UserError
from agent_tools.mle_bench.registry import PACKAGE

CANARY = "CANARY.txt"
# What the prepare environment needs itself, and scripts may have too.
_TOOLS = frozenset(
    {"numpy", "pandas", "python-dateutil", "pytz", "six", "tzdata"}
    | {"scikit-learn", "scipy", "joblib", "threadpoolctl", "narwhals", "pillow"}
)
# In archives that are read without being installed; the sentiment data's import name too.
_ARCHIVES = ("vadersentiment",)
_MOST_BYTES = 16 << 20  # read of one file
_ROWS = 5  # answers in exact form that no prediction hits by chance
_LABELS = 64  # labels in the test's order, written out in a script


@dataclass(frozen=True)
class Finding:
    """kind: source-package, canary, answers. `where`: file and line."""

    kind: str
    where: str
    what: str

    def text(self) -> str:
        return f"{self.kind} in {self.where}: {self.what}"


def source_packages() -> tuple[str, ...]:
    """Distributions that carry the competitions' raw data, in lower case, from the requirements."""
    names = set(_ARCHIVES)
    for path in sorted(PACKAGE.glob("prepare*requirements*.txt")):
        for line in path.read_text(encoding="utf-8").splitlines():
            match = re.match(r"\s*([A-Za-z0-9_.-]+)\s*==", line)
            if match:
                names.add(match.group(1).lower().replace("_", "-"))
    return tuple(sorted(names - _TOOLS))


def installed_sources(python: Path) -> tuple[str, ...]:
    """Source packages that an interpreter could import: there must be none.

    Reads the folders of its environment; nothing is run.
    """
    wanted = set(source_packages())
    found = set()
    for site in (python.parent.parent / "lib").glob("python*/site-packages"):
        for entry in site.iterdir():
            name = re.split(r"-\d", entry.name, maxsplit=1)[0].lower().replace("_", "-")
            if name in wanted or entry.name.lower() in wanted:
                found.add(name)
    return tuple(sorted(found))


def require_clean(python: Path) -> None:
    """Raises `UserError` where the script environment has a package that holds answers."""
    found = installed_sources(python)
    if found:
        raise UserError(
            f"the script environment of {python} holds {', '.join(found)}, whose files are the "
            "answers: make it again with `rm -rf .venv-script && make setup`"
        )


def plant_canary(private: Path) -> str:
    """A random word next to the folder of answers, kept for good: whoever shows it was there.

    Not inside, because the files of that folder are checked by their hashes.
    """
    path = private.parent / CANARY
    try:
        if not path.is_file():
            part = path.with_suffix(".part")
            part.touch(mode=0o600)
            part.write_text(f"selfevo-canary-{secrets.token_hex(16)}\n", encoding="ascii")
            part.replace(path)
        return path.read_text(encoding="ascii").strip()
    except OSError as error:
        raise UserError(
            f"{path}: cannot be made or read ({error.strerror}): give the user who grades the "
            "right to write there"
        ) from error


def scan(
    code: Iterable[Path], logs: Iterable[Path], submission: Path | None, private: Path
) -> list[Finding]:
    """All findings in a run's files; needs the answers, so it runs where grading does."""
    canary = plant_canary(private)
    answers = Answers.read(private / "test.csv")
    findings = []
    for kind, paths in (("code", code), ("log", logs)):
        for path in paths:
            text = _read(path)
            where = f"{kind} {path.name}"
            findings += _packages(text, where)
            findings += _canary(text, where, canary)
            findings += answers.found(text, where, script=kind == "code")
    if submission is not None and submission.is_file():
        findings += _canary(_read(submission), submission.name, canary)
    return findings


@dataclass(frozen=True)
class Answers:
    """The answers in the forms in which a thief would show them.

    rows      `id,value` where most values differ and this one has at least five characters: no
              prediction hits five of them by chance
    labels    answers of few kinds, in the test's order
    """

    rows: frozenset[str]
    labels: tuple[str, ...]

    @classmethod
    def read(cls, path: Path) -> Answers:
        """From an answers file; empty for one that is no table."""
        try:
            table = pd.read_csv(path, dtype=str, keep_default_na=False)
        except (OSError, ValueError):
            return cls(frozenset(), ())
        if table.shape[1] == 2:
            values = table.iloc[:, 1]
            if values.nunique() <= max(20, len(values) // 2):  # honest predictions hit these
                return cls(frozenset(), tuple(values))
            pairs = table.iloc[:, 0] + "," + values
            return cls(frozenset(pairs[values.str.len() >= 5]), ())
        labels = table.iloc[:, 1:] == "1"
        if (labels.sum(axis=1) == 1).all():
            return cls(frozenset(), tuple(str(name) for name in labels.idxmax(axis=1)))
        return cls(frozenset(table.agg(",".join, axis=1)), ())

    def found(self, text: str, where: str, *, script: bool) -> list[Finding]:
        """Exact answers in a text. Label lists count in scripts only: a log may print predictions,
        which are right by honest work."""
        if self.rows:
            lines = {re.sub(r"\s*[,\t ]\s*", ",", line.strip()) for line in text.splitlines()}
            pairs = {f"{a},{b}" for a, b in re.findall(r"(\d+)['\"]?\s*[:,]\s*([-\d.eE]+)", text)}
            hits = self.rows & (lines | pairs)
            if len(hits) >= min(_ROWS, len(self.rows)):
                return [Finding("answers", where, f"{len(hits)} rows of the answers")]
        if script and len(self.labels) >= _LABELS:
            words = tuple(re.findall(r"[\w.-]+", text))
            if _holds(words, self.labels[:_LABELS]):
                return [Finding("answers", where, f"the first {_LABELS} labels of the test")]
        return []


def _holds(words: tuple[str, ...], wanted: tuple[str, ...]) -> bool:
    text, part = "\0".join(("", *words, "")), "\0".join(("", *wanted, ""))
    return part in text


def _packages(text: str, where: str) -> list[Finding]:
    lowered = text.lower()
    found = []
    for name in source_packages():
        word = re.escape(name).replace(r"\-", "[-_]")
        pattern = (
            rf"^\s*(?:import\s+{word}\b|from\s+{word}(?:\.\w+)*\s+import\b)"
            rf"|(?:import_module|__import__|find_spec|files|distribution)\(\s*['\"]{word}\b"
            rf"|\bpip3?\s+(?:install|download)\b[^\n]*\b{word}\b"
            rf"|(?:site|dist)-packages/{word}\b|no module named ['\"]{word}\b"
        )
        match = re.search(pattern, lowered, re.MULTILINE)
        if match:
            line = lowered.count("\n", 0, match.start()) + 1
            found.append(Finding("source-package", f"{where} line {line}", name))
    return found


def _canary(text: str, where: str, canary: str) -> list[Finding]:
    squeezed = re.sub(r"[^0-9a-z]", "", text.lower())
    secret = canary.rpartition("-")[2]
    if secret in squeezed:
        return [Finding("canary", where, "the word that lies beside the answers")]
    return []


def _read(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(_MOST_BYTES).decode("utf-8", "replace")
