"""`python -m agent_tools.mle_bench audit`: are the ranks of a suite's fields worth a medal?

Everything is computed from what is committed (leaderboards and per-row losses), so anyone can
check it in seconds, without the data. Rules of a competition:

    p_gold_bronze, p_bronze_median   ≥ 0.95: the better rank really is better
    headroom_strong                  a strong solution outside the field takes gold
    headroom_default                 plain default boosting misses bronze
    ceiling                          gold is not at the metric's best possible value
    leak                             no entry of the trivial tier reaches bronze
    rows                             ≥ 500 independent test rows
    entries                          100, each with a score on the whole test and on every fold
    losses                           each entry's losses give its committed score

A rule that a competition breaks must be listed in the suite's `exceptions`, with the number.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from agent_tools.errors import UserError
from agent_tools.mle_bench.losses import LOSSES_FILE, Losses, beat, field_ranks, read
from agent_tools.mle_bench.medals import medal_thresholds, reaches
from agent_tools.mle_bench.metrics import CEILING
from agent_tools.mle_bench.registry import Config, Suite, SuiteException, load_config

LEAST_P = 0.95
LEAST_ROWS = 500
ENTRIES = 100
LOSS_TOLERANCE = 2e-3  # relative: losses are kept in half precision


@dataclass(frozen=True)
class Finding:
    """One rule of one competition. `excepted`: broken, and listed as an exception."""

    competition: str
    rule: str
    value: float
    passed: bool
    excepted: bool = False

    @property
    def ok(self) -> bool:
        return self.passed or self.excepted


def audit(suite: Suite) -> list[Finding]:
    """All rules of all competitions, in the suite's order.

    Raises `UserError` for a missing or broken file, and for an exception that names no broken
    rule or gives another number.
    """
    findings: list[Finding] = []
    for ref in suite.competitions:
        config = load_config(ref.id)
        found = list(audit_competition(config, config.folder))
        listed = {e.rule: e for e in suite.exceptions if e.id == ref.id}
        findings += [_excepted(finding, listed) for finding in found]
    unused = [
        e
        for e in suite.exceptions
        if not any(f.excepted and (f.competition, f.rule) == (e.id, e.rule) for f in findings)
    ]
    if unused:
        raise UserError(
            f"suite {suite.name}: the exception {unused[0].rule} of {unused[0].id} is for a rule "
            "that holds: take it out"
        )
    return findings


def _excepted(finding: Finding, listed: Mapping[str, SuiteException]) -> Finding:
    exception = listed.get(finding.rule)
    if finding.passed or exception is None:
        return finding
    if not math.isclose(exception.value, finding.value, rel_tol=0.02, abs_tol=0.005):
        raise UserError(
            f"{finding.competition}: the exception for {finding.rule} says {exception.value:g}, "
            f"found {finding.value:.4g}: correct the suite's file"
        )
    return Finding(finding.competition, finding.rule, finding.value, False, excepted=True)


def audit_competition(config: Config, folder: Path) -> Iterator[Finding]:
    """The rules of one competition, from the files in its folder."""
    rows = _board(folder / "leaderboard.csv")
    losses = read(folder / LOSSES_FILE)
    lower = config.lower_is_better
    scores = [float(row["score"]) for row in rows]
    limits = medal_thresholds(scores, lower)

    def finding(rule: str, value: float, passed: bool) -> Finding:
        return Finding(config.id, rule, round(float(value), 5), bool(passed))

    folds = range(config.folds if config.folds > 1 else 0)
    whole = all(math.isfinite(float(row[f"fold_{k}"])) for row in rows for k in folds)
    yield finding("entries", len(rows), len(rows) == ENTRIES and whole)
    p = beat(losses, "gold", "bronze")
    yield finding("p_gold_bronze", p, p >= LEAST_P)
    p = beat(losses, "bronze", "median")
    yield finding("p_bronze_median", p, p >= LEAST_P)
    strong, default = losses.score("strong"), losses.score("default")
    yield finding("headroom_strong", strong, reaches(strong, limits.gold, lower))
    yield finding("headroom_default", default, not reaches(default, limits.bronze, lower))
    yield finding("ceiling", limits.gold, limits.gold != CEILING[config.metric])
    trivial = [float(row["score"]) for row in rows if row["tier"] == "trivial"]
    best = min(trivial) if lower else max(trivial)
    yield finding("leak", best, not reaches(best, limits.bronze, lower))
    yield finding("rows", losses.test_rows, losses.test_rows >= LEAST_ROWS)
    apart = max(_apart(losses, scores))
    yield finding("losses", apart, apart <= LOSS_TOLERANCE)


def _apart(losses: Losses, scores: list[float]) -> Iterator[float]:
    """Relative distance between committed scores and those that the losses give."""
    for name, rank in field_ranks(len(scores)).items():
        committed, found = scores[rank - 1], losses.score(name)
        yield abs(found - committed) / max(abs(committed), 1e-9)


def _board(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: restore it with git, or fit the field") from None
