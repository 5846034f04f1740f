"""One file of tokens and where they came from; memory-mapped, or small enough to carry with xz.

Layout: one line of JSON (the manifest), then all tokens as little-endian uint16. The packages of
one split lie next to each other. No tokenizer is needed to read it.
"""

from __future__ import annotations

import hashlib
import json
import lzma
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from model.errors import ModelError

Tokens = npt.NDArray[np.uint16]
FORMAT = "selfevo-study-corpus-1"
_TOKEN = np.dtype("<u2")
_LONGEST_MANIFEST = 1 << 22
# Tokens are pairs of bytes, so contexts and positions are kept apart by parity.
_XZ_FILTERS = [
    {"id": lzma.FILTER_LZMA2, "preset": 6, "lc": 3, "lp": 1, "pb": 1, "dict_size": 1 << 26}
]


@dataclass(frozen=True)
class Package:
    """Tokens [start, end) of one package; `sha256` is of those tokens' bytes."""

    name: str
    version: str
    split: str
    files: int
    start: int
    end: int
    sha256: str


@dataclass(frozen=True, eq=False)
class Corpus:
    """Tokens of all packages; `digest` names this very corpus."""

    tokens: Tokens
    packages: tuple[Package, ...]
    tokenizer: str
    digest: str

    def split(self, name: str) -> list[Package]:
        """The packages of "train" or "heldout"."""
        return [package for package in self.packages if package.split == name]

    def train_tokens(self) -> Tokens:
        """All tokens of the train split, one after the other."""
        parts = [self.tokens[package.start : package.end] for package in self.split("train")]
        return np.concatenate(parts)


def digest_of(packages: Sequence[Package]) -> str:
    """sha256 over the packages' splits and hashes, first 16 digits."""
    text = "\n".join(f"{p.split} {p.name} {p.sha256}" for p in packages)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def hash_of(tokens: Tokens) -> str:
    """sha256 of tokens as they are stored."""
    return hashlib.sha256(tokens.astype(_TOKEN).tobytes()).hexdigest()


def manifest_of(corpus: Corpus) -> str:
    """Packages, versions, splits and hashes as JSON, one package a line."""
    head = {"format": FORMAT, "digest": corpus.digest, "tokenizer": corpus.tokenizer}
    packages = ",\n".join(json.dumps(asdict(package)) for package in corpus.packages)
    return json.dumps(head)[:-1] + f', "packages": [\n{packages}\n]}}'


def save_corpus(corpus: Corpus, path: Path) -> None:
    """Write the file, whole or not at all; compressed if its name ends in .xz."""
    head = " ".join(manifest_of(corpus).split())
    data = head.encode() + b"\n" + corpus.tokens.astype(_TOKEN).tobytes()
    if path.suffix == ".xz":
        data = lzma.compress(data, filters=_XZ_FILTERS)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(data)
    part.replace(path)


def load_corpus(path: Path) -> Corpus:
    """Read a file that `save_corpus` wrote: mapped into memory, or unpacked if it ends in .xz.

    Raises ModelError where it is missing, cut off, or no corpus.
    """
    try:
        if path.suffix == ".xz":
            head, _, body = lzma.decompress(path.read_bytes()).partition(b"\n")
            manifest = _manifest(head, path)
            tokens = np.frombuffer(body, dtype=_TOKEN)
        else:
            with path.open("rb") as file:
                head = file.readline(_LONGEST_MANIFEST)
            manifest = _manifest(head, path)
            tokens = np.memmap(path, dtype=_TOKEN, mode="r", offset=len(head))
    except FileNotFoundError:
        raise ModelError(
            f"{path}: no such corpus; make it with `python -m model.study corpus {path}`"
        ) from None
    except (lzma.LZMAError, OSError, ValueError) as error:
        raise ModelError(f"{path}: not a whole corpus file ({error}); make it again") from None
    packages = tuple(Package(**package) for package in manifest["packages"])
    if len(tokens) != max(package.end for package in packages):
        raise ModelError(f"{path}: cut off at {len(tokens)} tokens; copy or make it again")
    return Corpus(tokens, packages, str(manifest["tokenizer"]), str(manifest["digest"]))


def _manifest(line: bytes, path: Path) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError:
        found = None
    if not isinstance(found, dict) or found.get("format") != FORMAT or not found.get("packages"):
        raise ModelError(f"{path}: not a corpus of this study; make it with `model.study corpus`")
    return found
