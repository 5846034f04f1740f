"""Scores of different suite versions, fields or graders are never compared."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from selfevo_lab import quiet

from agent_tools.mle_bench import evaluator, registry
from selfevo import loop
from selfevo.arms import Commands
from selfevo.campaign import RunOptions, read_view


def test_the_gate_refuses_arms_of_different_evaluators(
    lab: Path, commands: Commands, tmp_path: Path
) -> None:
    script = tmp_path / "evaluate.py"
    double = Path(__file__).with_name("selfevo_double.py")
    script.write_text(
        "import json, pathlib, subprocess, sys\n"
        f"done = subprocess.run([sys.executable, {str(double)!r}, *sys.argv[1:]])\n"
        "out = pathlib.Path(sys.argv[sys.argv.index('--out') + 1])\n"
        "result = json.loads((out / 'result.json').read_text())\n"
        "result['evaluator'] = 'new' if 'candidate' in out.name else 'old'\n"
        "(out / 'result.json').write_text(json.dumps(result))\n"
        "sys.exit(done.returncode)\n"
    )
    other = replace(commands, evaluate=(sys.executable, str(script), "evaluate"))
    _, folder = loop.start(lab, RunOptions(agent="rules", rounds=1), quiet, other)
    view = read_view(folder)
    assert view.rounds[1].verdict == "void"
    assert "different evaluators (new, old)" in view.prs[1].gate["reason"]  # type: ignore[index]
    assert {s.evaluator for s in view.scores.values()} == {"new", "old"}


def test_the_evaluator_names_suite_version_fields_and_graders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = registry.load_suite("offline-small-v0")
    known = evaluator.evaluator_hash(suite)
    assert known == evaluator.evaluator_hash(suite) and len(known) == 12
    assert evaluator.evaluator_hash(replace(suite, version=1)) != known
    fewer = replace(suite, competitions=suite.competitions[:4])
    assert evaluator.evaluator_hash(fewer) != known
    folder = tmp_path / "tweet-sentiment"
    folder.mkdir()
    source = registry.COMPETITIONS / "tweet-sentiment"
    for name in evaluator.NAMED:
        (folder / name).write_bytes((source / name).read_bytes())
    real = registry.Config.folder.fget  # type: ignore[attr-defined]
    moved = property(lambda c: folder if c.id == "tweet-sentiment" else real(c))
    monkeypatch.setattr(registry.Config, "folder", moved)
    assert evaluator.evaluator_hash(suite) == known
    board = folder / "leaderboard.csv"
    board.write_text(board.read_text().replace("0.99530", "0.99531"))
    assert evaluator.evaluator_hash(suite) != known
