"""The batcher: who waits, joins, leaves and is told, with a runner that only counts."""

import threading
from collections.abc import Collection, Sequence
from concurrent.futures import CancelledError, Future

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.batching import Batcher, BatcherClosedError, QueueFullError
from model.errors import ModelError
from model.generate import Generation, GenRequest, Row


class Echo:
    """Gives every row its prompt back, a token a step; 13 breaks the step, and `gate` holds it."""

    def __init__(self, rows: int = 64) -> None:
        self.most = rows
        self.rows: list[Row] = []
        self.joined: list[tuple[int, ...]] = []
        self.loaded: list[tuple[str, int]] = []
        self.version = 7
        self.gate = threading.Event()
        self.gate.set()
        self.started = threading.Event()

    def check(self, request: GenRequest) -> None:
        if not request.prompt_ids:
            raise ModelError("empty")

    def room(self, waiting: Sequence[GenRequest]) -> int:
        return min(self.most - len(self.rows), len(waiting))

    def join(self, rows: Sequence[Row]) -> None:
        self.rows += rows
        self.joined += [row.request.prompt_ids for row in rows]
        assert len(self.rows) <= self.most

    def step(self) -> list[Row]:
        self.started.set()
        assert self.gate.wait(20)
        for row in self.rows:
            id = row.request.prompt_ids[len(row.ids) % len(row.request.prompt_ids)]
            if id == 13:
                raise ModelError("thirteen")
            row.add(id, -1.0)
        ended = [row for row in self.rows if row.finish is not None]
        self.drop(ended)
        return ended

    def drop(self, rows: Collection[Row]) -> None:
        for row in rows:
            self.rows.remove(row)

    def clear(self) -> None:
        self.rows.clear()

    def load(self, source: str, version: int) -> None:
        assert not self.rows, "loaded while rows run"
        if source == "bad":
            raise ModelError("bad weights")
        self.loaded.append((source, version))


def request(*ids: int, new: int = 1) -> GenRequest:
    return GenRequest(prompt_ids=ids, max_new_tokens=new)


def ids_of(futures: Sequence[Future[Generation]]) -> list[list[int]]:
    return [future.result(20).ids for future in futures]


# ---------------------------------------------------------------- whatever happens, in any order

ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.lists(st.integers(1, 5), min_size=1, max_size=4)),
        st.tuples(st.just("cancel"), st.integers(0, 50)),
        st.tuples(st.just("turn"), st.integers(1, 3)),
        st.tuples(st.just("break"), st.just(0)),
    ),
    max_size=60,
)


@settings(max_examples=150)
@given(actions=ACTIONS, slots=st.integers(1, 4), queue=st.integers(0, 5))
def test_no_slot_leaks_admission_is_in_order_and_every_request_ends_once(
    actions: list, slots: int, queue: int
) -> None:
    runner = Echo(slots)
    batcher = Batcher(runner, max_batch=slots, max_queue=queue, start=False)
    futures: list[Future[Generation]] = []
    ends: dict[int, int] = {}
    lengths: list[int] = []
    for kind, value in actions:
        # A running row that was cancelled keeps its slot until the next turn.
        leaving = sum(futures[row.request.prompt_ids[0] - 20].done() for row in runner.rows)
        open_now = leaving + sum(not future.done() for future in futures)
        if kind == "submit":
            first = len(futures)
            # Token 20 + i marks request i, so that the order of joining can be read off.
            asked = [request(20 + first + i, new=new) for i, new in enumerate(value)]
            if open_now + len(asked) > slots + queue:
                with pytest.raises(QueueFullError, match=f"at most {slots} may run and {queue}"):
                    batcher.submit(asked)
                continue
            for i, future in enumerate(batcher.submit(asked), start=first):
                ends[i] = 0
                future.add_done_callback(lambda _, i=i: ends.__setitem__(i, ends[i] + 1))
                futures.append(future)
            lengths += value
        elif kind == "cancel" and futures:
            futures[value % len(futures)].cancel()
        elif kind == "turn":
            for _ in range(value):
                batcher.turn()
        elif kind == "break" and open_now < slots + queue:
            [future] = batcher.submit([request(13)])
            ends[len(futures)] = 0
            i = len(futures)
            future.add_done_callback(lambda _, i=i: ends.__setitem__(i, ends[i] + 1))
            futures.append(future)
            lengths.append(1)
        assert len(runner.rows) <= slots and batcher.counts[0] == len(runner.rows)
        assert sum(batcher.counts) <= slots + queue
    for _ in range(sum(lengths) + len(futures) + 1):
        batcher.turn()
    assert runner.rows == [] and batcher.counts == (0, 0)
    assert all(count == 1 for count in ends.values()) and len(ends) == len(futures)
    order = [ids[0] for ids in runner.joined if ids[0] != 13]
    assert order == sorted(order) and len(set(order)) == len(order)
    for i, future in enumerate(futures):
        if not future.cancelled() and future.exception() is None:
            assert future.result().ids == [20 + i] * lengths[i]


# ---------------------------------------------------------------- with its thread


def test_a_request_joins_while_others_run_and_ends_before_them() -> None:
    runner = Echo()
    runner.gate.clear()
    with Batcher(runner) as batcher:
        [long] = batcher.submit([request(1, new=50_000)])
        assert runner.started.wait(20)
        [short] = batcher.submit([request(2, new=2)])
        runner.gate.set()
        assert short.result(20).ids == [2, 2] and not long.done()
        assert long.cancel()
    assert runner.rows == []


def test_an_error_reaches_all_that_run_and_the_next_ones_work() -> None:
    runner = Echo()
    runner.gate.clear()
    with Batcher(runner) as batcher:
        futures = batcher.submit([request(1, new=9), request(13)])
        runner.gate.set()
        for future in futures:
            with pytest.raises(ModelError, match="thirteen"):
                future.result(20)
        assert ids_of(batcher.submit([request(5)])) == [[5]]


class Fussy:
    """A constraint that breaks at its second token."""

    def __init__(self) -> None:
        self.taken = 0

    def mask(self) -> None:
        return None

    def accept(self, id: int) -> None:
        self.taken += 1
        if self.taken == 2:
            raise ModelError("fussy")

    def done(self) -> bool:
        return False


def test_a_broken_constraint_ends_its_own_request_only() -> None:
    with Batcher(Echo()) as batcher:
        broken = GenRequest((1,), 5, constraint=Fussy())
        good, bad = batcher.submit([request(2, new=5), broken])
        with pytest.raises(ModelError, match="fussy"):
            bad.result(20)
        assert good.result(20).ids == [2] * 5


def test_all_of_a_request_is_queued_or_nothing() -> None:
    runner = Echo(2)
    batcher = Batcher(runner, max_batch=2, max_queue=1, start=False)
    batcher.submit([request(1, new=5)])
    with pytest.raises(QueueFullError):
        batcher.submit([request(2)] * 3)
    with pytest.raises(ModelError, match="empty"):
        batcher.submit([request(2), request()])
    assert batcher.counts == (0, 1)


def test_a_cancelled_request_makes_room_in_the_queue() -> None:
    batcher = Batcher(Echo(1), max_batch=1, max_queue=1, start=False)
    first, second = batcher.submit([request(1, new=9), request(2, new=9)])
    with pytest.raises(QueueFullError):
        batcher.check_room()
    second.cancel()
    [third] = batcher.submit([request(3)])
    batcher.turn()
    first.cancel()
    batcher.turn()
    assert third.result(0).ids == [3]
    with pytest.raises(CancelledError):
        first.result(0)


def test_a_listener_hears_every_token_once_and_before_the_end() -> None:
    heard: list[list[int]] = []
    batcher = Batcher(Echo(), start=False)
    [future] = batcher.submit(
        [request(1, 2, 3, new=3)], [lambda piece: heard.append([*piece.ids, future.done()])]
    )
    for _ in range(3):
        batcher.turn()
    assert heard == [[1, False], [2, False], [3, False]] and future.result(0).ids == [1, 2, 3]


def test_new_weights_wait_for_what_runs_and_come_before_what_waits() -> None:
    runner = Echo()
    runner.gate.clear()
    with Batcher(runner) as batcher:
        [running] = batcher.submit([request(1, new=3)])
        assert runner.started.wait(20)
        loaded = batcher.load("weights", 3)
        [later] = batcher.submit([request(2)])
        assert runner.loaded == []
        runner.gate.set()
        assert loaded.result(20) >= 0
        assert running.done() and runner.loaded == [("weights", 3)]
        assert later.result(20).ids == [2]
        with pytest.raises(ModelError, match="bad weights"):
            batcher.load("bad", 4).result(20)


def test_closing_fails_what_waits_and_refuses_what_comes() -> None:
    runner = Echo(1)
    runner.gate.clear()
    batcher = Batcher(runner, max_batch=1)
    [running] = batcher.submit([request(0, new=9)])
    assert runner.started.wait(20)
    [waiting] = batcher.submit([request(1)])
    assert batcher.close(timeout_s=0.1) is False
    runner.gate.set()
    assert batcher.close() is True
    for future in (running, waiting):
        with pytest.raises(BatcherClosedError):
            future.result(20)
    with pytest.raises(BatcherClosedError, match="shutting down"):
        batcher.submit([request(2)])
    with pytest.raises(BatcherClosedError):
        batcher.load("weights", 1)
