"""What a run would do, said before it does it (`rl.train --dry-run`). No torch here."""

from __future__ import annotations

from rl.config import RunConfig
from rl.objective_text import objective_text
from rl.window import lag_bound, window_size

SHOWN = 3


def plan_text(config: RunConfig, tasks: tuple[str, ...]) -> str:
    """Objective, steps, budget and rules, as YAML comments: the whole output still parses."""
    budget, rollout = config.budget, config.rollout
    groups = config.groups_per_step
    lines = [
        f"objective: {objective_text(config)}",
        f"steps: {budget.steps} × {groups} groups of {rollout.group_size}, "
        f"{len(tasks)} tasks in turn: {_first_steps(config, tasks)}",
        f"budget: {_budget(config)}",
        f"updates: {budget.steps * config.optim.updates_per_batch} at lr {config.optim.lr:g} after "
        f"{config.optim.warmup_steps} steps of warm-up"
        if config.objective != "expert_iteration"
        else f"updates: {config.expert_iteration.updates} at lr {config.expert_iteration.lr:g} "
        f"after every {config.expert_iteration.round_steps} steps",
        f"reward: {config.reward.process:g} · process + {config.reward.speed:g} · speed + outcome, "
        f"γ {config.reward.gamma:g} · baseline: the other attempts of the group · deviation: "
        + ("the group" if config.objective == "grpo" else "the batch's domain"),
        f"groups without spread: {_dynamic(config)} · cut replies: {rollout.truncation.rule} · "
        f"repetition stop: {rollout.repetition_stop.tokens} tokens in a row over "
        f"{rollout.repetition_stop.probability:g}",
        f"records: {config.pool or 'none kept'}",
    ]
    if config.forge.mode == "async":
        lines[-1] = f"records: {config.pool or 'pool.sqlite'}"
        lines.append(async_text(config))
    return "".join(f"# {line}\n" for line in lines)


def async_text(config: RunConfig) -> str:
    """Groups in flight, window, the bound on the policy's lag, and the processes."""
    forge, groups = config.forge, config.groups_per_step
    slots = (forge.steps_ahead + 1) * groups
    window = window_size(forge.order, slots, forge.window_share)
    return (
        f"asynchronous: {slots} groups in flight, window {window} ({forge.order}), policy lag at "
        f"most {lag_bound(slots, window, groups)} versions; {forge.workers} workers of "
        f"{forge.episodes_per_worker} episodes, engine {forge.engine}, weights by {forge.sync}"
    )


def _budget(config: RunConfig) -> str:
    budget, rollout, forge = config.budget, config.rollout, config.forge
    attempts = budget.steps * budget.scripts_per_step
    if config.agent.kind != "mle":  # what it does is its own affair, within the episode's limits
        return (
            f"{attempts} attempts, each of at most {forge.episode_calls} calls of "
            f"{rollout.max_new_tokens} tokens, {forge.episode_tokens} sampled tokens and "
            f"{forge.deadline_s:g} seconds"
        )
    scripts = attempts * rollout.turns
    return (
        f"{attempts} attempts, {scripts} script executions, at most "
        f"{scripts * rollout.max_new_tokens} sampled tokens and "
        f"{scripts * config.env.cpu_seconds:g} CPU seconds of scripts"
    )


def _first_steps(config: RunConfig, tasks: tuple[str, ...]) -> str:
    groups = config.groups_per_step
    parts = []
    for step in range(min(SHOWN, config.budget.steps)):
        names = [tasks[(step * groups + g) % len(tasks)] for g in range(groups)]
        shown = ", ".join(names[:SHOWN]) + (" …" if len(names) > SHOWN else "")
        parts.append(f"step {step + 1} {shown}")
    return " · ".join(parts)


def _dynamic(config: RunConfig) -> str:
    refills = config.rollout.dynamic_sampling.refills
    if config.forge.mode == "async" and config.forge.zero_variance == "drop":
        return "consumed and released at once, out of the same budget"
    if not refills:
        return "kept, with advantage 0"
    return f"replaced, up to {refills} times a step, out of the same budget"
