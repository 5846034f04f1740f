"""The competitions without a plain table: their cut from made-up sources, splits and scripts."""

from __future__ import annotations

import ast
import io
import lzma
import struct
import zlib
from collections import Counter
from importlib import import_module
from pathlib import Path
from types import ModuleType

import mle_special_sources as made_up
import numpy as np
import pandas as pd
import pytest
from mle_synthetic import facts

from agent_tools.errors import UserError
from agent_tools.mle_bench.facts import TaskFacts, facts_of
from agent_tools.mle_bench.metrics import grade_with
from agent_tools.mle_bench.recipes import SIZES
from agent_tools.mle_bench.registry import COMPETITIONS, load_config
from agent_tools.mle_bench.special_files import (
    choose_groups,
    png,
    write_text_answers,
)
from agent_tools.mle_bench.splits import even_folds, write_folds
from agent_tools.mle_bench.v1.fill import fill
from agent_tools.mle_bench.v1.special import SPECIAL_RECIPES
from agent_tools.sandbox import Limits, ScriptJob, make_pool

TASKS: dict[str, TaskFacts] = {
    "mnist5k": facts("multiclass", "logloss", numeric=0, categorical=1, classes=10),
    "flavia-leaf": facts("multiclass", "logloss", numeric=50, classes=32),
    "vowel-speaker-full": facts("multiclass", "logloss", numeric=1, classes=9),
    "locale-language-id": facts("multiclass", "logloss", numeric=0, text=1, classes=21),
    "sotu-president": facts("multiclass", "logloss", numeric=0, text=1, classes=8),
    "cmudict-g2p": facts("text", "exact", numeric=0, categorical=1, classes=0),
    "russian-lemma": facts("text", "exact", numeric=0, categorical=1, classes=0),
    "photo-denoise": facts("regression", "rmse", numeric=3, categorical=1),
}
ONE_FOLD = {"flavia-leaf", "vowel-speaker-full"}


def module_of(competition: str) -> ModuleType:
    return import_module(f"agent_tools.mle_bench.competitions.{competition}.prepare")


class Cut:
    """What a `prepare` made of the sources in ``folder/raw``."""

    def __init__(self, competition: str, folder: Path) -> None:
        self.public, self.private = folder / "public", folder / "private"
        for made in (self.public, self.private):
            made.mkdir()
        module_of(competition).prepare(folder / "raw", self.public, self.private)
        self.train, self.test = self._read("train"), self._read("test")
        self.answers = pd.read_csv(self.private / "test.csv")
        self.metric = load_config(competition).metric
        assert list(self.train.columns[:-1]) == list(self.test.columns)
        assert list(self.train["id"]) == list(range(len(self.train)))
        assert list(self.answers["id"]) == list(self.test["id"])
        folds = self.private / "folds.csv"
        assert folds.is_file() == (competition not in ONE_FOLD)
        if folds.is_file():
            table = pd.read_csv(folds)
            assert list(table["id"]) == list(self.test["id"])
            assert set(table["fold"]) == {0, 1, 2}
            self.folds = table["fold"]
        # the answers are a perfect submission, and the sample a valid one
        best = 0.0 if self.metric in ("logloss", "rmse") else 1.0
        assert grade_with(self.metric, self.answers, self.answers) == pytest.approx(best, abs=1e-9)
        grade_with(self.metric, self._read("sample_submission"), self.answers)

    def _read(self, name: str) -> pd.DataFrame:
        return pd.read_csv(self.public / f"{name}.csv")

    def truth(self) -> pd.Series:
        """The class of each test row."""
        return self.answers.set_index("id").idxmax(axis=1).reset_index(drop=True)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    folder = tmp_path / "raw"
    folder.mkdir()
    return folder


def pixels_of(data: bytes) -> np.ndarray:
    """A second reading of a grey PNG file, checks and all."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    place, chunks = 8, {}
    while place < len(data):
        size, kind = struct.unpack(">I4s", data[place : place + 8])
        body = data[place + 8 : place + 8 + size]
        (check,) = struct.unpack(">I", data[place + 8 + size : place + 12 + size])
        assert check == zlib.crc32(kind + body)
        chunks[kind] = body
        place += 12 + size
    width, height, depth, colour = struct.unpack(">IIBB", chunks[b"IHDR"][:10])
    assert (depth, colour) == (8, 0)
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, width + 1)
    assert not lines[:, 0].any()
    return lines[:, 1:]


# --- the shared helpers --------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(28, 28), (1, 1), (300, 400)])  # the last has several blocks
def test_a_png_file_holds_its_pixels(shape: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    assert (pixels_of(png(pixels)) == pixels).all()
    assert png(pixels) == png(pixels.copy())


def test_groups_are_chosen_whole_and_by_name_only() -> None:
    names = [f"g{k % 40}" for k in range(400)]
    chosen = choose_groups(names, 95, "s")
    assert len(chosen) == 9 and chosen == choose_groups(names[::-1], 95, "s")
    assert chosen != choose_groups(names, 95, "other")
    assert "large" not in choose_groups([*["large"] * 99, "a", "b"], 50, "s")


def test_folds_hold_whole_groups_and_are_near_equal() -> None:
    names = [f"g{k}" for k in range(30) for _ in range(k + 1)]
    folds = even_folds(names, "folds")
    assert len({(n, f) for n, f in zip(names, folds, strict=True)}) == 30
    sizes = Counter(folds)
    assert max(sizes.values()) - min(sizes.values()) <= 2
    assert even_folds(["only"], "folds") == [0]


def test_texts_that_read_as_missing_and_folds_of_another_length_are_refused(
    tmp_path: Path,
) -> None:
    table = pd.DataFrame({"word": ["a", "b"], "target": ["x", "y"]})
    write_text_answers(table, table, tmp_path, tmp_path / "private", fill="z")
    with pytest.raises(ValueError, match="1 folds for 2 answers"):
        write_folds(tmp_path / "private", [0])
    bad = table.assign(word=["a", "null"])
    with pytest.raises(ValueError, match=r"test.csv: column word has a text that reads as missing"):
        write_text_answers(table, bad, tmp_path, tmp_path / "private", fill="z")


# --- one competition after the other -------------------------------------------------------------


def test_digits_become_images_that_tables_name(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_of("mnist5k"), "TEST", 30)
    made_up.digits(raw)
    cut = Cut("mnist5k", raw.parent)
    assert (len(cut.train), len(cut.test)) == (90, 30)
    assert set(cut.train["target"].value_counts()) == {9}
    names = [*cut.train["image"], *cut.test["image"]]
    assert sorted(path.name for path in (cut.public / "images").iterdir()) == sorted(names)
    for name, digit in zip(names, [*cut.train["target"], *cut.truth()], strict=True):
        image = pixels_of((cut.public / "images" / name).read_bytes())
        place = 2 * int(digit[-1])
        assert image.shape == (28, 28) and (image[place : place + 8, 6:12] == 200).all()


def test_leaves_lose_what_describes_their_species(
    raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module_of("flavia-leaf"), "TEST", 16)
    made_up.leaves(raw)
    cut = Cut("flavia-leaf", raw.parent)
    assert list(cut.test.columns) == ["id", *(f"number_{k}" for k in range(6))]
    assert (len(cut.train), len(cut.test)) == (32, 16)  # the twin is there once
    assert list(cut.answers.columns[1:]) == [f"leaf_of_{c}" for c in "abcd"]


def test_series_lie_beside_the_table_and_keep_their_length(
    raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module_of("vowel-speaker-full"), "TEST", 36)
    made_up.vowels(raw)
    cut = Cut("vowel-speaker-full", raw.parent)
    assert (len(cut.train), len(cut.test)) == (54, 36)
    for name, table in (("train", cut.train), ("test", cut.test)):
        series = pd.read_csv(cut.public / f"{name}_series.csv")
        assert list(series.columns) == ["id", "frame", *(f"c{k}" for k in range(1, 13))]
        lengths = series.groupby("id")["frame"].agg(["size", "max"])
        assert list(lengths["size"]) == list(table["frames"])
        assert (lengths["max"] == lengths["size"] - 1).all()
        target = cut.train["target"] if name == "train" else cut.truth()
        level = series.groupby("id")["c5"].mean().to_numpy() / 0.2
        speakers = target.str[-1].astype(int).to_numpy()
        assert np.corrcoef(level, speakers)[0, 1] > 0.9  # rows and series belong together


def test_words_of_a_family_and_ambiguous_words_do_not_leak(
    raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module_of("cmudict-g2p"), "TEST", 150)
    made_up.words(raw)
    cut = Cut("cmudict-g2p", raw.parent)
    words = pd.concat([cut.train["word"], cut.test["word"]])
    assert not {"abba", "null", "d'or"} & set(words)
    assert not set(cut.train["word"].str[:5]) & set(cut.test["word"].str[:5])
    assert len(cut.test) == 150
    assert not cut.train["target"].str.contains(r"\d").any()  # no stress
    families = cut.test["word"].str[:5]
    assert cut.folds.groupby(families).nunique().max() == 1


def test_lemmas_are_read_back_and_their_forms_stay_together(
    raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = module_of("russian-lemma")
    made_up.lemmas(raw)
    data = lzma.decompress((raw / "ru.plzma").read_bytes())
    pairs = dict(module._pairs(data))
    assert pairs["abc"] == "abc" and len(pairs) > 700
    assert all(form[:4] == lemma[:4] for form, lemma in pairs.items())
    monkeypatch.setattr(module, "TRAIN", 400)
    monkeypatch.setattr(module, "TEST", 120)
    cut = Cut("russian-lemma", raw.parent)
    assert (len(cut.train), len(cut.test)) == (400, 120)
    assert not set(cut.train["target"]) & set(cut.answers["target"])
    assert not cut.test["form"].isin(["abc", "ё-моё"]).any()
    assert cut.folds.groupby(cut.answers["target"]).nunique().max() == 1
    given = dict(zip(cut.test["form"], cut.answers["target"], strict=True))
    assert all(pairs[form] == lemma for form, lemma in given.items())


def test_a_broken_word_list_is_told_and_not_cut_short() -> None:
    read = module_of("russian-lemma")._pairs
    with pytest.raises(ValueError, match="not front-coded"):
        list(read(b"pickled"))
    data = made_up.front_coded({"дома": "дом", "дому": "дом", "я": "я"})
    assert dict(read(data)) == {"дома": "дом", "дому": "дом", "я": "я"}
    with pytest.raises(ValueError, match="3 of 5 words"):
        list(read(made_up.front_coded({"дома": "дом", "дому": "дом", "я": "я"}, missing=2)))
    backwards = b"SMFC1\x01\x01\x00\x04" + "да".encode()[::-1] + b"\x00\x00"
    assert list(read(backwards)) == [("да", "да")]


def test_translations_of_a_message_stay_together_and_shared_texts_go(raw: Path) -> None:
    module = module_of("locale-language-id")
    made_up.catalogues(raw, module.CLASSES)
    cut = Cut("locale-language-id", raw.parent)
    texts = pd.concat([cut.train["text"], cut.test["text"]])
    assert texts.is_unique and not texts.isin(["The same everywhere", "tiny", "head"]).any()
    # every text of the made-up catalogues ends in as many letters as its message has number
    message = [len(text.split()[-1]) for text in texts]
    train, test = message[: len(cut.train)], message[len(cut.train) :]
    assert not set(train) & set(test) and 0.3 < len(test) / len(message) <= 0.4
    assert cut.folds.groupby(np.array(test)).nunique().max() == 1
    with pytest.raises(ValueError, match="another byte order"):
        list(module._messages(made_up.catalogue({"a": "b"}, magic=0xDE120495)))


def test_sentences_of_an_address_stay_together(raw: Path) -> None:
    module = module_of("sotu-president")
    made_up.addresses(raw, list(module.PRESIDENTS))
    cut = Cut("sotu-president", raw.parent)
    assert set(cut.train["target"]) == set(module.CLASSES) == set(cut.answers) - {"id"}
    texts = pd.concat([cut.train["text"], cut.test["text"]])
    assert texts.is_unique and not texts.str.startswith("We will go on").any()
    words = r"Item \d+ of (\d) by word(\d+)x"
    train, test = (
        t["text"].str.extract(words).agg("/".join, axis=1) for t in (cut.train, cut.test)
    )
    assert not set(train) & set(test) and test.nunique() == 8
    assert set(test.str[-1]) == set("01234567")  # one address of each president
    assert cut.folds.groupby(test).nunique().max() == 1


def test_whole_photographs_are_held_out_and_their_clean_pixels_are_private(
    raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = module_of("photo-denoise")
    photos = made_up.photographs()
    monkeypatch.setattr(module, "_photos", lambda folder: iter(photos.items()))
    cut = Cut("photo-denoise", raw.parent)
    # 16 crops a photograph less the flat one; three photographs to fit, six to test
    assert (len(cut.train), len(cut.test)) == (3 * 15 * 40, 6 * 15 * 50)
    clean = sorted((cut.public / "train_images" / "clean").iterdir())
    dirty = sorted((cut.public / "train_images" / "dirty").iterdir())
    assert [p.name for p in clean] == [p.name for p in dirty] and len(clean) == 45
    assert sorted(p.name for p in (cut.public / "test_images").iterdir()) == ["dirty"]
    images = {p.name: pixels_of(p.read_bytes()) for p in clean}
    for row in cut.train[::50].itertuples():
        assert images[row.image][row.row, row.column] == row.target
    tiles = {
        photo[top : top + 64, left : left + 64].tobytes(): name
        for name, photo in photos.items()
        for top in range(0, 256, 64)
        for left in range(0, 256, 64)
    }
    known = {tiles[image.tobytes()] for image in images.values()}
    assert len(known) == 3
    assert cut.folds.groupby(cut.test["image"]).nunique().max() == 1
    soiled = abs(cut.train["dirty"] - cut.train["target"]).mean()
    assert 15 < soiled < 80
    again = module._dirty(images[clean[0].name], module._Draw("a"))
    assert (again == module._dirty(images[clean[0].name], module._Draw("a"))).all()
    assert (again != module._dirty(images[clean[0].name], module._Draw("b"))).any()


# --- the scripts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("competition", TASKS)
def test_a_field_has_100_distinct_scripts_that_parse_and_use_one_thread(competition: str) -> None:
    recipes = SPECIAL_RECIPES[competition](TASKS[competition])
    assert Counter(recipe.tier for recipe in recipes) == SIZES
    assert len({recipe.id for recipe in recipes}) == len({r.script for r in recipes}) == 100
    assert recipes == SPECIAL_RECIPES[competition](TASKS[competition])
    for recipe in recipes:
        ast.parse(recipe.script)
        assert "n_jobs" not in recipe.script and "submission.csv" in recipe.script


@pytest.mark.parametrize("competition", TASKS)
def test_the_configuration_is_the_one_the_scripts_are_written_for(competition: str) -> None:
    config, task = load_config(competition), TASKS[competition]
    assert (config.kind, config.metric, config.time) == (task.kind, task.metric, task.time)
    assert config.folds == (1 if competition in ONE_FOLD else 3) and not config.dev
    assert config.answer == ("text" if task.metric == "exact" else "number")
    for name in ("data_hashes.yaml", "card.md", "description.md", "grade.py"):
        assert (COMPETITIONS / competition / name).is_file()


def test_a_tier_that_is_too_short_or_names_two_alike_is_refused() -> None:
    many = {tier: [(f"{k}", f"{tier} {k}") for k in range(40)] for tier in SIZES}
    assert len(fill(**many)) == 100
    with pytest.raises(UserError, match="14 strong recipes of 15"):
        fill(**many | {"strong": many["strong"][:14]})
    with pytest.raises(UserError, match="two tuned recipes are called 0"):
        fill(**many | {"tuned": [("0", "a"), ("0", "b")]})


RUNS = {
    "mnist5k": ("trivial-ink-tree", "strong-edges-8-4-svc"),
    "vowel-speaker-full": ("trivial-prior", "strong-rich-2-discriminant-0.05"),
    "locale-language-id": ("trivial-prior", "strong-letter-model-4-0.35"),
    "sotu-president": ("trivial-prior", "strong-pairs-bayes-0.03-letters-4-mean"),
    "cmudict-g2p": ("trivial-commonest", "default-letter-2000", "strong-signs-5-all"),
    "russian-lemma": ("trivial-copy", "tuned-mixed-20000-1.0", "strong-ranked-20000-60"),
    "photo-denoise": ("trivial-copy", "default-median-3", "tuned-ridge-1"),
}


@pytest.mark.parametrize("competition", RUNS)
def test_better_scripts_score_better_on_made_up_data(
    competition: str, raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = module_of(competition)
    for name, value in {"TEST": 36, "TRAIN": 400}.items():
        if hasattr(module, name):
            monkeypatch.setattr(module, name, value)
    match competition:
        case "mnist5k":
            made_up.digits(raw)
        case "vowel-speaker-full":
            made_up.vowels(raw)
        case "locale-language-id":
            made_up.catalogues(raw, module.CLASSES)
        case "sotu-president":
            made_up.addresses(raw, list(module.PRESIDENTS))
        case "cmudict-g2p":
            made_up.words(raw)
        case "russian-lemma":
            made_up.lemmas(raw)
        case _:
            photos = made_up.photographs(8)
            monkeypatch.setattr(module, "_photos", lambda folder: iter(photos.items()))
    cut = Cut(competition, raw.parent)
    config = load_config(competition)
    task = facts_of(cut.public, config.metric, config.kind)
    by_id = {recipe.id: recipe for recipe in SPECIAL_RECIPES[competition](task)}
    recipes = [by_id[name] for name in RUNS[competition]]
    limits = Limits(cpu_seconds=60.0, wall_seconds=240.0, memory_mb=3_000)
    with make_pool("process", 2) as pool:
        results = pool.run([ScriptJob(r.script, cut.public, limits=limits) for r in recipes])
    scores = []
    for recipe, result in zip(recipes, results, strict=True):
        assert result.status == "ok", f"{recipe.id}\n{result.stderr[-400:]}"
        submission = pd.read_csv(io.BytesIO(result.files["submission.csv"]))
        scores.append(grade_with(cut.metric, submission, cut.answers))
    best, worst = scores[-1], scores[0]
    assert best < worst if config.lower_is_better else best > worst, scores
