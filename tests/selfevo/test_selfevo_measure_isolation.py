"""What `selfevo medals run` finds never reaches the loop: a measurement between two rounds.

The campaign, the agent's model, the competition agent, its sandbox and the grader are real; the
policy is a scripted model, training and the gate's evaluation are the fast double.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from selfevo_lab import new_lab, point_at
from selfevo_outcome import signature

from selfevo import loop
from selfevo.agent_prompts import call_message
from selfevo.arms import Commands
from selfevo.campaign import read_view
from selfevo.store import read_blob, read_events

sys.path.append(str(Path(__file__).parents[1] / "agent_tools"))
from mle_layout import make_checkout
from mle_model_double import ModelDouble

DRIVER = str(Path(__file__).with_name("selfevo_driver.py"))
EDITS = [
    call_message("propose_edit", {"key": "optim.lr", "direction": "decrease", "why": "falls"}),
    call_message(
        "propose_edit", {"key": "optim.weight_decay", "direction": "increase", "why": "x"}
    ),
]
SCORE = "15.2503"
MARK = "zirconium"
SCRIPT = f"""A constant ({MARK}).

```python
with open("/home/submission/submission.csv", "w") as file:
    file.write("id,y\\n1,{SCORE}\\n2,{SCORE}\\n")
print("cross-validation score: 0.2")
```
"""
COMPETITION = "krill-census"
WORDS = (COMPETITION, "krill", "mle-bench", "mle_bench", "lite", SCORE, MARK, "medals/", "measure.")


def files(lab: Path) -> list[Path]:
    """Everything that the loop has written: all of the lab but measurements and ledger."""
    own = [lab / "runs/medals", lab / "runs/ledger.duckdb"]
    return [
        path
        for path in lab.rglob("*")
        if path.is_file()
        and not any(path.is_relative_to(one) for one in own)
        and path.name not in ("checkpoints.sqlite", "view.snapshot", "lab.log")
        and ".git" not in path.parts[:-1]
    ]


def found(text: str) -> list[str]:
    """Words of the measurement in a text."""
    return [word for word in WORDS if word in text.lower()]


def run_campaign(
    lab: Path, url: str, commands: Commands, between: Callable[[], None] | None
) -> None:
    """Two rounds, the process killed after the first; `between` is done before it goes on."""
    point_at(lab, url)
    killed = subprocess.run(
        [sys.executable, DRIVER, "start", str(lab), "model", "round.end", "after"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "DOUBLE_STEP_S": "0"},
    )
    assert killed.returncode == -9, killed.stderr
    if between is not None:
        between()
    assert loop.resume(lab, None, lambda line: None, commands)[0] == 0


def prompts(lab: Path) -> list[Any]:
    """The messages of every recorded request."""
    folder = lab / "runs/c1"
    return [
        json.loads(read_blob(folder, event.data["blob"]))["messages"]
        for event in read_events(folder / "events.jsonl")[0]
        if event.kind == "agent.request"
    ]


@pytest.mark.real  # for its length
def test_nothing_of_a_measurement_reaches_prompt_memory_digest_or_gate(
    tmp_path: Path,
    commands: Commands,
    model: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = make_checkout(tmp_path).add(COMPETITION)
    public = made.private(COMPETITION).parent / "public"
    public.mkdir()
    (public / "train.csv").write_text("id,y\n7,3.0\n")
    (public / "sample_submission.csv").write_text("id,y\n1,0.0\n2,0.0\n")
    monkeypatch.setenv("SELFEVO_MLEBENCH", str(made.root))
    monkeypatch.setenv("SELFEVO_MLEBENCH_DATA", str(made.data))
    monkeypatch.setenv("DOUBLE_STEP_S", "0")
    lab = new_lab(tmp_path / "measured" / "lab")

    def measure() -> None:
        settings = ("steps=1", "drafts=1", "feedback=false", "looks=0", "gpu=false")
        with ModelDouble(lambda request: SCRIPT) as policy:
            done = subprocess.run(
                [
                    *(sys.executable, "-m", "selfevo.cli", "medals", "run", str(lab), "--json"),
                    *("--suite", "mle-bench-lite", "--competition", COMPETITION, "--seeds", "2"),
                    *("--base-url", policy.base_url, "--model", "scripted"),
                    *(part for change in settings for part in ("--set", change)),
                ],
                capture_output=True,
                text=True,
                timeout=300,
            )
        assert done.returncode == 0, done.stderr
        record = json.loads(done.stdout)
        row = record["rows"][0]
        kept = read_view(lab / "runs/c1").prs[1]
        assert (row["name"], row["silver"], row["scripts"]) == (kept.title, 2, 2)
        assert record["suite"] == "mle-bench-lite" and record["split"] == "test"
        assert record["medals"] == "offline medals"  # nobody vouches for this leaderboard

    run_campaign(lab, model(*EDITS).url, commands, measure)
    view = read_view(lab / "runs/c1")
    assert set(view.rounds) == {0, 1, 2} and view.prs[1].state == "merged" and 2 in view.prs
    assert view.rounds[2].gate is not None and len(prompts(lab)) >= 2
    events = read_events(lab / "runs/c1/events.jsonl")[0]
    kinds = {event.kind for event in events}
    assert {"digest", "memory", "gate", "agent.request", "eval.scores"} <= kinds
    # the search below would find it: it is all there, in the measurement's own log
    (log,) = (lab / "runs/medals").glob("*/events.jsonl")
    blobs = "".join(path.read_text() for path in log.parent.glob("blobs/*"))
    there = set(found(log.read_text())) | set(found(blobs))
    assert {COMPETITION, "mle-bench", SCORE, "measure."} <= there
    scanned = files(lab)
    assert len(list((lab / "runs/c1/blobs").iterdir())) > 5
    assert set((lab / "runs/c1/blobs").iterdir()) <= set(scanned)
    for path in scanned:
        text = path.read_bytes().decode("utf-8", "replace")
        # the report says of every medal that it is none of MLE-bench's
        allowed = {"mle-bench"} if path.name in ("report.md", "report.html") else set()
        assert set(found(text)) <= allowed, f"{path}: {found(text)}"
    notes = subprocess.run(
        ["git", "-C", str(lab), "log", "-p", "--all"], capture_output=True, text=True, check=True
    ).stdout
    assert not found(notes)
    # and the same campaign without a measurement asked, decided and wrote the same
    other = new_lab(tmp_path / "alone" / "lab")
    run_campaign(other, model(*EDITS).url, commands, None)
    assert prompts(other) == prompts(lab)
    assert signature(other) == signature(lab)
