"""`selfevo plan`: counts that a campaign then has, numbers that the gate then prints, refusals."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from agent_tools.git_configs import LabRepo
from selfevo import loop
from selfevo.arms import Commands
from selfevo.campaign import RunOptions, read_view
from selfevo.config import EvalConfig, LabConfig
from selfevo.lab import init_lab
from selfevo.plan import LARGEST_GAIN, Measured, false_keep, make, of_lab, smallest_effect

EXAMPLE = Path(__file__).parents[2] / "runs/example"


def config(**changes: Any) -> LabConfig:
    return LabConfig.model_validate({"rounds": 2, "agent": {"kind": "rules"}, **changes})


def planned(lab: LabConfig, seeds: int = 2, past: Measured | None = None, **more: Any) -> Any:
    evaluation = EvalConfig(train_seeds=seeds)
    return make(lab, evaluation, past or Measured(), competitions=2, **more)


def test_the_jobs_are_those_that_a_campaign_has(lab: Path, commands: Commands) -> None:
    code, folder = loop.start(lab, RunOptions(agent="random", seed=1), lambda line: None, commands)
    view = read_view(folder)
    assert code == 0 and len(view.prs) == 2  # every round proposes, so every job is needed
    before = of_lab(lab, None, None)
    for kind, span in (("train", before.train_jobs), ("eval", before.eval_jobs)):
        done = [job for job in view.jobs.values() if job.kind == kind]
        assert span[0] <= len(done) <= span[1]
    assert before.sources["time"].endswith("jobs of this lab")
    assert before.train_job_s < 20  # measured: the stand-in trainer takes no 45 s


def test_the_effect_is_the_one_that_the_gate_printed(tmp_path: Path) -> None:
    """The recorded campaign's gate, from its variance; the plan reads the folder's own past."""
    lab = tmp_path / "lab"
    init_lab(lab)
    shutil.copytree(EXAMPLE, lab / "runs/c1")
    gate = read_view(lab / "runs/c1").rounds[1].gate
    assert gate is not None
    variance = max(gate["seed_sd"], gate["sampling_sd"]) ** 2
    assert smallest_effect(variance, 2, 0, 0.05, 2) == pytest.approx(gate["smallest_effect"])
    plan = of_lab(lab, None, None)
    assert plan.sources["variance"] == "scores of this lab"
    assert plan.train_job_s == pytest.approx(62.8, abs=1)
    assert plan.score_sd == pytest.approx(math.sqrt(9.18), abs=0.1)


def test_more_seeds_see_smaller_effects_and_cost_more() -> None:
    two, five = planned(config()), planned(config(), 5)
    assert five.smallest_first < two.smallest_first and five.wall_hours[0] > two.wall_hours[0]
    assert two.smallest_last < two.smallest_first and two.problems == []
    confirmed = planned(config(gate={"confirm_seeds": 3}))
    assert confirmed.train_jobs == (6, 6 + 2 * 2 * 3 + 2)
    assert confirmed.wall_hours[1] > confirmed.wall_hours[0]
    assert planned(config(), gpus=1).gpu_hours == pytest.approx(two.wall_hours, abs=0.01)


def test_false_keeps_stay_below_the_bound_and_confirmation_lowers_them() -> None:
    loose = config(rounds=5, gate={"alpha": 0.4})
    plain = false_keep(20.0, loose, 8)
    checked = config(rounds=5, gate={"alpha": 0.4, "confirm_seeds": 4, "confirm_alpha": 0.05})
    assert 0.02 < plain < 0.4
    assert false_keep(20.0, checked, 8) < plain / 3


@pytest.mark.parametrize(
    ("changes", "past", "words"),
    [
        ({}, Measured(script_sd=90.0), "--seeds"),
        ({"budget": {"job_wall_s": 20}}, Measured(), "budget.job_wall_s"),
        ({"budget": {"campaign_hours": 0.01}}, Measured(), "budget.campaign_hours"),
    ],
)
def test_hopeless_designs_are_refused_with_what_to_change(
    changes: dict[str, Any], past: Measured, words: str
) -> None:
    (problem, *_) = planned(config(**changes), past=past).problems
    assert words in problem


def test_what_the_refusal_names_is_enough() -> None:
    past = Measured(script_sd=90.0)
    problem = planned(config(), past=past).problems[0]
    seeds = int(problem.split("--seeds ")[1].split(")")[0])
    better = planned(config(), seeds, past)
    assert better.problems == [] and better.smallest_first <= LARGEST_GAIN
    assert planned(config(), free_gb=0.01).problems[0].endswith("or take fewer rounds")


def test_the_command(tmp_path: Path) -> None:
    lab = tmp_path / "lab"
    repo = init_lab(lab)

    def selfevo(*args: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "selfevo.cli", "plan", str(lab), *args]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    done = selfevo("--json", "--rounds", "3", "--seeds", "4")
    told = json.loads(done.stdout)
    assert done.returncode == 0 and told["ok"] and told["train_jobs"] == [16, 24]
    settings = lab / "selfevo.yaml"
    settings.write_text(settings.read_text().replace("job_wall_s: 900", "job_wall_s: 9"))
    repo.commit(["selfevo.yaml"], "short", worktree=lab)
    refused = selfevo()
    assert refused.returncode == 1 and "hopeless: a training job takes about" in refused.stdout
    assert not (lab / "runs").exists() and LabRepo(lab).branches("selfevo/") == []
