"""Searches and agents on competitions in MLE-bench's layout, graded by its rules."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mle_layout import Checkout, make_checkout
from mle_model_double import ModelDouble, prompt_of

from agent_tools.errors import UserError
from agent_tools.mle_agent.sources import LITE, competition_ids, load_view

SCRIPT = """A constant.

```python
print(open("/home/data/train.csv").read())
with open("/home/submission/submission.csv", "w") as file:
    file.write("id,y\\n1,{0}\\n2,{0}\\n")
print("cross-validation score: {1}")
```
"""


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkout:
    made = make_checkout(tmp_path).add("two-rows")
    public = made.private("two-rows").parent / "public"
    public.mkdir()
    (public / "train.csv").write_text("id,y\n7,3.0\n")
    (public / "sample_submission.csv").write_text("id,y\n1,0.0\n2,0.0\n")
    monkeypatch.setenv("SELFEVO_MLEBENCH", str(made.root))
    monkeypatch.setenv("SELFEVO_MLEBENCH_DATA", str(made.data))
    return made


def run(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "agent_tools.mle_agent", "run", "--out", str(out)]
    argv += ["--suite", LITE, "--competition", "two-rows", "--seeds", "1", *arguments]
    return subprocess.run(argv, capture_output=True, text=True, timeout=300, env=os.environ.copy())


def test_a_search_on_mle_benchs_layout_is_graded_by_its_rules(
    checkout: Checkout, tmp_path: Path
) -> None:
    # the board is 1 … 100, lower is better: 15 is silver, 5 would be gold but has a worse score
    replies = [SCRIPT.format(60.0, 0.5), SCRIPT.format(15.0, 0.2), SCRIPT.format(5.0, 0.9)]
    asked: list[str] = []

    def answer(request: dict[str, Any]) -> str:
        asked.append(prompt_of(request))
        return replies[len(asked) - 1]

    with ModelDouble(answer) as double:
        done = run(
            tmp_path / "out", "--settings", "real", "--base-url", double.base_url,
            *(part for change in ("steps=3", "drafts=3", "feedback=false", "looks=0")
              for part in ("--set", change)),
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "# two-rows" in asked[0]
    assert "lower is better" in asked[0]
    row = json.loads((tmp_path / "out" / "scores.jsonl").read_text())
    assert (row["suite"], row["split"], row["score"]) == (LITE, "test", 15.0)
    assert (row["medal"], row["valid"], row["above_median"]) == ("silver", True, True)
    assert row["board"] == "unverified"
    assert row["thresholds"] == {"gold": 10.0, "silver": 20.0, "bronze": 40.0, "median": 50.5}
    best = json.loads((tmp_path / "out" / "best_on_test.jsonl").read_text())
    assert (best["score"], best["medal"]) == (5.0, "gold")
    assert (tmp_path / "mle-data" / "two-rows" / "prepared" / "CANARY.txt").is_file()


def test_an_agent_validates_there_and_is_told_no_score(checkout: Checkout, tmp_path: Path) -> None:
    folder = tmp_path / "agents" / "dummy"
    folder.mkdir(parents=True)
    variables = {"TIME_LIMIT_SECS": 60, "STEP_LIMIT": 1}
    (folder / "config.yaml").write_text(
        json.dumps({"dummy": {"start": "dummy/start.sh", "env_vars": variables}})
    )
    (folder / "start.sh").write_text(
        "cd /home/submission\n"
        "echo x > bad.csv; /home/validate_submission.sh bad.csv\n"
        "printf 'id,y\\n1,12\\n2,12\\n' > submission.csv\n"
        "/home/validate_submission.sh submission.csv\n"
    )
    done = run(tmp_path / "out", "--agent", str(folder))
    assert done.returncode == 0, done.stderr
    log = next((tmp_path / "out").glob("*/*/logs/agent.stdout.txt")).read_text()
    assert "Submission is invalid: Submission must have a column y" in log
    assert "Submission is valid." in log
    assert "12" not in log
    row = json.loads((tmp_path / "out" / "scores.jsonl").read_text())
    assert (row["score"], row["medal"]) == (12.0, "silver")


def test_what_is_not_prepared_says_so(checkout: Checkout, tmp_path: Path) -> None:
    assert load_view(LITE, "two-rows", None).lower_is_better
    with pytest.raises(UserError, match="no competition of Lite is prepared"):
        competition_ids(LITE, "all", None, None)
    with pytest.raises(UserError, match="is not prepared"):
        competition_ids(LITE, "all", ["spooky-author-identification"], None)
    with pytest.raises(UserError, match="no competition 'nothing'"):
        competition_ids(LITE, "all", ["nothing"], None)
    with pytest.raises(UserError, match="no sealed competitions"):
        competition_ids(LITE, "all", None, None, sealed=True)
    checkout.add("no-board", board=None)
    bare = checkout.private("no-board").parent / "public"
    bare.mkdir()
    (bare / "train.csv").write_text("id,y\n7,3.0\n")
    with pytest.raises(UserError, match=r"no leaderboard .*git lfs pull"):
        competition_ids(LITE, "all", ["no-board"], None)
    done = run(tmp_path / "out", "--settings", "nano", "--base-url", "auto")
    assert done.returncode == UserError.exit_code
    assert "knows our own suites only" in done.stderr
