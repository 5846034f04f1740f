"""A tiny random model and a tiny real environment for tests of the loop.

The environment rewards replies by a fixed property of their text, so rewards vary and are
repeatable; everything else (engine, trainer, run directory, W&B) is the real thing.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from model.checkpoint import save_checkpoint
from model.config import ModelConfig
from model.tokenizer import train_tokenizer
from model.transformer import Transformer
from rl.config import RunConfig, load_config, validate
from rl.loop import Parts, run
from rl.train import StopSignals
from rl.types import CallRecord, ChatClient, Episode, RewardRecord, ScriptOutcome, Task

TASKS = ("tweet-sentiment", "diamonds-price")


def tiny_checkpoint(folder: Path, *, seed: int = 0) -> Path:
    """A random model of 2 layers with its own tokenizer."""
    tokenizer = train_tokenizer(["import numpy as np\nx = 1 2 3"] * 50, 300)
    tokenizer.save(folder.parent / "tok")
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        rotary_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
        initializer_range=0.3,
    )
    save_checkpoint(Transformer(config, seed=seed), folder, tokenizer_from=folder.parent / "tok")
    return folder


def small_config(folder: Path, *, steps: int, **changes: object) -> RunConfig:
    """A run of the tiny model in `folder`/start; `changes` are merged section by section."""
    data: dict[str, object] = {
        "model": {"checkpoint": str(folder / "start")},
        "competitions": list(TASKS),
        "budget": {"steps": steps, "scripts_per_step": 8, "tokens_per_script": 12},
        "rollout": {"group_size": 4, "max_new_tokens": 12},
        "optim": {"lr": 3e-3, "warmup_steps": 1, "micro_batch": 3},
        "wandb": {"mode": "disabled"},
        "device": "cpu",
    }
    for key, value in changes.items():
        old = data.get(key)
        data[key] = {**old, **value} if isinstance(old, dict) else value  # type: ignore[dict-item]
    return validate(RunConfig, data, "test")


class TextEnv:
    """Reward = share of letters before 'n' in the reply, per turn; the last turn counts."""

    def __init__(self, turns: int = 1, infra_every: int = 0, pause_s: float = 0.0) -> None:
        self._turns, self._infra_every, self._pause_s = turns, infra_every, pause_s

    def run(self, task: Task, client: ChatClient) -> Episode:
        messages = list(task.prompt)
        calls, scripts, reward = [], [], 0.0
        for turn in range(self._turns):
            reply = client.chat(
                messages,
                temperature=task.sampling.temperature,
                max_tokens=task.sampling.max_tokens,
                seed=task.sampling.seed + turn,
            )
            time.sleep(self._pause_s)
            text = repr(reply.text + str(reply.response_ids))
            reward = sum(i % 3 == 0 for i in reply.response_ids) / max(1, len(reply.response_ids))
            infra = bool(self._infra_every) and task.index % self._infra_every == 0
            calls.append(
                CallRecord(
                    task.episode,
                    task.group,
                    task.index,
                    reply.prompt_ids,
                    reply.response_ids,
                    reply.logprobs,
                    reply.versions,
                    reply.finish_reason,
                    reply.t_start,
                    reply.t_end,
                    task.sampling.temperature,
                )
            )
            status = "infra" if infra else "ok"
            scripts.append(ScriptOutcome(text, status, reward > 0, reward, 100 * reward))
            messages += [
                {"role": "assistant", "content": reply.text},
                {"role": "user", "content": f"score {reward:.2f}"},
            ]
        record = RewardRecord(task.episode, reward, status="env_error" if infra else "done")
        return Episode(
            task.episode, task.id, task.group, task.index, tuple(calls), tuple(scripts), record
        )


def text_tasks() -> tuple[Task, ...]:
    """Two tasks with different prompts."""
    return tuple(
        Task(name, ({"role": "user", "content": f"task {name}"},), Path(), "train")
        for name in TASKS
    )


@contextmanager
def text_parts(config: RunConfig) -> Iterator[Parts]:
    """Parts of a run against `TextEnv`."""
    env = TextEnv(
        config.rollout.turns,
        int(os.environ.get("FAKE_INFRA_EVERY", "0")),
        float(os.environ.get("FAKE_PAUSE_S", "0")),
    )
    yield Parts(text_tasks(), env)


def main() -> int:
    """`python rl_fakes.py RUN.yaml RUN_DIR`: the real loop, resumable, on the fake environment."""
    from rl.cli import run_main

    signals = StopSignals()

    def body(argv: object) -> int:
        del argv
        config = load_config(Path(sys.argv[1]))
        return run(config, Path(sys.argv[2]), resume=True, parts=text_parts, check=signals.check)

    return run_main(body)


if __name__ == "__main__":
    sys.exit(main())
