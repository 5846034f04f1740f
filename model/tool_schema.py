"""The JSON-schema subset of tool parameters: reading typed text, checking values, short hints.

Covers what tools use in practice: type (also a list of types), enum, const, bounds, lengths,
items, properties, required, additionalProperties, anyOf/oneOf and local `$ref`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Schema = Mapping[str, Any]

_PYTHON_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "boolean": (bool,),
    "integer": (int,),
    "number": (int, float),
    "object": (dict,),
    "array": (list,),
    "null": (type(None),),
}


@dataclass(frozen=True)
class Tool:
    """One callable: `parameters` is a JSON schema of type object."""

    name: str
    description: str
    parameters: Schema

    @property
    def properties(self) -> dict[str, Schema]:
        """Parameter name to its schema, `$ref` resolved at the top level."""
        found = self.parameters.get("properties") or {}
        return {name: resolve(schema, self.parameters) for name, schema in found.items()}

    @property
    def required(self) -> list[str]:
        return list(self.parameters.get("required") or [])


def read_tools(tools: Sequence[Mapping[str, Any]] | None) -> dict[str, Tool]:
    """Tools by name, from OpenAI's `{"type": "function", "function": {…}}` or the bare inner form.

    Raises `ValueError` for a tool without a name, of another type, named twice, or with a schema
    whose parts are not of the kinds that JSON Schema gives them.
    """
    found: dict[str, Tool] = {}
    for index, entry in enumerate(tools or ()):
        if entry.get("type", "function") != "function":
            raise ValueError(f"tools[{index}]: type {entry['type']!r} is not supported")
        inner = entry.get("function", entry)
        name = inner.get("name") if isinstance(inner, Mapping) else None
        if not isinstance(name, str) or not name:
            raise ValueError(f"tools[{index}]: a function needs a name")
        if name in found:
            raise ValueError(f"tools[{index}]: two tools are named {name!r}")
        parameters = inner.get("parameters") or {"type": "object", "properties": {}}
        where = f"tools[{index}].parameters"
        if not isinstance(parameters, Mapping):
            raise ValueError(f"{where}: a JSON schema is an object")
        _check_schema(parameters, where)
        found[name] = Tool(name, str(inner.get("description") or ""), parameters)
    return found


_NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems")
_PART_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(_NUMBERS, (int, float)),
    **dict.fromkeys(_COUNTS, (int,)),
    **dict.fromkeys(("enum", "anyOf", "oneOf", "allOf", "required"), (list,)),
    **dict.fromkeys(("properties", "$defs", "definitions"), (dict,)),
    **dict.fromkeys(("pattern", "$ref"), (str,)),
    "type": (str, list),
    "items": (dict, bool, list),
    "additionalProperties": (dict, bool),
}
_DEEPEST = 24


def _check_schema(schema: Any, where: str, depth: int = 0) -> None:
    """Raise `ValueError` where a part that this module reads is not of its kind."""
    if not isinstance(schema, Mapping):
        if depth and isinstance(schema, bool):  # true allows anything, false nothing
            return
        raise ValueError(f"{where}: a JSON schema is an object, not {_short(schema)}")
    if depth > _DEEPEST:
        raise ValueError(f"{where}: more than {_DEEPEST} levels deep")
    for key, kinds in _PART_KINDS.items():
        value = schema.get(key)
        wrong_bool = isinstance(value, bool) and bool not in kinds
        if key in schema and (wrong_bool or not isinstance(value, kinds)):
            raise ValueError(f"{where}.{key}: {_short(value)} is not what JSON Schema has there")
    for key in ("type", "required"):
        if isinstance(schema.get(key), list) and not all(isinstance(v, str) for v in schema[key]):
            raise ValueError(f"{where}.{key}: it must list strings")
    for key in ("anyOf", "oneOf", "allOf"):
        for index, option in enumerate(schema.get(key) or ()):
            _check_schema(option, f"{where}.{key}[{index}]", depth + 1)
    for key in ("properties", "$defs", "definitions"):
        for name, part in (schema.get(key) or {}).items():
            _check_schema(part, f"{where}.{key}.{name}", depth + 1)
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), Mapping):
            _check_schema(schema[key], f"{where}.{key}", depth + 1)


def resolve(schema: Any, root: Schema) -> Schema:
    """Follows `$ref: #/…` inside `root`; an unresolvable reference accepts anything."""
    for _ in range(16):
        if not isinstance(schema, Mapping) or "$ref" not in schema:
            break
        target: Any = root
        for part in str(schema["$ref"]).removeprefix("#/").split("/"):
            target = target.get(part) if isinstance(target, Mapping) else None
        schema = target if target is not None else {}
    return schema if isinstance(schema, Mapping) else {}


def types_of(schema: Schema, root: Schema, depth: int = 0) -> list[str]:
    """Types a value may have; `["string"]` where the schema says nothing, as M2's parsers do, and
    where its alternatives refer to themselves."""
    schema = resolve(schema, root)
    declared = schema.get("type")
    if isinstance(declared, str):
        return [declared]
    if isinstance(declared, list):
        return [str(kind) for kind in declared]
    options = schema.get("anyOf") or schema.get("oneOf")
    if options and depth < _DEEPEST:
        kinds = [kind for option in options for kind in types_of(option, root, depth + 1)]
        return list(dict.fromkeys(kinds))
    if "const" in schema:
        return [_type_name(schema["const"])]
    if "enum" in schema:
        return list(dict.fromkeys(_type_name(value) for value in schema["enum"]))
    if "properties" in schema:
        return ["object"]
    if "items" in schema:
        return ["array"]
    return ["string"]


def _type_name(value: Any) -> str:
    """JSON type of a Python value; booleans before integers, which Python mixes up."""
    for name, kinds in _PYTHON_TYPES.items():
        if isinstance(value, kinds) and (name == "boolean" or not isinstance(value, bool)):
            return name
    return "string"


def read_value(raw: str, schema: Schema, root: Schema) -> Any:
    """Parameter text to a value: raw for strings, JSON for the rest.

    Where both are allowed JSON wins if it has an allowed type. Raises `ValueError` with a reason.
    """
    kinds = types_of(schema, root)
    if kinds == ["string"]:
        return raw
    try:
        value = json.loads(raw.strip())
    except ValueError as error:
        if "string" in kinds:
            return raw
        raise ValueError(f"{_short(raw)} is not a JSON {' or '.join(kinds)}") from error
    if not isinstance(value, str) and any(_is_type(value, kind) for kind in kinds):
        return value
    if "string" in kinds:
        return raw
    raise ValueError(f"{_short(raw)} is not a JSON {' or '.join(kinds)}")


def write_value(value: Any) -> str:
    """A value to parameter text, the inverse of `read_value`."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def fault(value: Any, schema: Schema, root: Schema) -> str | None:
    """First reason why `value` breaks `schema`, or None."""
    schema = resolve(schema, root)
    options = schema.get("anyOf") or schema.get("oneOf")
    if options:
        reasons = [fault(value, option, root) for option in options]
        if all(reasons):
            return reasons[0]
    if "const" in schema and not _equal(value, schema["const"]):
        return f"{_short(value)} must be {_short(schema['const'])}"
    if "enum" in schema and not any(_equal(value, allowed) for allowed in schema["enum"]):
        return f"{_short(value)} is none of {_short(schema['enum'], 200)}"
    has_type = any(key in schema for key in ("type", "properties", "items"))
    if has_type and not any(_is_type(value, kind) for kind in types_of(schema, root)):
        return f"{_short(value)} is not of type {' or '.join(types_of(schema, root))}"
    if isinstance(value, str):
        return _length_fault(value, schema)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return _bound_fault(value, schema)
    if isinstance(value, list):
        return _items_fault(value, schema, root)
    if isinstance(value, dict):
        return object_fault(value, schema, root)
    return None


def object_fault(value: Mapping[str, Any], schema: Schema, root: Schema) -> str | None:
    """First missing, unknown or wrong member of an object, or None."""
    properties = schema.get("properties") or {}
    for name in schema.get("required") or []:
        if name not in value:
            return f"parameter {name!r} is missing"
    extra = schema.get("additionalProperties", not properties)
    for name, member in value.items():
        if name not in properties and extra is False:
            return f"parameter {name!r} is unknown"
        member_schema = properties.get(name, extra if isinstance(extra, Mapping) else {})
        reason = fault(member, member_schema, root)
        if reason:
            return f"parameter {name!r}: {reason}"
    return None


def _length_fault(value: str, schema: Schema) -> str | None:
    if len(value) > schema.get("maxLength", math.inf):
        return f"longer than {schema['maxLength']} characters"
    if len(value) < schema.get("minLength", 0):
        return f"shorter than {schema['minLength']} characters"
    return None


def _bound_fault(value: float, schema: Schema) -> str | None:
    if not math.isfinite(value):
        return f"{value} is not finite"
    if value < schema.get("minimum", -math.inf) or value <= schema.get(
        "exclusiveMinimum", -math.inf
    ):
        return f"{value} is below the allowed range"
    if value > schema.get("maximum", math.inf) or value >= schema.get("exclusiveMaximum", math.inf):
        return f"{value} is above the allowed range"
    return None


def _items_fault(value: list[Any], schema: Schema, root: Schema) -> str | None:
    if len(value) > schema.get("maxItems", math.inf) or len(value) < schema.get("minItems", 0):
        return f"has {len(value)} items, outside the allowed number"
    for index, item in enumerate(value):
        reason = fault(item, schema.get("items") or {}, root)
        if reason:
            return f"item {index}: {reason}"
    return None


def _is_type(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    if kind == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, _PYTHON_TYPES.get(kind, (object,)))


def _equal(left: Any, right: Any) -> bool:
    """JSON equality: 1 equals 1.0 but true does not equal 1."""
    return isinstance(left, bool) == isinstance(right, bool) and bool(left == right)


def hint(tool: Tool) -> str:
    """The schema in one line: `propose_edit(key: a|b, why: string, value?: number 0..1)`."""
    parts = []
    for name, schema in tool.properties.items():
        mark = "" if name in tool.required else "?"
        parts.append(f"{name}{mark}: {_type_hint(schema, tool.parameters)}")
    return f"{tool.name}({', '.join(parts)})"


def _type_hint(schema: Schema, root: Schema) -> str:
    if "const" in schema:
        return write_value(schema["const"])
    if "enum" in schema:
        return _short("|".join(write_value(value) for value in schema["enum"]), 160, quote=False)
    text = "|".join(types_of(schema, root))
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is not None or high is not None:
        text += f" {'' if low is None else low}..{'' if high is None else high}"
    if "maxLength" in schema:
        text += f" up to {schema['maxLength']} characters"
    return text


def _short(value: Any, limit: int = 60, *, quote: bool = True) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str) if quote else str(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"
