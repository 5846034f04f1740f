"""The two kinds of error that command lines turn into exit codes."""

from __future__ import annotations


class UserError(Exception):
    """Something the caller can mend: a wrong file, key, value or repository state.

    The message is one line: what is wrong, where, and the next step. Command lines print it
    as ``error: …`` and leave with ``exit_code``.
    """

    exit_code = 2


class InfraError(Exception):
    """The machine failed us (no space, no fork, a vanished process), not the caller.

    The message has the same form as that of `UserError`; a retry may succeed.
    """

    exit_code = 5
