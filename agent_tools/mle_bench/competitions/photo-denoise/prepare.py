"""Crops of 14 real photographs with simulated noise, stains, creases and specks."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from agent_tools.mle_bench.special_files import (
    Pixels,
    in_order,
    png,
    write_files,
)
from agent_tools.mle_bench.splits import even_folds, rank_of, write_folds
from agent_tools.mle_bench.tables import write_tables

ID = "photo-denoise"
LONGEST = 1_024  # pixels of a photograph's longer side, about
SIDE = 64  # of a crop, in pixels
TRAIN_CROPS, TEST_CROPS = 60, 27  # most of one photograph
TEST_PHOTOS = 6
TRAIN_ASKED, TEST_ASKED = 40, 50  # pixels of a crop that have a row in the tables
LEAST_SPREAD = 6.0  # standard deviation, grey levels: flat crops are left out

Field = npt.NDArray[np.float64]


def prepare(raw: Path, public: Path, private: Path) -> None:
    """Eight photographs to fit and six to test, at most 60 and 27 crops of each.

    ``train_images/`` holds each crop clean and dirty, ``test_images/`` only dirty. A row of the
    tables is a pixel: some of each crop, as all of them would be 650,000 rows.
    """
    photos = dict(_photos(raw))
    names = sorted(photos, key=lambda name: rank_of(name, ID))
    parts = []
    for held_out, most in ((False, TRAIN_CROPS), (True, TEST_CROPS)):
        chosen = names[:TEST_PHOTOS] if held_out else names[TEST_PHOTOS:]
        crops = [crop for name in chosen for crop in _crops(name, photos[name], most)]
        table = pd.DataFrame([key for key, _ in crops], columns=["photo", "top", "left"])
        by_key = dict(crops)
        keys = list(in_order(table, ID).itertuples(index=False, name=None))
        parts.append([(key, by_key[key]) for key in keys])
    train, clean_images, dirty_images, _ = _rows(parts[0], 0, TRAIN_ASKED)
    test, _, test_images, photo_of_row = _rows(parts[1], len(parts[0]), TEST_ASKED)
    write_tables(train, test, public, private, fill=128.0)
    write_files(public / "train_images", clean_images | dirty_images)
    write_files(public / "test_images", test_images)
    write_folds(private, even_folds(photo_of_row, "folds"))


def _photos(raw: Path) -> Iterator[tuple[str, Pixels]]:
    """Name and grey pixels of each photograph, large ones reduced by a whole factor."""
    from PIL import Image  # only the prepare environment has it

    for path in sorted(raw.iterdir()):
        if path.suffix == ".tgz":
            with tarfile.open(path) as archive:
                stream = archive.extractfile("package/data/image.jpg")
                if stream is None:
                    raise ValueError(f"{ID}: {path.name} has no image")
                data = stream.read()
        else:
            data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            image.draft("L", image.size)  # the luminance as it is stored
            pixels = np.asarray(image.convert("L"), dtype=np.uint8)
        factor = max(1, round(max(pixels.shape) / LONGEST))
        height, width = (size // factor for size in pixels.shape)
        blocks = pixels[: height * factor, : width * factor].astype(np.int64)
        blocks = blocks.reshape(height, factor, width, factor).sum(axis=(1, 3))
        yield path.name, (blocks // factor**2).astype(np.uint8)


def _crops(name: str, photo: Pixels, most: int) -> list[tuple[tuple[str, int, int], Pixels]]:
    """Crops on a grid without overlap that are not flat, those with the lowest hashes."""
    found = []
    for top in range(0, photo.shape[0] - SIDE + 1, SIDE):
        for left in range(0, photo.shape[1] - SIDE + 1, SIDE):
            crop = photo[top : top + SIDE, left : left + SIDE]
            if crop.std() >= LEAST_SPREAD:
                found.append(((name, top, left), crop))
    return sorted(found, key=lambda item: rank_of(f"{item[0]}", ID))[:most]


def _rows(
    crops: list[tuple[tuple[str, int, int], Pixels]], first: int, asked: int
) -> tuple[pd.DataFrame, dict[str, bytes], dict[str, bytes], list[str]]:
    """Rows of the table, clean and dirty images by name, and the photograph of each row."""
    rows, clean_images, dirty_images, photo_of_row = [], {}, {}, []
    for number, (key, clean) in enumerate(crops, start=first):
        name = f"crop_{number:04d}.png"
        draw = _Draw(f"{key}")
        dirty = _dirty(clean, draw)
        clean_images[f"clean/{name}"] = png(clean)
        dirty_images[f"dirty/{name}"] = png(dirty)
        places = np.argsort(draw.uniform(SIDE * SIDE), kind="stable")[:asked]
        for row, column in zip(*np.divmod(np.sort(places), SIDE), strict=True):
            rows.append((name, row, column, dirty[row, column], clean[row, column]))
            photo_of_row.append(key[0])
    table = pd.DataFrame(rows, columns=["image", "row", "column", "dirty", "target"])
    return table, clean_images, dirty_images, photo_of_row


class _Draw:
    """Numbers from the raw stream of PCG64, which does not change between versions."""

    def __init__(self, text: str) -> None:
        self._bits = np.random.PCG64(int(rank_of(text, f"{ID}/noise")[:16], 16))

    def uniform(self, count: int) -> Field:
        """``count`` numbers in [0, 1)."""
        drawn: Field = (self._bits.random_raw(count) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        return drawn

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * float(self.uniform(1)[0])

    def normal(self, count: int) -> Field:
        """Sums of twelve uniform numbers: exact on every machine, unlike a logarithm."""
        sums: Field = self.uniform(12 * count).reshape(12, count).sum(axis=0)
        return sums - 6.0


def _dirty(clean: Pixels, draw: _Draw) -> Pixels:
    """Stains darken by a factor; then a crease, noise and specks are laid over them."""
    y, x = np.mgrid[0:SIDE, 0:SIDE].astype(np.float64)
    values = clean.astype(np.float64)
    for _ in range(2):
        values *= 1 - draw.between(0.2, 0.55) * _blot(x, y, draw)
    values *= 1 - draw.between(0.2, 0.5) * _ring(x, y, draw)
    values += draw.between(-70, 70) * _crease(x, y, draw)
    values += draw.between(8, 30) * draw.normal(SIDE * SIDE).reshape(SIDE, SIDE)
    specks = draw.uniform(SIDE * SIDE).reshape(SIDE, SIDE)
    share = draw.between(0.005, 0.03)
    values[specks < share] = 0.0
    values[specks > 1 - share] = 255.0
    return np.clip(np.floor(values + 0.5), 0, 255).astype(np.uint8)


def _blot(x: Field, y: Field, draw: _Draw) -> Field:
    """An ellipse with a soft edge: 1 inside, 0 outside."""
    away_x = (x - draw.between(0, SIDE)) / draw.between(6, 20)
    away_y = (y - draw.between(0, SIDE)) / draw.between(6, 20)
    return _step((1.15 - np.sqrt(away_x**2 + away_y**2)) / 0.3)


def _ring(x: Field, y: Field, draw: _Draw) -> Field:
    """The ring that a cup leaves."""
    away_x, away_y = x - draw.between(0, SIDE), y - draw.between(0, SIDE)
    away = np.abs(np.sqrt(away_x**2 + away_y**2) - draw.between(10, 40))
    return _step((draw.between(1.5, 4) - away) / 2 + 0.5)


def _crease(x: Field, y: Field, draw: _Draw) -> Field:
    """A straight line, two to three pixels wide."""
    slope = draw.between(-1, 1)
    away = np.abs(y - slope * x - draw.between(-10, SIDE + 10)) / np.sqrt(1 + slope**2)
    return _step(1.8 - away)


def _step(values: Field) -> Field:
    """0 below 0, 1 above 1, smooth between."""
    inside = np.clip(values, 0, 1)
    return inside * inside * (3 - 2 * inside)
