"""Competitions by the name of their suite: ours, or MLE-bench's with the user's own data.

`mle-bench-lite` is no suite of the registry: its competitions are those of
`agent_tools.mle_bench.folders` (Lite, a checkout), prepared by `lite-prepare`. They are for
measuring only.
"""

from __future__ import annotations

import os
from pathlib import Path

from agent_tools.errors import UserError
from agent_tools.mle_agent.folds import public_view
from agent_tools.mle_bench.facts import TaskFacts
from agent_tools.mle_bench.folders import FolderCompetition, registry_of
from agent_tools.mle_bench.leaderboards import lite_boards
from agent_tools.mle_bench.registry import (
    Competition,
    ScriptLimits,
    load_competition,
    load_suite,
    ref_of,
)

LITE = "mle-bench-lite"
LITE_VERSION = 1
_STEP_S = 9 * 3600.0  # MLE-bench's reference agents give a script nine hours


def suite_version(suite: str) -> int:
    """The version of a suite; `UserError` for an unknown one."""
    return LITE_VERSION if suite == LITE else load_suite(suite).version


def competition_ids(
    suite: str, split: str, asked: list[str] | None, data_dir: Path | None, *, sealed: bool = False
) -> tuple[str, ...]:
    """Ids to run, all of them prepared. Raises `UserError`.

    Sealed competitions are refused, but with `sealed` there are no others. Of Lite, without
    `asked`, those that are prepared. Leaderboards are read, so that nothing is run that could not
    be graded.
    """
    if split not in ("train", "val", "all"):
        raise UserError(f"--split {split!r}: choose train, val or all; sealed has its own command")
    if suite == LITE:
        if sealed:
            raise UserError(f"--sealed: {LITE} has no sealed competitions: leave it out")
        names = asked or [
            name for name in lite_boards() if folder_competition(name, data_dir).missing() is None
        ]
        for name in names:
            load_view(suite, name, data_dir)
            folder_competition(name, data_dir).board()
        if not names:
            raise UserError(
                "no competition of Lite is prepared: download each one's zip from Kaggle with your "
                "own account and give its id to `python -m agent_tools.mle_bench lite-prepare`, "
                "which compares the zip and what it makes with MLE-bench's MD5 sums; pull the "
                "leaderboards of a checkout of MLE-bench with `git lfs pull` and name it in "
                "SELFEVO_MLEBENCH, they are compared by size and SHA-256; "
                "`python -m agent_tools.mle_bench lite-status` lists what there is"
            )
        return tuple(dict.fromkeys(names))
    chosen = load_suite(suite)
    names = asked or [
        ref.id
        for ref in chosen.competitions
        if (ref.split == "sealed") == sealed and (sealed or split in (ref.split, "all"))
    ]
    for name in names:
        is_sealed = ref_of(name, chosen).split == "sealed"
        if is_sealed and not sealed:
            raise UserError(
                f"--competition {name}: is sealed, only `selfevo medals sealed` opens it"
            )
        if sealed and not is_sealed:
            raise UserError(f"--competition {name}: is not sealed: leave out --sealed")
        load_competition(name, data_dir, suite=chosen).field("private")
    if not names:
        raise UserError(
            f"suite {suite} has no competitions of split {'sealed' if sealed else split}"
        )
    return tuple(dict.fromkeys(names))


def load_view(suite: str, competition_id: str, data_dir: Path | None) -> Competition:
    """What a search may see of a competition. Raises `UserError` where it is not prepared."""
    if suite != LITE:
        chosen = load_suite(suite)
        return public_view(load_competition(competition_id, data_dir, suite=chosen))
    found = folder_competition(competition_id, data_dir)
    found.require_prepared()
    if not found.public_dir.is_dir() or not any(found.public_dir.iterdir()):
        raise UserError(f"{found.id} is not prepared (no files in {found.public_dir})")
    lower = found.lower_is_better
    return Competition(
        id=found.id,
        split="sealed",
        strata="",
        metric=found.grader_name,
        lower_is_better=found.board().lower_is_better if lower is None else lower,
        grade_fn="",
        public_dir=found.public_dir,
        private_dir=found.public_dir / "no-answers-here",
        dev_public_dir=None,
        dev_private_dir=None,
        leaderboard=(),
        dev_leaderboard=None,
        description=_description(found),
        facts=TaskFacts("regression", found.grader_name, 0, 0, 0, 0, 0, 0.0, 0, 0.0, False),
        suite=LITE,
        limits=ScriptLimits(_STEP_S, _memory_mb()),
    )


def folder_competition(competition_id: str, data_dir: Path | None) -> FolderCompetition:
    """A competition of MLE-bench's layout; a checkout is named by ``SELFEVO_MLEBENCH``."""
    return registry_of(data_dir=data_dir).get(competition_id)


def _description(found: FolderCompetition) -> str:
    prepared = found.public_dir / "description.md"
    if prepared.is_file():
        return prepared.read_text(encoding="utf-8")
    if found.description.strip():
        return found.description
    raise UserError(
        f"{found.id}: no description.md in {found.public_dir}: name a checkout of MLE-bench with "
        "SELFEVO_MLEBENCH"
    )


def _memory_mb() -> int:
    """Nine tenths of this machine's memory."""
    return int(0.9 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")) >> 20
