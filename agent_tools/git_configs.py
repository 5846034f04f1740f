"""The lab's git repository: branches, worktrees, commits, merges and diffs for the loop.

The loop works on its own branches in its own worktrees; nothing here moves the user's branch,
checkout or index (the checkout changes only if the caller merges into it). Git itself runs
through `agent_tools.git_safe`, which lets nothing of the repository run. Edits of YAML values
(`edit_yaml`, `flatten_yaml`) are re-exported from `agent_tools.yaml_edit`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from agent_tools.errors import UserError
from agent_tools.git_objects import Change, Commit, HeadState, ObjectCache
from agent_tools.git_safe import SafeGit, git_error, init_repository
from agent_tools.git_trailers import trailers_of, with_trailers
from agent_tools.yaml_edit import YamlEdit, edit_text, edit_yaml, flatten_yaml

__all__ = [
    "Change",
    "Commit",
    "HeadState",
    "LabRepo",
    "YamlEdit",
    "edit_text",
    "edit_yaml",
    "flatten_yaml",
    "init_lab_repo",
]
SUBMODULE = "160000"


def init_lab_repo(path: Path, *, message: str = "Start the lab") -> LabRepo:
    """Make `path` a git repository (branch main) and commit the files that are in it.

    Files that its ``.gitignore`` names stay out. Raises `UserError` if it is one already.
    """
    path = Path(path).absolute()
    if (path / ".git").exists():
        raise UserError(f"{path} is a git repository already: choose another folder")
    path.mkdir(parents=True, exist_ok=True)
    init_repository(path)
    repo = LabRepo(path)
    git = repo._git()
    git.run("add", "--all")
    git.run(
        "commit", "--quiet", "--no-verify", "--allow-empty", "--cleanup=verbatim", "-m", message
    )
    return repo


class LabRepo:
    """A lab's repository. `path` is its top folder, which holds the ``.git`` directory.

    Revisions are anything git accepts (branch, hash, ``HEAD``). Every failure is a `UserError`
    that says what to do. `worktree` arguments are folders made by `worktree_add`, or `path`.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path).absolute()
        self._dot_git = self.path / ".git"
        self._objects = ObjectCache()
        if not self._dot_git.is_dir() or self._dot_git.is_symlink():
            raise UserError(
                f"{self.path} is not the top of a git repository: run `selfevo init`, "
                "or give the lab's folder"
            )

    # -- looking ---------------------------------------------------------------------------------

    def head(self, worktree: Path | None = None) -> HeadState:
        """Branch and commit of the lab's checkout, or of a worktree."""
        git = self._git(worktree)
        ref = git.run("symbolic-ref", "--quiet", "HEAD", check=False).text.strip()
        sha = git.run("rev-parse", "--quiet", "--verify", "HEAD^{commit}", check=False)
        return HeadState(
            ref.removeprefix("refs/heads/") or None,
            sha.text.strip() if sha.code == 0 else None,
        )

    def require_clean_head(self, paths: Sequence[str] = ()) -> HeadState:
        """The lab's head, if it is on a branch with a commit and `paths` are as committed."""
        head = self.head()
        if head.detached:
            raise UserError(
                f"{self.path} is on no branch (detached head): run `git switch BRANCH` there"
            )
        if head.commit is None:
            raise UserError(f"{self.path} has no commit yet: commit the lab's files first")
        dirty = self.dirty_paths(paths) if paths else []
        if dirty:
            raise UserError(
                f"{self.path} has uncommitted changes in {', '.join(dirty[:5])}: "
                "commit them or take them back"
            )
        return head

    def resolve(self, rev: str) -> str:
        """Full hash of the commit that `rev` names."""
        if rev in self._objects.commits:
            return rev
        sha = self._commit_of(rev)
        if sha is None:
            raise UserError(f"{self.path} has no commit {rev!r}: see `git branch` and `git log`")
        self._objects.commits.add(sha)
        return sha

    def branch_exists(self, name: str) -> bool:
        """Whether there is a local branch of this name."""
        ref = f"refs/heads/{name}"
        return self._git().run("show-ref", "--verify", "--quiet", ref, check=False).code == 0

    def branches(self, prefix: str = "") -> list[str]:
        """Local branches whose name starts with `prefix`, sorted."""
        names = self._git().text("for-each-ref", "--format=%(refname)", "refs/heads/")
        short = [line.removeprefix("refs/heads/") for line in names.splitlines()]
        return sorted(name for name in short if name.startswith(prefix))

    def is_ancestor(self, older: str, newer: str) -> bool:
        """Whether `older` is `newer` or an ancestor of it."""
        args = ("merge-base", "--is-ancestor", self.resolve(older), self.resolve(newer))
        result = self._git().run(*args, check=False)
        if result.code not in (0, 1):
            raise git_error(args, result, self.path)
        return result.code == 0

    def dirty_paths(
        self, paths: Sequence[str] = (), worktree: Path | None = None, *, tracked_only: bool = False
    ) -> list[str]:
        """Paths (under `paths`, or all) that differ from HEAD or are untracked and not ignored."""
        listing = self._git(worktree).run(
            "status", "--porcelain=v1", "-z", "--no-renames", "--ignore-submodules=none",
            f"--untracked-files={'no' if tracked_only else 'all'}", "--", *paths,
        )  # fmt: skip
        return sorted(entry[3:] for entry in listing.text.split("\0") if entry)

    def is_dirty(
        self, paths: Sequence[str] = (), worktree: Path | None = None, *, tracked_only: bool = False
    ) -> bool:
        """Whether `dirty_paths` finds any."""
        return bool(self.dirty_paths(paths, worktree, tracked_only=tracked_only))

    def changed_paths(self, a: str, b: str) -> list[Change]:
        """What differs from commit `a` to commit `b`, by path; renames are not folded."""
        listing = self._git().run(
            "diff-tree", "-r", "-z", "--no-renames", "--no-ext-diff", "--ignore-submodules=none",
            self.resolve(a), self.resolve(b),
        )  # fmt: skip
        fields = listing.text.split("\0")
        names: dict[str, Literal["added", "deleted", "modified", "type"]]
        names = {"A": "added", "D": "deleted", "M": "modified", "T": "type"}
        changes = []
        for meta, path in zip(fields[0::2], fields[1::2], strict=False):
            old_mode, new_mode, _, _, status = meta.lstrip(":").split(" ")
            changes.append(Change(path, names[status[0]], old_mode, new_mode))
        return changes

    def diff(self, a: str, b: str, paths: Sequence[str] = ()) -> str:
        """Unified diff from commit `a` to commit `b`, without renames, filters or textconv."""
        result = self._git().run(
            "diff", "--no-ext-diff", "--no-textconv", "--no-color", "--no-renames",
            "--src-prefix=a/", "--dst-prefix=b/", self.resolve(a), self.resolve(b), "--", *paths,
        )  # fmt: skip
        return result.text

    def diff_stat(self, a: str, b: str) -> dict[str, tuple[int, int]]:
        """Path → (lines added, lines removed) from `a` to `b`; (0, 0) for binary files."""
        listing = self._git().run(
            "diff", "--numstat", "-z", "--no-ext-diff", "--no-textconv", "--no-renames",
            self.resolve(a), self.resolve(b), "--",
        )  # fmt: skip
        stat = {}
        for entry in listing.text.split("\0"):
            if entry:
                added, removed, path = entry.split("\t", 2)
                stat[path] = (0, 0) if added == "-" else (int(added), int(removed))
        return stat

    def read_bytes(self, rev: str, path: str) -> bytes:
        """Content of a file at a commit (of a symbolic link: its target)."""
        mode, blob = self._tree(rev).get(path, ("", ""))
        if mode in ("", SUBMODULE):
            raise UserError(f"{self.path} has no file {path} at {rev}: see `git ls-tree -r {rev}`")
        content = self._objects.blobs.get(blob)
        if content is None:
            content = self._git().run("cat-file", "blob", blob).stdout
            self._objects.keep_blob(blob, content)
        return content

    def read_file(self, rev: str, path: str) -> str:
        """Text of a file at a commit."""
        try:
            return self.read_bytes(rev, path).decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{path} at {rev} is not UTF-8 text: mend the file") from error

    def list_files(self, rev: str, prefix: str = "") -> list[str]:
        """Paths of all files of a commit that start with `prefix`, sorted."""
        return sorted(p for p in self._tree(rev) if p.startswith(prefix))

    def log(self, rev: str, *, exclude: str | None = None, limit: int = 1000) -> list[Commit]:
        """Commits reachable from `rev` (not from `exclude`), newest first."""
        revs = [self.resolve(rev)] + ([f"^{self.resolve(exclude)}"] if exclude else [])
        listing = self._git().run(
            "log", "-z", f"--max-count={limit}", "--no-show-signature",
            "--format=format:%H%x01%P%x01%s%x01%B", *revs, "--",
        )  # fmt: skip
        commits = []
        for entry in listing.text.split("\0"):
            if entry:
                sha, parents, subject, message = entry.split("\x01", 3)
                commits.append(
                    Commit(sha, tuple(parents.split()), subject, message, trailers_of(message))
                )
        return commits

    # -- branches and worktrees ------------------------------------------------------------------

    def create_branch(self, name: str, start: str) -> str:
        """Make branch `name` at `start` and return its commit.

        If it exists at that commit already this changes nothing; elsewhere it is a `UserError`.
        """
        git = self._git()
        sha = self.resolve(start)
        args = ("update-ref", f"refs/heads/{name}", sha, "0" * 40)
        result = git.run(*args, check=False)
        if result.code == 0:
            return sha
        if git.run("check-ref-format", f"refs/heads/{name}", check=False).code != 0:
            raise UserError(f"{name!r} cannot name a branch: use letters, digits, - and /")
        if self.branch_exists(name):
            existing = self.resolve(f"refs/heads/{name}")
            if existing != sha:
                raise UserError(
                    f"branch {name} exists at {existing[:12]}, not at {sha[:12]}: "
                    "choose another name, or delete it"
                )
            return sha
        raise git_error(args, result, self.path)

    def worktree_add(self, path: Path, branch: str) -> Path:
        """Check the existing `branch` out into a new folder and return its absolute path.

        The same call again changes nothing, also after a crash half-way (the folder is then
        completed). Raises `UserError` if the branch is checked out elsewhere or the folder is used.
        """
        path = Path(path).absolute()
        if not self.branch_exists(branch):
            raise UserError(f"{self.path} has no branch {branch}: create it first")
        git_dir = self._registered(path)
        if git_dir is not None and (path / ".git").is_file():
            checked_out = _branch_of(git_dir)
            if checked_out != branch:
                raise UserError(
                    f"{path} is the worktree of {checked_out or 'a detached head'}, not of "
                    f"{branch}: remove it first"
                )
            if not (git_dir / "index").is_file():
                self._git(path).run("reset", "--quiet", "--hard")
            return path
        if path.exists() and any(path.iterdir()):
            raise UserError(f"{path} is not empty: choose another folder for {branch}")
        path.parent.mkdir(parents=True, exist_ok=True)
        # No checkout here: git would start a child that inherits our fixed index file.
        force = ["--force"] if git_dir is not None else []  # registered, folder gone
        result = self._git().run(
            "worktree", "add", "--quiet", "--no-checkout", *force, "--", str(path), branch,
            check=False,
        )  # fmt: skip
        if result.code != 0:
            used = re.search(r"already (?:checked out|used by worktree) at '(.+)'", result.stderr)
            if used:
                raise UserError(
                    f"branch {branch} is checked out at {used.group(1)}: leave it there first"
                )
            raise git_error(("worktree",), result, self.path)
        self._git(path).run("reset", "--quiet", "--hard")
        return path

    def has_worktree(self, path: Path) -> bool:
        """Whether the folder is registered as a worktree (it may be missing on disk)."""
        return self._registered(Path(path).absolute()) is not None

    def worktree_remove(self, path: Path) -> None:
        """Remove a worktree with its folder, also with changes in it; a missing one is fine."""
        path = Path(path).absolute()
        if path == self.path:
            raise UserError(f"{path} is the lab itself, not a worktree: it is not removed")
        if self._registered(path) is not None:
            self._git().run("worktree", "remove", "--force", "--force", "--", str(path))

    def worktrees(self) -> dict[Path, str | None]:
        """Folder → branch (None if detached) of every worktree but the lab's own checkout."""
        found: dict[Path, str | None] = {}
        for path, git_dir in self._worktree_dirs():
            found[path] = _branch_of(git_dir)
        return found

    # -- changing --------------------------------------------------------------------------------

    def commit(
        self,
        paths: Sequence[str],
        message: str,
        trailers: Mapping[str, str] | None = None,
        *,
        worktree: Path,
    ) -> str:
        """Commit the state of `paths` (new, changed or deleted) in a worktree; returns the commit.

        Nothing else that is changed or staged there enters the commit. If `paths` are as they
        were, no commit is made and the head is returned, so a repeated call is harmless.
        """
        if not paths:
            raise UserError("no path to commit: name the changed files")
        git = self._git(worktree)
        missing = [
            path for path in paths
            if not _exists(Path(worktree) / path)
            and git.run("ls-files", "--error-unmatch", "--", path, check=False).code != 0
        ]  # fmt: skip
        if missing:
            raise UserError(f"{worktree} has no file {missing[0]}: nothing to commit there")
        git.run("add", "--all", "--", *paths)
        if git.run("diff", "--cached", "--quiet", "HEAD", "--", *paths, check=False).code == 0:
            return self._require_commit(worktree)
        git.run(
            "commit", "--quiet", "--no-verify", "--cleanup=verbatim", "--only",
            "-m", with_trailers(message, trailers), "--", *paths,
        )  # fmt: skip
        return self._require_commit(worktree)

    def merge(
        self,
        branch: str,
        message: str,
        trailers: Mapping[str, str] | None = None,
        *,
        worktree: Path,
    ) -> str:
        """Merge `branch` into the branch checked out in `worktree`; returns the merge commit.

        Always a merge commit. If it is merged already the head is returned. A conflict leaves
        the worktree as it was and raises `UserError` naming the files.
        """
        git = self._git(worktree)
        target = self.resolve(branch)
        head = self._require_commit(worktree)
        if self.is_ancestor(target, head):
            return head
        self._require_clean(worktree)
        full = with_trailers(message, trailers)
        args = (
            "merge", "--no-ff", "--no-edit", "--no-verify", "--no-autostash", "--no-gpg-sign",
            "--no-verify-signatures", "--cleanup=verbatim", "--quiet", "-m", full, target,
        )  # fmt: skip
        with self._undone_on_conflict(git, "merge", f"{branch} conflicts with {head[:12]}"):
            result = git.run(*args, check=False)
            if result.code != 0 and not self._unmerged(git):
                raise git_error(args, result, git.work_tree)
        return self._require_commit(worktree)

    def revert(
        self,
        commit: str,
        message: str,
        trailers: Mapping[str, str] | None = None,
        *,
        worktree: Path,
    ) -> str:
        """Take a commit (a merge: against its first parent) back by a new commit."""
        git = self._git(worktree)
        target = self.resolve(commit)
        self._require_clean(worktree)
        merge = ["-m", "1"] if len(self.log(target, limit=1)[0].parents) > 1 else []
        args = ("revert", "--no-commit", *merge, target)
        with self._undone_on_conflict(git, "revert", f"{target[:12]} cannot be taken back"):
            result = git.run(*args, check=False)
            if result.code != 0 and not self._unmerged(git):
                raise git_error(args, result, git.work_tree)
        git.run(
            "commit", "--quiet", "--no-verify", "--allow-empty", "--cleanup=verbatim",
            "-m", with_trailers(message, trailers),
        )  # fmt: skip
        return self._require_commit(worktree)

    def reset(self, commit: str, *, worktree: Path) -> None:
        """Move the branch that is checked out in a worktree to `commit`, with index and files."""
        if Path(worktree).absolute() == self.path:
            raise UserError(f"{worktree} is the lab itself, not a worktree: it is not reset")
        self._git(worktree).run("reset", "--quiet", "--hard", self.resolve(commit))

    # -- inside ----------------------------------------------------------------------------------

    def _tree(self, rev: str) -> dict[str, tuple[str, str]]:
        """Path → (mode, object) of every file of a commit."""
        sha = self.resolve(rev)
        tree = self._objects.trees.get(sha)
        if tree is None:
            tree = {}
            for entry in self._git().run("ls-tree", "-r", "-z", sha).text.split("\0"):
                if entry:
                    meta, path = entry.split("\t", 1)
                    mode, _, blob = meta.split(" ")
                    tree[path] = (mode, blob)
            self._objects.keep_tree(sha, tree)
        return tree

    def _git(self, worktree: Path | None = None) -> SafeGit:
        if worktree is None or Path(worktree).absolute() == self.path:
            return SafeGit(self.path, self._dot_git, self._dot_git)
        path = Path(worktree).absolute()
        git_dir = self._registered(path)
        if git_dir is None or not path.is_dir():
            raise UserError(f"{path} is no worktree of {self.path}: add it first")
        return SafeGit(path, git_dir, self._dot_git)

    def _worktree_dirs(self) -> list[tuple[Path, Path]]:
        """(folder, git directory) of each registered worktree; the folder's .git is not asked."""
        found = []
        for record in sorted((self._dot_git / "worktrees").glob("*/gitdir")):
            folder = Path(record.read_text("utf-8").strip()).parent
            found.append((folder, record.parent))
        return found

    def _registered(self, path: Path) -> Path | None:
        for folder, git_dir in self._worktree_dirs():
            if folder == path or folder == path.resolve():
                return git_dir
        return None

    def _commit_of(self, rev: str) -> str | None:
        if rev.startswith("-"):
            return None
        result = self._git().run(
            "rev-parse", "--quiet", "--verify", f"{rev}^{{commit}}", check=False
        )
        return result.text.strip() if result.code == 0 else None

    def _require_commit(self, worktree: Path) -> str:
        args = ("rev-parse", "--quiet", "--verify", "HEAD^{commit}")
        result = self._git(worktree).run(*args, check=False)
        if result.code != 0:
            raise UserError(f"{worktree} has no commit yet: commit the lab's files first")
        sha = result.text.strip()
        self._objects.commits.add(sha)
        return sha

    def _require_clean(self, worktree: Path) -> None:
        # Untracked files are no obstacle; git itself refuses to overwrite one.
        listing = self._git(worktree).run(
            "status", "--porcelain=v1", "-z", "--untracked-files=no", "--no-renames"
        )
        dirty = [entry[3:] for entry in listing.text.split("\0") if entry]
        if dirty:
            raise UserError(
                f"{worktree} has uncommitted changes in {', '.join(dirty[:5])}: "
                "commit them or take them back"
            )

    @staticmethod
    def _unmerged(git: SafeGit) -> list[str]:
        listing = git.run("diff", "--name-only", "-z", "--diff-filter=U", "--no-ext-diff")
        return [name for name in listing.text.split("\0") if name]

    @contextmanager
    def _undone_on_conflict(self, git: SafeGit, what: str, problem: str) -> Iterator[None]:
        yield
        files = self._unmerged(git)
        if files:
            git.run(what, "--abort", check=False)
            git.run("reset", "--quiet", "--hard")
            raise UserError(
                f"{problem} in {', '.join(files[:5])}: bring the branch up to date and try again"
            )


def _branch_of(git_dir: Path) -> str | None:
    """The branch that a worktree is on, None if its head is detached."""
    head = (git_dir / "HEAD").read_text("utf-8").strip()
    branch = head.removeprefix("ref: refs/heads/")
    return branch if branch != head else None


def _exists(path: Path) -> bool:
    return path.exists() or path.is_symlink()
