"""What is read of a git repository: head, changes, commits, and a cache of its objects."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class HeadState:
    """Where a checkout stands: `branch` is None if detached, `commit` None before the first."""

    branch: str | None
    commit: str | None

    @property
    def detached(self) -> bool:
        """The checkout is on a commit, not on a branch."""
        return self.branch is None


@dataclass(frozen=True)
class Change:
    """One path that differs between two commits.

    status: added, deleted, modified or type (file, link and submodule changed into each other);
    modes: git's six octal digits (100644 file, 100755 executable, 120000 symbolic link, 160000
    submodule, 000000 absent). A rename shows as a deletion and an addition.
    """

    path: str
    status: Literal["added", "deleted", "modified", "type"]
    old_mode: str
    new_mode: str


@dataclass(frozen=True)
class Commit:
    """A commit; `trailers` are the ``Key: value`` lines that end its message."""

    sha: str
    parents: tuple[str, ...]
    subject: str
    message: str
    trailers: dict[str, str]


@dataclass
class ObjectCache:
    """What has been read of the repository. An object never changes under its name."""

    commits: set[str] = field(default_factory=set)
    trees: dict[str, dict[str, tuple[str, str]]] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)

    def keep_tree(self, sha: str, tree: dict[str, tuple[str, str]]) -> None:
        if len(self.trees) >= 8:
            self.trees.pop(next(iter(self.trees)))
        self.trees[sha] = tree

    def keep_blob(self, sha: str, content: bytes) -> None:
        if len(content) <= 100_000:
            if len(self.blobs) >= 64:
                self.blobs.pop(next(iter(self.blobs)))
            self.blobs[sha] = content
