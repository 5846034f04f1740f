"""`selfevo attach`: digest, findings and one suggested change for a run of any trainer.

Reads only; needs no lab. The change is named in the trainer's own words, with the value that the
run's configuration holds where it is known.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from agent_tools.wandb_logs import (
    DEFAULT_KEYS,
    Finding,
    Suggestion,
    Translated,
    detect,
    detect_portable,
    digest,
    read_anything,
    translate,
)
from agent_tools.wandb_logs.digest import MAX_KEYS
from selfevo.memory import clean, number

FOREIGN_KEYS = (
    "reward",
    "group/zero_std_frac",
    "rollout/truncated_frac",
    "policy/entropy",
    "policy/grad_norm",
    "policy/clip_frac",
    "policy/kl_update",
    "mismatch_kl/mean",
    "policy/kl_reference",
    "optim/lr",
    "rollout/mean_length",
    "reward_std",
)
#: By what a setting is moved once; a critical finding moves the learning rate by `CRITICAL_LR`.
FACTORS = {"optim.lr": 3.0, "rollout.temperature": 1.25}
CRITICAL_LR = 10.0
FACTOR = 2.0
SHOWN_UNREAD = 12


@dataclass(frozen=True)
class Change:
    """One suggested edit; `before` and `after` are None where the run left no configuration."""

    key: str
    direction: str
    before: float | int | None
    after: float | int | None
    finding: str
    why: str


@dataclass(frozen=True)
class Attached:
    """What `selfevo attach` found in a run."""

    path: Path
    run: Translated
    text: str
    findings: tuple[Finding, ...]
    change: Change | None


def attach(path: Path) -> Attached:
    """Read, translate, digest and judge a run. Raises `UserError` if there is no log."""
    history, found = read_anything(path)
    run = translate(history)
    ours = run.dialect.name == "selfevo"
    keys: tuple[str, ...] = DEFAULT_KEYS
    if not ours:
        logged = set(run.renamed)
        keys = tuple(key for key in FOREIGN_KEYS if key in logged)[:MAX_KEYS]
    result = digest(run.history, keys=keys, detectors=detect if ours else detect_portable)
    return Attached(found, run, result.text, result.findings, suggest(run, result.findings))


def suggest(run: Translated, findings: tuple[Finding, ...]) -> Change | None:
    """The first finding's change that this trainer has a key for and that can still be made.

    None where a critical finding has no cure in the configuration: that comes first.
    """
    for finding in findings:
        if finding.suggestion is None:
            if finding.severity == "critical":
                return None
            continue
        change = _change(run, finding, finding.suggestion)
        if change is None and finding.suggestion.config_key == "optim.updates_per_batch":
            # one update a batch already: then a step is too large
            change = _change(run, finding, Suggestion("optim.lr", "decrease"))
        if change is not None:
            return change
    return None


def _change(run: Translated, finding: Finding, suggestion: Suggestion) -> Change | None:
    key = run.setting(suggestion.config_key)
    if key is None:
        return None
    why = f"{finding.name}: {finding.evidence}"
    before = run.history.config.get(key)
    if isinstance(before, bool) or not isinstance(before, int | float):
        return Change(key, suggestion.direction, None, None, finding.name, why)
    factor = FACTORS.get(suggestion.config_key, FACTOR)
    if suggestion.config_key == "optim.lr" and finding.severity == "critical":
        factor = CRITICAL_LR
    moved = before * factor if suggestion.direction == "increase" else before / factor
    after: float | int = float(f"{moved:.3g}")
    if isinstance(before, int):
        after = max(0 if suggestion.config_key == "optim.warmup_steps" else 1, int(moved))
    if after == before:
        return None
    return Change(key, suggestion.direction, before, after, finding.name, why)


def record(found: Attached) -> dict[str, Any]:
    """`selfevo attach --json`."""
    history = found.run.history
    return {
        "path": str(found.path),
        "trainer": found.run.dialect.name,
        "state": history.state,
        "source": history.source,
        "steps": int(history.rows[-1]["step"]) if history.rows else 0,
        "digest": found.text,
        "findings": [
            {**asdict(finding), "value": _plain(finding.value)} for finding in found.findings
        ],
        "suggestion": asdict(found.change) if found.change else None,
        "read": found.run.renamed,
        "unread": found.run.unread,
        "warnings": history.warnings,
    }


def _plain(value: float) -> float | str:
    """NaN and infinities as words: JSON has none."""
    return value if value - value == 0 else str(value)


def lines(found: Attached) -> list[str]:
    """The same for people."""
    run = found.run
    out = [f"{found.path}: a run of {_trainer(run)}, read from its {run.history.source} log", ""]
    out += [f"  {clean(line)}" for line in found.text.splitlines()]
    out += ["", "findings" if found.findings else "findings: nothing stands out"]
    out += [
        f"  {finding.severity:8} {finding.name}: {clean(finding.evidence)}"
        for finding in found.findings
    ]
    out += ["", change_line(found)]
    pairs = [f"{a} = {clean(b)}" for a, b in run.renamed.items() if a != b]
    if pairs:
        out += ["", "read as: " + ", ".join(pairs)]
    elif not run.renamed:
        out += ["", "read as: no metric of this run has a name that is known here"]
    if run.unread:
        shown = ", ".join(clean(name, 80) for name in run.unread[:SHOWN_UNREAD])
        more = len(run.unread) - SHOWN_UNREAD
        out.append(
            f"not read: {shown}" + (f" and {more} more (--json lists all)" if more > 0 else "")
        )
    out += [f"warning: {clean(warning)}" for warning in run.history.warnings]
    return out


def _trainer(run: Translated) -> str:
    names = {"selfevo": "rl.train", "plain": "an unknown trainer (plain names)"}
    return names.get(run.dialect.name, run.dialect.name)


def change_line(found: Attached) -> str:
    """The suggestion in one line."""
    change = found.change
    if change is None:
        if any(finding.severity != "info" for finding in found.findings):
            return "suggestion: none; no setting of this trainer mends what was found first"
        return "suggestion: none; keep the configuration"
    key = clean(change.key)
    if change.before is None or change.after is None:
        return f"suggestion: {change.direction} {key} ({clean(change.why)})"
    values = f"{number(change.before)} → {number(change.after)}"
    return f"suggestion: {key} {values} ({clean(change.why)})"
