"""The lab's repository with real git: nothing hostile runs, nothing of the user's moves."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from agent_tools.errors import UserError
from agent_tools.git_configs import Change, LabRepo, init_lab_repo

CONFIG = "optim: {lr: 3.0e-3}\nseed: 0\n"


def user_git(repo: Path, *args: str) -> str:
    """Git as the user runs it, for the test's own set-up and checks."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    env |= {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_NOSYSTEM": "1"}
    command = ["git", "-c", "user.name=u", "-c", "user.email=u@x", *args]
    done = subprocess.run(command, cwd=repo, env=env, capture_output=True, text=True, check=True)
    return done.stdout


@pytest.fixture
def lab(tmp_path):
    path = tmp_path / "lab"
    (path / "configs").mkdir(parents=True)
    (path / "configs" / "train.yaml").write_text(CONFIG)
    (path / "notes.md").write_text("one\ntwo\nthree\n")
    (path / ".gitignore").write_text("runs/\n")
    return init_lab_repo(path)


@pytest.fixture
def incumbent(lab):
    lab.create_branch("selfevo/c/incumbent", "main")
    return lab.worktree_add(lab.path / "runs" / "c" / "incumbent", "selfevo/c/incumbent")


def change(lab: LabRepo, branch: str, text: str, start: str = "selfevo/c/incumbent") -> str:
    """A branch with one commit that sets train.yaml to `text`."""
    lab.create_branch(branch, start)
    folder = lab.worktree_add(lab.path / "runs" / branch.replace("/", "-"), branch)
    (folder / "configs" / "train.yaml").write_text(text)
    return lab.commit(["configs/train.yaml"], f"Set {text!r}", worktree=folder)


def state_of_the_user(lab: LabRepo) -> tuple[object, ...]:
    files = {
        path.relative_to(lab.path): path.read_bytes()
        for path in lab.path.rglob("*")
        if path.is_file() and path.relative_to(lab.path).parts[0] not in (".git", "runs")
    }
    index = (lab.path / ".git" / "index").read_bytes()
    head = (lab.path / ".git" / "HEAD").read_bytes()
    return files, index, head, user_git(lab.path, "rev-parse", "HEAD", "main")


def test_a_new_lab_is_a_repository_with_its_files_committed(lab):
    head = lab.require_clean_head(["configs", "notes.md"])
    assert (head.branch, head.detached) == ("main", False)
    assert lab.list_files("main") == [".gitignore", "configs/train.yaml", "notes.md"]
    assert lab.read_file("main", "configs/train.yaml") == CONFIG
    author = user_git(lab.path, "log", "--format=%an <%ae>").strip()
    assert author == "selfevo agent <agent@selfevo.invalid>"
    assert "worktree" not in (lab.path / ".git" / "config").read_text()  # the lab can be moved
    with pytest.raises(UserError, match="already"):
        init_lab_repo(lab.path)


def test_a_round_leaves_the_users_branch_checkout_and_index_as_they_are(lab, incumbent):
    (lab.path / "notes.md").write_text("staged\n")
    user_git(lab.path, "add", "notes.md")
    (lab.path / "notes.md").write_text("not staged\n")
    (lab.path / "new.txt").write_text("untracked\n")
    before = state_of_the_user(lab)

    sha = change(lab, "selfevo/c/r1-lower", CONFIG.replace("3.0e-3", "3.0e-4"))
    merged = lab.merge(
        "selfevo/c/r1-lower", "Keep r1", {"Selfevo-Round": "1", "Selfevo-Gate": "accept"},
        worktree=incumbent,
    )  # fmt: skip
    back = lab.revert(merged, "Take r1 back", {"Selfevo-Round": "2"}, worktree=incumbent)
    lab.worktree_remove(lab.path / "runs" / "selfevo-c-r1-lower")

    assert state_of_the_user(lab) == before
    assert lab.dirty_paths() == ["new.txt", "notes.md"]
    assert lab.read_file(merged, "configs/train.yaml") == CONFIG.replace("3.0e-3", "3.0e-4")
    assert lab.read_file(back, "configs/train.yaml") == CONFIG
    assert lab.head(incumbent).commit == back
    revert, merge, commit = lab.log("selfevo/c/incumbent", exclude="main")
    assert (revert.sha, merge.sha, commit.sha) == (back, merged, sha)
    assert merge.trailers == {"Selfevo-Round": "1", "Selfevo-Gate": "accept"}
    assert len(merge.parents) == 2
    assert user_git(lab.path, "fsck", "--strict") == ""


def test_every_step_may_be_repeated(lab, incumbent):
    sha = change(lab, "selfevo/c/r1", "seed: 1\n")
    folder = lab.path / "runs" / "selfevo-c-r1"
    start = lab.resolve("selfevo/c/incumbent")
    assert lab.create_branch("selfevo/c/incumbent", "main") == start
    assert lab.worktree_add(folder, "selfevo/c/r1") == folder
    assert lab.commit(["configs/train.yaml"], "again", worktree=folder) == sha
    merged = lab.merge("selfevo/c/r1", "Keep", worktree=incumbent)
    assert lab.merge("selfevo/c/r1", "Keep", worktree=incumbent) == merged
    lab.worktree_remove(folder)
    lab.worktree_remove(folder)
    assert lab.worktrees() == {incumbent: "selfevo/c/incumbent"}


def test_a_worktree_whose_making_was_interrupted_is_completed(lab, incumbent):
    (lab.path / ".git" / "worktrees" / "incumbent" / "index").unlink()
    (incumbent / "notes.md").unlink()
    assert lab.worktree_add(incumbent, "selfevo/c/incumbent") == incumbent
    assert lab.is_dirty(worktree=incumbent) is False
    user_git(lab.path, "worktree", "list")
    for child in [incumbent / "configs" / "train.yaml", *incumbent.glob("*.md")]:
        child.unlink()
    (incumbent / ".git").unlink()
    (incumbent / ".gitignore").unlink()
    (incumbent / "configs").rmdir()
    incumbent.rmdir()  # a crash or a person removed the folder
    lab.worktree_add(incumbent, "selfevo/c/incumbent")
    assert (incumbent / "notes.md").is_file()


def test_diffs_show_modes_links_renames_and_deletions_as_they_are(lab, incumbent):
    (incumbent / "notes.md").chmod(0o755)
    (incumbent / "configs" / "train.yaml").rename(incumbent / "configs" / "TRAIN.yaml")
    (incumbent / "link").symlink_to("/etc/passwd")
    (incumbent / "sp ace\tü.txt").write_text("x\n")
    paths = ["notes.md", "configs/train.yaml", "configs/TRAIN.yaml", "link", "sp ace\tü.txt"]
    sha = lab.commit(paths, "Many", worktree=incumbent)
    assert sorted(lab.changed_paths("main", sha), key=lambda c: c.path) == [
        Change("configs/TRAIN.yaml", "added", "000000", "100644"),
        Change("configs/train.yaml", "deleted", "100644", "000000"),
        Change("link", "added", "000000", "120000"),
        Change("notes.md", "modified", "100644", "100755"),
        Change("sp ace\tü.txt", "added", "000000", "100644"),
    ]
    assert lab.read_bytes(sha, "link") == b"/etc/passwd"
    stat = lab.diff_stat("main", sha)
    assert stat["configs/TRAIN.yaml"] == (2, 0) and stat["notes.md"] == (0, 0)
    diff = lab.diff("main", sha, ["configs"])
    assert "+optim: {lr: 3.0e-3}" in diff and "link" not in diff
    assert lab.changed_paths(sha, sha) == []


def test_a_commit_takes_the_named_paths_only(lab, incumbent):
    (incumbent / "notes.md").write_text("wanted\n")
    (incumbent / "configs" / "train.yaml").write_text("unwanted: 1\n")
    (incumbent / "*.md").write_text("no pattern\n")
    sha = lab.commit(["notes.md"], "One", worktree=incumbent)
    assert [c.path for c in lab.changed_paths("main", sha)] == ["notes.md"]
    assert lab.dirty_paths(worktree=incumbent) == ["*.md", "configs/train.yaml"]
    with pytest.raises(UserError, match="no file missing"):
        lab.commit(["missing"], "None", worktree=incumbent)


def test_a_conflict_is_explained_and_undone(lab, incumbent):
    ours = change(lab, "selfevo/c/r1", "seed: 1\n")
    change(lab, "selfevo/c/r2", "seed: 2\n")
    lab.merge("selfevo/c/r1", "Keep 1", worktree=incumbent)
    head = lab.head(incumbent)
    with pytest.raises(UserError, match=r"conflicts .* in configs/train\.yaml: bring the branch"):
        lab.merge("selfevo/c/r2", "Keep 2", worktree=incumbent)
    assert lab.head(incumbent) == head
    assert lab.is_dirty(worktree=incumbent) is False
    change(lab, "selfevo/c/r3", "seed: 3\n")
    lab.merge("selfevo/c/r3", "Keep 3", worktree=incumbent)
    head = lab.head(incumbent)
    with pytest.raises(UserError, match="cannot be taken back"):
        lab.revert(ours, "Take 1 back", worktree=incumbent)
    assert (lab.head(incumbent), lab.is_dirty(worktree=incumbent)) == (head, False)


def test_locks_dirt_detached_heads_and_wrong_places_are_explained(lab, incumbent, tmp_path):
    lock = lab.path / ".git" / "worktrees" / "incumbent" / "index.lock"
    (incumbent / "notes.md").write_text("x\n")
    lock.touch()
    with pytest.raises(UserError, match=r"index\.lock.*another git process"):
        lab.commit(["notes.md"], "Locked", worktree=incumbent)
    lock.unlink()
    change(lab, "selfevo/c/r1", "seed: 1\n", "main")
    with pytest.raises(UserError, match=r"uncommitted changes in notes\.md"):
        lab.merge("selfevo/c/r1", "Dirty", worktree=incumbent)
    with pytest.raises(UserError, match="is checked out at"):
        lab.worktree_add(lab.path / "runs" / "again", "selfevo/c/incumbent")
    with pytest.raises(UserError, match="not empty"):
        lab.worktree_add(lab.path / "configs", "selfevo/c/r1")
    with pytest.raises(UserError, match="exists at"):
        lab.create_branch("selfevo/c/r1", "main")
    with pytest.raises(UserError, match="cannot name a branch"):
        lab.create_branch("a..b", "main")
    with pytest.raises(UserError, match="no commit 'nowhere'"):
        lab.resolve("nowhere")
    with pytest.raises(UserError, match="no commit '--help'"):
        lab.diff("--help", "main")
    with pytest.raises(UserError, match="no file nothing"):
        lab.read_file("main", "nothing")
    with pytest.raises(UserError, match="not the top of a git repository"):
        LabRepo(tmp_path)
    (lab.path / "configs" / "train.yaml").write_text("x: 1\n")
    with pytest.raises(UserError, match=r"uncommitted changes in configs/train\.yaml"):
        lab.require_clean_head(["configs"])
    user_git(lab.path, "checkout", "-q", "--detach")
    with pytest.raises(UserError, match="detached head"):
        lab.require_clean_head()


def test_git_variables_of_the_caller_do_not_redirect_us(lab, incumbent, tmp_path, monkeypatch):
    other = init_lab_repo(tmp_path / "other")
    before = state_of_the_user(other)
    monkeypatch.setenv("GIT_DIR", str(other.path / ".git"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(other.path / ".git" / "index"))
    monkeypatch.setenv("GIT_WORK_TREE", str(other.path))
    monkeypatch.setenv("GIT_EXTERNAL_DIFF", "false")
    (incumbent / "notes.md").write_text("x\n")
    sha = lab.commit(["notes.md"], "Here", worktree=incumbent)
    assert "+x" in lab.diff("main", sha)
    assert state_of_the_user(other) == before


def make_hostile(lab: LabRepo, marker: Path) -> None:
    """A .git in which everything that git can start runs a program that leaves a mark."""
    evil = marker.with_name("evil.sh")
    evil.write_text(f'#!/bin/sh\necho "$0 $*" >> "{marker}"\ncat\n')
    evil.chmod(0o755)
    hooks = lab.path / ".git" / "hooks"
    hooks.mkdir(exist_ok=True)
    for name in (
        "applypatch-msg", "pre-commit", "prepare-commit-msg", "commit-msg", "post-commit",
        "pre-merge-commit", "post-merge", "post-checkout", "post-index-change",
        "reference-transaction", "pre-auto-gc", "post-rewrite", "fsmonitor-watchman",
    ):  # fmt: skip
        (hooks / name).symlink_to(evil)
    included = lab.path / ".git" / "included"
    included.write_text(
        f'[filter "inc"]\n\tclean = {evil}\n\tsmudge = {evil}\n\trequired = true\n'
        f'[diff "inc"]\n\ttextconv = {evil}\n\tcommand = {evil}\n'
    )
    with (lab.path / ".git" / "config").open("a") as file:
        file.write(f"""
[include]
\tpath = {included}
[core]
\tfsmonitor = {evil}
\thooksPath = {hooks}
\tsshCommand = {evil}
\tpager = {evil}
\teditor = {evil}
\taskPass = {evil}
\tworktree = /
\tattributesFile = {lab.path}/.git/info/attributes
[filter "Evil one"]
\tclean = {evil}
\tsmudge = {evil}
\trequired = true
[filter "proc"]
\tprocess = {evil}
\trequired = true
[diff]
\texternal = {evil}
[diff "evil"]
\ttextconv = {evil}
\tcommand = {evil}
[merge "evil"]
\tname = evil
\tdriver = {evil} %A
[alias]
\tcommit = !{evil}
\tstatus = !{evil}
\tworktree = !{evil}
[commit]
\tgpgSign = true
\ttemplate = {evil}
[gpg]
\tprogram = {evil}
[gpg "openpgp"]
\tprogram = {evil}
[merge]
\tverifySignatures = true
[log]
\tshowSignature = true
[trailer "Selfevo-Round"]
\tcommand = {evil}
[pager]
\tlog = {evil}
\tdiff = {evil}
[branch "selfevo/c/incumbent"]
\tmergeOptions = --strategy=evil
[remote "origin"]
\turl = ext::{evil}
\tuploadpack = {evil}
\tpromisor = true
[protocol "ext"]
\tallow = always
[credential]
\thelper = !{evil}
[sequence]
\teditor = {evil}
""")
    info = lab.path / ".git" / "info"
    info.mkdir(exist_ok=True)
    (info / "attributes").write_text(
        "*.yaml filter=inc diff=inc merge=evil\n*.md filter=proc diff=evil\n"
    )


def test_nothing_of_a_hostile_git_directory_runs(lab, tmp_path):
    marker = tmp_path / "marker"
    make_hostile(lab, marker)
    lab.create_branch("selfevo/c/incumbent", "main")
    incumbent = lab.worktree_add(lab.path / "runs" / "i", "selfevo/c/incumbent")
    (incumbent / ".gitattributes").write_text("*.txt filter=proc\n*.yaml merge=evil\n")
    (incumbent / "a.txt").write_text("a\n")
    lab.commit([".gitattributes", "a.txt"], "Attributes", worktree=incumbent)
    sha = change(lab, "selfevo/c/r1", "seed: 1\n")
    (incumbent / "configs" / "train.yaml").write_text(CONFIG + "other: 1\n")
    lab.commit(["configs/train.yaml"], "Ours", {"Selfevo-Round": "1"}, worktree=incumbent)
    with pytest.raises(UserError, match="conflicts"):
        lab.merge("selfevo/c/r1", "Keep", worktree=incumbent)
    lab.create_branch("selfevo/c/r2", sha)
    two = lab.worktree_add(lab.path / "runs" / "two", "selfevo/c/r2")
    (two / "notes.md").write_text("two\n")
    lab.commit(["notes.md"], "Notes", worktree=two)
    merged = lab.merge("main", "Nothing new", worktree=two)
    lab.create_branch("selfevo/c/r3", "selfevo/c/incumbent")
    three = lab.worktree_add(lab.path / "runs" / "three", "selfevo/c/r3")
    (three / "notes.md").write_text("three\n")
    lab.commit(["notes.md"], "Notes", worktree=three)
    (incumbent / "a.txt").write_text("b\n")
    lab.commit(["a.txt"], "b", worktree=incumbent)
    merged = lab.merge("selfevo/c/r3", "Keep 3", {"Selfevo-Round": "3"}, worktree=incumbent)
    lab.revert(merged, "Back", worktree=incumbent)
    assert "seed: 1" in lab.diff("main", sha)
    assert lab.changed_paths("main", sha)
    assert lab.diff_stat("main", sha)["configs/train.yaml"] == (1, 2)
    assert lab.read_file(sha, "configs/train.yaml") == "seed: 1\n"
    (lab.path / "notes.md").write_text("dirty\n")
    assert lab.dirty_paths() == ["notes.md"]
    assert lab.log("selfevo/c/incumbent")
    assert lab.branches("selfevo/")
    with pytest.raises(UserError, match="no file gone"):
        lab.read_file("main", "gone")
    lab.worktree_remove(two)
    assert not marker.exists(), marker.read_text()

    # The trap is live: plain git falls into it.
    subprocess.run(["git", "-C", str(lab.path), "commit", "-m", "x", "--allow-empty"], check=False)
    subprocess.run(["git", "-C", str(lab.path), "diff", "--stat"], check=False)
    assert marker.exists()


def test_a_program_named_by_a_configured_merge_driver_is_replaced_by_an_ordinary_merge(
    lab, incumbent, tmp_path
):
    marker = tmp_path / "marker"
    make_hostile(lab, marker)
    text = "".join(f"key{i}: {i}\n" for i in range(20))
    base = change(lab, "selfevo/c/base", text)
    lab.merge("selfevo/c/base", "Base", worktree=incumbent)
    change(lab, "selfevo/c/r1", text.replace("key1: 1\n", "key1: one\n"), base)
    folder = incumbent / "configs" / "train.yaml"
    folder.write_text(text.replace("key18: 18", "key18: eighteen"))
    lab.commit(["configs/train.yaml"], "Ours", worktree=incumbent)
    merged = lab.merge("selfevo/c/r1", "Keep", worktree=incumbent)
    expected = text.replace("key1: 1\n", "key1: one\n").replace("key18: 18", "key18: eighteen")
    assert lab.read_file(merged, "configs/train.yaml") == expected
    assert not marker.exists(), marker.read_text()


def test_a_program_that_the_configuration_names_later_does_not_run(lab, tmp_path, monkeypatch):
    """The configuration is listed once while it stands still, and again when it has changed."""
    from agent_tools import git_safe

    monkeypatch.setattr(git_safe, "_SETTLED_NS", -1)
    commands = []
    real = git_safe.execute

    def execute(args, *rest):
        commands.append(args[0])
        return real(args, *rest)

    monkeypatch.setattr(git_safe, "execute", execute)
    lab.head()
    lab.branches()
    assert commands.count("config") == 1
    marker = tmp_path / "marker"
    evil = tmp_path / "evil.sh"
    evil.write_text(f'#!/bin/sh\necho run >> "{marker}"\ncat\n')
    evil.chmod(0o755)
    with (lab.path / ".git/config").open("a") as file:
        file.write(f'[filter "late"]\n\tclean = {evil}\n')
    (lab.path / ".git/info").mkdir(exist_ok=True)
    (lab.path / ".git/info/attributes").write_text("notes.md filter=late\n")
    (lab.path / "notes.md").write_text("changed\n")
    lab.commit(["notes.md"], "Notes", worktree=lab.path)
    assert commands.count("config") == 2 and not marker.exists()
    # files that are included may change unseen, so they are read every time
    with (lab.path / ".git/config").open("a") as file:
        file.write(f"[include]\n\tpath = {tmp_path / 'more'}\n")
    (tmp_path / "more").write_text("")
    lab.head()
    before = commands.count("config")
    (tmp_path / "more").write_text(f'[filter "late"]\n\tclean = {evil}\n')
    (lab.path / "notes.md").write_text("again\n")
    lab.commit(["notes.md"], "Notes", worktree=lab.path)
    assert commands.count("config") > before and not marker.exists()


def test_branches_moved_by_others_are_seen_although_objects_are_kept(lab):
    first = lab.resolve("main")
    assert lab.read_file("main", "notes.md")
    (lab.path / "notes.md").write_text("second\n")
    second = lab.commit(["notes.md"], "Second", worktree=lab.path)
    assert lab.read_file("main", "notes.md") == "second\n" and lab.resolve("main") == second
    subprocess.run(["git", "-C", str(lab.path), "reset", "--hard", first], check=True)
    assert lab.resolve("main") == first and lab.read_file("main", "notes.md") != "second\n"
