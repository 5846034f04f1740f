"""The batcher: requests that arrive together are generated together, errors reach their waiters."""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import CancelledError

import pytest

from model.batching import Batcher, BatcherClosedError
from model.errors import ModelError
from model.generate import Generation, GenRequest


class RecordingEngine:
    """An engine that answers with the prompt and notes its batches; `gate` can hold it."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.loaded: list[tuple[str, int]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.started = threading.Event()
        self.busy = False

    def generate(self, requests: Sequence[GenRequest]) -> list[Generation]:
        assert not self.busy, "two batches at once"
        self.busy = True
        self.started.set()
        assert self.gate.wait(10)
        self.batches.append(len(requests))
        self.busy = False
        if any(request.max_new_tokens == 13 for request in requests):
            raise ModelError("thirteen")
        return [
            Generation(list(r.prompt_ids), [0.0] * len(r.prompt_ids), "stop", False, 7)
            for r in requests
        ]

    def load(self, source: str, version: int) -> None:
        assert not self.busy, "loaded while generating"
        self.loaded.append((source, version))


def request(*ids: int, new: int = 4) -> GenRequest:
    return GenRequest(prompt_ids=ids, max_new_tokens=new, seed=None, stop_ids=frozenset())


def test_requests_that_come_together_share_a_batch_and_keep_their_answers() -> None:
    engine = RecordingEngine()
    with Batcher(engine, window_ms=100) as batcher:
        futures = [batcher.submit(request(i)) for i in range(20)]
        assert [f.result(10).ids for f in futures] == [[i] for i in range(20)]
    assert engine.batches == [20]


def test_requests_gather_while_a_batch_runs_and_max_batch_holds() -> None:
    engine = RecordingEngine()
    engine.gate.clear()
    with Batcher(engine, window_ms=1, max_batch=8) as batcher:
        first = batcher.submit(request(0))
        assert engine.started.wait(10)
        rest = [batcher.submit(request(i)) for i in range(1, 18)]
        engine.gate.set()
        assert [f.result(10).ids for f in [first, *rest]] == [[i] for i in range(18)]
    assert engine.batches[0] == 1 and sorted(engine.batches[1:]) == [1, 8, 8]


def test_an_engine_error_reaches_every_waiter_and_the_next_batch_works() -> None:
    with Batcher(RecordingEngine(), window_ms=50) as batcher:
        futures = [batcher.submit(request(1)), batcher.submit(request(1, new=13))]
        for future in futures:
            with pytest.raises(ModelError, match="thirteen"):
                future.result(10)
        assert batcher.submit(request(5)).result(10).ids == [5]


def test_a_cancelled_request_is_not_generated() -> None:
    engine = RecordingEngine()
    engine.gate.clear()
    with Batcher(engine, window_ms=1) as batcher:
        first = batcher.submit(request(0))
        assert engine.started.wait(10)
        gone, kept = batcher.submit(request(1)), batcher.submit(request(2))
        assert gone.cancel()
        engine.gate.set()
        assert first.result(10).ids == [0] and kept.result(10).ids == [2]
        with pytest.raises(CancelledError):
            gone.result(10)
    assert engine.batches == [1, 1]


def test_new_weights_wait_for_the_running_batch() -> None:
    engine = RecordingEngine()
    engine.gate.clear()
    with Batcher(engine, window_ms=1) as batcher:
        running = batcher.submit(request(0))
        assert engine.started.wait(10)
        loader = threading.Thread(target=batcher.load, args=("weights", 3))
        loader.start()
        time.sleep(0.05)
        assert engine.loaded == []
        engine.gate.set()
        loader.join(10)
        assert running.done() and engine.loaded == [("weights", 3)]


def test_closing_fails_what_waits_and_refuses_what_comes() -> None:
    engine = RecordingEngine()
    engine.gate.clear()
    batcher = Batcher(engine, window_ms=1)
    running = batcher.submit(request(0))
    assert engine.started.wait(10)
    waiting = batcher.submit(request(1))
    assert batcher.close(timeout_s=0.1) is False
    engine.gate.set()
    assert running.result(10).ids == [0]
    with pytest.raises(BatcherClosedError):
        waiting.result(10)
    assert batcher.close() is True
    with pytest.raises(BatcherClosedError, match="closed"):
        batcher.submit(request(2))
