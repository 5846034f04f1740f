"""Errors of the training plane, each with the exit code its command line ends with."""

from __future__ import annotations

from agent_tools.config_text import ConfigError
from agent_tools.errors import InfraError, UserError


class SplitError(UserError):
    """Training was asked to touch a competition that is not in the train split."""


class CheckpointStateError(UserError):
    """A run directory or its trainer state cannot be used for what was asked."""


class RecordError(UserError):
    """A call record cannot be trained on: lengths, tokenizer or sampling are not the run's."""


class InfraLimitError(InfraError):
    """Too many scripts failed for reasons that are not theirs; nothing was learnt from them."""


class DivergedError(Exception):
    """Non-finite loss or a stop rule: the run ends with exit code 6."""

    exit_code = 6


class StoppedError(Exception):
    """A signal asked the run to end; state is saved. `exit_code` is 143 (TERM) or 130 (INT)."""

    def __init__(self, signal_name: str, exit_code: int) -> None:
        super().__init__(f"stopped by {signal_name}")
        self.signal_name = signal_name
        self.exit_code = exit_code


def exit_code_of(error: BaseException) -> int:
    """The exit code that an error ends a command with; a full disk is the machine's fault."""
    if isinstance(error, OSError):
        return InfraError.exit_code
    return int(getattr(error, "exit_code", 1))


__all__ = [
    "CheckpointStateError",
    "ConfigError",
    "DivergedError",
    "InfraError",
    "InfraLimitError",
    "RecordError",
    "SplitError",
    "StoppedError",
    "UserError",
    "exit_code_of",
]
