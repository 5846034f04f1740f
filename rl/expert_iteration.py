"""Expert iteration (rejection fine-tuning): imitate the best distinct scripts sampled so far.

Every `round_steps` steps (and at the last one) the `keep_per_competition` best distinct scripts of
each competition, over everything sampled in this run, are imitated for `updates` × `batch`
sequences. A step samples and executes exactly as many scripts as a CISPO step, so both objectives
compare at equal script executions. No torch here.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rl.engine import derive_seed


@dataclass(frozen=True)
class Expert:
    """A kept script with the exact ids it was sampled as."""

    digest: str
    reward: float
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]


class ExpertPool:
    """The best distinct scripts a competition; equal rewards keep the earlier one."""

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._kept: dict[str, list[Expert]] = {}

    def add(
        self,
        competition: str,
        script: str,
        reward: float,
        prompt_ids: Sequence[int],
        response_ids: Sequence[int],
    ) -> None:
        """Offer one executed script; worthless (reward 0) and known ones are not kept."""
        if reward <= 0.0:
            return
        digest = hashlib.sha256(script.encode("utf-8", "surrogatepass")).hexdigest()
        kept = self._kept.setdefault(competition, [])
        if any(expert.digest == digest for expert in kept):
            return
        kept.append(Expert(digest, reward, tuple(prompt_ids), tuple(response_ids)))
        kept.sort(key=lambda expert: -expert.reward)  # stable: the earlier of equals stays ahead
        del kept[self._keep :]

    def experts(self) -> list[Expert]:
        """All kept scripts, in a fixed order."""
        return [expert for name in sorted(self._kept) for expert in self._kept[name]]

    def draw(self, *, seed: int, step: int, updates: int, batch: int) -> list[list[Expert]]:
        """`updates` batches of up to `batch` scripts: whole shuffled passes over the pool, so that
        every script is imitated equally often (± 1). Empty if nothing was kept."""
        experts = self.experts()
        if not experts:
            return []
        rng = random.Random(derive_seed(seed, step, "imitate"))
        stream: list[Expert] = []
        while len(stream) < updates * batch:
            stream += rng.sample(experts, len(experts))
        return [stream[i * batch : (i + 1) * batch] for i in range(updates)]

    def state(self) -> dict[str, Any]:
        """Plain values for the checkpoint."""
        return {
            name: [[e.digest, e.reward, list(e.prompt_ids), list(e.response_ids)] for e in experts]
            for name, experts in self._kept.items()
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state`."""
        self._kept = {
            name: [
                Expert(digest, reward, tuple(prompt), tuple(response))
                for digest, reward, prompt, response in experts
            ]
            for name, experts in state.items()
        }


def round_ends(step: int, steps: int, round_steps: int) -> bool:
    """True when the pool is imitated after this step (counted from 1)."""
    return step % round_steps == 0 or step == steps
