"""A step and its samples: updates, minibatches, refills, pools. Real loop, tiny model."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from rl_fakes import TASKS, TextEnv, small_config, text_parts, text_tasks, tiny_checkpoint
from safetensors.torch import load_file

from model.checkpoint import load_model
from model.generate import Engine, GenRequest
from model.transformer import Transformer
from rl import objectives, train
from rl.backward import Sums, backward_rows
from rl.cli import run_main
from rl.config import OptimSection, RunConfig
from rl.errors import ConfigError, RecordError
from rl.learner import Learner
from rl.loop import Parts, run
from rl.objectives import Objective
from rl.pool import Pool
from rl.run_dir import decode_row
from rl.samples import Sample
from rl.step_metrics import lag_metrics, window_metrics
from rl.trainer import Trainer
from rl.types import CallRecord, ChatClient, Episode, RewardRecord, Task
from rl.window import Window

config_of = partial(small_config, steps=3)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("learner")
    tiny_checkpoint(folder / "start")
    return folder


def go(config: RunConfig, path: Path, parts=text_parts, **more):  # type: ignore[no-untyped-def]
    run(config, path, resume=False, parts=parts, check=lambda: None, **more)
    lines = (path / "metrics.jsonl").read_text().splitlines()
    return [decode_row(line) for line in lines]


def weights(path: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(next((path / f"checkpoints/step-{step}").glob("*.safetensors")))


# ------------------------------------------------------------------ updates


def sampled(model: Transformer, count: int = 8) -> list[Sample]:
    """Replies of the model itself, so that at first every ratio is 1."""
    requests = [GenRequest((1 + i, 5, 9), 10, seed=i) for i in range(count)]
    made = Engine(model).generate(requests)
    return [
        Sample(r.prompt_ids, tuple(m.ids), tuple(m.logprobs), (-1.0) ** i)
        for i, (r, m) in enumerate(zip(requests, made, strict=True))
    ]


OBJECTIVES = [
    objectives.cispo(1.02),
    objectives.ppo_clip(0.02, 0.02),
    objectives.grpo(0.02, 0.02),
]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: o.name)
@pytest.mark.parametrize("passes", [1, 2, 4])
def test_ceiling_and_clip_act_from_the_second_update_on(
    home: Path, objective: Objective, passes: int
) -> None:
    model = load_model(home / "start")
    optim = OptimSection(warmup_steps=0, updates_per_batch=4, passes=passes)
    trainer, weights = Trainer(model, optim), []
    step = trainer._step

    def note(loss: float, lr: float) -> float:
        norm = step(loss, lr)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        return norm

    trainer._step = note  # type: ignore[method-assign]
    stats = trainer.update(sampled(model), objective, lr=1e-2, temperature=1.0, seed=3)
    moved = [float((b - a).abs().max()) for a, b in pairwise(weights)]
    assert len(moved) == 3 and min(moved) > 1e-3
    first, *later = stats.updates
    assert len(later) == 3
    assert first.capped == 0
    assert first.weight_max == pytest.approx(1.0, abs=1e-4)
    assert later[-1].capped > 0 and stats.capped_frac > 0
    # ratios differ from 1 in every update after the first
    assert all(sums.kl_max > 1e-6 for sums in later) and first.kl_max < 1e-8
    assert sum(s.tokens for s in stats.updates) == passes * stats.tokens


@pytest.mark.parametrize("updates", [1, 4])
def test_without_reuse_or_lag_all_objectives_make_the_same_update_but_their_average(
    home: Path, updates: int
) -> None:
    finals = []
    for objective in (
        objectives.reinforce(),
        objectives.cispo(1.02),
        objectives.ppo_clip(0.2, 0.2),
    ):
        model = load_model(home / "start")
        trainer = Trainer(model, OptimSection(warmup_steps=0, updates_per_batch=updates))
        trainer.update(sampled(model), objective, lr=1e-2, temperature=1.0)
        finals.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    apart = [float((final - finals[0]).abs().max()) for final in finals[1:]]
    # AdamW turns rounding of tiny gradients into steps of up to lr: compare the bulk
    same = [float(((final - finals[0]).abs() < 1e-4).float().mean()) for final in finals[1:]]
    assert (min(same) > 0.99) == (updates == 1), (apart, same)


def test_any_function_of_the_type_computes_the_gradients(home: Path) -> None:
    seen = []

    def backward(
        model: Transformer, samples: object, objective: Objective, temperature: float, budget: int
    ) -> Sums:
        sums = backward_rows(model, samples, objective, temperature, 2)  # type: ignore[arg-type]
        seen.append((budget, objective.name))
        return replace(sums, figures={"tree/ratio_vs_calls": 2.0})

    model = load_model(home / "start")
    trainer = Trainer(model, OptimSection(), backward, budget=512)
    stats = trainer.update(sampled(model), objectives.cispo(5.0), lr=1e-3, temperature=1.0)
    assert seen == [(512, "cispo")] and stats.figures == {"tree/ratio_vs_calls": 2.0}


def test_sequence_shares_leave_masked_tokens_out(home: Path) -> None:
    """GRPO's mean over a call's tokens counts trained ones only; naive version in float64."""
    model = load_model(home / "start").cast(torch.float64)
    rows = [replace(s, logprobs=(math.nan, *s.logprobs[1:])) for s in sampled(model, 2)]
    rows += sampled(model, 5)[2:]
    sums = backward_rows(model, rows, objectives.grpo(0.2, 0.2), 1.0, 2)
    naive = 0.0
    for row in rows:
        logp = torch.log_softmax(model(torch.tensor([[*row.prompt_ids, *row.response_ids]]))[0], -1)
        terms = []
        for t, (token, old) in enumerate(zip(row.response_ids, row.logprobs, strict=True)):
            if math.isfinite(old):
                ratio = math.exp(logp[len(row.prompt_ids) + t - 1, token].item() - old)
                held = min(max(ratio, 0.8), 1.2)
                terms.append(min(ratio * row.advantage, held * row.advantage))
        naive -= sum(terms) / len(terms) / len(rows)
    assert sums.loss == pytest.approx(naive, abs=1e-12)
    assert sums.nonfinite == 2


@pytest.mark.parametrize("objective", ["grpo", "ppo_clip", "reinforce"])
def test_every_objective_runs_and_names_its_figures(
    home: Path, tmp_path: Path, objective: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(
        home, objective=objective, budget={"steps": 1}, optim={"updates_per_batch": 2}
    )
    row = go(config, tmp_path / "run")[0]
    assert {
        f"loss/{objective}/{k}" for k in ("loss", "weight_mean", "weight_max", "capped_frac")
    } <= set(row)
    assert row["optim/updates"] == 2.0
    said = capsys.readouterr().out
    assert said.startswith(f"{objective}: ")
    assert "anchor: recorded" in said and "denominator: " in said and "2 updates a batch" in said


# ------------------------------------------------------------------ dynamic sampling


class Flat(TextEnv):
    """Every group of the first task earns the same."""

    def run(self, task: Task, client: ChatClient) -> Episode:
        made = super().run(task, client)
        if task.id != TASKS[0]:
            return made
        return replace(made, reward=replace(made.reward, outcome=0.5))


@contextmanager
def flat_parts(config: RunConfig) -> Iterator[Parts]:
    yield Parts(text_tasks(), Flat())


@pytest.mark.parametrize("refills", [0, 1, 3])
def test_groups_without_spread_are_replaced_inside_the_budget(
    home: Path, tmp_path: Path, refills: int
) -> None:
    config = config_of(
        home, budget={"steps": 4}, rollout={"dynamic_sampling": {"refills": refills}}
    )
    rows = go(config, tmp_path / "run", flat_parts)
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["scripts"] <= 4 * 8  # never more than the run was given
    assert all(row["group/zero_std_frac"] >= 0.25 for row in rows)
    if not refills:
        assert len(rows) == 4 and "group/dropped" not in rows[0]
        return
    # each step of two groups drops one (of the first task) and samples others for it
    assert all(row["group/dropped"] >= 1 for row in rows)
    assert len(rows) < 4 and result["steps"] == len(rows)
    assert result["scripts"] > 8 * len(rows)
    final = tmp_path / f"run/checkpoints/step-{len(rows)}"
    assert not (final / "trainer/state.safetensors").exists()  # the last one


def test_a_run_that_refills_resumes_where_its_budget_stood(home: Path, tmp_path: Path) -> None:
    from rl.errors import StoppedError

    config = config_of(home, budget={"steps": 6}, rollout={"dynamic_sampling": {"refills": 2}})
    whole = go(config, tmp_path / "whole", flat_parts)

    def stop() -> None:
        rows = tmp_path / "cut/metrics.jsonl"
        if rows.is_file() and len(rows.read_text().splitlines()) == 2:
            raise StoppedError("SIGTERM", 143)

    with pytest.raises(StoppedError):
        run(config, tmp_path / "cut", resume=False, parts=flat_parts, check=stop)
    run(config, tmp_path / "cut", resume=True, parts=flat_parts, check=lambda: None)
    cut = [decode_row(line) for line in (tmp_path / "cut/metrics.jsonl").read_text().splitlines()]
    assert [r["policy/grad_norm"] for r in cut] == [r["policy/grad_norm"] for r in whole]
    results = [json.loads((tmp_path / d / "result.json").read_text()) for d in ("whole", "cut")]
    assert results[0]["fingerprint"] == results[1]["fingerprint"]


@pytest.mark.parametrize("status", ["done", "env_error"])
def test_a_step_whose_members_all_fail_changes_nothing_and_says_so(
    home: Path, capsys: pytest.CaptureFixture[str], status: str
) -> None:
    config = config_of(home)
    model = load_model(home / "start")
    learner = Learner(config, Trainer(model, config.optim))
    before = [p.detach().clone() for p in model.parameters()]
    call = CallRecord("e", 0, 0, (1,), (2, 3), (-1.0, -1.0), ((0, 2, 0),), "stop", 0, 0)
    episodes = [
        Episode(f"e{i}", "t", 0, i, (call,), (), RewardRecord(f"e{i}", 0.0, status=status))  # type: ignore[arg-type]
        for i in range(4)
    ]
    row = learner.learn(1, episodes)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    if status == "done":
        assert row["group/zero_std_frac"] == 1.0
        assert "no group has spread" in capsys.readouterr().err
    else:
        assert row["optim/updates"] == 0.0 and learner.trainer.version == 0


# ------------------------------------------------------------------ bad input


def test_non_finite_log_probs_are_masked_counted_and_told(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load_model(home / "start")
    rows = sampled(model)
    rows[0] = replace(rows[0], logprobs=(math.nan, -math.inf, *rows[0].logprobs[2:]))
    stats = Trainer(model, OptimSection()).update(
        rows, objectives.cispo(5.0), lr=1e-3, temperature=1.0
    )
    assert stats.nonfinite == 2 and math.isfinite(stats.loss)
    assert "2 of " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokenizer_hash": "f" * 64}, "tokenizer ffffffffffff"),
        ({"temperature": 0.5}, "temperature 0.5"),
        ({"logprobs": (-1.0,)}, "log-probs"),
    ],
)
def test_a_record_that_does_not_fit_ends_the_run_before_the_update(
    home: Path, tmp_path: Path, change: dict[str, object], words: str
) -> None:
    class Wrong(TextEnv):
        def run(self, task: Task, client: ChatClient) -> Episode:
            made = super().run(task, client)
            return replace(made, calls=tuple(replace(c, **change) for c in made.calls))  # type: ignore[arg-type]

    @contextmanager
    def parts(config: RunConfig) -> Iterator[Parts]:
        yield Parts(text_tasks(), Wrong())

    with pytest.raises(RecordError, match=words):
        go(config_of(home), tmp_path / "run", parts)
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 2)
    assert (tmp_path / "run/metrics.jsonl").read_text() == ""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("optim: {updates_per_batch: 4, passes: 3}", "multiple of optim.passes"),
        ("objective: expert_iteration\nrollout: {dynamic_sampling: {refills: 1}}", "refills"),
        ("rollout: {truncation: {rule: penalise, buffer: 999}}", "truncation.buffer"),
        ("objective: dapo", "objective"),
        ("cispo: {mask_low: -1}", "cispo.mask_low"),
        ("reward: {gamma: 1.5}", "reward.gamma"),
    ],
)
def test_settings_that_make_no_sense_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, words: str
) -> None:
    (tmp_path / "run.yaml").write_text(text)
    assert run_main(train.main, [str(tmp_path / "run.yaml"), "--dry-run"]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and words in shown.err and shown.err.count("\n") == 1


def test_a_dry_run_says_what_the_run_would_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text("objective: grpo\noptim: {updates_per_batch: 4, passes: 2}")
    assert run_main(train.main, [str(tmp_path / "run.yaml"), "--dry-run"]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("# ")]
    text = "\n".join(said)
    for words in (
        "grpo: ratio clipped to [0.8, 1.2]", "2 minibatches × 2 passes",
        "denominator: each call's own tokens", "120 script executions", "deviation: the group",
    ):  # fmt: skip
        assert words in text, text


# ------------------------------------------------------------------ pools


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"objective": "grpo", "optim": {"updates_per_batch": 4}, "rollout": {"turns": 2}},
        {"rollout": {"dynamic_sampling": {"refills": 2}}, "budget": {"steps": 5}},
    ],
)
def test_a_run_is_computed_again_from_its_records_bit_for_bit(
    home: Path, tmp_path: Path, changes: dict[str, object]
) -> None:
    class Turns(Flat):
        """With the index of the call in its record."""

        def run(self, task: Task, client: ChatClient) -> Episode:
            made = super().run(task, client)
            return replace(made, calls=tuple(replace(c, index=i) for i, c in enumerate(made.calls)))

    @contextmanager
    def parts(config: RunConfig) -> Iterator[Parts]:
        yield Parts(text_tasks(), Turns(config.rollout.turns))

    @contextmanager
    def nothing(config: RunConfig) -> Iterator[Parts]:
        raise AssertionError("no engine, no environment")
        yield

    config = config_of(home, pool="pool.db", **changes)
    first = go(config, tmp_path / "run", parts)
    steps = len(first)
    again = go(config, tmp_path / "again", nothing, from_pool=str(tmp_path / "run/pool.db"))
    a, b = weights(tmp_path / "run", steps), weights(tmp_path / "again", steps)
    assert all(torch.equal(a[name], b[name]) for name in a)
    for one, other in zip(first, again, strict=True):
        same = {k for k in other if k.split("/")[0] in ("loss", "mismatch_kl", "policy", "lag")}
        assert same >= {"policy/grad_norm", "mismatch_kl/max"}
        assert {k: one[k] for k in same} == {k: other[k] for k in same}
    with Pool(tmp_path / "run/pool.db", create=False) as pool:
        stats = pool.stats()
    assert stats.damaged == () and stats.steps == steps


def test_pools_that_cannot_be_trained_from_are_refused(home: Path, tmp_path: Path) -> None:
    with Pool(tmp_path / "empty.db"):
        pass
    with pytest.raises(RecordError, match="names no optimiser step"):
        go(config_of(home), tmp_path / "a", from_pool=str(tmp_path / "empty.db"))
    with pytest.raises(ConfigError, match="no such pool"):
        go(config_of(home), tmp_path / "b", from_pool=str(tmp_path / "none.db"))
    with pytest.raises(ConfigError, match="expert iteration"):
        go(config_of(home, objective="expert_iteration"), tmp_path / "c", from_pool="x")


# ------------------------------------------------------------------ figures and the repetition stop


def test_lag_is_counted_by_version_spans() -> None:
    def episode(*spans: tuple[int, int, int]) -> Episode:
        ids = (7,) * spans[-1][1]
        call = CallRecord("e", 0, 0, (1,), ids, (-1.0,) * len(ids), spans, "stop", 0, 0)
        return Episode("e", "t", 0, 0, (call,), (), RewardRecord("e", 1.0))

    found = lag_metrics([episode((0, 6, 3), (6, 8, 5)), episode((0, 2, 5))], 5)
    assert found == {"lag/mean": 1.2, "lag/max": 2.0, "lag/spanning_frac": 0.5}


def test_window_figures() -> None:
    window: Window[str] = Window(8, 4)
    for _ in range(8):
        window.admit()
    for index in (1, 2, 5, 6):
        window.finish(index, "x")
    window.take()
    assert window_metrics(window) == {
        "window/head_age": 1.0, "window/overtaken": 1.0,
        "window/blocked_done": 2.0, "window/inflight": 8.0,
    }  # fmt: skip


def test_a_reply_that_is_certain_for_too_long_ends(home: Path) -> None:
    model = load_model(home / "start")
    free = GenRequest((1, 5, 9), 40, temperature=0.02, seed=0)  # so cold that it is certain
    plain = Engine(model).generate([free])[0]
    made = Engine(model).generate([replace(free, repetition=(4, 0.99))])[0]
    assert made.finish_reason == "repetition"
    assert made.ids == plain.ids[: len(made.ids)] and len(made.ids) < len(plain.ids)
    sure = [x > math.log(0.99) for x in plain.logprobs]
    first = next(i for i in range(4, len(sure) + 1) if all(sure[i - 4 : i]))
    assert len(made.ids) == first
    untouched = Engine(model).generate([replace(free, repetition=(3000, 0.99))])[0]
    assert untouched.ids == plain.ids and untouched.finish_reason == plain.finish_reason
