"""`selfevo attach` on runs that TRL and our trainer really made, and on other trainers' names.

The compressed files are made by `scripts/make_trl_fixtures.py`; those of `ours` by `rl.train` on
the lab's template (24 scripts a step, learning rates 3e-4 and 3e-3).
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from agent_tools.errors import UserError
from agent_tools.wandb_logs import RunHistory, detect_portable, read_anything, translate
from agent_tools.wandb_logs.dialects import PLAIN, PRIME_RL, TRL, VERL, recognise
from selfevo.attach import attach, lines, record

HERE = Path(__file__).parent


def unpacked(tmp_path: Path, name: str, source: str = "trl_runs") -> Path:
    """A W&B folder with one offline run, as its trainer left it."""
    folder = tmp_path / "wandb" / "offline-run-20260101_000000-x"
    folder.mkdir(parents=True)
    packed = (HERE / source / f"run-{name}.wandb.gz").read_bytes()
    (folder / "run-x.wandb").write_bytes(gzip.decompress(packed))
    return tmp_path / "wandb"


def tree(folder: Path) -> dict[str, tuple[str, int]]:
    """Content and time of every file below a folder."""
    return {
        str(path): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


TRL_RUNS: list[tuple[str, set[str], tuple[str, float, float] | None]] = [
    ("healthy", set(), None),
    ("lr_high", {"entropy_collapse"}, ("learning_rate", 1.0, 0.1)),
    ("hot", {"entropy_collapse"}, ("learning_rate", 0.03, 0.003)),
    ("truncated", {"truncated_high"}, ("max_completion_length", 4, 8)),
    ("no_signal", {"reward_constant"}, None),
]


@pytest.mark.parametrize(("name", "expected", "change"), TRL_RUNS, ids=[r[0] for r in TRL_RUNS])
def test_runs_that_trl_made(
    tmp_path: Path, name: str, expected: set[str], change: tuple[str, float, float] | None
) -> None:
    found = attach(unpacked(tmp_path, name))
    assert found.run.dialect is TRL and found.run.history.state == "done"
    assert [row["step"] for row in found.run.history.rows] == list(range(1, 17))
    names = {finding.name for finding in found.findings}
    assert expected <= names and (bool(names) == bool(expected))
    got = found.change and (found.change.key, found.change.before, found.change.after)
    assert got == change
    assert found.run.renamed["policy/entropy"] == "train/entropy"
    assert "train/loss" in found.run.unread and "train/reward" not in found.run.unread


@pytest.mark.parametrize(
    ("name", "change"), [("healthy", None), ("lr_high", ("optim.lr", 3e-3, 3e-4))]
)
def test_runs_that_our_trainer_made(
    tmp_path: Path, name: str, change: tuple[str, float, float] | None
) -> None:
    found = attach(unpacked(tmp_path, name, "our_runs"))
    assert found.run.dialect.name == "selfevo" and "valid_frac" in found.text
    got = found.change and (found.change.key, found.change.before, found.change.after)
    assert got == change


def test_the_command_reads_only_and_says_it_in_both_forms(tmp_path: Path) -> None:
    folder = unpacked(tmp_path, "lr_high")
    before = tree(tmp_path)
    command = [sys.executable, "-m", "selfevo.cli", "attach", str(folder)]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60)
    data = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=60)
    assert (shown.returncode, data.returncode) == (0, 0), shown.stderr + data.stderr
    assert "suggestion: learning_rate 1 → 0.1 (entropy_collapse" in shown.stdout
    told: dict[str, Any] = json.loads(data.stdout)
    assert data.stdout.count("\n") == 1 and told["trainer"] == "TRL" and told["steps"] == 16
    assert told["suggestion"]["key"] == "learning_rate" and told["read"]["optim/lr"]
    assert tree(tmp_path) == before


def test_every_way_to_point_at_a_run(tmp_path: Path) -> None:
    folder = unpacked(tmp_path, "healthy")
    file = next(folder.glob("*/run-x.wandb"))
    for path in (tmp_path, folder, file.parent, file):
        assert read_anything(path)[1] == file
    later = folder / "offline-run-20260102_000000-y"
    shutil.copytree(file.parent, later)
    assert read_anything(folder)[1].parent == later  # the newest
    with pytest.raises(UserError, match="no run log here"):
        read_anything(HERE)
    with pytest.raises(UserError, match="no such file"):
        read_anything(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"not a \.wandb file"):
        read_anything(Path(__file__))


def history(columns: dict[str, list[float]], config: dict[str, object] | None = None) -> RunHistory:
    length = len(next(iter(columns.values())))
    rows = [{"step": i + 1, **{k: v[i] for k, v in columns.items()}} for i in range(length)]
    return RunHistory(rows, config=config or {}, state="done")


def falling(start: float, end: float) -> list[float]:
    noise = random.Random(0)
    return [start + (end - start) * i / 19 + 0.01 * noise.uniform(-1, 1) for i in range(20)]


def test_verl_is_read_under_its_names() -> None:
    run = history(
        {
            "critic/score/mean": falling(0.6, 0.1),
            "actor/entropy": [0.4] * 20,
            "actor/grad_norm": [0.2] * 20,
            "actor/ppo_kl": [0.3] * 20,
            "actor/pg_clipfrac": [0.4] * 20,
            "actor/lr": [1e-5] * 20,
            "response_length/mean": [900.0] * 20,
            "response_length/clip_ratio": [0.5] * 20,
            "timing_s/gen": [3.0] * 20,
        },
        {"actor_rollout_ref.actor.optim.lr": 1e-5, "data.max_response_length": 1024},
    )
    found = translate(run)
    assert found.dialect is VERL and found.unread == ["timing_s/gen"]
    names = [finding.name for finding in detect_portable(found.history)]
    assert names == ["reward_falling", "kl_update_high", "truncated_high", "clip_high"]
    assert found.setting("optim.lr") == "actor_rollout_ref.actor.optim.lr"
    assert found.setting("rollout.group_size") == "actor_rollout_ref.rollout.n"


@pytest.mark.parametrize(
    ("reward", "truncated"),
    [
        ("reward/all/mean", "is_truncated/all/mean"),
        ("train/agg/effective/reward/mean", "train/agg/effective/is_truncated/mean"),
    ],
)
def test_prime_rl_is_read_under_its_names_old_and_new(reward: str, truncated: str) -> None:
    run = history(
        {
            reward: falling(0.1, 0.7),
            truncated: [0.6] * 20,
            "entropy/all/mean": [0.5] * 20,
            "mismatch_kl/all/mean": [0.2] * 20,
            "optim/grad_norm": [0.1] * 20,
            "optim/lr": [1e-6] * 20,
        },
        {"orchestrator.sampling.max_tokens": 512},
    )
    found = translate(run)
    assert found.dialect is PRIME_RL and found.unread == []
    names = [finding.name for finding in detect_portable(found.history)]
    assert names == ["truncated_high", "mismatch_high"]
    assert found.setting("rollout.max_new_tokens") == "orchestrator.sampling.max_tokens"


def test_plain_names_and_names_that_nobody_knows() -> None:
    run = history({"reward": falling(1.0, 0.0), "lr": [1e-3] * 20, "wobble": [1.0] * 20})
    assert recognise(run) is PLAIN and translate(run).unread == ["wobble"]
    other = translate(history({"wobble": [1.0] * 5}))
    assert other.renamed == {} and other.history.rows == [] and other.unread == ["wobble"]


def test_a_run_with_unknown_names_gets_no_guess(tmp_path: Path) -> None:
    rows = "".join(json.dumps({"step": i, "wob\u001b[31mble": 1.0}) + "\n" for i in range(1, 9))
    (tmp_path / "metrics.jsonl").write_text(rows)
    found = attach(tmp_path)
    text = "\n".join(lines(found))
    assert "no metric of this run has a name that is known here" in text and "\x1b" not in text
    assert record(found)["suggestion"] is None and "wob" in record(found)["unread"][0]


def test_without_a_configuration_the_direction_is_named() -> None:
    run = translate(history({"actor/pg_loss": [0.1] * 20, "critic/score/mean": falling(0.6, 0.1)}))
    from selfevo.attach import suggest

    change = suggest(run, tuple(detect_portable(run.history)))
    assert change is not None and change.before is None
    assert (change.key, change.direction) == ("actor_rollout_ref.actor.optim.lr", "decrease")


@pytest.mark.parametrize("seed", range(8))
def test_noise_alone_is_no_finding(seed: int) -> None:
    noise = random.Random(seed)
    columns = {
        "reward": [1.5 + noise.gauss(0, 0.4) for _ in range(40)],
        "entropy": [2.0 * noise.uniform(0.8, 1.2) for _ in range(40)],
        "grad_norm": [3.0 * noise.uniform(0.5, 1.8) for _ in range(40)],
        "approx_kl": [0.01 * noise.random() for _ in range(40)],
        "lr": [5e-6] * 40,
    }
    assert detect_portable(translate(history(columns)).history) == []
