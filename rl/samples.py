"""From judged episodes to what an optimiser trains on. No torch here.

The atom is one call (M2 report §6.1.1): its own response tokens, with one advantage, as the
reward-to-go is constant inside a call. Records that do not fit the run are refused, not mended.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

from rl.advantages import Advantages, Spread, group_advantages
from rl.config import RunConfig
from rl.errors import ConfigError, RecordError
from rl.rewards import LengthPenalty, RewardWeights, call_rewards, returns_to_go
from rl.types import CallRecord, Episode

CUT = ("length", "repetition")
"""Finish reasons of replies that did not end by themselves."""

T = TypeVar("T")


@dataclass(frozen=True)
class Sample:
    """One call to train on: ids = prompt + response, one recorded log-prob a response id (none for
    a reply that is imitated). RecordError where their numbers differ."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    advantage: float = 0.0

    def __post_init__(self) -> None:
        if self.logprobs and len(self.logprobs) != len(self.response_ids):
            raise RecordError(
                f"a sample has {len(self.response_ids)} ids but {len(self.logprobs)} log-probs; "
                "leave the record out"
            )

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass(frozen=True)
class Batch:
    """Samples of one step, call after call, and the advantages that they came from."""

    samples: tuple[Sample, ...]
    advantages: Advantages
    masked: int
    """Cut replies left out by the truncation rule."""


def usable(episodes: Iterable[Episode]) -> list[Episode]:
    """Episodes that were judged: infrastructure errors and aborted ones are left out."""
    return [e for e in episodes if e.reward.status in ("done", "timeout")]


def rewards_to_go(episodes: Sequence[Episode], config: RunConfig) -> list[list[float]]:
    """G_t of every call of each episode, in order; speed is judged within its group."""
    weights = RewardWeights(**config.reward.model_dump())
    rule, length = config.rollout.truncation, None
    if rule.rule == "penalise":
        length = LengthPenalty(config.rollout.max_new_tokens, rule.buffer, rule.penalty)
    groups: dict[int, list[int]] = {}
    for position, episode in enumerate(episodes):
        groups.setdefault(episode.group, []).append(position)
    out: list[list[float]] = [[] for _ in episodes]
    for positions in groups.values():
        members = [episodes[p] for p in positions]
        rewards = call_rewards(
            [e.reward for e in members], [e.calls for e in members], weights, length
        )
        for position, values in zip(positions, rewards, strict=True):
            out[position] = returns_to_go(values, weights.gamma)
    return out


def advantages_of(
    episodes: Sequence[Episode], to_go: Sequence[Sequence[float]], spread: Spread
) -> Advantages:
    """Advantages of judged episodes by their returns G_0."""
    return group_advantages(
        [values[0] for values in to_go],
        [e.group for e in episodes],
        [e.domain for e in episodes],
        spread,
    )


def make_batch(
    episodes: Sequence[Episode], config: RunConfig, spread: Spread, tokenizer_hash: str = ""
) -> Batch:
    """Samples of judged episodes. RecordError or ConfigError for a call that does not fit the run.

    tokenizer_hash: of the policy's tokenizer; calls that name another are refused.
    """
    for episode in episodes:
        for call in episode.calls:
            check_call(call, config, tokenizer_hash)
    to_go = rewards_to_go(episodes, config)
    advantages = advantages_of(episodes, to_go, spread)
    masking = config.rollout.truncation.rule == "mask"
    samples, masked = [], 0
    for i, episode in enumerate(episodes):
        values = advantages.of_calls(i, to_go[i])
        for call, advantage in zip(episode.calls, values, strict=False):
            if masking and call.finish_reason in CUT:
                masked += 1
            elif call.response_ids:
                samples.append(Sample(call.prompt_ids, call.response_ids, call.logprobs, advantage))
    return Batch(tuple(samples), advantages, masked)


def dead_groups(episodes: Sequence[Episode], config: RunConfig) -> set[int]:
    """Groups that teach nothing: no spread of returns among the judged members, or none judged."""
    judged = usable(episodes)
    found = advantages_of(judged, rewards_to_go(judged, config), "batch")
    live = {e.group for e, alive in zip(judged, found.live, strict=True) if alive}
    return {e.group for e in episodes} - live


def check_call(call: CallRecord, config: RunConfig, tokenizer_hash: str = "") -> None:
    """Raise where a call is not training data of this run, naming the call and the reason."""
    where = f"call {call.index} of episode {call.episode}"
    if call.constrained:
        raise ConfigError(
            f"{where}: a grammar-constrained reply is not training data: its log-probs are not the "
            "policy's; sample without tools"
        )
    if len(call.logprobs) != len(call.response_ids):
        raise RecordError(
            f"{where}: {len(call.response_ids)} ids but {len(call.logprobs)} log-probs; "
            "leave the episode out"
        )
    if tokenizer_hash and call.tokenizer_hash and call.tokenizer_hash != tokenizer_hash:
        raise RecordError(
            f"{where}: recorded with tokenizer {call.tokenizer_hash[:12]}, the policy has "
            f"{tokenizer_hash[:12]}; train the policy that sampled it"
        )
    if call.temperature != config.rollout.temperature:
        raise RecordError(
            f"{where}: sampled at temperature {call.temperature:g}, the run trains at "
            f"{config.rollout.temperature:g}; set rollout.temperature to it"
        )


def minibatches(items: Sequence[T], updates: int, passes: int, seed: int) -> list[list[T]]:
    """What each of the `updates` optimiser updates of a step sees, in order.

    `passes` times through the items, each time in a new order and in `updates` / `passes` parts
    whose sizes differ by one at most. With one part a pass, nothing is shuffled.
    """
    parts = min(updates // passes, len(items))
    if parts <= 1:
        return [list(items) for _ in range(passes)]
    rng = random.Random(seed)
    out = []
    for _ in range(passes):
        order = rng.sample(items, len(items))
        ends = [len(items) * k // parts for k in range(parts + 1)]
        out += [order[a:b] for a, b in pairwise(ends)]
    return out
