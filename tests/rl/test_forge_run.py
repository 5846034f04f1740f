"""Whole asynchronous runs: a real engine, gateway, trainer and worker under a real supervisor."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from forge_runs import Session, orphans, run_config, violations
from rl_fakes import tiny_checkpoint

from agent_tools.wandb_logs import read_run
from rl.forge.messages import parse_episode
from rl.forge.places import GroupLog, Places
from rl.pool import Pool
from rl.run_dir import RunDir


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("forge") / "start")


@pytest.mark.real  # for its length
def test_a_run_with_a_stuck_agent_a_failed_group_and_a_broken_environment(
    start: Path, tmp_path: Path
) -> None:
    """The run directory is that of a synchronous run; none of the three holds it up."""
    config = run_config(
        start,
        budget={"steps": 6},
        rollout={"turns": 2},
        wandb={"mode": "offline"},
        forge={"deadline_s": 3.0, "attempts": 2},
    )
    faults = "hang:1,raise:3,flat:5,mute:7,fail:9"
    session = Session(tmp_path, config, {"FORGE_FAULTS": faults})
    assert session.run() == 0, session.log()
    assert violations(session) == []
    rows = RunDir(session.run_dir).rows()
    result = json.loads((session.run_dir / "result.json").read_text())
    assert result["steps"] == 5 and result["checkpoint"] == "checkpoints/step-5"
    assert set(result) >= {"fingerprint", "tokens", "scripts", "infra_errors", "device", "versions"}
    assert not (session.run_dir / "checkpoints/step-5/trainer/state.safetensors").exists()
    assert not list((session.run_dir / "forge").glob("weights-*"))
    from_wandb = read_run(session.run_dir, prefer="wandb").rows
    assert from_wandb == read_run(session.run_dir, prefer="sidecar").rows
    # before the first update the engine's log-probs are the trainer's
    assert rows[0]["engine/logprob_corr"] > 0.99999 and rows[0]["mismatch_kl/lr0_mean"] < 1e-9
    assert rows[0]["lag/max"] == 0 and {"perf/wait_batch_s", "window/overtaken"} <= set(rows[0])
    # the agent that does not end is a timeout, with the call that it made
    with Pool(Places(session.run_dir).pool_of(config)) as pool:
        stuck = pool.reward("g1-0.0")
        assert stuck is not None and stuck.status == "timeout" and stuck.outcome == 0
        assert len(pool.calls("g1-0.0")) == 1
        # what broke is run again
        again = pool.reward("g3-0.1")
        assert pool.reward("g3-0.0") is None and again is not None and again.status == "done"
    assert "worker-0 is replaced: g1-0.0 does not end" in session.log()
    # groups without spread, or in which every member failed, are consumed and not trained on; the
    # twelve groups of the budget then make five steps
    lines = GroupLog(Places(session.run_dir).groups).lines()
    dropped = [parse_episode(group[0]) for line in lines for group in line["dropped"]]
    assert sorted(found[0] for found in dropped if found is not None) == [5, 7, 9]
    assert sum(row["group/failed"] for row in rows) == 1
    assert sum(row["group/dropped"] for row in rows) == 3
    assert "is done: 5 steps of 6 (dropped groups cost steps)" in session.log()
    assert session.log().count("group 7: no attempt made a call") == 1
    assert session.log().count("made a call") == 1


@pytest.mark.real  # for its length
def test_killed_again_and_again_a_run_ends_right(start: Path, tmp_path: Path) -> None:
    """A worker, the trainer, the scorer, then the supervisor; the order is strict, so what is
    consumed when is known."""
    config = run_config(
        start,
        budget={"steps": 5},
        checkpoint_every=2,
        sandbox={"kind": "process", "workers": 1},
        forge={"order": "fifo", "zero_variance": "keep", "parts": "forge_fakes:script_parts"},
    )
    session = Session(tmp_path, config, {"FORGE_PAUSE_S": "0.3"})
    session.start()
    session.wait_step(1)
    assert session.kill("worker") and session.kill("trainer") and session.kill("scorer")
    session.wait_step(3)
    session.kill("supervisor")
    assert not orphans(session.run_dir)
    done = len(RunDir(session.run_dir).rows())
    session.start()
    assert session.wait() == 0, session.log()
    assert violations(session) == []
    assert "resumed after step" in session.log() and done < 5
    assert session.log().count("scorer is ready") == 3
    assert "reward mle 0." in session.log()
    with Pool(Places(session.run_dir).pool_of(config)) as pool:
        assert {reward.status for reward in pool.rewards()} == {"done"}
    assert session.run() == 0 and "is done: 5 steps" in session.log()


@pytest.mark.slow
def test_a_run_in_which_everything_fails_ends_and_says_why(start: Path, tmp_path: Path) -> None:
    config = run_config(start, budget={"steps": 10})
    session = Session(tmp_path, config, {"FORGE_FAULTS": "fail-all"})
    assert session.run() == 5
    assert "all members failed in" in session.log() and "Traceback" not in session.log()
    status = json.loads((session.run_dir / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 5)
    assert not orphans(session.run_dir)


def test_what_cannot_start_is_refused_in_one_line(start: Path, tmp_path: Path) -> None:
    session = Session(tmp_path, run_config(start, forge={"parts": "nowhere:parts"}))
    assert session.run() == 2
    assert "error: forge.parts 'nowhere:parts': No module named 'nowhere'" in session.log()
    broken = tmp_path / "start"
    shutil.copytree(start, broken)
    for path in broken.glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-10])
    session = Session(tmp_path / "second", run_config(broken))
    assert session.run() == 2
    assert "error: " in session.log() and "Traceback" not in session.log()
    wrong = run_config(start, forge={"engine_options": ["--no-such-option"]})
    session = Session(tmp_path / "third", wrong)
    assert session.run() == 2
    assert "error: engine: " in session.log() and "--no-such-option" in session.log()
    session = Session(tmp_path / "fourth", run_config(start), {"FORGE_FAULTS": "wrong:0"})
    assert session.run() == 2
    assert "error: the agent's program is not there; install it" in session.log()
    assert not orphans(session.run_dir)


@pytest.mark.slow
def test_a_full_disk_ends_the_run_with_a_word(start: Path, tmp_path: Path) -> None:
    """No file may grow beyond what a checkpoint needs."""
    session = Session(tmp_path, run_config(start))
    session.limit_file_bytes = 100_000
    assert session.run() == 5
    assert "free some space" in session.log() or "check the disk" in session.log()
    assert "Traceback" not in session.log()
    assert not orphans(session.run_dir)
    session.limit_file_bytes = None
    assert session.run() == 0, session.log()
    assert violations(session) == []


@pytest.mark.slow
def test_a_signal_ends_every_process_and_the_run_goes_on_later(start: Path, tmp_path: Path) -> None:
    session = Session(tmp_path, run_config(start), {"FORGE_PAUSE_S": "0.5"})
    session.start()
    session.wait_step(1)
    assert session.process is not None
    session.process.terminate()
    assert session.wait() == 143
    assert not orphans(session.run_dir)
    status = json.loads((session.run_dir / "status.json").read_text())
    assert (status["state"], status["signal"]) == ("cancelled", "SIGTERM")
    assert session.run() == 0, session.log()
    assert violations(session) == []
