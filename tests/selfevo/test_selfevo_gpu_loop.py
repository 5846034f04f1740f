"""What `benchmarks.gpu_loop` makes of a round: faults that it must find, and the card's use."""

from __future__ import annotations

import json
import os
import sqlite3
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_card
from benchmarks.gpu_loop import arguments, faults_of, job_row, make_lab, pack
from rl.config import RunConfig, validate
from rl.pool import Pool
from rl.types import CallRecord, RewardRecord
from selfevo.lab import read_lab
from selfevo.records import JobView


def config() -> RunConfig:
    data: dict[str, Any] = {
        "budget": {"steps": 2, "scripts_per_step": 4},
        "rollout": {"group_size": 2},
        "forge": {"mode": "async", "order": "fifo"},
    }
    return validate(RunConfig, data, "test")


def run_of(folder: Path, groups: list[list[int]], lag: float = 1.0) -> Path:
    """A run directory whose steps consumed these groups; each call takes a second."""
    folder.mkdir()
    with Pool(folder / "pool.sqlite") as pool:
        for g in {g for step in groups for g in step}:
            for m in range(2):
                name = f"g{g}-{m}.0"
                ids = (1, 2, 3)
                span = ((0, 3, 0),)
                start = 10.0 + 2 * g
                times = (start, start + 1.0)
                pool.add_call(CallRecord(name, 0, 0, (1,), ids, (-1.0,) * 3, span, "stop", *times))
                pool.add_reward(RewardRecord(name, 0.5, t_tool=0.5))
    rows, lines = [], []
    for step, taken in enumerate(groups, start=1):
        names = [[f"g{g}-{m}.0" for m in range(2)] for g in taken]
        lines.append({"step": step, "version": step, "trained": names, "dropped": []})
        rows.append({"step": step, "t": 10.0 * (step + 1), "lag/max": lag, "perf/update_s": step})
    rows[0]["mismatch_kl/lr0_mean"], rows[0]["engine/logprob_corr"] = 1e-4, 0.99
    for name, found in (("metrics", rows), ("groups", lines)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in found))
    (folder / "stdout.log").write_text(
        "engine is ready after 3.5 s\ntrainer is ready after 4.0 s\n"
    )
    return folder


def test_a_right_run_has_no_faults_and_the_figures_worked_out_by_hand(tmp_path: Path) -> None:
    run_dir = run_of(tmp_path / "run", [[0, 1], [2, 3]])
    assert faults_of("j", run_dir, config()) == []
    job = JobView("j", "k", "train/x", "train", "control", "a", "nano", 0, 0, 0, "jobs/j")
    row = job_row(job, run_dir, config())
    assert row["tokens"] == 4 * 2 * 3
    assert row["tok_s"] == pytest.approx(24 / 20)  # from 10 to 30
    assert row["generate_s"] == pytest.approx(4 / 2)  # four groups, one after the other
    assert row["execute_s"] == pytest.approx(4 * 0.5 / 2)
    assert (row["update_s"], row["lr0_kl"], row["engine_corr"]) == (2, 1e-4, 0.99)
    assert row["start_s"] == {"engine": 3.5, "trainer": 4.0}


@pytest.mark.parametrize(
    ("groups", "lag", "said"),
    [
        ([[0, 1], [1, 3]], 1.0, "not each of 4 groups once"),
        ([[0, 1]], 1.0, "not each of 4 groups once"),
        ([[0, 1], [2, 3]], 9.0, "policy lag 9 over its bound"),
    ],
)
def test_a_wrong_run_is_found(
    tmp_path: Path, groups: list[list[int]], lag: float, said: str
) -> None:
    (fault,) = faults_of("j", run_of(tmp_path / "run", groups, lag), config())
    assert said in fault


def test_a_damaged_record_is_found(tmp_path: Path) -> None:
    run_dir = run_of(tmp_path / "run", [[0, 1], [2, 3]])
    with sqlite3.connect(run_dir / "pool.sqlite") as database:
        for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'"):
            database.execute(f"DROP TRIGGER {name}")  # behind the pool's back
        database.execute("UPDATE calls SET meta = replace(meta, 'stop', 'step') WHERE id = 1")
    assert faults_of("j", run_dir, config()) == ["j: damaged: call 0 of g0-0.0"]


def test_the_lab_is_sized_by_the_command_line(tmp_path: Path) -> None:
    args = arguments(["--engine", "vllm", "--device", "cuda", "--steps", "3", "--samples", "4"])
    make_lab(tmp_path / "lab", args, "process")
    files = read_lab(tmp_path / "lab")
    assert (files.lab.budget.steps, files.lab.launcher.parallel) == (3, 2)
    assert files.evaluation.samples == 4 and files.train["device"] == "cuda"
    assert files.train["sandbox"]["kind"] == "process"  # type: ignore[index]
    assert files.train["forge"]["sync"] == "ipc"  # type: ignore[index]


def test_logs_are_packed_without_weights(tmp_path: Path) -> None:
    work, out = tmp_path / "work", tmp_path / "out"
    for name in ("round.log", "lab/runs/c1/jobs/j/checkpoints/step-1/config.json", "lab/a.yaml"):
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_text("x")
    out.mkdir()
    pack(work, out)
    with tarfile.open(out / "logs.tar.gz") as archive:
        assert archive.getnames() == ["lab/a.yaml", "round.log"]


def test_the_cards_use_by_role(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program in nvidia-smi's place: of the card that children see, the third, 1,000 MiB at
    first, then 3,000 with two processes; of others nothing."""
    count = tmp_path / "count"
    (tmp_path / "nvidia-smi").write_text(
        f"""#!/bin/sh
[ "$1 $2" = "-i 2" ] || exit 6
case "$3" in
*gpu=*) if [ -e {count} ]; then echo '3000, 50'; else echo '1000, 0'; touch {count}; fi ;;
*) printf '7, 1500\\n8, 400\\n9, [N/A]\\n' ;;
esac
"""
    )
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,0")
    monkeypatch.setattr(gpu_card, "PERIOD_S", 0.01)
    with gpu_card.watched({7: "engine", 8: "trainer", 9: "x"}.__getitem__) as use:
        deadline = time.monotonic() + 20
        while use.samples < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert use.before == pytest.approx(1.048576) and use.peak == pytest.approx(3 * 1.048576)
    assert use.by_role == pytest.approx({"engine": 1.572864, "trainer": 0.4194304})
    assert 0 < use.busy <= 0.5
    assert gpu_card.role_of(os.getpid()) == "other"
