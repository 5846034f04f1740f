"""Captured decode steps in the running batch: equal to steps that are not, whatever happens.

The first test plays a device: what it "captures" is run again with the tensors of the capture,
trial steps included. The others need one.
"""

import copy
import random
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_model import CONFIG as SMALL
from small_model import VOCAB, make_uneven
from torch import Tensor

from model import decode, running
from model.checkpoint import save_checkpoint
from model.generate import Engine, GenRequest, Row
from model.running import RunningBatch
from model.transformer import Transformer

CONTEXT = 400
CONFIG = replace(SMALL, max_position_embeddings=CONTEXT)
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="cuda: needs a CUDA device")


class Played:
    """A CUDA graph's manners: its tensors stay those of the capture."""

    def __init__(self, step: Callable[[], Tensor]) -> None:
        self.step, self.cache = step, step.__self__.cache
        self.store = self.cache._store
        for _ in range(3):
            self.out = step().clone()

    def replay(self) -> None:
        now, self.cache._store = self.cache._store, self.store
        self.out.copy_(self.step())
        self.cache._store = now


def played(step: Callable[[], Tensor], device: torch.device) -> tuple[Played, Tensor]:
    graph = Played(step)
    return graph, graph.out


def requests(seed: int) -> list[GenRequest]:
    """Lengths round the steps in which the cache grows; a few long prompts."""
    rng, made = random.Random(seed), []
    beginning = tuple(rng.randrange(VOCAB) for _ in range(70))
    for i in range(26):
        total = rng.choice([20, 60, 127, 128, 129, 200, 260, CONTEXT])
        prompt = rng.randint(max(1, total - 40), total - 1)
        ids = (beginning + tuple(rng.randrange(VOCAB) for _ in range(CONTEXT)))[-prompt:]
        if i % 3 == 0:
            ids = (beginning + ids)[:prompt]
        new = min(total - prompt, 40)
        made.append(GenRequest(ids, new, rng.choice([0.0, 1.0]), seed=i))
    return made


def drive(batch: RunningBatch, asked: list[GenRequest], seed: int, other: Path) -> list[Row]:
    """Joins, drops and a reload at the same random places for every batch."""
    rng = random.Random(seed)
    rows = [Row(request) for request in asked]
    waiting, steps = list(rows), 0
    while waiting or batch.running:
        count = batch.room([row.request for row in waiting[: rng.choice([0, 0, 1, 2, 9])]])
        batch.join(waiting[:count])
        del waiting[:count]
        if steps % 11 == 10:
            inside = [row for row in rows if row not in waiting and row.finish is None]
            gone = [row for row in inside if rng.random() < 0.15]
            batch.drop(gone)
            for row in gone:
                row.finish = "abort"
        if steps == 40:
            batch.load(other, 1)
        batch.step()
        steps += 1
        assert steps < 5_000
    assert steps > 45
    return rows


def compare(rows: list[Row], wanted: list[Row]) -> None:
    for row, other in zip(rows, wanted, strict=True):
        assert row.ids == other.ids and row.finish == other.finish
        assert row.versions == other.versions
        assert row.logprobs == pytest.approx(other.logprobs, abs=1e-9)


def both(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, device: str, seed: int, piece: int
) -> RunningBatch:
    """The batch with captured steps, after both have done the same."""
    model = make_uneven(Transformer(CONFIG, seed=0).cast(torch.float64), 1, 0.2).to(device)
    other = make_uneven(Transformer(CONFIG, seed=1).cast(torch.float64), 2, 0.2)
    save_checkpoint(other, tmp_path / "other", dtype="float64", tokenizer_from=None)
    asked = requests(seed)
    made = []
    for captured in (False, True):
        monkeypatch.setattr(running, "needs_no_host", lambda *_, captured=captured: captured)
        batch = RunningBatch(
            Engine(copy.deepcopy(model)), max_batch=20, prefill_tokens=piece, native=False
        )
        batch._captures = captured
        made.append((batch, drive(batch, asked, seed, tmp_path / "other")))
    (eager, wanted), (batch, rows) = made
    assert eager._graph is None and batch._graph is not None
    compare(rows, wanted)
    return batch


@pytest.mark.parametrize(("seed", "piece"), [(0, 7), (1, 33), (2, 512), (3, 7)])
def test_captured_steps_as_played_on_a_cpu(monkeypatch, tmp_path, seed: int, piece: int) -> None:
    monkeypatch.setattr(decode, "_captured", played)
    both(monkeypatch, tmp_path, "cpu", seed, piece)


def test_a_capture_writes_into_no_row_that_is_full_to_a_round_number(monkeypatch) -> None:
    monkeypatch.setattr(decode, "_captured", played)
    monkeypatch.setattr(running, "needs_no_host", lambda *_: True)
    engine = Engine(make_uneven(Transformer(CONFIG, seed=0).cast(torch.float64), 1, 0.2))
    batch = RunningBatch(engine, prefill_tokens=2048, native=False)
    batch._captures = True
    rows = [Row(GenRequest((i,) * 120, 20, 0.0)) for i in range(8)]
    batch.join(rows)
    for _ in range(8):
        batch.step()
    assert batch._lengths == [128] * 8
    batch.join([Row(GenRequest((9, 9), 30, 0.0))])  # a ninth row: the cache grows, and is captured
    while any(row.finish is None for row in rows):
        batch.step()
    for row, made in zip(rows, engine.generate([row.request for row in rows]), strict=True):
        assert row.ids == made.ids and row.logprobs == pytest.approx(made.logprobs, abs=1e-9)


@pytest.mark.gpu
@cuda
@pytest.mark.parametrize(("seed", "piece"), [(0, 7), (1, 33), (2, 2048), (3, 7), (4, 64)])
def test_captured_steps_on_a_device(monkeypatch, tmp_path, seed: int, piece: int) -> None:
    batch = both(monkeypatch, tmp_path, "cuda", seed, piece)
    assert isinstance(batch._graph.graph, torch.cuda.CUDAGraph)


@pytest.mark.gpu
@cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_on_a_device_equals_the_engine(dtype: torch.dtype) -> None:
    """Rounding may turn a rare choice; log-probs of the common beginnings agree."""
    model = make_uneven(Transformer(CONFIG, seed=0), 1, 0.2).cast(dtype).cuda()
    asked = [GenRequest((1, 2, i), 40, 0.0, seed=i) for i in range(20)]
    batch, rows = RunningBatch(Engine(model)), [Row(request) for request in asked]
    batch.join(rows)
    while batch.running:
        batch.step()
    tolerance, same = (1e-4 if dtype == torch.float32 else 0.1), 0
    for row, made in zip(rows, Engine(model).generate(asked), strict=True):
        pairs = zip(row.ids, made.ids, strict=True)
        count = next((i for i, (a, b) in enumerate(pairs) if a != b), len(row.ids))
        assert row.logprobs[:count] == pytest.approx(made.logprobs[:count], abs=tolerance)
        same += count
    assert same > 20 * 40 * (0.9 if dtype == torch.float32 else 0.3)


@pytest.mark.gpu
@cuda
def test_a_step_waits_for_the_device_once() -> None:
    model = Transformer(CONFIG, seed=0).cuda()
    batch = RunningBatch(Engine(model))
    batch.join([Row(GenRequest((1, 2, i), 60, seed=i)) for i in range(9)])
    for _ in range(3):
        batch.step()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            for _ in range(10):
                batch.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [str(one.message) for one in told if "synchronizing" in str(one.message)]
    assert len(waits) <= 10, waits[:3]


@pytest.mark.gpu
@cuda
def test_a_capture_that_fails_leaves_no_old_one(monkeypatch) -> None:
    model = Transformer(CONFIG, seed=0).cuda()
    batch = RunningBatch(Engine(model))
    batch.join([Row(GenRequest((1, 2), 30, seed=1))])
    batch.step()

    def broken(*_: object) -> None:
        raise RuntimeError("no memory")

    with monkeypatch.context() as patched:
        patched.setattr(running, "SlotGraph", broken)
        batch.join([Row(GenRequest((i, 3), 30, seed=i)) for i in range(9)])
        with pytest.raises(RuntimeError, match="no memory"):
            batch.step()
        batch.clear()
    assert batch._graph is None
    row = Row(GenRequest((1, 2), 9, 0.0))
    batch.join([row])
    while batch.running:
        batch.step()
    assert row.ids == Engine(model).generate([row.request])[0].ids
