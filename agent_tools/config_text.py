"""Configuration text of the trainer and of the loop, read one way, with one wording of faults."""

from __future__ import annotations

from typing import Any

from agent_tools.errors import UserError


class ConfigError(UserError):
    """A configuration file, override or argument is wrong: what, where, and what to do."""


def parse_yaml(text: str, where: str) -> dict[str, Any]:
    """Parse `text` (YAML 1.2) to a mapping; `where` names the source in messages."""
    from ruamel.yaml import YAML  # whoever only needs the error needs no parser
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    try:
        value = YAML(typ="safe", pure=True).load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f" line {mark.line + 1}" if mark is not None else ""
        problem = " ".join(str(error.problem or error.context or "syntax error").split())
        raise ConfigError(f"{where}{line}: not valid YAML: {problem}; fix that line") from error
    except YAMLError as error:
        problem = " ".join(str(error).split())
        raise ConfigError(f"{where}: not valid YAML: {problem}") from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: expected a mapping of keys, got {type(value).__name__}")
    return value
