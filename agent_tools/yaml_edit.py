"""Edits of YAML configuration that change one value and not a byte more.

The parser of ruamel.yaml finds the value's exact place; the text around it (comments, quotes,
layout) is kept as it is, and the result is parsed again to prove that nothing else changed.
"""

from __future__ import annotations

import math
import os
import re
import tempfile
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from agent_tools.errors import UserError

Scalar = bool | int | float | str | None
MAX_BYTES = 1_000_000
_STANDARD_TAG = "tag:yaml.org,2002:"


@dataclass(frozen=True)
class YamlEdit:
    """One changed value; `line` counts from 1."""

    path: Path
    key: str
    before: Scalar
    after: Scalar
    line: int


def edit_yaml(path: Path, key: str, value: Scalar) -> YamlEdit:
    """Set the existing dotted `key` of a YAML file to `value`; the type of the old value is kept.

    An integer is accepted for a float key, a whole float for an integer key. The file is replaced
    atomically. Raises `UserError` for an unknown key, another type, a key that is a mapping or a
    list, a symbolic link, and any YAML that cannot be edited safely (duplicate keys, anchors,
    aliases, merge keys, tags, tabs, several documents), naming the line.
    """
    path = Path(path)
    if path.is_symlink() or not path.is_file():
        raise UserError(f"{path} is not an ordinary file: give the configuration file itself")
    try:
        data = path.read_bytes()
        text = data.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} as UTF-8 text: {error}") from error
    new, edit = edit_text(text, key, value, path)
    if new != text:
        _write(path, new.encode("utf-8"))
    return edit


def edit_text(text: str, key: str, value: Scalar, path: Path) -> tuple[str, YamlEdit]:
    """`edit_yaml` on text; `path` is named in errors only. Returns the new text and the edit."""
    old_tree = _load(text, path)
    node = _find(_compose(text, path), key, path)
    line, column = node.start_mark.line, node.start_mark.column
    before = _value(old_tree, key)
    after = _typed(before, value, key, path, line + 1)
    edit = YamlEdit(path, key, before, after, line + 1)
    if before == after and type(before) is type(after):
        return text, edit
    if node.end_mark.line != line or node.style in ("|", ">"):
        raise UserError(f"{path}:{line + 1}: {key} spans several lines: edit it by hand")
    lines = text.splitlines(keepends=True)
    row = lines[line]
    shift = 1 if line == 0 and text.startswith("\ufeff") else 0
    start, end = column + shift, node.end_mark.column + shift
    lines[line] = row[:start] + _render(after, row[start:end], node.style) + row[end:]
    new = "".join(lines)
    expected = dict(_flatten(old_tree, "", path))
    expected[key] = after
    if dict(_flatten(_load(new, path), "", path)) != expected:
        raise UserError(f"{path}:{line + 1}: {key} cannot be changed safely: edit it by hand")
    return new, edit


def flatten_yaml(text: str, path: Path | str = "the YAML text") -> dict[str, object]:
    """Dotted key → value of every leaf; lists and empty mappings are leaves.

    Raises `UserError` for what `edit_yaml` refuses, and for keys that are no text or hold a dot.
    """
    return _flatten(_load(text, Path(path)), "", Path(path))


def _load(text: str, path: Path) -> dict[str, Any]:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError
    from ruamel.yaml.events import AliasEvent, DocumentStartEvent, NodeEvent, ScalarEvent

    if len(text) > MAX_BYTES:
        raise UserError(f"{path} is above {MAX_BYTES} bytes: a configuration is smaller")
    try:
        documents = 0
        for event in YAML(typ="safe", pure=True).parse(text):
            line = event.start_mark.line + 1
            if isinstance(event, DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise UserError(f"{path}:{line}: a second document: keep one a file")
            if isinstance(event, AliasEvent) or (isinstance(event, NodeEvent) and event.anchor):
                raise UserError(
                    f"{path}:{line}: anchors and aliases (& and *) cannot be edited safely: "
                    "write the value out"
                )
            if isinstance(event, ScalarEvent) and event.value == "<<" and event.style is None:
                raise UserError(f"{path}:{line}: merge keys (<<) are not allowed: write them out")
            tag = str(getattr(event, "tag", None) or "")
            if tag and not tag.startswith(_STANDARD_TAG):
                raise UserError(f"{path}:{line}: the tag {tag} is not allowed: remove it")
        value = YAML(typ="safe", pure=True).load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}" if mark is not None else str(path)
        problem = " ".join((error.problem or "not valid YAML").split())
        if "\\t" in problem or "'\t'" in problem:
            problem = "a tab cannot indent YAML; use spaces"
        raise UserError(f"{where}: {problem}; mend that line") from error
    except YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    except (ValueError, RecursionError, AttributeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{path}:1: a configuration is a mapping of keys, not {_kind(value)}")
    return value


def _compose(text: str, path: Path) -> Any:
    from ruamel.yaml import YAML

    node = YAML(typ="rt", pure=True).compose(text)  # parsed once already: cannot fail
    if node is None:
        raise UserError(f"{path} is empty: nothing to edit")
    return node


def _find(node: Any, key: str, path: Path) -> Any:
    from ruamel.yaml.nodes import MappingNode, ScalarNode

    walked: list[str] = []
    for part in key.split("."):
        if not isinstance(node, MappingNode):
            raise UserError(f"{path}: {'.'.join(walked)} has no keys, so {key} does not exist")
        found = [value for name, value in node.value if name.value == part]
        if not found:
            known = ", ".join(str(name.value) for name, _ in node.value)
            where = ".".join(walked) or "the file"
            raise UserError(f"{path}: no key {key}: {where} has {known}")
        walked.append(part)
        node = found[0]
    if not isinstance(node, ScalarNode):
        kind = "a mapping" if isinstance(node, MappingNode) else "a list"
        line = node.start_mark.line + 1
        raise UserError(f"{path}:{line}: {key} is {kind}: name a key that holds one value")
    return node


def _value(tree: dict[str, Any], key: str) -> Scalar:
    value: Any = tree
    for part in key.split("."):
        value = value[part]
    return value  # type: ignore[no-any-return]


def _flatten(tree: dict[str, Any], prefix: str, path: Path) -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in tree.items():
        if not isinstance(name, str) or "." in name:
            raise UserError(f"{path}: key {name!r} is not a plain word: rename it or quote it")
        key = prefix + name
        if isinstance(value, dict) and value:
            flat.update(_flatten(value, f"{key}.", path))
        else:
            flat[key] = value
    return flat


def _typed(before: Scalar, value: Scalar, key: str, path: Path, line: int) -> Scalar:
    """`value` as the type of `before`; null may become anything."""
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{path}:{line}: {key} must be a finite number, not {value}")
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if before is None or type(before) is type(value):
        return value
    if number and isinstance(before, float):
        return float(value)  # type: ignore[arg-type]
    if isinstance(value, float) and type(before) is int and value.is_integer():
        return int(value)
    raise UserError(f"{path}:{line}: {key} is {_kind(before)}, so {value!r} does not fit")


def _kind(value: object) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return names.get(type(value), "a list" if isinstance(value, list) else type(value).__name__)


def _render(value: Scalar, old: str, style: str | None) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return _render_float(value, scientific="e" in old.lower())
    if style == "'" and "\n" not in value and value.isprintable():
        return "'" + value.replace("'", "''") + "'"
    plain = re.fullmatch(r"[A-Za-z_][A-Za-z0-9_./-]*", value)
    words = {"true", "false", "null", "yes", "no", "on", "off", "y", "n"}
    if style is None and plain and value.lower() not in words:
        return value
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in escaped) + '"'


def _render_float(value: float, *, scientific: bool) -> str:
    """The shortest exact form with a point, which YAML 1.1 and 1.2 both read as a float."""
    if value == 0 or not (scientific or abs(value) < 1e-3 or abs(value) >= 1e6):
        return repr(value)
    sign, digits, exponent = Decimal(repr(value)).as_tuple()
    assert isinstance(exponent, int)
    word = "".join(map(str, digits))
    power = len(word) - 1 + exponent
    fraction = word[1:].rstrip("0") or "0"
    return f"{'-' if sign else ''}{word[0]}.{fraction}e{power:+d}"


def _write(path: Path, data: bytes) -> None:
    mode = path.stat().st_mode & 0o777
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(mode)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
