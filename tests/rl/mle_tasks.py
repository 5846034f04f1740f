"""Made-up competitions with fields, and scripted clients, for tests of the MLE environment."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "agent_tools"))

from mle_synthetic import facts, make_competition

from agent_tools.mle_bench.facts import TaskFacts
from agent_tools.mle_bench.registry import Competition
from rl.types import ChatReply, Message

RMSE = "agent_tools.mle_bench.competitions.tweet-sentiment.grade:grade"
FIELD = tuple(n / 20 for n in range(100))  # 0.00 … 4.95, best first

__all__ = ["RMSE", "ScriptedClient", "constant", "facts", "made_up", "make_competition"]


def made_up(folder: Path, split: str, task: TaskFacts | None = None) -> Competition:
    """A prepared regression competition; train ones have dev rows, drawn with another seed."""
    task = task or facts("regression", "rmse")
    public = make_competition(task, folder / "prepared")
    dev = make_competition(task, folder / "dev", seed=1) if split == "train" else None
    return Competition(
        id="made-up",
        split=split,  # type: ignore[arg-type]
        strata="table",
        metric=task.metric,
        lower_is_better=True,
        grade_fn=RMSE,
        public_dir=public,
        private_dir=folder / "prepared" / "private",
        dev_public_dir=dev,
        dev_private_dir=folder / "dev" / "private" if dev else None,
        leaderboard=FIELD,
        dev_leaderboard=FIELD if dev else None,
        description="",
        facts=task,
    )


def constant(value: str) -> str:
    """A script that predicts one value everywhere."""
    return (
        "import pandas as pd\n"
        'sub = pd.read_csv("sample_submission.csv")\n'
        f"sub[sub.columns[1]] = {value}\n"
        'sub.to_csv("submission.csv", index=False)'
    )


class ScriptedClient:
    """Answers with given texts in turn and keeps what it was asked."""

    def __init__(self, *texts: str) -> None:
        self.texts = list(texts)
        self.asked: list[list[Message]] = []
        self.seeds: list[int | None] = []

    def chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        temperature: float = 1.0,
        max_tokens: int = 256,
        seed: int | None = None,
    ) -> ChatReply:
        del tools, max_tokens
        self.asked.append([dict(message) for message in messages])
        self.seeds.append(seed)
        turn = len(self.asked)
        return ChatReply(
            text=self.texts[turn - 1],
            prompt_ids=(1,) * turn,
            response_ids=(7, turn),
            logprobs=(-0.5 * temperature, -1.0),
            versions=((0, 2, 5),),
            tokenizer_hash="h",
        )
