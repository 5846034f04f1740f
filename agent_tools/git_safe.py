"""Runs git on a repository that we do not trust.

A lab's own ``.git`` (configuration, hooks, attributes) can name programs that git would start:
hooks, fsmonitor, external and textconv diffs, clean and smudge filters, merge drivers, trailer
commands, transports. Every command here goes through `SafeGit`, which

* fixes the git directory, work tree and index itself (``core.worktree``, ``.git`` files and GIT_*
  variables of the caller are not followed),
* ignores system and global configuration,
* overrides every setting of the repository's configuration that starts a program, by name where
  the name is free (``filter.<name>.clean`` …); overriding is done in the command's environment,
  which beats the repository's files,
* uses GitPython's command object, which holds no process or handle between calls, so there is
  nothing to close.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from agent_tools.errors import InfraError, UserError

AUTHOR_NAME = "selfevo agent"
AUTHOR_EMAIL = "agent@selfevo.invalid"
TIMEOUT_S = 120

# Same for every repository. "none" names no protocol, so all of them are refused.
_SETTINGS = {
    "core.hooksPath": "/dev/null",
    "core.fsmonitor": "false",
    "core.attributesFile": "/dev/null",
    "core.excludesFile": "/dev/null",
    "core.sshCommand": "false",
    "core.gitProxy": "",
    "core.askPass": "false",
    "core.editor": "false",
    "core.commitGraph": "false",  # a file that may say other parents than the commits
    "core.multiPackIndex": "false",
    "core.sparseCheckout": "false",
    "core.fileMode": "true",
    "core.symlinks": "true",
    "core.ignoreCase": "false",
    "core.filesRefLockTimeout": "3000",  # ms that a branch may be held by another git
    "core.packedRefsTimeout": "3000",
    "core.pager": "cat",
    "core.quotePath": "false",
    "core.autocrlf": "false",
    "diff.external": "",
    "diff.ignoreSubmodules": "all",
    "diff.renames": "false",
    "diff.noprefix": "false",
    "diff.mnemonicPrefix": "false",
    "color.ui": "false",
    "gpg.program": "false",
    "commit.gpgSign": "false",
    "tag.gpgSign": "false",
    "log.showSignature": "false",
    "merge.verifySignatures": "false",
    "merge.renames": "false",
    "merge.autoStash": "false",
    "rerere.enabled": "false",
    "commit.template": "",
    "submodule.recurse": "false",
    "gc.auto": "0",
    "maintenance.auto": "false",
    "protocol.allow": "never",
    "protocol.ext.allow": "never",
    "advice.detachedHead": "false",
}
_ENVIRONMENT = {
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_CONFIG_SYSTEM": "/dev/null",
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_CONFIG_PARAMETERS": "",
    "GIT_ATTR_NOSYSTEM": "1",
    "GIT_ALLOW_PROTOCOL": "none",
    "GIT_NO_LAZY_FETCH": "1",
    "GIT_TERMINAL_PROMPT": "0",
    "GIT_ASKPASS": "false",
    "GIT_SSH_COMMAND": "false",
    "GIT_EDITOR": "false",
    "GIT_PAGER": "cat",
    "GIT_EXTERNAL_DIFF": "",
    "GIT_LITERAL_PATHSPECS": "1",
    "GIT_TEMPLATE_DIR": "",
    "GIT_ALTERNATE_OBJECT_DIRECTORIES": "",
    "GIT_NAMESPACE": "",
    "GIT_NO_REPLACE_OBJECTS": "1",
    "GIT_GRAFT_FILE": "/dev/null",
    "GIT_SHALLOW_FILE": "",
    "GIT_OPTIONAL_LOCKS": "0",
    "GIT_AUTHOR_NAME": AUTHOR_NAME,
    "GIT_AUTHOR_EMAIL": AUTHOR_EMAIL,
    "GIT_COMMITTER_NAME": AUTHOR_NAME,
    "GIT_COMMITTER_EMAIL": AUTHOR_EMAIL,
}
# What an ordinary three-way merge does, for files that a custom merge driver claims.
_PLAIN_MERGE = "git merge-file --marker-size=%L %A %O %B"
# Settings with a free middle part that start a program, and what they are set to.
_NAMED = (
    (re.compile(r"filter\..+\.(clean|smudge|process)"), ""),
    (re.compile(r"filter\..+\.required"), "false"),
    (re.compile(r"diff\..+\.(command|textconv)"), ""),
    (re.compile(r"merge\..+\.driver"), _PLAIN_MERGE),
    (re.compile(r"branch\..+\.mergeoptions"), ""),
    (re.compile(r"gpg\..+\.program"), "false"),
    (re.compile(r"gpg\.ssh\.defaultkeycommand"), "false"),
    (re.compile(r"trailer\..+\.(command|cmd)"), "false"),
    (re.compile(r"protocol\..+\.allow"), "never"),
    (re.compile(r"remote\..+\.(uploadpack|receivepack|vcs|promisor)"), ""),
    (re.compile(r"credential\.(.+\.)?helper"), ""),
    (re.compile(r"pager\..+"), "cat"),
    (re.compile(r"submodule\..+\.update"), "none"),
    (re.compile(r"extensions\.partialclone"), ""),
)
# Overrides by git directory, with the stamps of the files that they were listed from. A file that
# changed a moment ago is not trusted to show a further change by its stamp (clocks tick coarsely).
_Stamp = tuple[int, int, int] | None
_listed: dict[Path, tuple[tuple[_Stamp, ...], dict[str, str]]] = {}
_MAX_LISTED = 64
_SETTLED_NS = 1_000_000_000


def _stamp(file: Path) -> _Stamp:
    """(change time in ns, inode, size); None where there is no file."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_ctime_ns, found.st_ino, found.st_size


@dataclass(frozen=True)
class GitResult:
    """Exit code and output of one git command."""

    code: int
    stdout: bytes
    stderr: str

    @property
    def text(self) -> str:
        """Standard output as text; bytes that are no UTF-8 are replaced."""
        return self.stdout.decode("utf-8", "replace")


class SafeGit:
    """Git commands on one work tree, with nothing of the repository allowed to run.

    work_tree: the top of the work tree; git_dir: its git directory (``.git``, or
    ``.git/worktrees/<name>``); common_dir: the repository's ``.git``.
    """

    def __init__(self, work_tree: Path, git_dir: Path, common_dir: Path) -> None:
        self.work_tree = work_tree
        self.git_dir = git_dir
        self.common_dir = common_dir

    def run(self, *args: str, check: bool = True, stdin: IO[bytes] | None = None) -> GitResult:
        """Run ``git *args``; with `check`, a failure raises `UserError` with git's reason."""
        result = self._execute(args, {**_SETTINGS, **self._overrides()}, stdin)
        if check and result.code != 0:
            raise git_error(args, result, self.work_tree)
        return result

    def text(self, *args: str) -> str:
        """Standard output of ``git *args`` without the last line end."""
        return self.run(*args).text.rstrip("\n")

    def _overrides(self) -> dict[str, str]:
        """Settings of this repository (included files too) that would start a program.

        Listed again whenever a configuration file is another one than at the last listing (its
        change time cannot be set back), and every time where other files are included.
        """
        files = (self.common_dir / "config", self.git_dir / "config.worktree")
        stamp = tuple(_stamp(file) for file in files)
        known = _listed.get(self.git_dir)
        if known is not None and known[0] == stamp:
            return known[1]
        listing = self._execute(
            ("config", "--includes", "--list", "--name-only", "-z"), _SETTINGS, None
        )
        if listing.code != 0:
            raise git_error(("config", "--list"), listing, self.work_tree)
        overrides = {}
        names = listing.text.split("\0")
        for name in names:
            for pattern, value in _NAMED:
                if pattern.fullmatch(name):
                    overrides[name] = value
        _listed.pop(self.git_dir, None)
        settled = all(made is None or time.time_ns() - made[0] > _SETTLED_NS for made in stamp)
        if settled and not any(name.startswith("include") for name in names):
            if len(_listed) >= _MAX_LISTED:
                _listed.clear()
            _listed[self.git_dir] = stamp, overrides
        return overrides

    def _execute(
        self, args: Sequence[str], settings: Mapping[str, str], stdin: IO[bytes] | None
    ) -> GitResult:
        env = {
            **_ENVIRONMENT,
            "GIT_DIR": str(self.git_dir),
            "GIT_COMMON_DIR": str(self.common_dir),
            "GIT_WORK_TREE": str(self.work_tree),
            "GIT_INDEX_FILE": str(self.git_dir / "index"),
            "GIT_OBJECT_DIRECTORY": str(self.common_dir / "objects"),
            "GIT_CONFIG_COUNT": str(len(settings)),
        }
        for i, (name, value) in enumerate(settings.items()):
            env[f"GIT_CONFIG_KEY_{i}"] = name
            env[f"GIT_CONFIG_VALUE_{i}"] = value
        return execute(args, self.work_tree, env, stdin)


def init_repository(path: Path) -> None:
    """``git init`` with branch main and no template (templates carry hooks)."""
    env = {
        **_ENVIRONMENT,
        "GIT_CONFIG_COUNT": "0",
        "GIT_DIR": str(path / ".git"),
        "GIT_WORK_TREE": str(path),
        "GIT_COMMON_DIR": str(path / ".git"),
        "GIT_OBJECT_DIRECTORY": str(path / ".git" / "objects"),
    }
    args = ("init", "--quiet", "--initial-branch=main", "--template=")
    result = execute(args, path, env, None)
    if result.code != 0:
        raise git_error(args, result, path)
    # A fixed GIT_WORK_TREE is written down as core.worktree, which would pin the lab to its place.
    execute(
        ("config", "--file", str(path / ".git" / "config"), "--unset", "core.worktree"),
        path, env, None,
    )  # fmt: skip


def execute(
    args: Sequence[str], cwd: Path, env: Mapping[str, str], stdin: IO[bytes] | None
) -> GitResult:
    """Run git through GitPython; a git that hangs is killed after `TIMEOUT_S`."""
    program = shutil.which("git")
    if program is None:
        raise UserError("the git program is not on PATH: install git (apt-get install git)")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    import git  # lazy: importing GitPython runs git

    try:
        code, stdout, stderr = git.Git(str(cwd)).execute(
            [program, *args],
            istream=stdin,
            with_extended_output=True,
            with_exceptions=False,
            stdout_as_string=False,
            strip_newline_in_stdout=False,
            kill_after_timeout=TIMEOUT_S,
            env=dict(env),
        )
    except git.exc.GitCommandNotFound as error:
        raise UserError(f"cannot run git in {cwd}: check that the folder exists") from error
    text = stderr if isinstance(stderr, str) else stderr.decode("utf-8", "replace")
    return GitResult(int(code), stdout or b"", text)


#: A full disk, quota or file size limit, in git's words or the system's. Git names the cause in
#: some places only; a write that fails for want of a permission says so, and is told apart above.
_FULL = re.compile(
    r"No space left|Disk quota exceeded|File too large|Input/output error|write error|"
    r"(unable|failed|could not|cannot|couldn't) (to )?(write|append|flush|fsync|close|create temp)|"
    r"file write error|write failure|sha1 file .* (write|error)|wrapper.* write|unable to deflate",
    re.IGNORECASE,
)


def git_error(args: Sequence[str], result: GitResult, where: Path) -> Exception:
    """The exception for a failed command: one line, with the repair where we know it."""
    lines = [line.strip() for line in result.stderr.splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith("hint:")] or ["no message"]
    reason = re.sub(r"^(fatal|error): ", "", lines[0])
    if "Permission denied" in result.stderr or "Read-only file system" in result.stderr:
        return UserError(f"git cannot write in {where} ({reason}): make the repository writable")
    if _FULL.search(result.stderr):
        return InfraError(f"git cannot write in {where} ({reason}): free some space and run again")
    if result.code < 0:
        return InfraError(f"git {args[0]} in {where} was killed ({reason}): run again")
    lock = re.search(r"[Uu]nable to create '([^']+\.lock)'", result.stderr)
    if lock or "cannot lock ref" in result.stderr:
        name = lock.group(1) if lock else "the branch"
        return UserError(
            f"{name} of {where} is locked by another git process: wait for it, or remove the "
            ".lock file if no git is running"
        )
    return UserError(f"git {args[0]} failed in {where}: {reason}")
