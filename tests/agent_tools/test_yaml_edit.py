"""Edits of one YAML value keep every other byte; what cannot be edited safely is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML

from agent_tools.errors import UserError
from agent_tools.git_configs import edit_yaml, flatten_yaml
from agent_tools.yaml_edit import edit_text

TEXT = """\
# The run.
seed: 0
model: {checkpoint: nano}        # 'nano' = bundled
competitions: [tweet-sentiment,   diamonds-price]
optim: {lr: 3.0e-4, warmup_steps: 5, betas: [0.9, 0.95],
        grad_clip: 1.0}          # two lines

rollout:
    temperature:   1.0   # odd spacing stays
    "quoted": 'it''s'
    double: "a \\"b\\""
scaffold: null
wandb:
  upload: false
"""


def edit(key: str, value: object, text: str = TEXT) -> str:
    return edit_text(text, key, value, Path("train.yaml"))[0]


@pytest.mark.parametrize(
    ("key", "value", "old", "new"),
    [
        ("optim.lr", 1e-3, "lr: 3.0e-4,", "lr: 1.0e-3,"),
        ("optim.lr", 0.00125, "lr: 3.0e-4,", "lr: 1.25e-3,"),
        ("optim.lr", 1, "lr: 3.0e-4,", "lr: 1.0e+0,"),
        ("optim.warmup_steps", 1, "warmup_steps: 5", "warmup_steps: 1"),
        ("optim.warmup_steps", 2.0, "warmup_steps: 5", "warmup_steps: 2"),
        ("optim.grad_clip", 0.5, "grad_clip: 1.0}", "grad_clip: 0.5}"),
        ("optim.grad_clip", 2, "grad_clip: 1.0}", "grad_clip: 2.0}"),
        ("optim.grad_clip", 1e-5, "grad_clip: 1.0}", "grad_clip: 1.0e-5}"),
        ("rollout.temperature", 0.7, ":   1.0   # odd", ":   0.7   # odd"),
        ("rollout.quoted", "it's: new", "'it''s'", "'it''s: new'"),
        ("rollout.double", "c\n", '"a \\"b\\""', '"c\\U0000000a"'),
        ("model.checkpoint", "other", "{checkpoint: nano}", "{checkpoint: other}"),
        ("model.checkpoint", "true", "{checkpoint: nano}", '{checkpoint: "true"}'),
        ("scaffold", "prompts", "scaffold: null", "scaffold: prompts"),
        ("wandb.upload", True, "upload: false", "upload: true"),
    ],
)
def test_only_the_value_changes(key, value, old, new):
    assert TEXT.count(old) == 1
    assert edit(key, value) == TEXT.replace(old, new)


def test_the_file_is_replaced_and_the_edit_reported(tmp_path):
    path = tmp_path / "train.yaml"
    path.write_bytes(TEXT.replace("\n", "\r\n").encode())
    path.chmod(0o640)
    result = edit_yaml(path, "optim.lr", 1e-3)
    assert (result.before, result.after, result.line) == (3e-4, 1e-3, 5)
    assert path.read_bytes() == TEXT.replace("3.0e-4", "1.0e-3").replace("\n", "\r\n").encode()
    assert path.stat().st_mode & 0o777 == 0o640
    assert [p.name for p in tmp_path.iterdir()] == ["train.yaml"]
    assert edit_yaml(path, "optim.lr", 1e-3).before == 1e-3


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("optim.lrr", 1.0, r"no key optim\.lrr: optim has lr, warmup_steps, betas, grad_clip"),
        ("nothing", 1, r"no key nothing: the file has seed, model"),
        ("seed.deep", 1, r"seed has no keys"),
        ("optim", 1, r"train\.yaml:5: optim is a mapping"),
        ("competitions", 1, r"train\.yaml:4: competitions is a list"),
        ("optim.warmup_steps", 1.5, r"train\.yaml:5: optim\.warmup_steps is a whole number"),
        ("optim.warmup_steps", True, "does not fit"),
        ("optim.lr", "fast", "is a number, so 'fast' does not fit"),
        ("optim.lr", math.nan, "finite"),
        ("wandb.upload", 1, "true or false"),
        ("model.checkpoint", 3, "is text"),
    ],
)
def test_a_wrong_key_or_type_is_refused(key, value, message):
    with pytest.raises(UserError, match=message):
        edit(key, value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", r"train\.yaml:3: .*duplicate"),
        ("a: &x 1\nb: 2\n", r"train\.yaml:1: anchors"),
        ("b: 2\nbase: &x {a: 1}\nc: *x\n", r"train\.yaml:2: anchors"),
        ("a: 1\nc:\n  <<: {b: 1}\n", r"train\.yaml:3: merge keys"),
        ("a:\n\tb: 1\n", r"train\.yaml:2: .*tab"),
        ("a: 1\n---\na: 2\n", r"train\.yaml:2: a second document"),
        ("a: 1\nb: !!python/object:os.system x\n", r"train\.yaml:2: .*tag"),
        ("a: 1\nb: !mine x\n", r"train\.yaml:2: the tag !mine"),
        ("a: 1\nb: [1, 2\nc: 3\n", r"train\.yaml:3: "),
        ("a: 1\nb: 'open\n", r"train\.yaml:3: "),
        ("- a\n- b\n", r"train\.yaml:1: .*not a list"),
        ("a: 1\n1: 2\n", r"key 1 is not a plain word"),
        ("a: 1\nb.c: 2\n", r"key 'b\.c' is not a plain word"),
        ("a: |\n  text\n", r"train\.yaml:1: a spans several lines"),
        ("", "empty|no key"),
    ],
)
def test_yaml_that_cannot_be_edited_safely_is_refused_with_the_line(text, message):
    with pytest.raises(UserError, match=message):
        edit("a", "new" if "|" in text else 9, text)


def test_a_link_or_a_missing_file_is_refused(tmp_path):
    outside = tmp_path / "outside.yaml"
    outside.write_text("a: 1\n")
    link = tmp_path / "link.yaml"
    link.symlink_to(outside)
    with pytest.raises(UserError, match="not an ordinary file"):
        edit_yaml(link, "a", 2)
    assert outside.read_text() == "a: 1\n"
    with pytest.raises(UserError, match="not an ordinary file"):
        edit_yaml(tmp_path / "none.yaml", "a", 2)


def test_flatten_gives_dotted_leaves():
    flat = flatten_yaml(TEXT)
    assert flat["optim.lr"] == 3e-4
    assert flat["optim.betas"] == [0.9, 0.95]
    assert flat["scaffold"] is None
    assert flatten_yaml("a: {}\nb:\n  c: {d: x}\n") == {"a": {}, "b.c.d": "x"}
    assert flatten_yaml("") == {}


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_any_float_is_written_exactly_and_read_as_a_float_by_both_yaml_versions(value):
    text = edit("optim.lr", value)
    assert flatten_yaml(text)["optim.lr"] == value
    old = YAML(typ="safe", pure=True)
    old.version = (1, 1)
    read = old.load(text)["optim"]["lr"]
    assert isinstance(read, float) and read == value


@given(st.text(max_size=40))
def test_any_text_is_written_so_that_it_reads_back(value):
    for key in ("rollout.quoted", "rollout.double", "model.checkpoint", "scaffold"):
        try:
            text = edit(key, value)
        except UserError:
            # Lone surrogates cannot stand in a file.
            assert any(0xD800 <= ord(c) < 0xE000 for c in value)
            continue
        assert flatten_yaml(text)[key] == value, json.dumps(value)
