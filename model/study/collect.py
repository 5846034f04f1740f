"""Real text for the study: sources and documents of the packages installed here.

Packages are the standard library and whatever the project's own distribution requires, directly
or not. Each is in one split only: nothing of a held-out package is trained on, and files that occur
twice, or whose lines mostly occur in the train split, are dropped.
"""

from __future__ import annotations

import hashlib
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from platform import python_version

import numpy as np

from model.errors import ModelError
from model.study.corpus import Corpus, Package, Tokens, digest_of, hash_of
from model.tokenizer import EOS, Tokenizer

Encode = Callable[[str], list[int]]

ROOT = "selfevo"
SUFFIXES = (".py", ".rst", ".md", ".txt")
_COPIES = frozenset(
    ("_vendor", "_vendored", "vendor", "third_party", "site-packages", "idlelib", "__pycache__")
)
_SMALLEST, _LARGEST = 500, 150_000  # bytes of a file: no stubs, no tables
_LONG_LINE = 30  # shorter lines are alike everywhere and tell nothing about copies
_HELDOUT_EVERY = 5
_FEWEST = 512  # tokens of a package
_BYTES_A_TOKEN = 2.4
_NAME = re.compile(r"[A-Za-z0-9._-]+")


@dataclass(frozen=True)
class Source:
    """The readable files of one installed package: folders in an order of their own, by hash, so
    that a cut package is a mixture; files of one folder by name, next to each other."""

    name: str
    version: str
    files: tuple[Path, ...]

    @property
    def size(self) -> int:
        """Bytes of its files that are not too small or too large."""
        sizes = (path.stat().st_size for path in self.files)
        return sum(size for size in sizes if _SMALLEST <= size <= _LARGEST)

    @property
    def family(self) -> str:
        """What packages of one project share: `langgraph` of `langgraph-sdk`."""
        return re.split(r"[-_.0-9]", self.name)[0]

    @property
    def heldout(self) -> bool:
        """One family of packages in five, by the first word of the name alone; the standard
        library is for training."""
        number = int(hashlib.sha256(self.family.encode()).hexdigest()[:8], 16)
        return self.name != "python" and number % _HELDOUT_EVERY == 0


def installed_sources() -> list[Source]:
    """The standard library and every installed requirement of the project, by name."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = (p for p in sorted(library.rglob("*.py")) if "test" not in p.parts[-2:-1])
    found = [Source("python", python_version(), _ordered(p for p in files if _wanted(p, library)))]
    for dist in _requirements():
        paths = [Path(str(dist.locate_file(f))) for f in dist.files or [] if f.suffix in SUFFIXES]
        root = Path(str(dist.locate_file("")))
        kept = _ordered(path for path in paths if _wanted(path, root) and path.is_file())
        if kept:
            found.append(Source(dist.name.lower(), dist.version, kept))
    return sorted(found, key=lambda source: source.name)


def _requirements() -> Iterator[Distribution]:
    """Distributions that the project requires, theirs too, without the project itself."""
    queue, seen = [ROOT], {ROOT}
    while queue:
        try:
            dist = distribution(queue.pop())
        except PackageNotFoundError:
            continue
        for line in dist.requires or []:
            match = _NAME.match(line)
            name = re.sub(r"[-_.]+", "-", match.group()).lower() if match else ROOT
            if name not in seen:
                seen.add(name)
                queue.append(name)
        if dist.name != ROOT:
            yield dist


def _ordered(paths: Iterable[Path]) -> tuple[Path, ...]:
    def key(path: Path) -> tuple[str, Path]:
        return hashlib.sha256("/".join(path.parts[-4:-1]).encode()).hexdigest(), path

    return tuple(sorted(paths, key=key))


def _wanted(path: Path, root: Path) -> bool:
    inner = path.relative_to(root).parts if path.is_relative_to(root) else path.parts
    return not _COPIES.intersection(inner)


def read_text(path: Path) -> str | None:
    """The text of a file that is worth reading: prose or code, neither stub nor table."""
    try:
        if not _SMALLEST <= path.stat().st_size <= _LARGEST:
            return None
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    lines = text.splitlines()
    digits = sum(char.isdigit() for char in text)
    if not text.isprintable() and "\0" in text:
        return None
    return None if len(text) > 120 * len(lines) or digits > 0.2 * len(text) else text


def collect(
    sources: list[Source], tokenizer: Tokenizer, *, tokens: int, heldout_share: float = 0.08
) -> Corpus:
    """Tokens of both splits, about `tokens` in all; the largest packages are cut to one size.

    Raises ModelError where a split would be empty.
    """
    seen: set[str] = set()
    lines: set[int] = set()
    packages: list[Package] = []
    parts: list[Tokens] = []
    start = 0
    for split in ("train", "heldout"):
        held = split == "heldout"
        chosen = [source for source in sources if source.heldout == held]
        cap = _cap([source.size for source in chosen], tokens * (1 - heldout_share))
        if held:
            cap = _cap([source.size for source in chosen], tokens * heldout_share)
        for source in chosen:
            ids, files = _encode(source, tokenizer, cap, seen, lines, heldout=held)
            if len(ids) < _FEWEST:
                continue
            end = start + len(ids)
            name, version, sha256 = source.name, source.version, hash_of(ids)
            packages.append(Package(name, version, split, files, start, end, sha256))
            parts.append(ids)
            start = end
        if not any(package.split == split for package in packages):
            raise ModelError(f"no text for the {split} split; install the project's packages")
    return Corpus(np.concatenate(parts), tuple(packages), tokenizer.hash, digest_of(packages))


def _cap(sizes: list[int], tokens: float) -> int:
    """Tokens that no package may exceed, so that packages of these bytes give `tokens` in all."""
    left, cap = tokens, 0.0
    for rank, size in enumerate(sorted(sizes)):
        cap = left / (len(sizes) - rank)
        if size / _BYTES_A_TOKEN > cap:
            break
        left -= size / _BYTES_A_TOKEN
    return round(cap)


def _encode(
    source: Source,
    tokenizer: Tokenizer,
    limit: int,
    seen: set[str],
    train_lines: set[int],
    *,
    heldout: bool,
) -> tuple[Tokens, int]:
    """Up to `limit` tokens of a package and the number of its files in them."""
    ids: list[int] = []
    files = 0
    for path in source.files:
        if len(ids) >= limit:
            break
        text = read_text(path)
        if text is None:
            continue
        key = hashlib.sha256("".join(text.split()).encode()).hexdigest()
        if key in seen:
            continue
        seen.add(key)
        long = {hash(line.strip()) for line in text.splitlines() if len(line) >= _LONG_LINE}
        if heldout and len(long & train_lines) > len(long) / 2:
            continue
        if not heldout:
            train_lines |= long
        ids.append(tokenizer.token_id(EOS))
        ids += tokenizer.encode(text, specials=False)
        files += 1
    return np.array(ids[:limit], dtype=np.uint16), files
