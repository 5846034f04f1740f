"""The guard: which changes of the lab the loop may make. Pure functions over a change list.

Two allow-lists: paths (here) and keys (search_space.yaml). Everything that is not allowed is
refused: renames, deletions, links, mode bits, submodules, git attributes, odd spellings of a path,
and YAML that could mean something else than it shows (anchors, aliases, merges, tags, duplicates).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    CollectionEndEvent,
    CollectionStartEvent,
    DocumentStartEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceStartEvent,
)

from agent_tools.config_text import ConfigError, parse_yaml
from selfevo.config import (
    PROTECTED,
    TRAIN_CONFIG,
    SearchSpace,
    edit_fault,
    nearest,
)
from selfevo.store import sha256

MAX_FILE = 64_000  # bytes
MAX_TOTAL = 200_000
MAX_FILES = 20
MAX_DEPTH = 16  # of nested YAML collections
MAX_INT = 2**53  # beyond, a float key would not hold the number that is shown
REGULAR = "100644"
ABSENT = "000000"

#: Unicode categories that a reader does not see as they are: control and format characters, line
#: and paragraph separators, surrogates, private use.
UNSEEN = ("Cc", "Cf", "Zl", "Zp", "Cs", "Co")

#: Paths that a PR may touch, as whole-path patterns.
ALLOWED = (
    re.compile(r"configs/train\.yaml"),
    re.compile(r"scaffold/[a-z0-9_]+\.(md|yaml)"),
    re.compile(r"skills/[a-z0-9-]+/SKILL\.md"),
)


@dataclass(frozen=True)
class FileChange:
    """One path that differs between two commits, as git's raw diff says (renames not followed).

    Modes are git's six digits, `000000` for a side on which the file does not exist; `content` is
    the new content, None where there is none.
    """

    path: str
    status: str
    old_mode: str
    new_mode: str
    content: bytes | None


def history_faults(commits: Sequence[Sequence[FileChange]], merges: int) -> list[str]:
    """What is wrong with a PR's single commits, each given as its changes.

    A merge would carry them all into the incumbent's history, so a protected file that is edited
    and restored is refused although nothing of it is left in the end.
    """
    reasons = ["holds a merge commit; rebase it onto the incumbent"] if merges else []
    for changes in commits:
        for change in changes:
            fault = path_fault(change.path) or _kind_fault(change)
            if fault:
                reasons.append(f"one of its commits: {fault}")
    return reasons[:8]


@dataclass(frozen=True)
class KeyEdit:
    key: str
    before: Any
    after: Any


@dataclass(frozen=True)
class GuardResult:
    ok: bool
    reasons: tuple[str, ...]
    edits: tuple[KeyEdit, ...]


def check(
    changes: Sequence[FileChange],
    base_train: str,
    space: SearchSpace,
    tracked: Sequence[str] = (),
) -> GuardResult:
    """Judge a PR's whole difference from its control.

    `base_train` is the control's configs/train.yaml; `tracked` are the control's paths, for the
    test against spellings that differ in case only. At most eight reasons are given.
    """
    reasons: list[str] = []
    edits: tuple[KeyEdit, ...] = ()
    if not changes:
        reasons.append("the proposal changes nothing")
    if len(changes) > MAX_FILES:
        reasons.append(f"{len(changes)} files, at most {MAX_FILES} are allowed")
    if sum(len(c.content or b"") for c in changes) > MAX_TOTAL:
        reasons.append(f"the files together are over {MAX_TOTAL} bytes")
    for change in changes:
        fault = path_fault(change.path, tracked) or _kind_fault(change)
        if fault:
            reasons.append(fault)
            continue
        fault = _content_fault(change)
        if fault:
            reasons.append(fault)
        elif change.path == TRAIN_CONFIG:
            assert change.content is not None
            found, faults = check_keys(base_train, change.content.decode("utf-8"), space)
            edits = tuple(found)
            reasons += faults
    return GuardResult(not reasons, tuple(reasons[:8]), edits)


def path_fault(path: str, tracked: Sequence[str] = ()) -> str | None:
    """Why a PR may not touch `path`; None if it may."""
    shown = repr(path)[1:-1][:120]
    if path in PROTECTED:
        return f"{shown}: protected, only a person may change it"
    if not any(pattern.fullmatch(path) for pattern in ALLOWED):
        return f"{shown}: outside the paths that a proposal may touch"
    if unicodedata.normalize("NFKC", path) != path or not path.isascii():
        return f"{shown}: spelled with characters that look like others"
    folded = path.casefold()
    for other in tracked:
        if other != path and other.casefold() == folded:
            return f"{shown}: differs from {other} in case only"
    return None


def _kind_fault(change: FileChange) -> str | None:
    where = change.path
    if change.status not in ("A", "M"):
        word = {"D": "deletes", "R": "renames", "C": "copies", "T": "changes the type of"}
        return f"{where}: {word.get(change.status[:1], 'changes')} a file; only edits are allowed"
    if change.status == "A" and where == TRAIN_CONFIG:
        return f"{where}: must already exist in the control"
    if change.new_mode != REGULAR:
        kind = {"120000": "a symbolic link", "160000": "a submodule", "100755": "executable"}
        return f"{where}: is {kind.get(change.new_mode, f'of mode {change.new_mode}')}"
    if change.status == "M" and change.old_mode != change.new_mode:
        return f"{where}: changes the file mode"
    return None


def _content_fault(change: FileChange) -> str | None:
    raw = change.content
    if raw is None:
        return f"{change.path}: has no content"
    if len(raw) > MAX_FILE:
        return f"{change.path}: {len(raw)} bytes, the limit is {MAX_FILE}"
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        return f"{change.path}: not UTF-8"
    if any(unicodedata.category(c) in UNSEEN and c not in "\n\t" for c in text):
        return f"{change.path}: holds control characters"
    if change.path.endswith(".yaml"):
        return yaml_fault(text, change.path)
    return None


@lru_cache(maxsize=16)
def yaml_fault(text: str, where: str) -> str | None:
    """YAML features that make a file mean something else than it shows; None if it has none."""
    documents = depth = 0
    try:
        for event in YAML(typ="safe", pure=True).parse(text):
            depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
            if depth > MAX_DEPTH:
                return f"{where}: nested deeper than {MAX_DEPTH} levels"
            if isinstance(event, DocumentStartEvent):
                documents += 1
                if documents > 1 or event.tags or event.version:
                    return f"{where}: more than one plain YAML document"
            if isinstance(event, AliasEvent):
                return f"{where}: uses a YAML alias"
            if isinstance(event, (ScalarEvent, MappingStartEvent, SequenceStartEvent)):
                if event.anchor is not None:
                    return f"{where}: uses a YAML anchor"
                if event.tag is not None:
                    return f"{where}: uses a YAML tag"
            if isinstance(event, ScalarEvent) and event.value == "<<":
                return f"{where}: uses a YAML merge key"
        parse_yaml(text, where)  # finds duplicate keys
    except YAMLError as error:
        return f"{where}: not valid YAML: {' '.join(str(error).split())[:120]}"
    except ConfigError as error:
        return str(error)
    except (ValueError, OverflowError, AttributeError, RecursionError) as error:
        # what the parser's own checks miss, such as a number of 5,000 digits
        return f"{where}: not valid YAML: {' '.join(str(error).split())[:120]}"
    return None


def check_keys(before: str, after: str, space: SearchSpace) -> tuple[list[KeyEdit], list[str]]:
    """The keys that differ between two train configs, and what is wrong with those edits."""
    fault = yaml_fault(after, TRAIN_CONFIG)
    if fault:
        return [], [fault]
    try:
        old, new = _values(before, f"control {TRAIN_CONFIG}"), _values(after, TRAIN_CONFIG)
    except ConfigError as error:
        return [], [str(error)]
    edits: list[KeyEdit] = []
    reasons: list[str] = []
    for key in sorted(old.keys() | new.keys(), key=str):
        a, b = old.get(key), new.get(key)
        if key in old and key in new and _same(a, b):
            continue
        edits.append(KeyEdit(key, a, b))
        if key not in space.keys:
            reasons.append(
                f"key {key}: not in search_space.yaml; the nearest that is: "
                f"{nearest(key, space.keys)}"
            )
        elif key not in old or key not in new:
            reasons.append(
                f"key {key}: {'removed' if key in old else 'added'}; only edits of "
                "values are allowed"
            )
        elif isinstance(b, int) and abs(b) > MAX_INT:
            reasons.append(f"key {key}: a number beyond {MAX_INT}")
        else:
            problem = edit_fault(space.keys[key], a, b)
            if problem:
                reasons.append(f"key {key}: {problem}")
    if len(edits) > space.max_keys:
        reasons.append(f"{len(edits)} keys changed, at most {space.max_keys} is allowed")
    if not edits:
        reasons.append(f"{TRAIN_CONFIG}: no value changes")
    return edits, reasons


@lru_cache(maxsize=16)
def _values(text: str, where: str) -> Mapping[str, Any]:
    """Dotted key → value; parsed once a text, as YAML is slow and a round asks several times.

    Every key is a plain word, and an empty mapping is a value, so that two texts with equal values
    are equal: a key `"optim.lr"` beside `optim: {lr: …}` would hide one of the two.
    """
    return _flat(parse_yaml(text, where), "", where)


def _flat(data: Mapping[Any, Any], prefix: str, where: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in data.items():
        if not isinstance(key, str) or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key):
            raise ConfigError(f"{where}: key {key!r} is not a plain word; only words name a value")
        if isinstance(value, Mapping) and value:
            found |= _flat(value, f"{prefix}{key}.", where)
        else:
            found[prefix + key] = value
    return found


def _same(a: Any, b: Any) -> bool:
    """Equal in value and type, through lists and mappings: 1, 1.0 and true are three values."""
    return type(a) is type(b) and repr(a) == repr(b)


# ------------------------------------------------------------------ protected files


def manifest(files: Mapping[str, bytes]) -> dict[str, str]:
    """sha256 by path, of the protected files."""
    return {path: sha256(content) for path, content in sorted(files.items())}


def tampered(expected: Mapping[str, str], files: Mapping[str, bytes | None]) -> list[str]:
    """Protected paths whose content is gone or differs from the manifest."""
    problems = []
    for path, digest in expected.items():
        content = files.get(path)
        if content is None:
            problems.append(f"{path} is missing")
        elif sha256(content) != digest:
            problems.append(f"{path} has changed")
    return problems
