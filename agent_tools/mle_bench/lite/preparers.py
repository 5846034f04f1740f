"""Preparers of the ten smaller competitions: Kaggle's raw files to MLE-bench's folders.

Each is ``prepare(raw, public, private)``: ``raw`` holds the unpacked download and is only read,
``public`` and ``private`` are empty folders. The tables are those of the original, byte for byte;
archives hold the same members. Raises `UserError` where a raw file is missing or not as expected.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd

from agent_tools.errors import UserError
from agent_tools.mle_bench.lite import tables
from agent_tools.mle_bench.lite.catalogue import JIGSAW_LABELS, SPOOKY_LABELS
from agent_tools.mle_bench.lite.png import read_grey
from agent_tools.mle_bench.lite.tables import read_member, read_zipped_table, write_table


def aerial_cactus_identification(raw: Path, public: Path, private: Path) -> None:
    """19 % of the training images become the test images; both are zipped without a folder."""
    train, test = tables.split_table(_raw_table(raw / "train.csv"), 0.19)
    write_table(train, public / "train.csv")
    write_table(test, private / "test.csv")
    write_table(test.assign(has_cactus=0.5), public / "sample_submission.csv")
    with tables.open_zip(raw / "train.zip") as archive:
        for name, part in (("train.zip", train), ("test.zip", test)):
            images = {image: read_member(archive, f"train/{image}") for image in part["id"]}
            tables.write_zip(public / name, images)


def denoising_dirty_documents(raw: Path, public: Path, private: Path) -> None:
    """20 % of the training images become the test images; the answers are their clean pixels."""
    with tables.open_zip(raw / "train.zip") as dirty:
        names = _images_in(dirty.namelist(), "train")
        test = {names[row] for row in tables.random_rows(len(names), 0.2)[1]}
        for name in names:
            folder = "test" if name in test else "train"
            _write_bytes(public / folder / name, read_member(dirty, f"train/{name}"))
    pixels = []
    with tables.open_zip(raw / "train_cleaned.zip") as clean:
        for name in _images_in(clean.namelist(), "train_cleaned"):
            image = read_member(clean, f"train_cleaned/{name}")
            if name in test:
                pixels.append(_pixel_table(image, name))
            else:
                _write_bytes(public / "train_cleaned" / name, image)
    if len(pixels) != len(test):
        raise UserError(f"{raw / 'train_cleaned.zip'} lacks images of train.zip: download it again")
    answers = pd.concat(pixels)
    write_table(answers, private / "answers.csv")
    write_table(answers.assign(value=1), public / "sampleSubmission.csv")


def _images_in(members: Iterable[str], folder: str) -> list[str]:
    """Names of the PNG files directly in a folder of an archive, sorted."""
    paths = map(PurePosixPath, members)
    found = sorted(p.name for p in paths if p.suffix == ".png" and str(p.parent) == folder)
    if not found:
        raise UserError(f"no PNG image in the folder {folder}/ of the archive: download it again")
    return found


def _pixel_table(image: bytes, name: str) -> pd.DataFrame:
    """One row a pixel: ``<image>_<row>_<column>``, counted from 1, and its level from 0 to 1."""
    levels = read_grey(image, name)
    height, width = levels.shape
    stem = PurePosixPath(name).stem
    ids = [f"{stem}_{row}_{col}" for row in range(1, height + 1) for col in range(1, width + 1)]
    return pd.DataFrame({"id": ids, "value": levels.reshape(-1) / 255.0})


def detecting_insults_in_social_commentary(raw: Path, public: Path, private: Path) -> None:
    """Kaggle ships the labels of its test set, so nothing is split."""
    answers = _raw_table(raw / "test_with_solutions.csv")
    train = _raw_table(raw / "train.csv")
    columns = ["Insult", "Date", "Comment"]
    _expect(list(train.columns) == columns, raw / "train.csv", f"columns {columns}")
    _expect(
        list(answers.columns) == [*columns, "Usage"],
        raw / "test_with_solutions.csv",
        f"columns {[*columns, 'Usage']}",
    )
    _expect(
        set(train["Comment"]).isdisjoint(answers["Comment"]),
        raw / "train.csv",
        "no comment of the test set",
    )
    shutil.copyfile(raw / "train.csv", public / "train.csv")
    shutil.copyfile(raw / "test_with_solutions.csv", private / "test.csv")
    gold = answers[columns]
    write_table(gold, private / "gold_submission.csv")
    write_table(gold.drop(columns="Insult"), public / "test.csv")
    write_table(gold.assign(Insult=0), public / "sample_submission_null.csv")


def jigsaw_toxic_comment_classification_challenge(raw: Path, public: Path, private: Path) -> None:
    """Kaggle ships the labels of its test set, so nothing is split."""
    found = {
        name: read_zipped_table(raw / f"{name}.zip", name)
        for name in ("train.csv", "test.csv", "test_labels.csv", "sample_submission.csv")
    }
    test, answers = found["test.csv"], found["test_labels.csv"]
    sample = found["sample_submission.csv"].assign(**dict.fromkeys(JIGSAW_LABELS, 0.5))
    for name in ("test_labels.csv", "sample_submission.csv"):
        same = sorted(found[name]["id"]) == sorted(test["id"])
        _expect(same, raw / f"{name}.zip", "the ids of test.csv")
    write_table(found["train.csv"], public / "train.csv")
    write_table(test, public / "test.csv")
    write_table(sample, public / "sample_submission.csv")
    write_table(answers, private / "test.csv")


def leaf_classification(raw: Path, public: Path, private: Path) -> None:
    """10 % of the training leaves become the test; the images of both stay together."""
    leaves = read_zipped_table(raw / "train.csv.zip", "train.csv")
    train, test = tables.split_table(leaves, 0.1)
    species = sorted(leaves["species"].unique())
    answers = tables.one_hot(test, "id", "species", species)
    with tables.open_zip(raw / "images.zip") as archive:
        for leaf in leaves["id"]:
            image = f"images/{leaf}.jpg"
            _write_bytes(public / image, read_member(archive, image))
    write_table(train, public / "train.csv")
    write_table(test.drop(columns="species"), public / "test.csv")
    write_table(answers, private / "test.csv")
    sample = answers.assign(**dict.fromkeys(species, 1 / len(species)))
    write_table(sample, public / "sample_submission.csv")


def nomad2018_predict_transparent_conductors(raw: Path, public: Path, private: Path) -> None:
    """10 % of the training materials become the test; both are numbered anew from 1."""
    materials = read_zipped_table(raw / "train.csv.zip", "train.csv")
    parts = dict(zip(("train", "test"), tables.split_table(materials, 0.1), strict=True))
    with tables.open_zip(raw / "train.zip") as archive:
        for folder, part in parts.items():
            for new, old in enumerate(part["id"], start=1):
                geometry = read_member(archive, f"train/{old}/geometry.xyz")
                _write_bytes(public / folder / str(new) / "geometry.xyz", geometry)
            part["id"] = np.arange(1, len(part) + 1)
    energies = ["formation_energy_ev_natom", "bandgap_energy_ev"]
    write_table(parts["train"], public / "train.csv")
    write_table(parts["test"], private / "test.csv")
    write_table(parts["test"].drop(columns=energies), public / "test.csv")
    sample = pd.DataFrame(
        {"id": parts["test"]["id"], energies[0]: 0.1779, energies[1]: 1.8892},
    )
    write_table(sample, public / "sample_submission.csv")


def random_acts_of_pizza(raw: Path, public: Path, private: Path) -> None:
    """The original share of test requests is taken from the labelled ones.

    A test request keeps the fields that Kaggle's test requests have.
    """
    labelled, unlabelled = _raw_json(raw / "train.json"), _raw_json(raw / "test.json")
    share = len(unlabelled) / (len(labelled) + len(unlabelled))
    train_rows, test_rows = tables.random_rows(len(labelled), share)
    test = [labelled[row] for row in test_rows]
    fields = list(unlabelled[0])
    _expect(set(fields) <= set(labelled[0]), raw / "test.json", "only fields of train.json")
    for name, requests in (
        ("train", [labelled[row] for row in train_rows]),
        ("test", [{field: request[field] for field in fields} for request in test]),
    ):
        data = json.dumps(requests, indent=4).encode()
        _write_bytes(public / f"{name}.json", data)
        tables.write_zip(public / f"{name}.zip", {f"{name}.json": data})
    received = "requester_received_pizza"
    answers = pd.DataFrame(
        {
            "request_id": [request["request_id"] for request in test],
            received: [int(request[received]) for request in test],
        }
    )
    write_table(answers, private / "test.csv")
    write_table(answers.assign(**{received: 0}), public / "sampleSubmission.csv")


def spooky_author_identification(raw: Path, public: Path, private: Path) -> None:
    """10 % of the training sentences become the test."""
    sentences = read_zipped_table(raw / "train.zip", "train.csv")
    train, test = tables.split_table(sentences, 0.1)
    answers = tables.one_hot(test, "id", "author", SPOOKY_LABELS)
    write_table(train, public / "train.csv")
    write_table(test.drop(columns="author"), public / "test.csv")
    write_table(answers, private / "test.csv")
    shares = {"EAP": 0.403493538995863, "HPL": 0.287808366106543, "MWS": 0.308698094897594}
    write_table(answers.assign(**shares), public / "sample_submission.csv")


def text_normalization_challenge_english_language(raw: Path, public: Path, private: Path) -> None:
    """10 % of the training sentences become the test."""
    _text_normalization("en", raw, public, private)


def text_normalization_challenge_russian_language(raw: Path, public: Path, private: Path) -> None:
    """10 % of the training sentences become the test."""
    _text_normalization("ru", raw, public, private)


def _text_normalization(language: str, raw: Path, public: Path, private: Path) -> None:
    """Whole sentences are split and numbered anew from 0; every text is quoted."""
    archive = raw / f"{language}_train.csv.zip"
    tokens = read_zipped_table(archive, f"{language}_train.csv")
    columns = ["sentence_id", "token_id", "class", "before", "after"]
    _expect(list(tokens.columns) == columns, archive, f"columns {columns}")
    sentences = tokens["sentence_id"].unique()
    chosen = sentences[tables.random_rows(len(sentences), 0.1)[1]]
    in_test = tokens["sentence_id"].isin(chosen)
    train, test = _renumbered(tokens[~in_test]), _renumbered(tokens[in_test])
    ids = test["sentence_id"].astype(str) + "_" + test["token_id"].astype(str)
    answers = pd.DataFrame({"id": ids, "after": test["after"]})
    sample = pd.DataFrame({"id": ids, "after": test["before"]})
    write_table(answers, private / "answers.csv", quote_text=True)
    write_table(sample, private / "sample_submission.csv", quote_text=True)
    for name, table in (
        ("train", train),
        ("test_2", test[["sentence_id", "token_id", "before"]]),
        ("sample_submission_2", sample),
    ):
        member = public / f"{language}_{name}.csv"
        write_table(table, member, quote_text=True)
        tables.write_zip(public / f"{member.name}.zip", {member.name: member.read_bytes()})
        member.unlink()


def _renumbered(tokens: pd.DataFrame) -> pd.DataFrame:
    """Sentences numbered from 0 in order of appearance."""
    return tokens.assign(sentence_id=pd.factorize(tokens["sentence_id"])[0])


def _raw_table(path: Path) -> pd.DataFrame:
    return tables.read_table(_raw_file(path))


def _raw_json(path: Path) -> list[dict[str, Any]]:
    try:
        found = json.loads(_raw_file(path).read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"{path} is no JSON: download it again") from None
    same = isinstance(found, list) and found and all(set(row) == set(found[0]) for row in found)
    _expect(bool(same), path, "a list of requests that all have the same fields")
    return list(found)


def _raw_file(path: Path) -> Path:
    if not path.is_file():
        raise UserError(f"no {path}: download the competition from Kaggle and unpack it there")
    return path


def _write_bytes(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _expect(fact: bool, path: Path, what: str) -> None:
    if not fact:
        raise UserError(f"{path} must have {what}: download it again")
