"""5,000 handwritten digits (LeCun et al. 1998), 500 of each, as PNG images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from agent_tools.mle_bench.special_files import png, write_files
from agent_tools.mle_bench.splits import take_turns, write_folds
from agent_tools.mle_bench.tables import split_by_hash, without_duplicates, write_tables

ID = "mnist5k"
SIDE = 28
TEST = 1_500
CLASSES = [f"digit_{number}" for number in range(10)]


def prepare(raw: Path, public: Path, private: Path) -> None:
    """3,500 training and 1,500 test images with equal shares of the digits.

    The tables name the images, which lie in ``images/``; three folds of 500 test images.
    """
    source = pd.read_csv(raw / "mnist_5k.csv.gz", header=None, dtype=np.uint8)
    table = source.set_axis([*map(str, range(SIDE * SIDE)), "target"], axis=1)
    table["target"] = "digit_" + table["target"].astype(str)
    table = without_duplicates(table)
    train, test = split_by_hash(table, len(table) - TEST, TEST, salt=ID, stratify=True)
    images: dict[str, bytes] = {}
    for part in (train, test):
        for pixels in part.iloc[:, :-1].to_numpy(dtype=np.uint8):
            images[f"{len(images):05d}.png"] = png(pixels.reshape(SIDE, SIDE))
    names = list(images)
    write_tables(
        pd.DataFrame({"image": names[: len(train)], "target": train["target"]}),
        pd.DataFrame({"image": names[len(train) :], "target": test["target"]}),
        public,
        private,
        classes=CLASSES,
        fill=1 / len(CLASSES),
    )
    write_files(public / "images", images)
    write_folds(private, take_turns(len(test)))
