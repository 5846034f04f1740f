"""A finished run whose `.wandb` file cannot be read is read from its side-car, and says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from agent_tools.errors import UserError
from agent_tools.wandb_logs import read_run
from agent_tools.wandb_logs.records import HEADER


def run_with(tmp_path: Path, wandb: bytes) -> Path:
    log = tmp_path / "wandb/offline-run-20260101_000000-abc/run-abc.wandb"
    log.parent.mkdir(parents=True)
    log.write_bytes(wandb)
    (tmp_path / "status.json").write_text(json.dumps({"state": "done", "exit_code": 0}))
    rows = [{"step": n, "t": n, "reward/mle/mean": 0.1 * n} for n in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.mark.parametrize("wandb", [b"not a log at all", HEADER[:-1] + b"\x07", HEADER, b""])
def test_the_side_car_stands_in_with_a_warning(tmp_path: Path, wandb: bytes) -> None:
    history = read_run(run_with(tmp_path, wandb))
    assert history.source == "sidecar" and history.state == "done"
    assert history.series("reward/mle/mean") == [(1, 0.1), (2, 0.2)]
    assert any("the sidecar log was read instead" in warning for warning in history.warnings)


def test_without_a_side_car_the_fault_is_told(tmp_path: Path) -> None:
    run = run_with(tmp_path, b"not a log at all")
    with pytest.raises(UserError, match=r"not a \.wandb file"):
        read_run(run, prefer="wandb")
    (run / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match=r"not a \.wandb file"):
        read_run(run)
