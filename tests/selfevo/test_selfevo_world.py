"""What people, disks and clocks do to a running campaign: real git, real processes."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from selfevo_driver import Sessions
from selfevo_lab import new_lab
from selfevo_outcome import signature

from agent_tools.errors import InfraError
from agent_tools.git_safe import GitResult, git_error
from selfevo import loop
from selfevo.arms import Commands
from selfevo.campaign import RunOptions, read_view
from selfevo.store import read_events

Meddle = Callable[[Path], None]


def git(lab: Path, *args: str) -> str:
    return subprocess.run(
        ["git", "-C", str(lab), "-c", "user.name=U", "-c", "user.email=u@x", *args],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()


def run_with(lab: Path, commands: Commands, acts: dict[str, Meddle]) -> Path:
    """A campaign of one round; each act happens once, at the live line that begins as its key."""
    left = dict(acts)

    def say(line: str) -> None:
        for start in [s for s in left if line.startswith(s)]:
            left.pop(start)(lab)

    code, folder = loop.start(lab, RunOptions(agent="rules", rounds=1), say, commands)
    assert code == 0 and not left
    view = read_view(folder)
    assert view.rounds[1].verdict == "accept" and view.prs[1].state == "merged"
    log = git(lab, "log", "--format=%s", "--topo-order", "selfevo/c1/incumbent").splitlines()
    title = view.prs[1].title
    assert log == ["Note round 1: accept", f"Keep PR 1: {title}", title, *log[3:]]
    assert "lr: 3.0e-4" in git(lab, "show", "selfevo/c1/incumbent:configs/train.yaml")
    return folder


def commit_on(lab: Path, branch: str, path: str, content: str) -> str:
    """A commit on a branch that is checked out elsewhere: plumbing that git does not refuse."""
    tree = lab.parent / "elsewhere"
    git(lab, "worktree", "add", "--force", "--detach", str(tree), branch)
    (tree / path).write_text(content)
    git(tree, "add", path)
    git(tree, "commit", "-m", "mine")
    sha = git(tree, "rev-parse", "HEAD")
    git(lab, "worktree", "remove", "--force", str(tree))
    git(lab, "update-ref", f"refs/heads/{branch}", sha)
    return sha


def test_checkouts_dirt_lost_branches_and_worktrees_change_nothing(
    lab: Path, commands: Commands, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    git(tmp_path, "init", "--quiet", str(other))
    git(other, "commit", "--allow-empty", "-m", "x")
    git(lab, "-c", "protocol.file.allow=always", "submodule", "add", str(other), "vendor")
    git(lab, "commit", "-m", "a submodule")

    def leave_main(lab: Path) -> None:
        git(lab, "checkout", "-b", "side")
        (lab / "configs/train.yaml").write_text("mine: 1\n")
        (lab / "selfevo.yaml").write_text("rounds: 99\n")

    def lose_branches(lab: Path) -> None:
        git(lab, "update-ref", "-d", "refs/heads/selfevo/c1/r1-lower-optim-lr")
        git(lab, "update-ref", "-d", "refs/heads/selfevo/c1/incumbent")

    def lose_worktrees(lab: Path) -> None:
        git(lab, "stash")
        git(lab, "checkout", "--detach", "main")
        git(lab, "branch", "-m", "main", "trunk")
        shutil.rmtree(lab / "runs/c1/worktrees")
        git(lab, "worktree", "prune")

    acts = {
        "  PR 1: commit": leave_main,
        "  gate:": lose_branches,
        "  PR 1 kept": lose_worktrees,
    }
    run_with(lab, commands, acts)
    assert git(lab, "branch", "--show-current") == ""  # where the person left it
    assert not git(lab, "branch", "--list", "selfevo/c1/found-*")


def test_commits_of_others_on_the_loops_branches_are_kept_apart(
    lab: Path, commands: Commands
) -> None:
    found: list[str] = []

    def sneak(lab: Path) -> None:
        commit_on(lab, "selfevo/c1/r1-lower-optim-lr", "selfevo.yaml", "rounds: 99\n")

    def extend(lab: Path) -> None:
        found.append(commit_on(lab, "selfevo/c1/incumbent", "mine.txt", "mine\n"))

    def rewrite(lab: Path) -> None:
        empty = git(lab, "hash-object", "-t", "tree", "/dev/null")
        sha = git(lab, "commit-tree", empty, "-m", "another history")
        found.append(sha)
        git(lab, "update-ref", "refs/heads/selfevo/c1/incumbent", sha)

    acts = {"  train r1-candidate-s0": sneak, "  gate:": extend, "  PR 1 kept": rewrite}
    folder = run_with(lab, commands, acts)
    # what was merged is what was guarded and measured, not what its branch held by then
    main = git(lab, "show", "main:selfevo.yaml")
    assert git(lab, "show", "selfevo/c1/incumbent:selfevo.yaml") == main
    events = [e for e in read_events(folder / "events.jsonl")[0] if e.kind == "branch.restored"]
    assert [e.data["found"] for e in events] == found
    for event in events:
        assert git(lab, "rev-parse", event.data["kept_as"]) == event.data["found"]


def test_a_locked_or_unreadable_database_is_set_aside(lab: Path, commands: Commands) -> None:
    with Sessions() as sessions:
        assert sessions.run(lab, "start", number=60) < 0
    database = lab / "runs/c1/checkpoints.sqlite"
    holder = sqlite3.connect(database)
    holder.execute("begin exclusive")
    assert loop.resume(lab, None, lambda line: None, commands)[0] == 0
    holder.close()
    assert database.with_suffix(".damaged").exists() and read_view(lab / "runs/c1").state == "done"


def test_a_clock_that_jumps_changes_nothing(lab: Path, undisturbed: dict[str, Any]) -> None:
    day = 86_400.0
    with Sessions() as sessions:
        offsets = [0.0, 40 * day, -day, 3.0, -400 * day]
        assert sessions.run(lab, "start", number=70, clock=offsets) < 0
        assert sessions.run(lab, "resume", clock=list(reversed(offsets))) == 0
    assert signature(lab) == undisturbed
    view = read_view(lab / "runs/c1")
    assert 0 < view.active_seconds < day and min(view.node_seconds.values()) >= 0


# ------------------------------------------------------------------ full disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path | None]:
    """A file system of 24 MB, where this user may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    argv = ["mount", "-t", "tmpfs", "-o", "size=24m", "none", str(folder)]
    mounted = subprocess.run(argv, capture_output=True).returncode == 0
    yield folder if mounted else None
    if mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_ends_with_exit_5_and_resume_goes_on(
    tmp_path: Path, small_disk: Path | None, undisturbed: dict[str, Any]
) -> None:
    """The disk (else, for ordinary users, the largest file) leaves room for less and less of it."""
    lab = new_lab((small_disk or tmp_path) / "lab")
    filler = lab.parent / "filler"
    log = tmp_path / "log"
    action = "start"
    with Sessions() as sessions:
        for room in (150_000, 80_000, 150_000, 200_000, 260_000, 330_000, 420_000):
            order: dict[str, object] = {"log": str(log)}
            if small_disk:
                filler.unlink(missing_ok=True)
                free = shutil.disk_usage(lab).free
                with filler.open("wb") as file:
                    file.write(bytes(max(0, free - room)))
            else:
                order["file_bytes"] = room // 10
            code = sessions.run(lab, action, **order)
            if code == 0:
                break
            assert code == 5, log.read_text()[-3000:]
            assert "error: " in log.read_text().splitlines()[-1]
            begun = (lab / "runs/c1/events.jsonl").exists()
            action = "resume" if begun and read_events(lab / "runs/c1/events.jsonl")[0] else "start"
            if action == "start":
                shutil.rmtree(lab / "runs", ignore_errors=True)
        filler.unlink(missing_ok=True)
        assert sessions.run(lab, action, log=str(log)) == 0, log.read_text()[-3000:]
    assert signature(lab) == undisturbed


@pytest.mark.parametrize(
    "words",
    [
        "error: unable to write file configs/train.yaml: No space left on device",
        "fatal: unable to write new index file",
        "fatal: cannot create '/lab/.git/x': Disk quota exceeded",
        "error: file write error: File too large",
        "fatal: Unable to create '/lab/.git/index.lock': No space left on device",
        "error: unable to create temporary file: No space left on device",
        "fatal: write error: Input/output error",
        "fatal: failed to write commit object",
    ],
)
def test_git_on_a_full_disk_is_the_machines_fault(words: str) -> None:
    error = git_error(("commit",), GitResult(128, b"", words), Path("/lab"))
    assert isinstance(error, InfraError) and "free some space" in str(error)
    assert error.exit_code == 5
