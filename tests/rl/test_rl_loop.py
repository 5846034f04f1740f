"""The training loop and its run directory, on a tiny model and a tiny environment."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from rl_fakes import TASKS, TextEnv, small_config, text_parts, text_tasks, tiny_checkpoint
from safetensors.torch import load_file

from agent_tools.wandb_logs import read_run
from rl.cli import run_main
from rl.config import RunConfig, dump_config
from rl.errors import (
    CheckpointStateError,
    ConfigError,
    DivergedError,
    InfraLimitError,
    StoppedError,
)
from rl.loop import Parts, run
from rl.run_dir import RunDir, decode_row
from rl.types import ChatClient, Episode, Task

FAKES = Path(__file__).with_name("rl_fakes.py")


config_of = partial(small_config, steps=4)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rl")
    tiny_checkpoint(folder / "start")
    return folder


def go(config: RunConfig, path: Path, *, resume: bool = False, check=lambda: None) -> int:  # type: ignore[no-untyped-def]
    return run(config, path, resume=resume, parts=text_parts, check=check)


def rows_of(path: Path) -> list[dict[str, object]]:
    lines = (path / "metrics.jsonl").read_text().splitlines()
    return [decode_row(line) for line in lines]


def status_of(path: Path) -> dict[str, object]:
    return json.loads((path / "status.json").read_text())


def learned(row: dict[str, object]) -> dict[str, object]:
    return {k: v for k, v in row.items() if k != "t" and not k.startswith("perf/")}


def test_run_directory_contract(home: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    assert go(config_of(home, wandb={"mode": "offline"}), path) == 0
    assert [row["step"] for row in rows_of(path)] == [1, 2, 3, 4]
    status = status_of(path)
    assert (status["state"], status["exit_code"], status["signal"]) == ("done", 0, None)
    assert set(status) >= {"pid", "host", "started", "heartbeat", "reason"}
    result = json.loads((path / "result.json").read_text())
    assert result["steps"] == 4 and result["checkpoint"] == "checkpoints/step-4"
    assert result["scripts"] == 32 and result["tokens"] > 0 and "torch" in result["versions"]
    assert (path / "checkpoints/latest").resolve() == (path / "checkpoints/step-4").resolve()
    assert sorted(p.name for p in (path / "checkpoints").glob("step-*")) == ["step-3", "step-4"]
    assert not (path / "checkpoints/step-4/trainer/state.safetensors").exists()
    assert (path / "checkpoints/step-4/tokenizer.json").is_file()
    # the W&B file alone tells the same story as the side-car
    from_wandb = read_run(path, prefer="wandb").rows
    from_sidecar = read_run(path, prefer="sidecar").rows
    assert from_wandb == from_sidecar
    required = {
        "reward/mle/mean", f"reward/{TASKS[0]}/mean", "loss/cispo/weight_mean",
        "loss/cispo/weight_max", "loss/cispo/capped_frac", "mismatch_kl/mean", "mismatch_kl/max",
        "policy/entropy", "policy/grad_norm", "group/zero_std_frac", "rollout/truncated_frac",
        "rollout/turns", "rollout/tokens", "rollout/valid_frac", "rollout/timeout_frac",
        "rollout/memory_frac", "optim/lr", "perf/tokens_per_s", "perf/step_s", "perf/generate_s",
        "perf/execute_s", "perf/update_s",
    }  # fmt: skip
    assert required <= set(rows_of(path)[0])


def test_two_processes_never_write_in_one_directory(home: Path, tmp_path: Path) -> None:
    path, config = tmp_path / "run", config_of(home, budget={"steps": 1})
    first = RunDir(path)
    first.open(dump_config(config), resume=True)
    with pytest.raises(CheckpointStateError, match="another process"):
        go(config, path, resume=True)
    first.close()
    assert go(config, path, resume=True) == 0


def test_weights_change_and_differ_from_parent(home: Path, tmp_path: Path) -> None:
    go(config_of(home, budget={"steps": 1}), tmp_path / "run")
    before = load_file(next((home / "start").glob("*.safetensors")))
    after = load_file(next((tmp_path / "run/checkpoints/step-1").glob("*.safetensors")))
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_finished_run_resumed_ends_at_once_and_reuse_is_refused(home: Path, tmp_path: Path) -> None:
    path, config = tmp_path / "run", config_of(home, budget={"steps": 1})
    go(config, path)
    stamp = (path / "result.json").stat().st_mtime_ns
    assert go(config, path, resume=True) == 0
    assert (path / "result.json").stat().st_mtime_ns == stamp
    with pytest.raises(CheckpointStateError, match="--resume"):
        go(config, path)
    with pytest.raises(CheckpointStateError, match="another configuration"):
        go(config_of(home, budget={"steps": 1}, seed=9), path, resume=True)


@pytest.mark.parametrize("objective", ["cispo", "expert_iteration"])
@pytest.mark.parametrize("every", [1, 3])
def test_stopped_and_resumed_run_equals_an_undisturbed_one(
    home: Path, tmp_path: Path, objective: str, every: int
) -> None:
    config = config_of(
        home, objective=objective, checkpoint_every=every,
        expert_iteration={"round_steps": 2, "updates": 2, "batch": 4, "keep_per_competition": 3},
    )  # fmt: skip
    go(config, tmp_path / "whole")
    calls = 0

    def stop_in_third_step() -> None:
        nonlocal calls
        rows = tmp_path / "cut/metrics.jsonl"
        calls += rows.is_file() and len(rows.read_text().splitlines()) == 2
        if calls >= 2:
            raise StoppedError("SIGTERM", 143)

    with pytest.raises(StoppedError):
        go(config, tmp_path / "cut", check=stop_in_third_step)
    status = status_of(tmp_path / "cut")
    assert (status["state"], status["exit_code"], status["signal"]) == ("cancelled", 143, "SIGTERM")
    assert (tmp_path / "cut/checkpoints/step-2/trainer/state.safetensors").is_file()
    go(config, tmp_path / "cut", resume=True)
    whole = [learned(row) for row in rows_of(tmp_path / "whole")]
    cut = [learned(row) for row in rows_of(tmp_path / "cut")]
    assert [row["step"] for row in cut] == [1, 2, 3, 4]
    assert cut == whole
    final = [load_file(next((tmp_path / d / "checkpoints/step-4").glob("*.safetensors")))
             for d in ("whole", "cut")]  # fmt: skip
    assert all(torch.equal(final[0][name], final[1][name]) for name in final[0])


def test_line_lost_after_its_checkpoint_is_restored_and_later_lines_are_cut(
    home: Path, tmp_path: Path
) -> None:
    path, config = tmp_path / "run", config_of(home)

    def stop_after_three() -> None:
        rows = path / "metrics.jsonl"
        if rows.is_file() and len(rows.read_text().splitlines()) == 3:
            raise StoppedError("SIGTERM", 143)

    with pytest.raises(StoppedError):
        go(config, path, check=stop_after_three)
    lines = (path / "metrics.jsonl").read_text().splitlines(keepends=True)
    stray = json.dumps({"step": 9, "t": 0.0}) + "\n" + '{"step": 10, "t"'
    (path / "metrics.jsonl").write_text("".join(lines[:2]) + stray)
    go(config, path, resume=True)
    assert [row["step"] for row in rows_of(path)] == [1, 2, 3, 4]
    assert rows_of(path)[2] == decode_row(lines[2])


def test_a_damaged_newest_checkpoint_is_passed_over(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, config = tmp_path / "run", config_of(home)

    def stop_after_three() -> None:
        rows = path / "metrics.jsonl"
        if rows.is_file() and len(rows.read_text().splitlines()) == 3:
            raise StoppedError("SIGTERM", 143)

    with pytest.raises(StoppedError):
        go(config, path, check=stop_after_three)
    before = [learned(row) for row in rows_of(path)]
    state = path / "checkpoints/step-3/trainer/state.safetensors"
    state.write_bytes(state.read_bytes()[:-8])
    go(config, path, resume=True)
    shown = capsys.readouterr()
    assert "step-3/trainer/state.safetensors: damaged or cut off" in shown.err
    assert "resumed after step 2" in shown.out
    assert [learned(row) for row in rows_of(path)[:3]] == before
    assert [row["step"] for row in rows_of(path)] == [1, 2, 3, 4]


def test_no_run_starts_again_by_itself_when_all_checkpoints_are_damaged(
    home: Path, tmp_path: Path
) -> None:
    folder = RunDir(tmp_path / "run")
    folder.open("a: 1\n", resume=False)
    assert folder.latest() is None
    for step in (1, 2):
        shutil.copytree(home / "start", folder.checkpoints / f"step-{step}")
    with pytest.raises(CheckpointStateError, match="no checkpoint is whole"):
        folder.latest()
    folder.close()


def launch(home: Path, tmp_path: Path, **env: str) -> tuple[subprocess.Popen[bytes], Path]:
    config = config_of(home, wandb={"mode": "offline"})
    (tmp_path / "run.yaml").write_text(json.dumps(config.model_dump(mode="json")))
    path = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, str(FAKES), str(tmp_path / "run.yaml"), str(path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    return process, path


def wait_for_rows(path: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        rows = path / "metrics.jsonl"
        if rows.is_file() and rows.read_text().count("\n") >= count:
            return
        time.sleep(0.05)
    raise AssertionError(f"no {count} rows in {path}")


def test_kill_9_then_resume_gives_every_step_once(home: Path, tmp_path: Path) -> None:
    process, path = launch(home, tmp_path, FAKE_PAUSE_S="0.4")
    wait_for_rows(path, 2)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)
    assert status_of(path)["state"] == "running"
    again, _ = launch(home, tmp_path)
    _, errors = again.communicate(timeout=180)
    assert again.returncode == 0, errors.decode()
    assert [row["step"] for row in rows_of(path)] == [1, 2, 3, 4]
    # the last .wandb file holds every step, also those of the killed process
    assert [row["step"] for row in read_run(path, prefer="wandb").rows] == [1, 2, 3, 4]
    assert len(list((path / "wandb").glob("offline-run-*"))) == 2
    assert json.loads((path / "result.json").read_text())["scripts"] == 32


def test_sigterm_of_the_process_group_saves_and_exits_143(home: Path, tmp_path: Path) -> None:
    process, path = launch(home, tmp_path, FAKE_PAUSE_S="0.4")
    wait_for_rows(path, 1)
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors.decode()
    assert errors.decode().strip().splitlines()[-1] == "error: stopped by SIGTERM"
    assert status_of(path)["state"] == "cancelled"
    steps = [row["step"] for row in rows_of(path)]
    assert (path / f"checkpoints/step-{steps[-1]}/trainer/state.safetensors").is_file()
    assert [row["step"] for row in read_run(path, prefer="wandb").rows] == steps


def test_infrastructure_errors_end_with_5(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_INFRA_EVERY", "4")  # a quarter of the scripts
    with pytest.raises(InfraLimitError):
        go(config_of(home), tmp_path / "run")
    status = status_of(tmp_path / "run")
    assert (status["state"], status["exit_code"]) == ("failed", 5)
    assert run_main(lambda argv: go(config_of(home), tmp_path / "again")) == 5


def test_divergence_ends_with_6_and_the_row_says_nan_as_text(home: Path, tmp_path: Path) -> None:
    with pytest.raises(DivergedError):
        go(config_of(home, optim={"lr": 1e30, "warmup_steps": 0}), tmp_path / "run")
    assert status_of(tmp_path / "run")["exit_code"] == 6
    last = (tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1]
    assert '"loss/cispo/loss": "NaN"' in last
    json.loads(last, parse_constant=lambda word: pytest.fail(f"bare {word} in a row"))


def test_reuse_of_a_batch_moves_the_ratio(home: Path, tmp_path: Path) -> None:
    changes = {"lr": 1e-2, "updates_per_batch": 3}
    go(config_of(home, budget={"steps": 1}, optim=changes), tmp_path / "run")
    assert rows_of(tmp_path / "run")[0]["loss/cispo/weight_max"] > 1.01


@pytest.mark.parametrize("objective", ["cispo", "expert_iteration"])
def test_grammar_constrained_replies_are_refused_as_training_data(
    home: Path, tmp_path: Path, objective: str
) -> None:
    class Constrained(TextEnv):
        def run(self, task: Task, client: ChatClient) -> Episode:
            episode = super().run(task, client)
            calls = tuple(replace(call, constrained=True) for call in episode.calls)
            return replace(episode, calls=calls)

    @contextmanager
    def parts(config: RunConfig) -> Iterator[Parts]:
        yield Parts(text_tasks(), Constrained())

    with pytest.raises(ConfigError, match="constrained"):
        run(config_of(home, objective=objective), tmp_path / "run", resume=False, parts=parts,
            check=lambda: None)  # fmt: skip
    assert rows_of(tmp_path / "run") == [] and status_of(tmp_path / "run")["exit_code"] == 2


def test_turns_become_separate_calls(home: Path, tmp_path: Path) -> None:
    go(config_of(home, budget={"steps": 1}, rollout={"turns": 3}), tmp_path / "run")
    assert rows_of(tmp_path / "run")[0]["rollout/turns"] == 3.0
