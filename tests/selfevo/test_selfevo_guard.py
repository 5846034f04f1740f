"""The guard: nothing but allowed values of allowed keys in allowed files gets through."""

from __future__ import annotations

import pytest

from selfevo.config import load_space
from selfevo.guard import REGULAR, FileChange, check, check_keys, manifest, tampered, yaml_fault
from selfevo.lab import TEMPLATE

SPACE = load_space((TEMPLATE / "search_space.yaml").read_text())
TRAIN = (TEMPLATE / "configs/train.yaml").read_text()


def change(
    path: str,
    content: str | bytes | None = "x\n",
    status: str = "M",
    old: str = REGULAR,
    new: str = REGULAR,
) -> FileChange:
    raw = content.encode() if isinstance(content, str) else content
    return FileChange(path, status, old, new, raw)


def edited(old: str, new: str) -> FileChange:
    assert old in TRAIN
    return change("configs/train.yaml", TRAIN.replace(old, new))


def test_one_step_of_an_allowed_key_passes_with_its_edit() -> None:
    result = check([edited("lr: 3.0e-3", "lr: 3.0e-4")], TRAIN, SPACE)
    assert result.ok and [(e.key, e.before, e.after) for e in result.edits] == [
        ("optim.lr", 3.0e-3, 3.0e-4)
    ]


@pytest.mark.parametrize(
    ("old", "new", "word"),
    [
        ("lr: 3.0e-3", "lr: 3.0e-5", "largest step"),
        ("lr: 3.0e-3", "lr: '3e-4'", "number"),
        ("objective: cispo", "objective: expert_iteration", "search_space"),
        ("model: {checkpoint: nano}", "model: {checkpoint: /tmp/x}", "search_space"),
        ("food-reviews]", "vowel-speaker]", "search_space"),
        ("  warmup_steps: 1\n", "", "removed"),
        ("  warmup_steps: 1\n", "  warmup_steps: 1\n  betas: [0.1, 0.2]\n", "search_space"),
        ("lr: 3.0e-3\n", "lr: 3.0e-4\n  betas: [0.1, 0.2]\n", "search_space"),
        ("lr: 3.0e-3\n  warmup_steps: 1", "lr: 3.0e-4\n  warmup_steps: 2", "2 keys changed"),
        ("group_size: 8", "group_size: 8\nseed: 7", "not valid YAML"),
        ("objective: cispo", "objective: cispo\nseed: 7", "key seed"),
        ("# The CISPO run", "# the CISPO run", "no value changes"),
    ],
)
def test_key_edits_outside_the_space_are_refused(old: str, new: str, word: str) -> None:
    result = check([edited(old, new)], TRAIN, SPACE)
    assert not result.ok and any(word in reason for reason in result.reasons), result.reasons


@pytest.mark.parametrize(
    "path",
    [
        "selfevo.yaml",
        "search_space.yaml",
        "configs/eval.yaml",
        ".gitattributes",
        "scaffold/.gitattributes",
        ".gitmodules",
        "configs/train.yaml/x",
        "memory/NOTES.md",
        "Configs/train.yaml",
        "configs/TRAIN.yaml",
        "scaffold/../selfevo.yaml",
        "/etc/passwd",
        "configs\\train.yaml",
        "configs/train.yaml\n",
        "scaffold/system.md\u200b",
        "scaffold/a/b.md",
        "scaffold/run.py",
        ".git/hooks/post-commit",
        "skills/x/run.sh",
        "conﬁgs/train.yaml",
    ],
)
def test_paths_outside_the_allow_list_are_refused(path: str) -> None:
    assert not check([change(path, status="A", old="000000")], TRAIN, SPACE).ok


def test_spelling_that_differs_in_case_only_is_refused() -> None:
    found = check(
        [change("scaffold/system.md", status="A", old="000000")],
        TRAIN,
        SPACE,
        tracked=["scaffold/System.md"],
    )
    assert "case only" in found.reasons[0]


@pytest.mark.parametrize(
    ("status", "old", "new", "word"),
    [
        ("D", REGULAR, "000000", "deletes"),
        ("R", REGULAR, REGULAR, "renames"),
        ("T", REGULAR, "120000", "type"),
        ("M", REGULAR, "120000", "symbolic link"),
        ("A", "000000", "160000", "submodule"),
        ("M", REGULAR, "100755", "executable"),
        ("M", "100755", REGULAR, "mode"),
    ],
)
def test_renames_links_modes_and_submodules_are_refused(
    status: str, old: str, new: str, word: str
) -> None:
    result = check([change("scaffold/system.md", status=status, old=old, new=new)], TRAIN, SPACE)
    assert word in result.reasons[0]


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"\xff\xfe", "UTF-8"),
        (b"a" * 70_000, "limit"),
        (b"a\x00b", "control"),
        ("a\u202eb", "control"),
        ("\ufeffa", "control"),
        (b"a\rb", "control"),
    ],
)
def test_unreadable_and_huge_content_is_refused(content: str | bytes, word: str) -> None:
    assert word in check([change("scaffold/system.md", content)], TRAIN, SPACE).reasons[0]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("a: &x 1\nb: *x\n", "anchor"),
        ("a: *x\n", "alias"),
        ("b: {<<: {c: 1}}\n", "merge"),
        ("a: 1\na: 2\n", "duplicate"),
        ("a: !!python/object:os.system x\n", "tag"),
        ("a: 1\n---\nb: 2\n", "document"),
        ("a: [1\n", "not valid YAML"),
        ("- 1\n", "mapping"),
    ],
)
def test_tricky_yaml_is_refused(text: str, word: str) -> None:
    assert word in (yaml_fault(text, "f.yaml") or "")
    assert check_keys(TRAIN, text, SPACE)[1]


def test_many_files_are_bounded_together_and_an_empty_change_is_refused() -> None:
    many = [change(f"scaffold/a{i}.md", "x" * 60_000, status="A", old="000000") for i in range(4)]
    assert "together" in check(many, TRAIN, SPACE).reasons[0]
    assert "changes nothing" in check([], TRAIN, SPACE).reasons[0]


def test_manifest_sees_changes_and_losses() -> None:
    expected = manifest({"selfevo.yaml": b"a", "configs/eval.yaml": b"b"})
    assert tampered(expected, {"selfevo.yaml": b"a", "configs/eval.yaml": b"b"}) == []
    assert tampered(expected, {"selfevo.yaml": b"A", "configs/eval.yaml": None}) == [
        "configs/eval.yaml is missing",
        "selfevo.yaml has changed",
    ]
