"""The study's text and tasks: what is in a file, a split, a row."""

from pathlib import Path

import numpy as np
import pytest

from model.errors import ModelError
from model.study.collect import Source, collect, installed_sources
from model.study.corpus import load_corpus, manifest_of, save_corpus
from model.study.probes import (
    ASK,
    COPY,
    COUNT,
    FACT,
    HOP,
    REACHES,
    TASKS,
    make_rows,
    pair_is_heldout,
    reach_class,
)
from model.tokenizer import EOS, Tokenizer
from tests.model.study_helpers import make_corpus

NANO = Path(__file__).resolve().parents[2] / "model" / "checkpoints" / "nano"


@pytest.mark.parametrize("name", ["corpus.bin", "corpus.xz"])
def test_a_corpus_file_keeps_tokens_and_packages(tmp_path: Path, name: str) -> None:
    corpus = make_corpus()
    save_corpus(corpus, tmp_path / name)
    again = load_corpus(tmp_path / name)
    assert np.array_equal(again.tokens, corpus.tokens)
    assert again.packages == corpus.packages and again.digest == corpus.digest
    assert len(again.train_tokens()) == 4000


@pytest.mark.parametrize("name", ["corpus.bin", "corpus.xz"])
def test_a_cut_corpus_file_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    save_corpus(make_corpus(), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match="again"):
        load_corpus(path)


def test_what_is_no_corpus_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such corpus"):
        load_corpus(tmp_path / "absent.bin")
    (tmp_path / "other.bin").write_text("{}\n")
    with pytest.raises(ModelError, match="not a corpus"):
        load_corpus(tmp_path / "other.bin")


def _source(folder: Path, name: str, **files: str) -> Source:
    (folder / name).mkdir()
    paths = []
    for stem, text in files.items():
        paths.append(folder / name / f"{stem}.py")
        paths[-1].write_text(text)
    return Source(name, "1", tuple(paths))


def _text(seed: int, lines: int = 60) -> str:
    draw = np.random.default_rng(seed)
    letters = np.array(list("abcdefghij klmnop"))
    return "\n".join("".join(draw.choice(letters, 40)) for _ in range(lines))


def test_copies_of_training_text_are_not_held_out(tmp_path: Path) -> None:
    names = {held: [] for held in (True, False)}  # type: ignore[var-annotated]
    for number in range(40):
        names[Source(f"p{chr(97 + number % 26)}{'x' * number}", "1", ()).heldout].append(number)
    train, held = (f"p{chr(97 + n % 26)}{'x' * n}" for n in (names[False][0], names[True][0]))
    one, other = _text(1), _text(2)
    sources = [
        _source(tmp_path, train, one=one, copy=one),
        _source(tmp_path, held, exact=one, near=one[:2000] + _text(4, 10), other=other),
    ]
    tokenizer = Tokenizer.load(NANO)
    corpus = collect(sources, tokenizer, tokens=1_000_000)
    (kept,) = corpus.split("heldout")
    assert kept.files == 1
    expected = [tokenizer.token_id(EOS), *tokenizer.encode(other, specials=False)]
    assert corpus.tokens[kept.start : kept.end].tolist() == expected
    (trained,) = corpus.split("train")
    assert trained.files == 1
    assert train in manifest_of(corpus)


def test_families_of_installed_packages_are_in_one_split() -> None:
    sources = installed_sources()
    held = {source.family for source in sources if source.heldout}
    assert held and not held & {source.family for source in sources if not source.heldout}
    assert "python" in {source.name for source in sources}


def test_a_reader_that_sees_the_row_answers_every_task() -> None:
    window, time = 16, 256
    text = np.random.default_rng(0).integers(8, 2048, (24, time)).astype(np.uint16)
    for heldout in (False, True):
        rows = make_rows(text, window=window, seed=3, heldout=heldout)
        answered = dict.fromkeys(TASKS, 0)
        for ids, reach, task in zip(rows.ids.tolist(), rows.reach, rows.task, strict=True):
            for t in np.flatnonzero(reach >= 0).tolist():
                answer, distance, pair = _read(ids, t)
                assert answer == ids[t]
                assert reach[t] == reach_class(distance, window)
                assert pair_is_heldout(*pair) == heldout
                answered[TASKS[task]] += 1
        assert min(answered.values()) > 0


def _facts(ids: list[int], key: int, before: int) -> list[tuple[int, int]]:
    """(place, value) of what was bound to a key."""
    return [(p, ids[p + 2]) for p in range(before - 2) if ids[p : p + 2] == [FACT, key]]


def _read(ids: list[int], t: int) -> tuple[int, int, tuple[int, int]]:
    """The answer at t by the page's definition, the distance, and a pair that it needs."""
    mark, key = ids[t - 2 : t]
    if mark in (ASK, COUNT):
        facts = _facts(ids, key, t)
        values = [value for _, value in facts]
        answer = max(set(values), key=values.count)
        assert values.count(answer) >= (4 if mark == COUNT else 1)
        return answer, t - 2 - facts[0][0], (key, answer)
    if mark == HOP:
        ((near, middle),) = _facts(ids, key, t)
        ((far, answer),) = _facts(ids, middle, t)
        assert far < near
        return answer, t - 2 - far, (middle, answer)
    start = max(p for p in range(t) if ids[p] == COPY)
    first = next(p for p in range(start) if ids[p : p + 2] == ids[start : start + 2])
    assert t - start < 8
    return ids[first + t - start], start - first, (ids[t - 1], ids[t])


def test_distances_are_spread_over_the_whole_context() -> None:
    text = np.random.default_rng(0).integers(8, 2048, (32, 2048)).astype(np.uint16)
    rows = make_rows(text, window=128, seed=0, heldout=False)
    for number in range(len(TASKS)):
        counts = [int((rows.reach[rows.task == number] == i).sum()) for i in range(len(REACHES))]
        assert min(counts) > 0.5 * sum(counts) / len(REACHES)


def test_a_vocabulary_too_small_for_a_row_is_refused() -> None:
    text = np.full((4, 2048), 9, dtype=np.uint16)
    with pytest.raises(ModelError, match="too few tokens"):
        make_rows(text, window=128, seed=0, heldout=True, vocabulary=64)
