"""Pausing the batcher, and new weights for rows in the middle of their replies."""

import threading
from concurrent.futures import CancelledError
from pathlib import Path

import pytest
import torch
from small_model import CONFIG, VOCAB, make_uneven, spoil
from test_batching import Echo, request

from model.batching import Batcher, BatcherClosedError, PauseMode, ResumedError
from model.cache import KVCache
from model.checkpoint import save_checkpoint
from model.decode import EagerDecoder, prefill
from model.errors import CheckpointError, ModelError
from model.generate import Engine, GenRequest, Row
from model.running import RunningBatch
from model.transformer import Transformer

PROMPT = tuple(i * 5 % VOCAB for i in range(40))


def quiet(runner: Echo, **more: int) -> Batcher:
    """A batcher without its thread."""
    return Batcher(runner, start=False, **more)


# ---------------------------------------------------------------- modes


def test_abort_ends_what_runs_and_waits_with_what_it_has() -> None:
    batcher = quiet(Echo(1), max_batch=1)
    running, waiting = batcher.submit([request(1, 2, new=9), request(3, new=9)])
    batcher.turn()
    batcher.turn()
    done = batcher.pause("abort")
    batcher.turn()
    assert done.result(0) is None and batcher.counts == (0, 0)
    assert running.result(0).ids == [1, 2] and running.result(0).finish_reason == "abort"
    assert waiting.result(0).ids == [] and waiting.result(0).versions == []
    assert running.result(0).versions == [(0, 2, 7)]
    [later] = batcher.submit([request(4, new=1)])
    batcher.turn()
    assert not later.done() and batcher.counts == (0, 1)
    batcher.resume()
    batcher.turn()
    assert later.result(0).ids == [4]


def test_keep_freezes_and_goes_on() -> None:
    batcher = quiet(Echo())
    [running] = batcher.submit([request(1, 2, 3, new=3)])
    batcher.turn()
    done = batcher.pause("keep")
    [waiting] = batcher.submit([request(5)])
    for _ in range(4):
        batcher.turn()
    assert done.done() and batcher.paused == "keep" and batcher.counts == (1, 1)
    assert not running.done() and not waiting.done()
    batcher.resume()
    for _ in range(2):
        batcher.turn()
    assert running.result(0).ids == [1, 2, 3] and waiting.result(0).ids == [5]


def test_wait_lets_what_runs_end_and_nobody_in() -> None:
    batcher = quiet(Echo())
    [running] = batcher.submit([request(1, new=3)])
    batcher.turn()
    done = batcher.pause("wait")
    [waiting] = batcher.submit([request(5)])
    batcher.turn()
    assert not done.done()
    batcher.turn()
    assert done.done() and running.result(0).ids == [1] * 3 and batcher.counts == (0, 1)
    batcher.resume()
    batcher.turn()
    assert waiting.result(0).ids == [5]


@pytest.mark.parametrize("second", ["wait", "keep", "abort"])
def test_a_pause_on_another_replaces_it(second: PauseMode) -> None:
    batcher = quiet(Echo())
    [running] = batcher.submit([request(1, new=5)])
    batcher.turn()
    first = batcher.pause("wait")
    batcher.turn()
    assert not first.done()
    again = batcher.pause(second)
    batcher.turn()
    assert first.done() == again.done() == (second != "wait")
    assert running.done() == (second == "abort")
    batcher.pause("abort")
    batcher.turn()
    assert running.result(0).finish_reason == "abort" and first.done() and again.done()


def test_an_abort_is_not_taken_back_by_another_pause() -> None:
    batcher = quiet(Echo())
    [running] = batcher.submit([request(1, new=5)])
    batcher.turn()
    batcher.pause("abort")
    batcher.pause("keep")
    batcher.turn()
    assert running.result(0).finish_reason == "abort" and batcher.paused == "keep"


def test_resuming_before_a_pause_is_complete_tells_whoever_waits_for_it() -> None:
    batcher = quiet(Echo())
    batcher.resume()  # without a pause nothing happens
    [running] = batcher.submit([request(1, new=5)])
    batcher.turn()
    done = batcher.pause("wait")
    batcher.turn()
    batcher.resume()
    with pytest.raises(ResumedError):
        done.result(0)
    for _ in range(3):
        batcher.turn()
    assert running.result(0).ids == [1] * 5


# ---------------------------------------------------------------- with the thread


def test_a_paused_batcher_sleeps_until_something_happens() -> None:
    runner = Echo()
    with Batcher(runner) as batcher:
        batcher.pause("keep").result(20)
        [waiting] = batcher.submit([request(1)])
        assert not runner.started.is_set()
        assert batcher.load("weights", 3).result(20) >= 0 and runner.loaded == [("weights", 3)]
        batcher.resume()
        assert waiting.result(20).ids == [1]
        batcher.pause("abort").result(20)
        batcher.resume()


def test_a_request_that_is_cancelled_leaves_while_nothing_moves() -> None:
    runner = Echo()
    runner.gate.clear()
    left = threading.Event()
    drop = runner.drop

    def noting(rows):
        drop(rows)
        if rows and not runner.rows:
            left.set()

    with Batcher(runner) as batcher:
        runner.drop = noting
        [running] = batcher.submit([request(1, new=50)])
        assert runner.started.wait(20)
        done = batcher.pause("keep")
        runner.gate.set()
        done.result(20)
        running.cancel()
        assert left.wait(20)
        with pytest.raises(CancelledError):
            running.result(0)


def test_closing_while_paused_fails_whoever_waits() -> None:
    runner = Echo()
    runner.gate.clear()
    batcher = Batcher(runner)
    [running] = batcher.submit([request(1, new=50)])
    assert runner.started.wait(20)
    kept = batcher.pause("keep")
    runner.gate.set()
    kept.result(20)
    [waiting] = batcher.submit([request(2)])
    assert batcher.close() is True
    for future in (running, waiting):
        with pytest.raises(BatcherClosedError):
            future.result(20)
    for late in (lambda: batcher.pause("keep"), lambda: batcher.load("weights", 1)):
        with pytest.raises(BatcherClosedError):
            late()


def test_a_wish_for_weights_may_be_taken_back() -> None:
    runner = Echo()
    batcher = quiet(runner)
    [running] = batcher.submit([request(1, new=3)])
    batcher.turn()
    wish = batcher.load("weights", 3)
    batcher.turn()
    assert wish.cancel()
    batcher.turn()
    assert running.done() and runner.loaded == []


# ---------------------------------------------------------------- weights for rows that run


@pytest.fixture
def models() -> tuple[Transformer, Transformer]:
    def made(seed: int) -> Transformer:
        return make_uneven(Transformer(CONFIG, seed=seed).cast(torch.float64), seed, 0.2)

    return made(0), made(1)


def after(old: Transformer, new: Transformer, known: tuple[int, ...], count: int) -> list[int]:
    """Greedy ids behind `known`: the keys of all but its last token are the old weights'."""
    cache = KVCache(CONFIG, 1, len(known) + count, torch.device("cpu"), torch.float64)
    with torch.no_grad():
        pad_left_B, _ = prefill(old, [known[:-1]], cache)
        decoder, ids = EagerDecoder(new, cache, pad_left_B), [known[-1]]
        for _ in range(count):
            ids.append(int(decoder.step(torch.tensor(ids[-1:])).argmax()))
    return ids[1:]


def test_rows_go_on_with_new_weights_and_say_which_made_what(models) -> None:
    old, new = models
    wanted = [GenRequest(PROMPT[:n], 12, 0.0) for n in (3, 17)]
    rows = [Row(request) for request in wanted]
    long = Row(GenRequest(PROMPT, 6, 0.0, prompt_logprobs=True))
    batch = RunningBatch(Engine(old), prefill_tokens=15)
    batch.join(rows)
    batch.join([long])
    for _ in range(3):
        batch.step()
    counts = [len(row.ids) for row in rows]
    assert min(counts) > 1 and long.ids == []
    batch.load(new, 5)
    while batch.running:
        batch.step()
    for row, count in zip(rows, counts, strict=True):
        known = (*row.request.prompt_ids, *row.ids[:count])
        assert row.ids[count:] == after(old, new, known, 12 - count)
        assert row.result(5).versions == [(0, count, 0), (count, 12, 5)]
        assert row.result(5).version == 5
    # A prompt that was not whole is read anew: its reply is all the new weights'.
    fresh = Row(long.request)
    alone = RunningBatch(Engine(new))
    alone.join([fresh])
    while alone.running:
        alone.step()
    assert long.ids == fresh.ids and long.result(5).versions == [(0, 6, 5)]
    assert long.prompt.logprobs == pytest.approx(fresh.prompt.logprobs, abs=1e-10)
    # What was written with keys of both is no beginning of a later prompt.
    again = Row(GenRequest((*rows[1].request.prompt_ids, *rows[1].ids, 1), 1, 0.0))
    batch.join([again])
    batch.step()
    assert again.cached == 16 and again.ids == Engine(new).generate([again.request])[0].ids


@pytest.mark.parametrize("native", [True, False])
def test_a_folders_weights_come_in_place(models, tmp_path: Path, native: bool) -> None:
    old, new = (model.cast(torch.float32) for model in models)
    save_checkpoint(new, tmp_path / "new", dtype="float32", tokenizer_from=None)
    batch, request = RunningBatch(Engine(old), native=native), GenRequest(PROMPT, 9, 0.0)
    at = old.lm_head.data_ptr()
    for version in (0, 3):
        row = Row(request)
        batch.join([row])
        while batch.running:
            batch.step()
        assert row.result(0).versions == [(0, 9, version)] and row.cached == 0
        assert row.ids == Engine(old).generate([request])[0].ids
        batch.load(tmp_path / "new", 3)
    assert row.ids == Engine(new).generate([request])[0].ids and old.lm_head.data_ptr() == at


def test_weights_that_cannot_be_used_change_nothing(models, tmp_path: Path) -> None:
    old, _ = models
    before = [weight.clone() for weight in old.parameters()]
    batch, row = RunningBatch(Engine(old)), Row(GenRequest(PROMPT, 9, 0.0))
    batch.join([row])
    batch.step()
    save_checkpoint(Transformer(CONFIG, seed=2), tmp_path / "nan", tokenizer_from=None)
    spoil(tmp_path / "nan", "model.layers.1.block_sparse_moe.experts.0.w2.weight")
    with pytest.raises(CheckpointError, match=r"layers\.1\..*w2.weight holds NaN or inf"):
        batch.load(tmp_path / "nan", 1)
    with pytest.raises(ModelError):
        batch.load(tmp_path / "nowhere", 1)
    assert batch.version == 0 and all(map(torch.equal, before, old.parameters()))
    while batch.running:
        batch.step()
    assert row.ids == Engine(old).generate([row.request])[0].ids
