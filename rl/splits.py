"""Which competitions training may touch: the train split, whatever a configuration says."""

from __future__ import annotations

from collections.abc import Iterable

from agent_tools.mle_bench.registry import load_suite, suite_names
from rl.config import nearest
from rl.errors import ConfigError, SplitError


def held_out_ids() -> frozenset[str]:
    """Ids that any bundled suite declares other than train: never trained on, in any suite."""
    return frozenset(
        ref.id
        for name in suite_names()
        for ref in load_suite(name).competitions
        if ref.split != "train"
    )


def trainable_ids(suite_name: str, wanted: Iterable[str] = ()) -> tuple[str, ...]:
    """The ids to train on, in the given order (none given: all train ids of the suite).

    Raises SplitError naming the first val or sealed id, ConfigError for an unknown one.
    """
    suite = load_suite(suite_name)
    splits = {ref.id: ref.split for ref in suite.competitions}
    held_out = held_out_ids()
    ids = tuple(wanted) or suite.ids("train")
    for competition in ids:
        split = splits.get(competition)
        if competition in held_out or split not in (None, "train"):
            raise SplitError(
                f"competition {competition!r} is held out ({split or 'not train'}) and is never "
                "trained on; remove it from competitions"
            )
        if split is None:
            raise ConfigError(
                f"competition {competition!r} is not in suite {suite_name}; "
                f"nearest is {nearest(competition, splits)!r}"
            )
    return ids


def refuse_held_out_text(text: str, where: str, held_out: Iterable[str]) -> None:
    """Raise SplitError if a training text names a competition of `held_out`."""
    for competition in sorted(held_out, key=lambda id: (-len(id), id)):  # the most exact name
        if competition in text:
            raise SplitError(
                f"{where} names the held-out competition {competition!r}; remove that record"
            )
