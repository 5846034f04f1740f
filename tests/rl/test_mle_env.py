"""Episodes of the MLE environment: real scripts, real grading, scripted models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import pytest
from mle_tasks import FIELD, ScriptedClient, constant, made_up

from agent_tools.errors import UserError
from agent_tools.mle_bench.grading import grade
from agent_tools.sandbox import Limits, ScriptJob, ScriptPool, ScriptResult, make_pool
from model.config import ModelConfig
from model.generate import Engine
from model.tokenizer import train_tokenizer
from model.transformer import Transformer
from rl.envs.mle.env import MleEnv, MleTaskset, make_task, scored_rows
from rl.envs.mle.prompts import Scaffold, describe
from rl.envs.mle.verifier import Verifier
from rl.rollout import run_local
from rl.types import Sampling, Task

LIMITS = Limits(cpu_seconds=2.0, wall_seconds=30.0)


@pytest.fixture(scope="module")
def pool() -> Iterator[ScriptPool]:
    with make_pool("process", 2) as pool:
        yield pool


def attempt(task: Task) -> Task:
    return replace(task, episode="e1", group=3, index=2, sampling=Sampling(0.7, 99, 40))


def test_one_turn_earns_the_percentile_of_its_script(pool: ScriptPool, tmp_path: Path) -> None:
    competition = made_up(tmp_path, "val")
    task = attempt(make_task(competition, "val"))
    env = MleEnv(pool, LIMITS, verifier=Verifier({"made-up": competition}))
    client = ScriptedClient(f"```python\n{constant('0.0')}\n```")
    episode = env.run(task, client)
    (script,) = episode.scripts
    assert script.script == constant("0.0")
    assert script.valid
    assert script.score is not None
    worse = sum(score > script.score for score in FIELD)
    equal = sum(score == script.score for score in FIELD)
    assert script.percentile == pytest.approx(worse + equal / 2)
    assert episode.reward.outcome == pytest.approx(script.percentile / 100)
    assert episode.reward.status == "done"
    assert (episode.id, episode.task, episode.group, episode.index) == ("e1", "made-up", 3, 2)
    (call,) = episode.calls
    assert call.response_ids == (7, 1)
    assert call.logprobs == (-0.35, -1.0)
    assert call.versions == ((0, 2, 5),)
    assert call.temperature == 0.7
    assert [message["role"] for message in client.asked[0]] == ["system", "user"]
    assert client.asked[0][1]["content"] == describe(competition.facts)


def test_three_turns_show_results_and_the_last_script_counts(
    pool: ScriptPool, tmp_path: Path
) -> None:
    competition = made_up(tmp_path, "train")
    task = attempt(make_task(competition, "dev", turns=3))
    scaffold = Scaffold(turn_text="result: {result} . improve it")
    env = MleEnv(pool, LIMITS, verifier=Verifier({"made-up": competition}), scaffold=scaffold)
    broken = constant("unknown_name")
    client = ScriptedClient(broken, constant("0.0"), constant("50.0"))
    episode = env.run(task, client)
    assert [script.valid for script in episode.scripts] == [False, True, True]
    assert episode.scripts[1].percentile > 0
    assert episode.scripts[2].percentile == 0
    assert episode.reward.outcome == 0.0  # the best script was not the last
    second, third = client.asked[1], client.asked[2]
    assert [message["role"] for message in third] == [
        "system", "user", "assistant", "user", "assistant", "user",
    ]  # fmt: skip
    assert second[2]["content"] == broken
    assert second[3]["content"] == (
        "result: error: NameError: name 'unknown_name' is not defined . improve it"
    )
    score, percentile = episode.scripts[1].score, episode.scripts[1].percentile
    assert third[5]["content"] == (
        f"result: score {score:.3f} percentile {percentile:.0f} . improve it"
    )
    assert [call.index for call in episode.calls] == [0, 1, 2]
    assert client.seeds == [40, 41, 42]
    assert 0 < episode.reward.t_tool <= episode.reward.t_wall


def test_no_held_out_score_reaches_a_prompt(pool: ScriptPool, tmp_path: Path) -> None:
    competition = made_up(tmp_path, "val")
    env = MleEnv(pool, LIMITS, turns=2, verifier=Verifier({"made-up": competition}))
    client = ScriptedClient(constant("0.0"), constant("0.1"))
    episode = env.run(attempt(make_task(competition, "val")), client)
    assert client.asked[1][3]["content"] == "submission.csv is valid"
    assert episode.scripts[0].score is None
    assert episode.scripts[0].percentile == 0.0
    assert episode.scripts[1].score is not None
    assert episode.reward.outcome > 0


def test_trials_on_a_train_task_are_scored_on_dev_rows_and_the_last_on_private(
    pool: ScriptPool, tmp_path: Path
) -> None:
    competition = made_up(tmp_path, "train")
    env = MleEnv(pool, LIMITS, turns=2, verifier=Verifier({"made-up": competition}))
    text = constant("0.0")
    episode = env.run(attempt(make_task(competition, "train")), ScriptedClient(text, text))
    dev, private = episode.scripts
    sample = competition.public_dir / "sample_submission.csv"
    table = sample.read_text().replace("0.5", "0.0")
    assert private.score == grade(competition, table.encode(), "private").score
    assert dev.score is not None
    assert dev.score != private.score


def test_what_is_wrong_with_a_script_is_an_outcome(pool: ScriptPool, tmp_path: Path) -> None:
    competition = made_up(tmp_path, "train")
    verifier = Verifier({"made-up": competition})
    env = MleEnv(pool, Limits(cpu_seconds=0.3, wall_seconds=20.0), verifier=verifier)
    task = attempt(make_task(competition, "dev"))
    cases = {
        "while True: pass": ("timeout", "time limit"),
        "x = (": ("error", "SyntaxError"),
        "": ("error", "submission.csv"),
        constant("None"): ("ok", "NaN"),
    }
    for text, (status, words) in cases.items():
        episode = env.run(task, ScriptedClient(text))
        (script,) = episode.scripts
        assert (script.status, script.valid, script.score) == (status, False, None), text
        assert words in script.message
        assert episode.reward.outcome == 0.0
        assert episode.reward.status == ("timeout" if status == "timeout" else "done")


def test_a_real_model_plays_three_turns_and_every_id_is_recorded(
    pool: ScriptPool, tmp_path: Path
) -> None:
    competition = made_up(tmp_path, "train")
    task = make_task(competition, "dev", turns=3)
    texts = [" ".join(str(message["content"]) for message in task.prompt)] * 50
    tokenizer = train_tokenizer([*texts, "error: SyntaxError: invalid syntax"] * 2, 400)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        rotary_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
    )
    engine = Engine(Transformer(config, seed=0), device="cpu")
    env = MleEnv(pool, LIMITS, verifier=Verifier({"made-up": competition}))
    attempts = [
        replace(task, episode=f"e{i}", index=i, sampling=Sampling(1.0, 12, 100 * i))
        for i in range(2)
    ]
    for episode in run_local(attempts, env, engine, tokenizer).episodes:
        assert len(episode.calls) == len(episode.scripts) == 3
        prompts = [call.prompt_ids for call in episode.calls]
        assert len(prompts[0]) < len(prompts[1]) < len(prompts[2])
        for call in episode.calls:
            assert len(call.response_ids) == len(call.logprobs) <= 12
            assert call.tokenizer_hash == tokenizer.hash
        assert "error:" in tokenizer.decode(prompts[2])
        assert episode.reward.outcome == 0.0


class BrokenPool:
    """A sandbox that has failed."""

    missing: tuple[str, ...] = ()

    def submit(self, job: ScriptJob) -> Future[ScriptResult]:
        future: Future[ScriptResult] = Future()
        future.set_result(ScriptResult("infra", None, "", "no fork left", {}, 0.0, 0.0))
        return future

    def run(self, jobs: Sequence[ScriptJob]) -> list[ScriptResult]:
        return [self.submit(job).result() for job in jobs]

    def close(self) -> None: ...

    def __enter__(self) -> BrokenPool:
        return self

    def __exit__(self, *details: object) -> None: ...


def test_a_broken_sandbox_ends_the_episode_as_an_environment_error(tmp_path: Path) -> None:
    competition = made_up(tmp_path, "train")
    env = MleEnv(BrokenPool(), turns=3, verifier=Verifier({"made-up": competition}))
    client = ScriptedClient(*["x = 1"] * 3)
    episode = env.run(attempt(make_task(competition, "dev")), client)
    assert episode.reward.status == "env_error"
    assert len(client.asked) == 1
    assert episode.scripts[0].message == "no fork left"


def test_a_taskset_holds_the_competitions_of_its_split() -> None:
    dev = MleTaskset("offline-small-v0", "dev", turns=2)
    assert dev.ids() == ("tweet-sentiment", "diamonds-price", "food-reviews")
    assert MleTaskset("offline-small-v0", "train").ids() == dev.ids()
    val = MleTaskset("offline-small-v0", "val")
    assert set(val.ids()) == {"electricity-demand", "vowel-speaker"}
    task = dev.task("diamonds-price")
    assert task.turns == 2
    assert task.files.parts[-2:] == ("dev", "public")
    assert {p.name for p in task.files.iterdir()} >= {"train.csv", "test.csv"}
    assert val.task("vowel-speaker").files.parts[-2:] == ("prepared", "public")
    assert len(list(dev)) == len(dev) == 3
    with pytest.raises(UserError, match="not in split dev"):
        dev.task("vowel-speaker")
    with pytest.raises(UserError, match="unknown split"):
        MleTaskset("offline-small-v0", "test")
    with pytest.raises(UserError, match="at least 1"):
        MleEnv(BrokenPool(), turns=0)


def test_only_dev_rows_are_scored_for_training() -> None:
    assert [scored_rows(split) for split in ("dev", "train", "val")] == [
        "dev",
        "private",
        "private",
    ]
