"""The ten preparers on generated raw files in Kaggle's layout, and the parts they are made of."""

from __future__ import annotations

import hashlib
import inspect
import json
import zipfile
from importlib import import_module
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from lite_cases import grade
from lite_raw import make_raw, png
from sklearn.model_selection import train_test_split

from agent_tools.errors import UserError
from agent_tools.mle_bench.lite import tables
from agent_tools.mle_bench.lite.catalogue import LITE, LiteCompetition
from agent_tools.mle_bench.lite.png import read_grey
from agent_tools.mle_bench.lite.tables import read_table

SMALL = [lite for lite in LITE.values() if lite.preparer]


def prepare(lite: LiteCompetition, base: Path, seed: int = 0) -> Path:
    """Make raw files and prepare them; the folder with ``raw``, ``public`` and ``private``."""
    for name in ("raw", "public", "private"):
        (base / name).mkdir(parents=True)
    make_raw(lite.id, base / "raw", seed)
    before = hashes(base / "raw")
    preparer(lite)(base / "raw", base / "public", base / "private")
    assert hashes(base / "raw") == before, "raw files must stay as they are"
    return base


def preparer(lite: LiteCompetition):
    assert lite.preparer is not None
    module, _, name = lite.preparer.partition(":")
    return getattr(import_module(module), name)


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def zipped(path: Path, member: str) -> pd.DataFrame:
    with zipfile.ZipFile(path) as archive, archive.open(member) as file:
        return read_table(file)


def test_the_ten_competitions_of_at_most_a_tenth_of_a_gigabyte_have_a_preparer() -> None:
    assert {lite.id for lite in SMALL} == {
        lite.id for lite in LITE.values() if lite.gigabytes <= 0.1
    }
    for lite in SMALL:
        assert list(inspect.signature(preparer(lite)).parameters) == ["raw", "public", "private"]


@pytest.mark.parametrize("lite", SMALL, ids=lambda lite: lite.id)
def test_preparing_twice_gives_the_same_bytes_and_the_listed_files(
    lite: LiteCompetition, tmp_path: Path
) -> None:
    first, second = prepare(lite, tmp_path / "a"), prepare(lite, tmp_path / "b")
    for part in ("public", "private"):  # the raw archives are made anew and hold their time
        assert hashes(first / part) == hashes(second / part) != {}
    assert sorted(path.name for path in (first / "public").iterdir()) == sorted(lite.public)
    for name in (lite.answers, lite.sample, lite.gold):
        assert name is None or (first / name).is_file()


@pytest.mark.parametrize("lite", SMALL, ids=lambda lite: lite.id)
def test_sample_and_answers_are_submissions_that_the_grader_takes(
    lite: LiteCompetition, tmp_path: Path
) -> None:
    base = prepare(lite, tmp_path / "a")
    answers = read_table(base / lite.answers)
    sample = read_table(base / lite.sample)
    assert list(sample[lite.key]) == list(answers[lite.key])
    floor = grade(lite.id, sample, answers)
    best = grade(lite.id, read_table(base / (lite.gold or lite.answers)), answers)
    assert best == pytest.approx(0.0 if lite.lower_is_better else 1.0, abs=1e-12)
    assert floor > best if lite.lower_is_better else floor < best
    if "auc" in lite.metric:
        assert floor == 0.5


@pytest.mark.parametrize("lite", SMALL, ids=lambda lite: lite.id)
def test_no_answer_lies_in_the_public_folder(lite: LiteCompetition, tmp_path: Path) -> None:
    base = prepare(lite, tmp_path / "a")
    test = base / "public" / "test.csv"
    if not test.is_file():
        return
    columns = set(read_table(test).columns)
    hidden = {"species", "author", *lite.targets}
    assert not columns & hidden
    assert set(read_table(test)[lite.key]) == set(read_table(base / lite.answers)[lite.key])


@pytest.mark.parametrize("lite", SMALL, ids=lambda lite: lite.id)
def test_a_missing_raw_file_is_named(lite: LiteCompetition, tmp_path: Path) -> None:
    for needed in lite.raw:
        base = tmp_path / needed
        for name in ("raw", "public", "private"):
            (base / name).mkdir(parents=True)
        make_raw(lite.id, base / "raw")
        (base / "raw" / needed).unlink()
        with pytest.raises(UserError, match="download the competition from Kaggle"):
            preparer(lite)(base / "raw", base / "public", base / "private")


@pytest.mark.parametrize(
    ("competition_id", "archive"),
    [
        ("leaf-classification", "train.csv.zip"),
        ("aerial-cactus-identification", "train.zip"),
        ("denoising-dirty-documents", "train_cleaned.zip"),
    ],
)
def test_a_broken_or_incomplete_archive_is_named(
    competition_id: str, archive: str, tmp_path: Path
) -> None:
    lite = LITE[competition_id]
    for case, data in (("broken", b"PK but no zip"), ("empty", None)):
        base = tmp_path / case
        for name in ("raw", "public", "private"):
            (base / name).mkdir(parents=True)
        make_raw(lite.id, base / "raw")
        if data is None:
            zipfile.ZipFile(base / "raw" / archive, "w").close()
        else:
            (base / "raw" / archive).write_bytes(data)
        with pytest.raises(UserError, match="download it again"):
            preparer(lite)(base / "raw", base / "public", base / "private")


def test_cactus_images_go_with_their_rows(tmp_path: Path) -> None:
    base = prepare(LITE["aerial-cactus-identification"], tmp_path / "a")
    raw = read_table(base / "raw/train.csv")
    train, test = train_test_split(raw, test_size=0.19, random_state=0)
    assert read_table(base / "private/test.csv").equals(test.reset_index(drop=True))
    assert read_table(base / "public/train.csv").equals(train.reset_index(drop=True))
    for name, part in (("train.zip", train), ("test.zip", test)):
        with zipfile.ZipFile(base / "public" / name) as archive:
            assert archive.namelist() == list(part["id"])
            assert all(archive.read(image) == image.encode() for image in part["id"])


def test_denoising_answers_are_the_pixels_of_the_clean_images(tmp_path: Path) -> None:
    base = prepare(LITE["denoising-dirty-documents"], tmp_path / "a")
    with zipfile.ZipFile(base / "raw/train_cleaned.zip") as archive:
        clean = {
            name.split("/")[1]: read_grey(archive.read(name))
            for name in archive.namelist()
            if name.endswith(".png")
        }
    test = train_test_split(sorted(clean), test_size=0.2, random_state=0)[1]
    answers = read_table(base / "private/answers.csv").set_index("id")["value"]
    assert len(answers) == sum(clean[name].size for name in test)
    for name in test:
        for (row, col), level in np.ndenumerate(clean[name]):
            assert answers[f"{name[:-4]}_{row + 1}_{col + 1}"] == level / 255
    assert sorted(p.name for p in (base / "public/test").iterdir()) == sorted(test)
    left = sorted(set(clean) - set(test))
    for folder in ("train", "train_cleaned"):
        assert sorted(p.name for p in (base / "public" / folder).iterdir()) == left


def test_nomad_numbers_materials_anew_and_takes_their_geometry_along(tmp_path: Path) -> None:
    base = prepare(LITE["nomad2018-predict-transparent-conductors"], tmp_path / "a")
    raw = zipped(base / "raw/train.csv.zip", "train.csv")
    train, test = train_test_split(raw, test_size=0.1, random_state=0)
    for folder, part in (("train", train), ("test", test)):
        table = read_table(base / "public" / f"{folder}.csv")
        assert list(table["id"]) == list(range(1, len(part) + 1))
        assert list(table["percent_atom_al"]) == list(part["percent_atom_al"])
        for new, old in enumerate(part["id"], start=1):
            geometry = base / "public" / folder / str(new) / "geometry.xyz"
            assert geometry.read_text() == f"atoms of {old}"


def test_pizza_test_requests_lose_the_fields_that_kaggle_hides(tmp_path: Path) -> None:
    base = prepare(LITE["random-acts-of-pizza"], tmp_path / "a")
    requests = json.loads((base / "public/test.json").read_text())
    raw = json.loads((base / "raw/train.json").read_text())
    _, test = train_test_split(raw, test_size=25 / 85, random_state=0)
    assert [row["request_id"] for row in requests] == [row["request_id"] for row in test]
    assert all("requester_received_pizza" not in row for row in requests)
    assert all("request_text" not in row for row in requests)
    answers = read_table(base / "private/test.csv")["requester_received_pizza"]
    assert list(answers) == [int(row["requester_received_pizza"]) for row in test]
    with zipfile.ZipFile(base / "public/test.zip") as archive:
        assert archive.read("test.json") == (base / "public/test.json").read_bytes()


@pytest.mark.parametrize("language", ["en", "ru"])
def test_text_normalization_keeps_sentences_whole(language: str, tmp_path: Path) -> None:
    name = {"en": "english", "ru": "russian"}[language]
    base = prepare(LITE[f"text-normalization-challenge-{name}-language"], tmp_path / "a")
    raw = zipped(base / f"raw/{language}_train.csv.zip", f"{language}_train.csv")
    train = zipped(base / f"public/{language}_train.csv.zip", f"{language}_train.csv")
    test = zipped(base / f"public/{language}_test_2.csv.zip", f"{language}_test_2.csv")
    answers = read_table(base / "private/answers.csv")
    assert len(train) + len(test) == len(raw) and len(answers) == len(test)
    for part in (train, test):
        assert sorted(part["sentence_id"].unique()) == list(range(part["sentence_id"].nunique()))
    _, chosen = train_test_split(raw["sentence_id"].unique(), test_size=0.1, random_state=0)
    held_out = raw[raw["sentence_id"].isin(chosen)]
    assert list(test["before"].astype(str)) == list(held_out["before"].astype(str))
    assert list(answers["after"].astype(str)) == list(held_out["after"].astype(str))
    assert answers["id"][0] == "0_0"
    assert (base / "private/answers.csv").read_text().startswith('"id","after"\n"0_0","')


def test_the_split_is_that_of_scikit_learn() -> None:
    for n in (2, 10, 101, 1000):
        for size in (0.1, 0.19, 0.2, 1 / 3, 1):
            train, test = train_test_split(np.arange(n), test_size=size, random_state=0)
            ours = tables.random_rows(n, size)
            assert np.array_equal(ours[0], train) and np.array_equal(ours[1], test)
    for n, size in ((1, 0.1), (5, 5), (0, 0.5)):
        with pytest.raises(UserError, match="incomplete"):
            tables.random_rows(n, size)


def test_an_unknown_label_is_named() -> None:
    table = pd.DataFrame({"id": [1, 2], "author": ["EAP", "ABC"]})
    with pytest.raises(UserError, match="unknown label 'ABC'"):
        tables.one_hot(table, "id", "author", ["EAP", "HPL"])


def test_png_of_every_kind_and_filter_becomes_grey() -> None:
    rng = np.random.default_rng(0)
    palette = rng.integers(0, 256, (256, 3)).astype(np.uint8)

    def grey(colours: np.ndarray) -> np.ndarray:
        return np.rint(colours[..., :3] @ np.array([0.299, 0.587, 0.114]))

    for kind, channels in ((0, 1), (2, 3), (3, 1), (4, 2), (6, 4)):
        pixels = rng.integers(0, 256, (13, 7, channels)).astype(np.uint8)
        found = read_grey(png(pixels, kind, palette.tobytes() if kind == 3 else b""))
        if kind in (0, 4):
            assert np.array_equal(found, pixels[:, :, 0])
        else:
            colours = palette[pixels[:, :, 0]] if kind == 3 else pixels
            assert np.abs(found - grey(colours)).max() <= 1
            assert np.mean(found == grey(colours)) > 0.99
    white = np.full((2, 2, 3), 255, dtype=np.uint8)
    assert read_grey(png(white, 2)).min() == 255


def test_a_bad_image_is_named() -> None:
    good = png(np.zeros((4, 4, 1), dtype=np.uint8))
    deep = good[:24] + b"\x10" + good[25:]
    for data, words in ((b"GIF89a", "no PNG"), (good[:50], "no PNG"), (deep, "8 bits")):
        with pytest.raises(UserError, match=f"x.png.*{words}"):
            read_grey(data, "x.png")
