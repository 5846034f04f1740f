"""The trainer process: what it reads from the pool, what it writes, and that a step done again is
the same step. Real model, pool and run directory; the process itself is in `test_forge_run`."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from forge_fakes import seed_parts
from forge_runs import run_config
from rl_fakes import tiny_checkpoint

from model.checkpoint import load_model
from model.generate import Engine, GenRequest
from model.scoring import token_logprobs
from model.tokenizer import Tokenizer
from rl.checkpoints import fingerprint
from rl.config import RunConfig, dump_config
from rl.errors import CheckpointStateError, RecordError
from rl.forge.engine_match import engine_match
from rl.forge.groups import Group
from rl.forge.messages import Step, Stepped, episode_name
from rl.forge.places import Places, read_note
from rl.forge.records import TaskNames, Verdict, judge
from rl.forge.resume import find_start, known_of
from rl.forge.trainer import TrainerProcess, call_seconds
from rl.loop import run as run_synchronously
from rl.pool import Pool
from rl.run_dir import RunDir
from rl.trainer import Trainer
from rl.types import CallRecord, RewardRecord
from rl.window import Frontier

TASKS = TaskNames(("tweet-sentiment", "diamonds-price"), ("mle", "mle"))


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("forge") / "start")


@pytest.fixture(scope="module")
def config(start: Path) -> RunConfig:
    return run_config(start, optim={"updates_per_batch": 2, "passes": 2})


@pytest.fixture(scope="module")
def records(start: Path) -> tuple[list[CallRecord], list[RewardRecord]]:
    """Six groups of two, sampled at version 0 by the real engine; group 4 is flat."""
    tokenizer = Tokenizer.load(start)
    engine = Engine(load_model(start), max_batch=32)
    calls, rewards = [], []
    for group in range(6):
        for member in range(2):
            prompt = tuple(tokenizer.encode(f"task {group % 2}"))
            seed = 10 * group + member
            (made,) = engine.generate([GenRequest(prompt, 16, 1.0, seed=seed)])
            name = episode_name(group, member, 0)
            calls.append(
                CallRecord(
                    name, group, 0, prompt, tuple(made.ids), tuple(made.logprobs),
                    ((0, len(made.ids), 0),), made.finish_reason, 0.0, 1.0,
                    tokenizer_hash=tokenizer.hash,
                )
            )  # fmt: skip
            outcome = 0.5 if group == 4 else (seed % 7) / 7
            rewards.append(RewardRecord(name, outcome))
    return calls, rewards


@pytest.fixture
def run_dir(
    tmp_path: Path, config: RunConfig, records: tuple[list[CallRecord], list[RewardRecord]]
) -> Iterator[Path]:
    path = tmp_path / "run"
    folder = RunDir(path)
    folder.open(dump_config(config), resume=False)
    (path / "forge").mkdir()
    with Pool(Places(path).pool_of(config)) as pool:
        for call in records[0]:
            pool.add_call(call)
        for reward in records[1]:
            pool.add_reward(reward)
    folder.close()
    yield path


def step_of(number: int, *groups: int, dropped: tuple[int, ...] = (), last: bool = False) -> Step:
    def names(group: int) -> tuple[str, ...]:
        return tuple(episode_name(group, member, 0) for member in range(2))

    taken = {"head": max(groups) + 1, "taken": []}
    metrics = {"perf/wait_batch_s": 1.0, "perf/sync_s": 0.5, "group/zero_std_frac": 0.0}
    return Step(
        number, tuple(map(names, groups)), tuple(map(names, dropped)), taken, *_lists(), last,
        metrics,
    )  # fmt: skip


def _lists() -> tuple[tuple[str, ...], tuple[str, ...]]:
    return TASKS.ids, TASKS.domains


def learned(stepped: Stepped) -> dict[str, object]:
    return {k: v for k, v in stepped.row.items() if k != "t" and not k.startswith("perf/")}


def test_a_step_done_again_is_the_same_step(
    run_dir: Path, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before its checkpoint, nothing of it is there; killed after, it is told."""
    monkeypatch.setattr("rl.mfu.peak_flops", lambda device: 1e12)
    other = tmp_path / "other"
    shutil.copytree(run_dir, other)
    first = TrainerProcess(config, Places(run_dir))
    stepped = [first.step(step_of(1, 0, 1)), first.step(step_of(2, 2, 3, dropped=(4,)))]
    again = TrainerProcess(config, Places(other))
    once = again.step(step_of(1, 0, 1))
    assert learned(once) == learned(stepped[0])
    assert 0 < once.row["perf/mfu"] < 1 and once.row["perf/update_s"] > 0
    killed = TrainerProcess(config, Places(other))  # after the checkpoint of step 1
    ready = killed.ready()
    assert (ready.step, ready.version, ready.row) == (1, once.version, once.row)
    assert learned(killed.step(step_of(2, 2, 3, dropped=(4,)))) == learned(stepped[1])
    for name in ("checkpoints/step-2", "forge/weights-2"):
        assert fingerprint(run_dir / name) == fingerprint(other / name)
    with pytest.raises(CheckpointStateError, match="step 4 was asked for after step 2"):
        killed.step(step_of(4, 5))


def test_a_checkpoint_has_the_frontier_and_the_row_says_what_was_dropped(
    run_dir: Path, config: RunConfig, start: Path
) -> None:
    process = TrainerProcess(config, Places(run_dir))
    row = process.step(step_of(1, 0, 1, dropped=(4,))).row
    assert row["group/dropped"] == 1 and row["perf/wait_batch_s"] == 1.0
    assert row["perf/step_s"] == pytest.approx(1.5 + row["perf/update_s"])
    note = read_note(run_dir / "checkpoints/step-1")
    assert note["forge"]["frontier"] == {"head": 2, "taken": []}
    assert note["forge"]["groups"]["dropped"] == [["g4-0.0", "g4-1.0"]]
    folder = RunDir(run_dir)
    begin = find_start(folder, start, fingerprint(start))
    assert (begin.step, begin.version, begin.frontier.head) == (1, process.trainer.version, 2)
    assert begin.rows == [process.row] and begin.weights == Places(run_dir).weights(1)
    shutil.rmtree(begin.weights)
    assert find_start(folder, start, fingerprint(start)).weights.name == "step-1"
    with pytest.raises(CheckpointStateError, match="put it back"):
        find_start(folder, start, "another")


def test_the_run_can_be_trained_again_from_its_pool(
    run_dir: Path, config: RunConfig, tmp_path: Path
) -> None:
    process = TrainerProcess(config, Places(run_dir))
    process.step(step_of(1, 0, 1))
    process.step(step_of(2, 3, 2, last=True))
    pool = Places(run_dir).pool_of(config)
    path = tmp_path / "again"
    run_synchronously(
        config, path, resume=False, parts=seed_parts, check=lambda: None, from_pool=pool
    )  # type: ignore[arg-type]
    expected = fingerprint(run_dir / "checkpoints/step-2")
    assert fingerprint(path / "checkpoints/step-2") == expected


def test_records_of_another_tokenizer_are_refused(
    run_dir: Path, config: RunConfig, records: tuple[list[CallRecord], list[RewardRecord]]
) -> None:
    with Pool(Places(run_dir).pool_of(config)) as pool:
        pool.add_call(replace(records[0][0], index=1, tokenizer_hash="f" * 64))
    process = TrainerProcess(config, Places(run_dir))
    with pytest.raises(RecordError, match=r"call 1 of episode g0-0\.0: recorded with tokenizer ff"):
        process.step(step_of(1, 0, 1))
    assert not list((run_dir / "checkpoints").iterdir())


def test_an_episode_without_reward_is_no_training_data(run_dir: Path, config: RunConfig) -> None:
    process = TrainerProcess(config, Places(run_dir))
    with pytest.raises(CheckpointStateError, match=r"no reward of episode g7-0\.0"):
        process.step(step_of(1, 0, 7))


def test_trainer_and_engine_are_compared_on_calls_of_the_present_weights(
    start: Path, records: tuple[list[CallRecord], list[RewardRecord]], config: RunConfig
) -> None:
    trainer = Trainer(load_model(start), config.optim)
    calls = [replace(c, logprobs=tuple(x - 0.01 for x in c.logprobs)) for c in records[0]]
    calls[0] = replace(calls[0], logprobs=(math.nan, *calls[0].logprobs[1:]))
    found = engine_match(trainer, calls, 1.0, limit=4)
    theirs, ours = [], []
    for call in calls[:4]:
        ids = torch.tensor([call.prompt_ids + call.response_ids])
        logp_BT = token_logprobs(trainer.model, ids, torch.tensor([ids.shape[1]])).detach()
        for t, value in enumerate(call.logprobs):
            if math.isfinite(value):
                theirs.append(value)
                ours.append(float(logp_BT[0, len(call.prompt_ids) + t]))
    kl = [math.expm1(a - b) - (a - b) for a, b in zip(ours, theirs, strict=True)]
    assert found["engine/matched_tokens"] == len(kl)
    assert found["mismatch_kl/lr0_mean"] == pytest.approx(sum(kl) / len(kl), rel=1e-3)
    assert found["mismatch_kl/lr0_max"] == pytest.approx(max(kl), rel=1e-3)
    both = torch.tensor([ours, theirs], dtype=torch.float64)
    assert found["engine/logprob_corr"] == pytest.approx(float(both.corrcoef()[0, 1]), abs=1e-6)
    prob_corr = float(both.exp().corrcoef()[0, 1])
    assert found["engine/prob_corr"] == pytest.approx(prob_corr, abs=1e-6)
    # calls that other weights had a part in are no comparison
    trainer.version = 1
    mixed = [replace(c, versions=((0, 3, 0), (3, len(c.response_ids), 1))) for c in calls]
    assert engine_match(trainer, mixed, 1.0, limit=4) == {}


def test_a_group_is_judged_by_the_runs_own_reward_rule(run_dir: Path, config: RunConfig) -> None:
    def verdict(group: int, status: str = "done") -> Verdict:
        names = tuple(episode_name(group, member, 0) for member in range(2))
        return judge(pool, Group(group, names, (status, status)), TASKS, config)  # type: ignore[arg-type]

    with Pool(Places(run_dir).pool_of(config)) as pool:
        assert verdict(0) == Verdict.LIVE
        assert verdict(4) == Verdict.FLAT
        assert verdict(0, "env_error") == Verdict.FAILED


def test_what_a_pool_knows_is_bounded_by_the_checkpoints_version(
    run_dir: Path, config: RunConfig, records: tuple[list[CallRecord], list[RewardRecord]]
) -> None:
    late = replace(records[0][0], episode="g6-0.1", group=6, versions=((0, 8, 0), (8, 16, 2)))
    with Pool(Places(run_dir).pool_of(config)) as pool:
        pool.add_call(late)
        pool.add_reward(RewardRecord("g6-0.1", 1.0))
        pool.add_call(replace(late, episode="g6-1.0"))  # never ended
        assert (6, 0) not in known_of(pool, 1).ended
        known = known_of(pool, 2)
        beyond = known_of(pool, 2, Frontier(3, (4,)))
    assert known.ended[6, 0] == (1, "done") and len(known.ended) == 13
    assert known.attempts[6, 0] == 2 and known.attempts[6, 1] == 1
    assert {group for group, _ in beyond.ended} == {3, 5, 6}


def test_seconds_of_calls_are_counted_once(records: tuple[list[CallRecord], object]) -> None:
    times = [(0.0, 2.0), (1.0, 3.0), (2.5, 2.75), (5.0, 6.0)]
    calls = [replace(records[0][0], t_start=a, t_end=b) for a, b in times]
    assert call_seconds(calls) == pytest.approx(4.0)
    assert call_seconds([]) == 0.0
