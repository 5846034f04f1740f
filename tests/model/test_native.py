"""Native code for the forward pass: the torch path's numbers, whoever else is in the call, and the
torch path itself where there is no native code."""

import os
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_model import CONFIG as SMALL
from small_model import CONTEXT, VOCAB, make_uneven

from model.config import ModelConfig
from model.errors import ModelError
from model.generate import Engine, Generation, GenRequest, Row
from model.native import build
from model.native.build import NativeUnavailableError, cache_folder, load_library
from model.native.panels import Panels
from model.native.step import NativeModel
from model.running import RunningBatch
from model.sampling import Sampler
from model.slots import JoinAttend, SlotAttend, SlotCache
from model.transformer import Transformer

CONFIG = replace(SMALL, num_local_experts=8)
CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    try:
        load_library()
    except NativeUnavailableError as error:
        if "no C compiler" not in str(error):
            raise
        pytest.skip(f"compiler: {error}")


@pytest.fixture(scope="module")
def policy() -> Transformer:
    return make_uneven(Transformer(CONFIG, seed=0), 1, 0.2)


def some_config(rng: random.Random) -> ModelConfig:
    """Any sizes: most are no multiple of a vector or a panel."""
    kv_heads, head_dim = rng.choice([1, 2, 3]), rng.choice([4, 6, 8, 16, 20, 32, 64, 128])
    experts = rng.randint(1, 9)
    return replace(
        SMALL,
        vocab_size=rng.choice([31, 61, 64, 130]),
        hidden_size=rng.choice([7, 18, 32, 48, 70]),
        intermediate_size=rng.choice([3, 16, 20, 33]),
        num_hidden_layers=rng.randint(1, 3),
        num_attention_heads=kv_heads * rng.choice([1, 2, 4, 5, 7]),
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rotary_dim=2 * rng.randint(1, head_dim // 2),
        num_local_experts=experts,
        num_experts_per_tok=rng.randint(1, experts),
        rms_norm_eps=rng.choice([1e-6, 1e-3]),
    )


class Text:
    """Rows of one slot cache, and the logits that a model gives after each of their tokens."""

    def __init__(self, model: Transformer, lengths: list[int], seed: int) -> None:
        self.cache = SlotCache(model.config, CPU, torch.float32)
        self.cache.fit(len(lengths), max(lengths), 0, 0)
        rng = random.Random(seed)
        vocab = model.config.vocab_size
        self.rows = [[rng.randrange(vocab) for _ in range(length)] for length in lengths]

    def read(self, native: NativeModel) -> torch.Tensor:
        """Logits after every token but the last, row after row."""
        counts = [len(ids) - 1 for ids in self.rows]
        attend = JoinAttend(self.cache, 0, [0] * len(counts), counts)
        ids_M = torch.tensor([id for ids in self.rows for id in ids[:-1]])
        return native.head(native.run(ids_M, attend.column_M, attend))

    def step(self, native: NativeModel, rows: list[int] | None = None) -> torch.Tensor:
        """Logits after the last token, of all rows or of these, which have to come first."""
        chosen = self.rows if rows is None else [self.rows[row] for row in rows]
        column_B = torch.tensor([len(ids) - 1 for ids in chosen])
        attend = SlotAttend(self.cache, column_B, max(len(ids) for ids in chosen))
        if rows is not None:
            attend.row_M = torch.tensor(rows)
        return native.logits(torch.tensor([ids[-1] for ids in chosen]), column_B, attend)

    def expected(self, model: Transformer) -> list[torch.Tensor]:
        """Logits (T, V) of each row by itself."""
        with torch.no_grad():
            return [model(torch.tensor([ids]))[0] for ids in self.rows]


@pytest.mark.parametrize("seed", range(24))
def test_logits_are_those_of_torch_for_any_sizes(seed: int) -> None:
    rng = random.Random(seed)
    model = make_uneven(Transformer(some_config(rng), seed=seed), seed, 0.3)
    lengths = [rng.randint(2, 40) for _ in range(rng.choice([1, 2, 7, 8, 9, 33]))]
    text, native = Text(model, lengths, seed), NativeModel(model)
    read_MV, step_BV = text.read(native), text.step(native)
    expected = text.expected(model)
    assert torch.cat(expected).std() > 0.05
    torch.testing.assert_close(read_MV, torch.cat([x[:-1] for x in expected]), atol=1e-5, rtol=0)
    torch.testing.assert_close(step_BV, torch.stack([x[-1] for x in expected]), atol=1e-5, rtol=0)


def test_long_prompts_are_read_in_chunks(policy: Transformer) -> None:
    text, native = Text(policy, [CONTEXT] * 7, 0), NativeModel(policy)
    expected = torch.cat([x[:-1] for x in text.expected(policy)])
    torch.testing.assert_close(text.read(native), expected, atol=1e-5, rtol=0)


def test_a_rows_bits_do_not_depend_on_the_others(policy: Transformer) -> None:
    text, native = Text(policy, [2 + 3 * i % 50 for i in range(41)], 3), NativeModel(policy)
    text.read(native)
    together = text.step(native)
    for rows in ([0], [5], [40, 3, 17], list(range(9)), list(reversed(range(41)))):
        assert torch.equal(text.step(native, rows), together[rows])


@pytest.mark.parametrize("head_dim", [8, 12, 16, 32, 64, 128])
@pytest.mark.parametrize("share", [1, 3, 4, 6])
def test_a_prompts_bits_do_not_depend_on_its_pieces(head_dim: int, share: int) -> None:
    config = replace(
        CONFIG,
        num_hidden_layers=2,
        num_attention_heads=2 * share,
        head_dim=head_dim,
        rotary_dim=head_dim // 2,
    )
    native = NativeModel(make_uneven(Transformer(config, seed=share), share, 0.2))
    lengths, ids = [75, 40], torch.arange(75) * 7 % VOCAB
    cache = SlotCache(config, CPU, torch.float32)
    cache.fit(2, 75, 0, 0)
    whole = JoinAttend(cache, 0, [0, 0], lengths)
    flat = torch.cat([ids[:n] for n in lengths])
    expected = native.run(flat, whole.column_M, whole).split(lengths)
    keys = cache.data.clone()
    for sizes in ([1] * 75, [7, 1, 60, 7], [16, 9, 50]):
        cache.data.zero_()
        start, parts = 0, []
        for size in sizes:
            piece = JoinAttend(cache, 1, [start], [size])
            parts.append(native.run(ids[start : start + size], piece.column_M, piece))
            start += size
        assert torch.equal(torch.cat(parts), expected[0])
        assert torch.equal(torch.cat(parts)[:40], expected[1])
        assert torch.equal(cache.data[:, :, 1, :, :75], keys[:, :, 0, :, :75])


@pytest.mark.parametrize("top_k", [1, 3])
def test_all_rows_may_choose_the_same_experts(top_k: int) -> None:
    config = replace(CONFIG, num_experts_per_tok=top_k)
    model = make_uneven(Transformer(config, seed=1), 1, 0.2)
    for layer in model.layers:
        layer.block_sparse_moe.e_score_correction_bias[2 : 2 + top_k] += 5
    text, native = Text(model, [9] * 33, 1), NativeModel(model)
    text.read(native)
    expected = torch.stack([x[-1] for x in text.expected(model)])
    torch.testing.assert_close(text.step(native), expected, atol=1e-5, rtol=0)


def test_weights_in_16_bits_give_the_same_bits(
    policy: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_uneven(Transformer(CONFIG, seed=3).cast(torch.bfloat16), 3, 0.2)
    model = model.cast(torch.float32)
    text, short = Text(model, [20] * 12, 3), NativeModel(model)
    found = text.read(short), text.step(short)
    monkeypatch.setattr(Panels, "_is_short", lambda *_: False)
    wide = NativeModel(model)
    assert short.nbytes < 0.6 * wide.nbytes
    assert all(map(torch.equal, found, (text.read(wide), text.step(wide))))
    assert NativeModel(policy).nbytes == wide.nbytes


def test_tokens_without_a_place_are_refused(policy: Transformer) -> None:
    text, native = Text(policy, [5, 5], 0), NativeModel(policy)
    attend = SlotAttend(text.cache, torch.tensor([4, 4]), 5)
    for id, column in ((VOCAB, 4), (-1, 4), (1, text.cache.columns), (1, -1)):
        attend.column_M = torch.tensor([column, 4])
        with pytest.raises(ModelError, match="lies outside"):
            native.run(torch.tensor([id, 1]), torch.tensor([4, 4]), attend)


@pytest.mark.parametrize("vocab", [7, 61, 64, 65, 2048])
def test_the_same_tokens_are_drawn(policy: Transformer, vocab: int) -> None:
    native = NativeModel(policy)
    generator = torch.Generator().manual_seed(vocab)
    for _ in range(20):
        logits_BV = torch.randn(24, vocab, generator=generator) * 5
        heats = [0.0 if i % 5 == 0 else 0.3 + i / 10 for i in range(24)]
        sampler = Sampler.of(heats, [1.0] * 24, [0] * 24, vocab, CPU)
        uniform_B = torch.rand(24, generator=generator, dtype=torch.float64)
        uniform_B[0], uniform_B[-1] = 0, 1 - 2.0**-50
        id_B, logp_B = native.draw(sampler, logits_BV, uniform_B)
        expected_B, _, logp_BV = sampler.draw(logits_BV, uniform_B, None)
        # The largest number there is lies among tokens that rounding alone tells apart.
        assert id_B[:-1].tolist() == expected_B[:-1].tolist()
        expected_logp_B = logp_BV.gather(1, id_B[:, None])[:, 0]
        torch.testing.assert_close(logp_B, expected_logp_B, atol=1e-5, rtol=0)


# ---------------------------------------------------------------- in the running batch


def requests(count: int, seed: int) -> list[GenRequest]:
    rng = random.Random(seed)
    beginning = tuple(rng.randrange(VOCAB) for _ in range(40))
    return [
        GenRequest(
            beginning[: rng.choice([0, 20, 40])]
            + tuple(rng.randrange(VOCAB) for _ in range(rng.randint(1, 20))),
            rng.randint(1, 40),
            temperature=rng.choice([0.0, 0.0, 0.7, 1.0]),
            top_p=rng.choice([1.0, 1.0, 0.8]),
            top_logprobs=rng.choice([0, 0, 2]),
            seed=i,
        )
        for i in range(count)
    ]


def run(batch: RunningBatch, asked: list[GenRequest], seed: int) -> list[Row]:
    """All through the batch, joining at random between any two steps."""
    rng = random.Random(seed)
    rows = [Row(request) for request in asked]
    waiting = list(rows)
    while waiting or batch.running:
        joining = waiting[: rng.choice([0, 0, 1, 5])]
        batch.join(joining)
        del waiting[: len(joining)]
        batch.step()
    return rows


def same(rows: Sequence[Row], others: Sequence[Row | Generation]) -> None:
    assert [row.ids for row in rows] == [row.ids for row in others]
    for row, other in zip(rows, others, strict=True):
        assert row.logprobs == pytest.approx(other.logprobs, abs=1e-5)


@pytest.mark.parametrize("prefix_tokens", [0, 4096])
def test_a_running_batch_gives_what_torch_gives(policy: Transformer, prefix_tokens: int) -> None:
    asked = requests(60, 0)
    batches = [
        RunningBatch(Engine(policy), prefix_tokens=prefix_tokens, native=native)
        for native in (True, False)
    ]
    assert [batch.path for batch in batches] == ["native code", "torch (native code is turned off)"]
    first, second = (run(batch, asked, 0) for batch in batches)
    same(first, second)
    assert any(row.top for row in first)


@pytest.mark.parametrize("prefix_tokens", [0, 4096])
def test_a_reply_is_the_same_bits_whoever_else_runs(
    policy: Transformer, prefix_tokens: int
) -> None:
    asked = [replace(request, top_p=1.0, top_logprobs=0) for request in requests(40, 1)]
    batch = RunningBatch(Engine(policy), prefix_tokens=prefix_tokens)
    gone = [Row(replace(request, max_new_tokens=60)) for request in asked[:3]]
    batch.join(gone)
    rows = run(batch, asked[:20], 1)
    batch.drop([row for row in gone if row.finish is None])
    rows += run(batch, asked[20:], 2)
    assert any(row.cached for row in rows) == bool(prefix_tokens)
    for request, row in zip(asked, rows, strict=True):
        [alone] = run(RunningBatch(Engine(policy), prefix_tokens=0), [request], 0)
        assert row.ids == alone.ids and row.logprobs == alone.logprobs


@pytest.mark.parametrize("steps", [31, 32])
def test_an_engine_writes_long_replies_in_native_code(policy: Transformer, steps: int) -> None:
    model = make_uneven(Transformer(CONFIG, seed=4), 4, 0.2)
    asked = [
        GenRequest((1, 2, 3)[: 1 + i % 3], steps - i % 2, seed=i, stop_ids=frozenset({i}))
        for i in range(9)
    ]
    engine = Engine(model)
    for _ in range(2):  # the second time with other weights, changed in place
        given = engine.generate(asked)
        same(run(RunningBatch(Engine(model), native=False), asked, 0), given)
        assert (engine._native is not None) == (steps == 32)
        with torch.no_grad():
            model.lm_head.mul_(-1)
            model.layers[0].block_sparse_moe.w2_EIH.mul_(2)


def test_new_weights_are_packed_anew(policy: Transformer) -> None:
    batch = RunningBatch(Engine(policy))
    asked = requests(8, 2)
    run(batch, asked, 0)
    other = make_uneven(Transformer(CONFIG, seed=9), 9, 0.2)
    batch.load(other, 1)
    same(run(batch, asked, 0), run(RunningBatch(Engine(other), native=False), asked, 0))


# ---------------------------------------------------------------- where there is no native code


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache folder, and nothing loaded yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "_found", {})
    return tmp_path


def falls_back(model: Transformer, reason: str) -> None:
    """Says why in one line, and answers all the same."""
    batch = RunningBatch(Engine(model))
    assert batch.path.startswith("torch (") and reason in batch.path and "\n" not in batch.path
    [row] = run(batch, [GenRequest((1, 2, 3), 5, 0.0)], 0)
    assert row.ids == Engine(model).generate([GenRequest((1, 2, 3), 5, 0.0)])[0].ids


def test_without_a_compiler(
    policy: Transformer, fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", "no-such-compiler -O1")
    falls_back(policy, "no C compiler (no-such-compiler not found)")
    monkeypatch.setenv("CC", "cc '")
    falls_back(policy, "CC: No closing quotation")


def test_with_a_compiler_that_fails(
    policy: Transformer, fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = fresh / "cc"
    script.write_text('#!/bin/sh\n[ "$1" = --version ] || { echo "x.c: error: no" >&2; exit 1; }\n')
    script.chmod(0o755)
    monkeypatch.setenv("CC", str(script))
    falls_back(policy, "cc failed: x.c: error: no")
    assert list(cache_folder().iterdir()) == []


def test_without_a_folder_for_the_library(
    policy: Transformer, fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (fresh / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(fresh / "file"))
    falls_back(policy, "Not a directory")


def test_a_damaged_library_is_made_again(
    fresh: Path, policy: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = tuple("-O0" if flag == "-O3" else flag for flag in build.FLAGS)
    monkeypatch.setattr(build, "FLAGS", quick)  # five compilations
    load_library()
    [path] = cache_folder().iterdir()
    whole = path.read_bytes()
    for damaged in (b"", whole[:-40], b"x" * 100, whole[:5000] + b"x" + whole[5001:]):
        build._found.clear()
        path.unlink()  # what is mapped by this process must not change under it
        path.write_bytes(damaged)
        load_library()
        assert build._whole(path) and path.read_bytes() != damaged
    assert RunningBatch(Engine(policy)).path == "native code"


def test_a_library_of_another_layout_is_not_used(
    policy: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = load_library()

    class Other:
        def __getattr__(self, name: str) -> object:
            return (lambda _: 8) if name == "native_sizes" else getattr(library, name)

    monkeypatch.setattr("model.native.step.load_library", Other)
    falls_back(policy, "Model has another size in C")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_are_left_to_torch(dtype: torch.dtype) -> None:
    falls_back(Transformer(CONFIG, seed=0).cast(dtype), "not float32 on a CPU")


def test_wide_models_are_left_to_torch() -> None:
    config = replace(CONFIG, hidden_size=1032, num_hidden_layers=1)
    falls_back(Transformer(config, seed=0), "hidden_size 1032 is more than 1024")


def test_two_processes_may_compile_at_once(fresh: Path) -> None:
    code = (
        "from model.native import build\n"
        "build.FLAGS = tuple('-O0' if flag == '-O3' else flag for flag in build.FLAGS)\n"
        "print(build.load_library().native_sizes(3))"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=os.environ | {"XDG_CACHE_HOME": str(fresh)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    told = [process.communicate(timeout=300)[0].strip() for process in processes]
    assert told[0] == told[1] and told[0] in ("4", "8", "16")
    [path] = cache_folder().iterdir()
    assert build._whole(path)
