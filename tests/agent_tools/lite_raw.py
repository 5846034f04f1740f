"""Small generated raw files in the layout of Kaggle's downloads, for the ten small competitions.

`make_raw(competition_id, folder)` fills ``folder`` as the unpacked download would: zips within it,
names, columns and odd values (missing ages, the word NA as a token, -1 for unscored labels).
"""

from __future__ import annotations

import io
import json
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

LABELS = ["toxic", "severe_toxic", "obscene", "threat", "insult", "identity_hate"]
WORDS = "you are the dark house of an old sea and NA null 12 that , night he said"


def make_raw(competition_id: str, folder: Path, seed: int = 0) -> None:
    """Fill ``folder``, which exists; the same seed gives the same bytes."""
    _MAKERS[competition_id](folder, np.random.default_rng(seed))


def png(pixels: npt.NDArray[np.uint8], kind: int = 0, palette: bytes = b"") -> bytes:
    """A PNG of colour type ``kind``; ``pixels`` (height, width, channels), filters in turns."""
    height, width, channels = pixels.shape
    before = np.zeros(width * channels, dtype=np.int64)
    lines = bytearray()
    for row in range(height):
        line = pixels[row].reshape(-1).astype(np.int64)
        left = np.concatenate([np.zeros(channels, dtype=np.int64), line[:-channels]])
        corner = np.concatenate([np.zeros(channels, dtype=np.int64), before[:-channels]])
        guesses = (0 * line, left, before, (left + before) // 2, _paeth(left, before, corner))
        lines += bytes([row % 5]) + ((line - guesses[row % 5]) % 256).astype(np.uint8).tobytes()
        before = line
    packed = zlib.compress(bytes(lines))
    header = struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0)
    chunks = [(b"IHDR", header)] + ([(b"PLTE", palette)] if palette else [])
    chunks += [(b"IDAT", packed[:20]), (b"IDAT", packed[20:]), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


def _paeth(left: np.ndarray, up: np.ndarray, corner: np.ndarray) -> np.ndarray:
    target = left + up - corner
    distances = np.abs(np.stack([left, up, corner]) - target)
    return np.choose(distances.argmin(axis=0), [left, up, corner])  # the first of equal ones


def _zip(path: Path, members: Mapping[str, bytes | str]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def _csv(table: pd.DataFrame) -> str:
    buffer = io.StringIO()
    table.to_csv(buffer, index=False)
    return buffer.getvalue()


def _texts(rng: np.random.Generator, n: int) -> list[str]:
    return [f"{i} " + " ".join(rng.choice(WORDS.split(), rng.integers(2, 9))) for i in range(n)]


def _cactus(raw: Path, rng: np.random.Generator) -> None:
    ids = [f"{value:032x}.jpg" for value in rng.integers(0, 2**60, 60)]
    table = pd.DataFrame({"id": ids, "has_cactus": rng.integers(0, 2, 60)})
    (raw / "train.csv").write_text(_csv(table))
    _zip(raw / "train.zip", {"train/": b"", **{f"train/{i}": i.encode() for i in ids}})
    _zip(raw / "test.zip", {"test/x.jpg": b"x"})
    (raw / "sample_submission.csv").write_text("id,has_cactus\nx.jpg,0.5\n")


def _denoising(raw: Path, rng: np.random.Generator) -> None:
    names = [f"{number}.png" for number in rng.permutation(np.arange(2, 120))[:18]]
    dirty, clean = {"train/": b""}, {"train_cleaned/": b""}
    for name in names:
        shape = (int(rng.integers(3, 9)), int(rng.integers(3, 9)), 1)
        clean[f"train_cleaned/{name}"] = png(rng.integers(0, 256, shape).astype(np.uint8))
        dirty[f"train/{name}"] = png(rng.integers(0, 256, shape).astype(np.uint8))
    _zip(raw / "train.zip", dirty)
    _zip(raw / "train_cleaned.zip", clean)
    _zip(raw / "test.zip", {"test/1.png": b""})
    _zip(raw / "sampleSubmission.csv.zip", {"sampleSubmission.csv": "id,value\n1_1_1,1\n"})


def _insults(raw: Path, rng: np.random.Generator) -> None:
    def table(n: int, prefix: str) -> pd.DataFrame:
        dates = [None if i % 5 == 0 else f"201206{i % 30:02d}083115Z" for i in range(n)]
        texts = [f'"{prefix} {text}\\xa0"' for text in _texts(rng, n)]
        return pd.DataFrame({"Insult": rng.integers(0, 2, n), "Date": dates, "Comment": texts})

    test = table(40, "b")
    test.loc[7, "Comment"] = test.loc[3, "Comment"]  # the real test set repeats comments
    test.loc[[0, 1], "Insult"] = [0, 1]
    (raw / "train.csv").write_text(_csv(table(50, "a")))
    (raw / "test.csv").write_text("id,Date,Comment\n1,,x\n")
    (raw / "test_with_solutions.csv").write_text(_csv(test.assign(Usage="PrivateTest")))
    (raw / "sample_submission_null.csv").write_text("Insult,Date,Comment\n0,,x\n")


def _jigsaw(raw: Path, rng: np.random.Generator) -> None:
    ids = [f"{value:016x}" for value in rng.integers(2**40, 2**60, 120)]
    labels = pd.DataFrame(rng.integers(0, 2, (120, 6)), columns=LABELS)
    train = pd.concat([pd.DataFrame({"id": ids, "comment_text": _texts(rng, 120)}), labels], axis=1)
    test = train.iloc[50:].reset_index(drop=True)
    answers = test[["id", *LABELS]].copy()
    answers.loc[rng.permutation(70)[:20], LABELS] = -1
    _zip(raw / "train.csv.zip", {"train.csv": _csv(train.iloc[:50])})
    _zip(raw / "test.csv.zip", {"test.csv": _csv(test[["id", "comment_text"]])})
    _zip(raw / "test_labels.csv.zip", {"test_labels.csv": _csv(answers)})
    sample = answers.assign(**dict.fromkeys(LABELS, 0.5))
    _zip(raw / "sample_submission.csv.zip", {"sample_submission.csv": _csv(sample)})


def _leaf(raw: Path, rng: np.random.Generator) -> None:
    ids = rng.permutation(np.arange(1, 200))[:80]
    species = [f"Acer_{'xBCAD'[i % 5]}" for i in range(80)]
    table = pd.DataFrame({"id": ids, "species": species, "margin1": rng.random(80).round(6)})
    _zip(raw / "train.csv.zip", {"train.csv": _csv(table)})
    _zip(raw / "test.csv.zip", {"test.csv": "id,margin1\n500,0.5\n"})
    images = {f"images/{number}.jpg": f"leaf {number}" for number in range(1, 201)}
    _zip(raw / "images.zip", {"images/": b"", **images})
    _zip(raw / "sample_submission.csv.zip", {"sample_submission.csv": "id\n500\n"})


def _nomad(raw: Path, rng: np.random.Generator) -> None:
    table = pd.DataFrame(
        {
            "id": np.arange(1, 71),
            "spacegroup": rng.integers(1, 230, 70),
            "percent_atom_al": rng.random(70).round(4),
            "formation_energy_ev_natom": rng.random(70).round(4),
            "bandgap_energy_ev": (4 * rng.random(70)).round(4),
        }
    )
    _zip(raw / "train.csv.zip", {"train.csv": _csv(table)})
    _zip(raw / "test.csv.zip", {"test.csv": _csv(table.iloc[:3, :3])})
    _zip(raw / "train.zip", {f"train/{i}/geometry.xyz": f"atoms of {i}" for i in table["id"]})
    _zip(raw / "test.zip", {"test/1/geometry.xyz": b""})
    _zip(raw / "sample_submission.csv.zip", {"sample_submission.csv": "id\n1\n"})


def _pizza(raw: Path, rng: np.random.Generator) -> None:
    def request(number: int, *, labelled: bool) -> dict[str, object]:
        row: dict[str, object] = {"giver_username_if_known": "N/A", "request_id": f"t3_{number:x}"}
        if labelled:
            row["request_text"] = "hungry"
            row["requester_received_pizza"] = bool(rng.integers(0, 2))
        return {**row, "request_title": "[Request] caf\u00e9", "requester_upvotes": number}

    train = [request(i, labelled=True) for i in range(60)]
    train[0]["requester_received_pizza"], train[1]["requester_received_pizza"] = True, False
    (raw / "train.json").write_text(json.dumps(train))
    test = [request(i, labelled=False) for i in range(100, 125)]
    (raw / "test.json").write_text(json.dumps(test))
    (raw / "sampleSubmission.csv").write_text("request_id,requester_received_pizza\nt3_64,0\n")


def _spooky(raw: Path, rng: np.random.Generator) -> None:
    ids = [f"id{number:05d}" for number in rng.permutation(30000)[:90]]
    authors = rng.choice(["EAP", "HPL", "MWS"], 90)
    table = pd.DataFrame({"id": ids, "text": _texts(rng, 90), "author": authors})
    _zip(raw / "train.zip", {"train.csv": _csv(table)})
    _zip(raw / "test.zip", {"test.csv": "id,text\nid1,x\n"})
    _zip(raw / "sample_submission.zip", {"sample_submission.csv": "id,EAP,HPL,MWS\n"})


def _text_normalization(language: str) -> Callable[[Path, np.random.Generator], None]:
    def make(raw: Path, rng: np.random.Generator) -> None:
        rows = []
        for sentence in range(40):
            for token in range(int(rng.integers(2, 7))):
                word = "12" if token == 0 else str(rng.choice(WORDS.split()))
                after = "twelve" if word == "12" else word
                rows.append((sentence * 2, token, "PLAIN", word, after))
        table = pd.DataFrame(rows, columns=["sentence_id", "token_id", "class", "before", "after"])
        for name, part in (("train", table), ("test", table[:3]), ("test_2", table[:4])):
            member = f"{language}_{name}.csv"
            _zip(raw / f"{member}.zip", {member: part.to_csv(index=False, quoting=2)})
        for name in ("sample_submission", "sample_submission_2"):
            _zip(raw / f"{language}_{name}.csv.zip", {f"{language}_{name}.csv": '"id","after"\n'})

    return make


_MAKERS: dict[str, Callable[[Path, np.random.Generator], None]] = {
    "aerial-cactus-identification": _cactus,
    "denoising-dirty-documents": _denoising,
    "detecting-insults-in-social-commentary": _insults,
    "jigsaw-toxic-comment-classification-challenge": _jigsaw,
    "leaf-classification": _leaf,
    "nomad2018-predict-transparent-conductors": _nomad,
    "random-acts-of-pizza": _pizza,
    "spooky-author-identification": _spooky,
    "text-normalization-challenge-english-language": _text_normalization("en"),
    "text-normalization-challenge-russian-language": _text_normalization("ru"),
}
