"""`selfevo plan`: what a campaign would cost and could show, before anything is spent.

Costs come from the lab's own finished jobs where there are any, else from the documented defaults
below. What the gate can see comes from the gate's own functions, on simulated scores.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from selfevo import arms, gate
from selfevo.asynchronous import Rollouts, rollouts_of
from selfevo.config import EvalConfig, LabConfig
from selfevo.gate import SeedScore
from selfevo.views import CampaignView

# One job a time on two cores without a GPU, the bundled model, the template's budget: 45 to 63 s
# for 120 scripts, 9 to 14 s for 32 (`selfevo replay runs/example --json` has the latter of each).
TRAIN_S, TRAIN_START_S = 0.31, 8.0
EVAL_S, EVAL_START_S = 0.17, 4.0
SCRIPT_SD = 18.0  # percentile points between scripts of one policy and competition; measured 15
#: Start of an asynchronous job: its processes with our own engine on two cores; with vLLM
#: (`--eager`) on one card, where imports are most of it. Scripts run beside the training of the
#: step before, which would make them cheaper; a short job gains little, so it is left out.
ASYNC_START_S = {"own": 15.0, "vllm": 75.0}
AGENT_S = 5.0  # of the bundled model's proposal a round; rules take none
CHECKPOINT_MB = 36.0  # one training run on disk
#: A true gain above this has not been seen: the whole way from a destroyed policy to a tuned one.
LARGEST_GAIN = 42.0
SIMULATED = 2000  # rounds of null campaigns
MOST_SEEDS = 64


@dataclass(frozen=True)
class Measured:
    """Figures of the lab's own past; None where it has none.

    train_s, eval_s: wall seconds a script, start of the job included; script_sd: points between
    scripts; seed_var: variance between seeds at this budget (points squared) with its df.
    """

    train_s: float | None = None
    eval_s: float | None = None
    script_sd: float | None = None
    seed_var: float | None = None
    seed_df: int = 0
    jobs: int = 0


@dataclass(frozen=True)
class Plan:
    """What a campaign would do. Effects in percentile points, times in hours.

    Spans are (least, most): most with a confirmation in every round and new control runs in every
    round but the first, least with neither.
    smallest_first, smallest_last: the gate's smallest detectable effect in the first and in the
    last round; blind_rounds: rounds at the start in which it is above `LARGEST_GAIN`; false_keep:
    share of simulated campaigns without any better change that keep one.
    """

    rounds: int
    train_seeds: int
    rollouts: str
    train_jobs: tuple[int, int]
    eval_jobs: tuple[int, int]
    train_scripts: tuple[int, int]
    eval_scripts: tuple[int, int]
    train_job_s: float
    eval_job_s: float
    wall_hours: tuple[float, float]
    gpu_hours: tuple[float, float]
    disk_gb: float
    score_sd: float
    smallest_first: float
    smallest_last: float
    blind_rounds: int
    false_keep: float
    false_keep_bound: float
    sources: dict[str, str]
    problems: list[str] = field(default_factory=list)


def measured(views: Sequence[tuple[CampaignView, dict[str, Any]]], budget_id: str) -> Measured:
    """Figures of past campaigns, each with its resolved configuration. Pure."""
    wall: dict[str, list[tuple[float, int]]] = {"train": [], "eval": []}
    script_vars: list[float] = []
    groups: list[list[SeedScore]] = []
    for view, resolved in views:
        budget = resolved["lab"]["budget"]
        per_train = budget["steps"] * budget["scripts_per_step"]
        samples = {score.job: score.score.samples for score in view.scores.values()}
        for job in view.jobs.values():
            if job.state != "done" or job.ended <= job.started:
                continue
            count = per_train if job.kind == "train" else samples.get(job.id)
            if count:
                wall[job.kind].append((job.ended - job.started, count))
        # a destroyed policy scores 0 in every script, which tells nothing about the spread
        alive = [s for s in view.scores.values() if s.score.score > 0]
        script_vars += [s.score.sampling_var * s.score.samples for s in alive]
        if view.info["budget"] == budget_id:
            by_arm: dict[tuple[str, str], list[SeedScore]] = {}
            for one in alive:
                by_arm.setdefault((one.arm, one.parent), []).append(one.score)
            groups += by_arm.values()
    between, df = gate.pooled_variance(groups)
    return Measured(
        _rate(wall["train"]),
        _rate(wall["eval"]),
        math.sqrt(sum(script_vars) / len(script_vars)) if script_vars else None,
        between if df else None,
        df,
        len(wall["train"]) + len(wall["eval"]),
    )


def _rate(jobs: Sequence[tuple[float, int]]) -> float | None:
    return sum(s for s, _ in jobs) / sum(n for _, n in jobs) if jobs else None


def make(
    config: LabConfig,
    evaluation: EvalConfig,
    past: Measured,
    *,
    competitions: int,
    rollouts: Rollouts = Rollouts(),
    gpus: int = 0,
    free_gb: float = math.inf,
) -> Plan:
    """The plan of a campaign with this configuration. Pure; the simulation's seed is fixed."""
    budget, rules = config.budget, config.gate
    seeds, rounds = evaluation.train_seeds, config.rounds
    least = seeds * (1 + rounds)
    # from round 2 on the control may be trained again: for fresh seeds beside an edit that is
    # repeated, or from the kept checkpoint (`gate.parent: incumbent`)
    jobs = (least, least + rounds * 2 * rules.confirm_seeds + (rounds - 1) * seeds)
    per_train = budget.steps * budget.scripts_per_step
    per_eval = evaluation.samples * competitions
    start_s = TRAIN_START_S if rollouts.engine is None else ASYNC_START_S[rollouts.engine]
    train_s = _job_seconds(past.train_s, TRAIN_S, start_s, per_train)
    eval_s = _job_seconds(past.eval_s, EVAL_S, EVAL_START_S, per_eval)
    agent_s = rounds * (AGENT_S if config.agent.kind == "model" else 0.0)
    parallel = min(config.launcher.parallel, seeds)

    def hours(count: int) -> float:
        return (count * (train_s + eval_s) / parallel + agent_s) / 3600

    def gpu_hours(count: int) -> float:
        return round(gpus * count * (train_s + eval_s) / 3600, 3)

    sd = past.script_sd or SCRIPT_SD
    variance = max(past.seed_var or 0.0, sd**2 / per_eval)
    sources = {
        "time": _source(past.train_s, f"{past.jobs} jobs of this lab"),
        "variance": _source(past.script_sd, "scores of this lab"),
    }
    found = Plan(
        rounds=rounds,
        train_seeds=seeds,
        rollouts=rollouts.name,
        train_jobs=jobs,
        eval_jobs=jobs,
        train_scripts=(jobs[0] * per_train, jobs[1] * per_train),
        eval_scripts=(jobs[0] * per_eval, jobs[1] * per_eval),
        train_job_s=round(train_s, 1),
        eval_job_s=round(eval_s, 1),
        wall_hours=(round(hours(jobs[0]), 3), round(hours(jobs[1]), 3)),
        gpu_hours=(gpu_hours(jobs[0]), gpu_hours(jobs[1])),
        disk_gb=round(jobs[1] * CHECKPOINT_MB / 1000, 2),
        score_sd=round(math.sqrt(variance), 2),
        smallest_first=round(smallest_effect(variance, seeds, 0, rules.alpha, rounds), 1),
        smallest_last=round(smallest_effect(variance, seeds, rounds - 1, rules.alpha, rounds), 1),
        blind_rounds=blind_rounds(variance, seeds, rules.alpha, rounds),
        false_keep=round(false_keep(variance, config, seeds), 4),
        false_keep_bound=rules.alpha,
        sources=sources,
    )
    found.problems.extend(_problems(found, config, variance, free_gb))
    return found


def _job_seconds(measured_s: float | None, default_s: float, start_s: float, scripts: int) -> float:
    return scripts * measured_s if measured_s is not None else start_s + scripts * default_s


def _source(value: float | None, where: str) -> str:
    return "documented defaults" if value is None else where


# ------------------------------------------------------------------ what the gate can see


def smallest_effect(variance: float, seeds: int, others: int, alpha: float, rounds: int) -> float:
    """The gate's smallest detectable effect with `others` earlier arms beside the two compared."""
    arm = [SeedScore(i, 50.0, variance, 1) for i in range(seeds)]
    result = gate.decide(arm, arm, [arm] * others, alpha=alpha, rounds=rounds)
    assert result.smallest_effect is not None  # a design has two seeds an arm or more
    return result.smallest_effect


def blind_rounds(variance: float, seeds: int, alpha: float, rounds: int) -> int:
    """Rounds at the start whose smallest detectable effect no change can reach."""
    for done in range(rounds):
        if smallest_effect(variance, seeds, done, alpha, rounds) <= LARGEST_GAIN:
            return done
    return rounds


def false_keep(variance: float, config: LabConfig, seeds: int) -> float:
    """Share of simulated campaigns, in which no change is better, that keep one in the end.

    Scores are normal around one mean with the variance given; every round tests a new candidate
    against the same control, and a kept one is confirmed where the lab says so.
    """
    rules, rounds = config.gate, config.rounds
    rng = random.Random(0)
    sd = math.sqrt(variance)

    def arm(count: int) -> list[SeedScore]:
        return [SeedScore(i, rng.gauss(50.0, sd), variance, 1) for i in range(count)]

    campaigns = max(50, SIMULATED // rounds)
    kept = 0
    for _ in range(campaigns):
        control = arm(seeds)
        others: list[list[SeedScore]] = []
        for _ in range(min(rounds, SIMULATED // 50)):
            candidate = arm(seeds)
            result = gate.decide(control, candidate, others, alpha=rules.alpha, rounds=rounds)
            if result.verdict == "accept" and _stays(config, arm):
                kept += 1
                break
            others.append(candidate)
    return kept / campaigns


def _stays(config: LabConfig, arm: Any) -> bool:
    """Whether a change without effect passes its confirmation."""
    n = config.gate.confirm_seeds
    if not n:
        return True
    return gate.confirm(arm(n), arm(n), alpha=config.gate.confirm_alpha)[0] == "confirmed"


def _problems(plan: Plan, config: LabConfig, variance: float, free_gb: float) -> list[str]:
    """Why this design is hopeless, each with what to change."""
    found = []
    if plan.blind_rounds == plan.rounds:
        enough = _enough_seeds(variance, config)
        more = f"{enough} train seeds an arm (--seeds {enough})" if enough else "a larger alpha"
        found.append(
            f"in no round would the gate see effects below {plan.smallest_last:.0f} points, and no "
            f"change is worth more than {LARGEST_GAIN:.0f}: take {more}, or more samples an "
            "evaluation"
        )
    wall = config.budget.job_wall_s
    for name, seconds in (("training", plan.train_job_s), ("evaluation", plan.eval_job_s)):
        if seconds > wall:
            found.append(
                f"a {name} job takes about {seconds:.0f} s and is killed after {wall:.0f} s: raise "
                "budget.job_wall_s, or lower its steps, scripts or samples"
            )
    limit = config.budget.campaign_hours
    first = 2 * plan.wall_hours[0] / (plan.rounds + 1)
    if limit and limit < first:
        found.append(
            f"budget.campaign_hours is {limit:g}, and the start with one round takes about "
            f"{first:.2g} hours: raise it, or lower the budget of a job"
        )
    if plan.disk_gb > free_gb:
        found.append(
            f"the runs need about {plan.disk_gb:.1f} GB and {free_gb:.1f} GB are free: free some, "
            "or take fewer rounds"
        )
    return found


def _enough_seeds(variance: float, config: LabConfig) -> int | None:
    for seeds in range(2, MOST_SEEDS + 1):
        effect = smallest_effect(variance, seeds, 0, config.gate.alpha, config.rounds)
        if effect <= LARGEST_GAIN:
            return seeds
    return None


# ------------------------------------------------------------------ of a lab, and as text


def of_lab(lab: Path | None, rounds: int | None, train_seeds: int | None) -> Plan:
    """The plan of the next campaign of a lab (None: of the template), with `run`'s options."""
    import shutil

    from agent_tools.mle_bench.registry import load_suite
    from selfevo.config import PROTECTED, load_eval, load_lab_config
    from selfevo.lab import TEMPLATE, read_lab

    root = lab if lab is not None else TEMPLATE
    rollouts = rollouts_of(read_lab(root).train)
    settings, _, measuring = ((root / name).read_text("utf-8") for name in PROTECTED)
    config = load_lab_config(settings, {} if rounds is None else {"rounds": rounds})
    evaluation = load_eval(measuring, train_seeds)
    past = (
        Measured() if lab is None else measured(_past(lab, rollouts), arms.budget_id(config.budget))
    )
    return make(
        config,
        evaluation,
        past,
        competitions=len(load_suite(evaluation.suite or config.suite).ids("val")),
        rollouts=rollouts,
        gpus=1 if Path("/dev/nvidia0").exists() else 0,
        free_gb=shutil.disk_usage(root).free / 1e9,
    )


def _past(lab: Path, rollouts: Rollouts) -> list[tuple[CampaignView, dict[str, Any]]]:
    """The lab's campaigns; those whose jobs sampled in another way tell nothing of these."""
    from selfevo.campaign import read_view
    from selfevo.lab import campaign_folder, campaigns
    from selfevo.store import read_blob

    found = []
    for name in campaigns(lab):
        folder = campaign_folder(lab, name)
        view = read_view(folder)
        train = folder / "arms" / str(view.info.get("arm")) / "train.yaml"
        known = train.is_file()
        same = (
            not known or rollouts_of(arms.parsed(train.read_text("utf-8"), str(train))) == rollouts
        )
        if view.info and same:
            found.append((view, json.loads(read_blob(folder, view.info["config"]))))
    return found


def record(plan: Plan) -> dict[str, Any]:
    """`selfevo plan --json`."""
    return {"ok": not plan.problems, **asdict(plan)}


def lines(plan: Plan) -> list[str]:
    """The plan for people."""

    def span(low: float, high: float, digits: int = 0) -> str:
        a, b = f"{low:,.{digits}f}", f"{high:,.{digits}f}"
        return a if a == b else f"{a} to {b}"

    found = [
        f"{plan.rounds} rounds, {plan.train_seeds} train seeds an arm, jobs {plan.rollouts}",
        f"  jobs        {span(*plan.train_jobs)} training, {span(*plan.eval_jobs)} evaluation",
        f"  scripts     {span(*plan.train_scripts)} in training, "
        f"{span(*plan.eval_scripts)} in evaluation",
        f"  a job       training {plan.train_job_s:.0f} s, evaluation {plan.eval_job_s:.0f} s "
        f"({plan.sources['time']})",
        f"  wall        {span(*plan.wall_hours, 2)} hours",
        f"  GPU         {span(*plan.gpu_hours, 2)} hours",
        f"  disk        {plan.disk_gb:.1f} GB",
        f"  the gate    sees effects from {plan.smallest_first:.1f} points in round 1"
        + (f", {plan.smallest_last:.1f} in round {plan.rounds}" if plan.rounds > 1 else "")
        + f"; a seed's score has sd {plan.score_sd:.1f} ({plan.sources['variance']})",
        f"  false keeps {plan.false_keep:.1%} of simulated campaigns without a better change "
        f"(bound {plan.false_keep_bound:.0%})",
    ]
    if 0 < plan.blind_rounds < plan.rounds:
        found.append(
            f"  note        the first {plan.blind_rounds} of {plan.rounds} rounds can accept "
            "nothing (too few arms yet): more train seeds an arm would change that"
        )
    found += [f"hopeless: {problem}" for problem in plan.problems]
    return found
