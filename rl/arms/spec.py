"""Which arms there are, and the run file of each. No torch here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rl.config import RunConfig, merge, parse_override, validate
from rl.errors import ConfigError

VARIANTS: dict[str, dict[str, Any]] = {
    "cispo": {"objective": "cispo"},
    "grpo": {"objective": "grpo"},
    "ppo_clip": {"objective": "ppo_clip"},
    "expert_iteration": {"objective": "expert_iteration"},
    "reinforce": {"objective": "reinforce"},
    "cispo_tight": {"objective": "cispo", "cispo": {"is_weight_max": 1.2}},
    "cispo_masked": {"objective": "cispo", "cispo": {"mask_low": 0.2, "mask_high": 0.2}},
    "cispo_dynamic": {
        "objective": "cispo",
        "rollout": {"dynamic_sampling": {"refills": 2}},
    },
}
MAIN = ("cispo", "grpo", "ppo_clip", "expert_iteration")
"""What is compared unless something else is asked for; the first is what the others are held to."""
START = "start"
"""Name of the measurement of the policy that all arms start from."""


@dataclass(frozen=True)
class Arm:
    """`cispo-u4-s0`: variant, optimiser updates a batch, seed; `cispo-u4p4-s0`: in 4 passes."""

    variant: str
    updates: int
    seed: int
    passes: int = 1

    @property
    def recipe(self) -> str:
        """The name without the seed."""
        passes = f"p{self.passes}" if self.passes > 1 else ""
        return f"{self.variant}-u{self.updates}{passes}"

    @property
    def name(self) -> str:
        return f"{self.recipe}-s{self.seed}"

    @classmethod
    def parse(cls, name: str) -> Arm:
        """Inverse of `name`; ConfigError for what is none."""
        variant, _, rest = name.partition("-u")
        counts, _, seed = rest.partition("-s")
        updates, _, passes = counts.partition("p")
        if variant not in VARIANTS or not (updates.isdigit() and seed.isdigit()):
            raise ConfigError(
                f"arm {name!r} is not VARIANT-uUPDATES-sSEED; variants: {', '.join(VARIANTS)}"
            )
        return cls(variant, int(updates), int(seed), int(passes or 1))


@dataclass(frozen=True)
class Settings:
    """What all arms of a comparison share."""

    suite: str = "practice-v1"
    steps: int = 40
    scripts: int = 72
    eval_every: int = 10
    samples: int = 4
    """Scripts a val competition at a point of the curve."""
    final_samples: int = 12
    """The same for the start and for the last checkpoint."""
    checkpoint: str = "nano"
    sandbox: str = "bubblewrap"
    workers: int = 2
    device: str = "auto"
    overrides: tuple[str, ...] = ()

    def eval_steps(self, last: int) -> tuple[int, ...]:
        """Steps whose checkpoints are measured, given the last step that was done."""
        return (*range(self.eval_every, last, self.eval_every), last)


def grid(
    variants: Sequence[str], updates: Iterable[int], seeds: Iterable[int], passes: int = 1
) -> list[Arm]:
    """All arms, seed by seed: what is stopped early has whole seeds."""
    counts = tuple(updates)
    return [
        Arm(variant, count, seed, passes if count % passes == 0 else 1)
        for seed in seeds
        for count in counts
        for variant in variants
    ]


def run_config(arm: Arm, settings: Settings) -> RunConfig:
    """The arm's run file, resolved.

    Expert iteration imitates every 10 steps; `updates` a batch are so 10 × `updates` a round, as
    many optimiser updates in all as the others make.
    """
    round_steps = min(10, settings.steps)
    data: dict[str, Any] = {
        "seed": arm.seed,
        "suite": settings.suite,
        "model": {"checkpoint": settings.checkpoint},
        "budget": {"steps": settings.steps, "scripts_per_step": settings.scripts},
        "optim": {"lr": 3e-4, "warmup_steps": 5},
        "sandbox": {"kind": settings.sandbox, "workers": settings.workers},
        "wandb": {"mode": "disabled"},
        "checkpoint_every": settings.eval_every,
        "keep_checkpoints": settings.steps // settings.eval_every + 2,
        "device": settings.device,
    }
    data = merge(data, VARIANTS[arm.variant])
    if arm.variant == "expert_iteration":
        rounds = {"round_steps": round_steps, "updates": round_steps * arm.updates}
        data = merge(data, {"expert_iteration": rounds})
    else:
        updates = {"updates_per_batch": arm.updates, "passes": arm.passes}
        data = merge(data, {"optim": updates})
    for text in settings.overrides:
        data = merge(data, parse_override(text))
    return validate(RunConfig, data, arm.name)
