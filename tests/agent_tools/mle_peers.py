"""Our scaffold and AIDE with the same scripted model, budget and container: `make verify-peers`.

The model writes four scripts for each competition: a sound draft, a draft that raises, its repair,
an improvement. Both agents select by the scores that the scripts print; both are graded on the
private test. They must run the same scripts and select the same one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from agent_tools.paths import repo_root
from tests.agent_tools.mle_model_double import ModelDouble, is_criticism, prompt_of, review

COMPETITIONS = ("diamonds-price", "vowel-speaker")
STEPS = 4
_HEAD = """
import numpy as np
import pandas as pd
from sklearn.model_selection import cross_val_predict
from sklearn.pipeline import make_pipeline
train = pd.read_csv("/home/data/train.csv")
test = pd.read_csv("/home/data/test.csv")
sample = pd.read_csv("/home/data/sample_submission.csv")
X = pd.get_dummies(train.drop(columns=["id", "target"]))
T = pd.get_dummies(test.drop(columns=["id"])).reindex(columns=X.columns, fill_value=0)
y = train["target"]
"""
_DIAMONDS = """
model.fit(X, np.log1p(y))
held = cross_val_predict(model, X, np.log1p(y), cv=3)
print(f"cross-validation score: {np.sqrt(np.mean((held - np.log1p(y)) ** 2)):.5f}")
sample["target"] = np.maximum(0, np.expm1(model.predict(T)))
sample.to_csv("/home/submission/submission.csv", index=False)
"""
_VOWELS = """
from sklearn.metrics import log_loss
model.fit(X, y)
held = cross_val_predict(model, X, y, cv=3, method="predict_proba")
print(f"cross-validation score: {log_loss(y, held):.5f}")
sample[list(model.classes_)] = model.predict_proba(T)
sample.to_csv("/home/submission/submission.csv", index=False)
"""
_BROKEN = "raise ValueError('a draft that does not run')\n"


def scripts(competition: str) -> list[str]:
    """The four scripts of a competition."""
    from_, name = ("sklearn.linear_model", "Ridge()")
    better, best = (
        "RandomForestRegressor(40, random_state=0)",
        "ExtraTreesRegressor(80, random_state=0)",
    )
    end = _DIAMONDS
    if competition == "vowel-speaker":
        from_, name = ("sklearn.naive_bayes", "GaussianNB()")
        better, best = (
            "RandomForestClassifier(40, random_state=0)",
            "ExtraTreesClassifier(80, random_state=0)",
        )
        end = _VOWELS
    trees = "from sklearn.ensemble import *\n"
    return [
        f"{_HEAD}from {from_} import *\nmodel = {name}\n{end}",
        f"{_HEAD}{_BROKEN}",
        f"{_HEAD}{trees}model = {better}\n{end}",
        f"{_HEAD}{trees}model = {best}\n{end}",
    ]


class Script:
    """Answers the n-th request for a script of a competition with its n-th script."""

    def __init__(self) -> None:
        self.given: dict[str, int] = {}
        self._lock = threading.Lock()

    def __call__(self, request: dict[str, Any]) -> str | dict[str, Any]:
        if request.get("tools"):
            return review(request)
        if is_criticism(request):
            return "It ran as planned. Next: more trees."
        title = "Diamond prices" if "Diamond prices" in prompt_of(request) else "Vowel speaker"
        name = "diamonds-price" if title == "Diamond prices" else "vowel-speaker"
        with self._lock:
            number = self.given.get(name, 0)
            self.given[name] = number + 1
        code = scripts(name)[min(number, STEPS - 1)]
        return f"This is the plan of script {number + 1}.\n\n```python\n{code}\n```\n"


def run(agent: list[str], out: Path) -> dict[str, Any]:
    """One agent on both competitions through the command line; the table as JSON."""
    script = Script()
    with ModelDouble(script) as double:
        argv = [sys.executable, "-m", "agent_tools.mle_agent", "run", "--out", str(out), "--json"]
        argv += ["--seeds", "1", "--base-url", double.base_url, "--model", "scripted", *agent]
        argv += [part for name in COMPETITIONS for part in ("--competition", name)]
        done = subprocess.run(argv, stdout=subprocess.PIPE, text=True, timeout=900)
        if done.returncode:
            sys.exit(f"{' '.join(argv)} ended with exit code {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout)
    rows = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    return {"scores": {row["competition"]: row["score"] for row in rows},
            "valid": all(row["valid"] for row in rows),
            "percentile": {row["competition"]: row["percentile"] for row in rows},
            "scripts": script.given, "findings": found["findings"]}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--aide-python", type=Path, default=repo_root() / ".venv-aide/bin/python")
    args = parser.parse_args()
    if not args.aide_python.exists():
        sys.exit(f"no {args.aide_python}: run `make setup-aide`")
    folder = Path(tempfile.mkdtemp(prefix="peers-"))
    aide = repo_root() / "agent_tools/mle_agent/agents/aide"
    ours = ["--settings", "real", "--set", f"steps={STEPS}", "--set", "drafts=2"]
    ours += ["--set", "debug_share=1", "--set", "looks=0", "--set", "time_limit_s=300"]
    results = {
        "selfevo": run(ours, folder / "selfevo"),
        "aide": run(
            ["--agent", f"{aide}:aide-short", "--python", str(args.aide_python)], folder / "aide"
        ),
    }
    for name, result in results.items():
        shown = ", ".join(
            f"{key} {result['scores'][key]} (percentile {result['percentile'][key]:.0f}, "
            f"{result['scripts'].get(key)} scripts)"
            for key in COMPETITIONS
        )
        print(f"{name:8} valid {result['valid']}: {shown}")
    print(f"runs are in {folder}")
    same = results["selfevo"]["scores"] == results["aide"]["scores"]
    budget = all(
        result["scripts"] == dict.fromkeys(COMPETITIONS, STEPS) for result in results.values()
    )
    if not (same and budget and all(result["valid"] for result in results.values())):
        print("NOT THE SAME: scores, budget or validity differ")
        return 1
    print("same scripts, same selection, same scores")
    return 0


if __name__ == "__main__":
    sys.exit(main())
