"""Learning arms: names, run files, real processes that are stopped and go on, logs, statistics."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rl_fakes import tiny_checkpoint

from rl.arms import __main__ as command
from rl.arms.log import Log, log_lines, read_log, read_logs
from rl.arms.report import curve, tables
from rl.arms.run import run_arms
from rl.arms.spec import MAIN, VARIANTS, Arm, Settings, grid, run_config
from rl.arms.statistics import slope_of, student, val_difference
from rl.cli import run_main
from rl.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
CHILD = (sys.executable, str(Path(__file__).with_name("arms_child.py")))


def test_arm_names_read_back_and_unknown_ones_are_refused() -> None:
    for variant in VARIANTS:
        for arm in (Arm(variant, 1, 0), Arm(variant, 4, 12), Arm(variant, 4, 2, 4)):
            assert Arm.parse(arm.name) == arm
    for name in ("dapo-u1-s0", "cispo", "cispo-u1", "cispo-ux-s0"):
        with pytest.raises(ConfigError, match="VARIANT-uUPDATES-sSEED"):
            Arm.parse(name)


def test_the_grid_is_whole_seeds_first_and_every_arm_spends_the_same_scripts() -> None:
    arms = grid(MAIN, [1, 4], [0, 1, 2])
    assert len({arm.name for arm in arms}) == 24
    assert [arm.seed for arm in arms] == [0] * 8 + [1] * 8 + [2] * 8
    configs = [run_config(arm, Settings()) for arm in arms]
    assert {(c.budget.steps, c.budget.scripts_per_step) for c in configs} == {(40, 72)}
    assert {c.objective for c in configs} == set(MAIN)
    for arm, config in zip(arms, configs, strict=True):
        rounds = config.expert_iteration
        made = config.optim.updates_per_batch * 40
        if arm.variant == "expert_iteration":
            made = rounds.updates * 40 // rounds.round_steps
        assert made == 40 * arm.updates  # optimiser updates in all
    assert run_config(Arm("cispo_tight", 1, 0), Settings()).cispo.is_weight_max == 1.2


def test_measured_steps_end_with_the_last() -> None:
    assert Settings().eval_steps(40) == (10, 20, 30, 40)
    assert Settings().eval_steps(37) == (10, 20, 30, 37)
    assert Settings(eval_every=50).eval_steps(40) == (40,)


# ------------------------------------------------------------------ processes


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = tmp_path_factory.mktemp("arms")
    tiny_checkpoint(folder / "start")
    return Settings(
        suite="offline-small-v0", steps=4, scripts=8, eval_every=2, samples=1, final_samples=2,
        checkpoint=str(folder / "start"), sandbox="process", device="cpu",
        overrides=("rollout={group_size: 4, max_new_tokens: 12}", "optim.lr=3e-3"),
    )  # fmt: skip


def test_arms_are_stopped_and_go_on_and_are_done_once(
    small: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SELFEVO_DATA", str(tmp_path / "data"))
    names = ["start", "grpo-u2-s0"]
    work, logs = tmp_path / "work", tmp_path / "logs"

    def go(minutes: float, work: Path) -> dict[str, str]:
        return run_arms(
            names, small, work, logs, minutes=minutes, parallel=2, gpus=0,
            about={"device": "test"}, command=CHILD,
        )  # fmt: skip

    assert "failed" not in go(0.06, work).values()  # told to stop while they start, or later
    assert go(5, work) == dict.fromkeys(names, "done")
    read = {log.head["arm"]: log for log in read_logs([logs])}
    assert [s["step"] for s in read["grpo-u2-s0"].steps] == [1, 2, 3, 4]
    assert [s["scripts"] for s in read["grpo-u2-s0"].steps] == [8, 16, 24, 32]
    assert sorted(read["grpo-u2-s0"].val) == [2, 4] and sorted(read["start"].val) == [0]
    counts = {k: [len(v) for v in val.values()] for k, val in read["grpo-u2-s0"].val.items()}
    assert counts == {2: [1, 1], 4: [2, 2]}
    assert read["grpo-u2-s0"].done is not None
    assert read["grpo-u2-s0"].done["scripts"] == 32
    assert not list(work.glob("*/run/checkpoints"))
    ledger = (tmp_path / "data/val_ledger.jsonl").read_text().splitlines()
    assert len(ledger) >= 3  # every look at held-out scores is written down
    # the logs alone say what is done: on another machine nothing is run again
    assert go(5, tmp_path / "other") == dict.fromkeys(names, "done")
    assert not (tmp_path / "other").exists()
    with pytest.raises(ConfigError, match="made with steps 4, asked for is 5"):
        run_arms(names, Settings(**{**small.__dict__, "steps": 5}), work, logs, minutes=1,
                 parallel=1, gpus=0, about={})  # fmt: skip


def test_a_failed_arm_is_told_and_the_others_go_on(
    small: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = Settings(**{**small.__dict__, "device": "potato"})
    state = run_arms(["cispo-u1-s0"], broken, tmp_path / "w", tmp_path / "l", minutes=1,
                     parallel=1, gpus=0, about={}, command=CHILD)  # fmt: skip
    assert state == {"cispo-u1-s0": "failed"}
    assert "device 'potato' is unknown" in capsys.readouterr().err


# ------------------------------------------------------------------ statistics


def test_the_interval_of_a_difference_covers_a_true_one() -> None:
    """Over simulated arms with a known difference the interval holds it about as often as it says;
    with three seeds a percentile bootstrap is somewhat narrow."""
    random = np.random.default_rng(0)
    names = [f"c{i}" for i in range(16)]
    held = 0
    for trial in range(24):
        base = random.normal(50, 15, len(names))
        gain = random.normal(5, 8, len(names))

        def arm(level: np.ndarray[Any, Any]) -> list[dict[str, list[float]]]:
            return [
                {n: list(random.normal(m, 12, 8)) for n, m in zip(names, level, strict=True)}
                for _ in range(3)
            ]

        found = val_difference(arm(base + gain), arm(base), seed=trial)
        held += found.low <= 5.0 <= found.high
    assert held >= 20


def test_a_difference_is_of_means_of_competitions() -> None:
    ours = [{"a": [10.0, 20.0], "b": [40.0]}, {"a": [30.0], "b": [50.0]}]
    theirs = [{"a": [5.0], "b": [15.0], "c": [99.0]}]
    found = val_difference(ours, theirs)
    assert found.mean == pytest.approx((15 + 40 + 30 + 50) / 4 - 10)
    same = val_difference(theirs, theirs)
    assert (same.low, same.high) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("degrees", "value"), [(1, 12.706), (4, 2.776), (5, 2.571), (10, 2.228), (30, 2.042)]
)
def test_students_points(degrees: int, value: float) -> None:
    assert student(degrees) == pytest.approx(value, rel=4e-3)


def test_slope_noise_and_power_against_simulation() -> None:
    random = np.random.default_rng(1)
    steps, slope, noise = 20, 0.5, 4.0
    lines = [slope * np.arange(steps) + random.normal(0, noise, steps) for _ in range(400)]
    found = [slope_of(list(line), slope) for line in lines]
    covered = np.mean([f.slope.low <= slope <= f.slope.high for f in found])
    assert 0.92 <= covered <= 0.98
    assert np.mean([f.noise**2 for f in found]) == pytest.approx(noise**2, rel=0.05)
    shown = np.mean([f.slope.low > 0 for f in found])
    assert np.mean([f.power for f in found]) == pytest.approx(shown, abs=0.06)
    at_80 = np.mean([f.smallest for f in found])
    again = [at_80 * np.arange(steps) + random.normal(0, noise, steps) for _ in range(400)]
    assert np.mean([slope_of(list(y), 0).slope.low > 0 for y in again]) == pytest.approx(
        0.8, abs=0.06
    )
    assert slope_of([1.0, 2.0, 3.0, 4.0], 1.0).slope.mean == pytest.approx(1.0)
    with pytest.raises(ValueError, match="at least 4"):
        slope_of([1.0, 2.0, 3.0], 1.0)


# ------------------------------------------------------------------ logs and tables


def made_log(arm: Arm, level: float) -> list[dict[str, Any]]:
    settings = Settings(steps=12).__dict__ | {"overrides": []}
    lines: list[dict[str, Any]] = [{"arm": arm.name, "settings": settings, "device": "card"}]
    for k in range(1, 13):
        lines.append(
            {"step": k, "scripts": 72 * k, "train": 30 + level * k + (k * 7) % 3, "valid": 0.9,
             "zero_std": 0.1, "entropy": 0.1, "grad": 0.2, "weight_max": 1.0, "capped": 0.0}
        )  # fmt: skip
    for step in (10, 12):
        lines.append({"step": step, "val": {"x": [40 + level, 42.0], "y": [50 + level, 53.0]}})
    lines.append({"done": True, "steps": 12, "scripts": 864})
    return lines


def write(folder: Path, name: str, lines: list[dict[str, Any]]) -> Path:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_report_goes_into_a_page_and_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    for variant, level in (("cispo", 2.0), ("grpo", 1.0)):
        for updates in (1, 4):
            for seed in range(3):
                arm = Arm(variant, updates, seed)
                write(logs, arm.name, made_log(arm, level + seed / 10))
    begun = {"step": 0, "val": {"x": [30.0, 34.0], "y": [40.0, 44.0]}}
    head = made_log(Arm("cispo", 1, 0), 0.0)[0] | {"arm": "start"}
    write(logs, "start", [head, begun, {"done": True}])
    unfinished = made_log(Arm("ppo_clip", 1, 0), 1.0)[:-1]
    write(logs, "ppo_clip-u1-s0", unfinished)
    page = tmp_path / "page.md"
    page.write_text("top\n<!-- tables: begin -->\nold\n<!-- tables: end -->\nbottom\n")
    for _ in range(2):
        assert run_main(command.main, ["report", str(logs), "--into", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("top\n") and text.endswith("<!-- tables: end -->\nbottom\n")
    assert "old" not in text and "ppo_clip" not in text and text.count("| start |") == 1
    assert "| `grpo-u1` − `cispo-u1` | -0.5" in text and "| `cispo-u4` − `cispo-u1` | +0.0" in text
    rise = (42.1 + 42 + 52.1 + 53) / 4 - 37  # cispo: levels 2.0, 2.1, 2.2
    assert f"| {rise:+.1f} [" in text
    page.write_text("no marks")
    assert run_main(command.main, ["report", str(logs), "--into", str(page)]) == 2
    assert "tables: begin" in capsys.readouterr().err and page.read_text() == "no marks"


def test_the_pages_tables_are_those_of_the_committed_logs(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    shutil.copy(ROOT / "docs" / "objectives.md", page)
    logs = ROOT / "benchmarks" / "results" / "objectives-h200"
    done = [read_log(path) for path in sorted(logs.glob("*.jsonl"))]
    arms = {log.arm.name for log in done if log.arm is not None and log.done is not None}
    assert arms >= {arm.name for arm in grid(MAIN, (1, 4), (0, 1, 2))}
    assert command.main(["report", str(logs), "--into", str(page)]) == 0
    assert page.read_text() == (ROOT / "docs" / "objectives.md").read_text()


def test_logs_of_other_settings_or_none_are_refused(tmp_path: Path) -> None:
    a = made_log(Arm("cispo", 1, 0), 1.0)
    b = made_log(Arm("grpo", 1, 0), 1.0)
    b[0] = b[0] | {"settings": b[0]["settings"] | {"scripts": 24}}
    paths = [write(tmp_path, "a", a), write(tmp_path, "b", b)]
    with pytest.raises(ConfigError, match="2 settings"):
        tables(read_logs(paths))
    with pytest.raises(ConfigError, match="no finished arm"):
        tables([])
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"arm": "cispo-u1-s0", "settings": {}}\nnonsense\n')
    with pytest.raises(ConfigError, match="line 2"):
        read_log(bad)
    bad.write_text('{"arm": "cispo-u1-s0", "settings": {}}\n{"step": 1, "trai')
    assert read_log(bad).steps == []  # a cut-off last line


def test_a_short_curve_says_what_it_can_show(tmp_path: Path) -> None:
    log = read_log(write(tmp_path, "a", made_log(Arm("cispo", 1, 0), 2.0)))
    text = curve(log)
    assert "it rises" in text and "80 % of such runs" in text and "over 12 steps" in text
    with pytest.raises(ConfigError, match="at least 4"):
        curve(Log(log.arm, log.head, log.steps[:3]))


def test_rows_in_short(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    row = {
        "step": 1, "t": 0.0, "reward/mle/mean": 0.41234, "rollout/valid_frac": 0.5,
        "rollout/attempts": 24.0, "loss/ppo_clip/weight_max": 1.23456, "policy/entropy": 0.123456,
        "loss/ppo_clip/capped_frac": 0.25, "loss/ppo_clip/loss": math.nan,
    }  # fmt: skip
    (run_dir / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    head, line = log_lines("ppo_clip-u4-s1", Settings(), tmp_path, {"device": "x"})
    assert head["arm"] == "ppo_clip-u4-s1" and head["device"] == "x"
    assert line == {"step": 1, "scripts": 24, "train": 41.23, "valid": 0.5, "entropy": 0.1235,
                    "weight_max": 1.235, "capped": 0.25}  # fmt: skip


def test_the_command_lists_arms_without_running_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["run", "--work", str(tmp_path / "w"), "--log", str(tmp_path / "l"), "--dry-run"]
    assert run_main(command.main, base) == 0
    assert len(capsys.readouterr().out.split()) == 25
    for extra, words in (
        (["--only", "cispo-u1"], "cispo-u1"),
        (["--steps", "0"], "--steps must be 1"),
        (["--set", "optim.lr=-1"], "optim.lr"),
        (["--only", "cispo-u1-s0", "cispo-u1-s0"], "named twice"),
    ):
        assert run_main(command.main, [*base, *extra]) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "w").exists()
