"""English words with their pronunciation (the CMU Pronouncing Dictionary)."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from agent_tools.mle_bench.special_files import (
    NOT_A_VALUE,
    choose_groups,
    in_order,
    write_text_answers,
)
from agent_tools.mle_bench.splits import even_folds, write_folds

ID = "cmudict-g2p"
TEST = 6_000
PREFIX = 5  # letters that words of one family share


def prepare(raw: Path, public: Path, private: Path) -> None:
    """6,000 test words; words that begin with the same five letters stay on one side.

    Words with several pronunciations and words with other signs than letters are left out; stress
    marks are removed.
    """
    lines = (raw / "cmudict.dict").read_text(encoding="utf-8").splitlines()
    entries = [line.split(" #")[0].split() for line in lines]
    left_out = NOT_A_VALUE | {word.split("(")[0] for word, *_ in entries if "(" in word}
    rows = [
        (word, " ".join(phone.rstrip("012") for phone in phones))
        for word, *phones in entries
        if word.isascii() and word.isalpha() and word not in left_out
    ]
    table = pd.DataFrame(rows, columns=["word", "target"])
    family = table["word"].str[:PREFIX]
    held_out = family.isin(choose_groups(family, TEST, ID)).to_numpy()
    train, test = in_order(table[~held_out], ID), in_order(table[held_out], ID)
    write_text_answers(train, test, public, private, fill="AH")
    write_folds(private, even_folds(list(test["word"].str[:PREFIX]), "folds"))
