"""What this package raises when a user, a file or a request is at fault."""

from __future__ import annotations


class ModelError(Exception):
    """A mistake that the user can mend; one line: what, where, next step."""

    exit_code = 2


class CheckpointError(ModelError):
    """A checkpoint folder that cannot be read or written as asked."""
