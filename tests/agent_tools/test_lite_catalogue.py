"""The catalogue of the 22 competitions: complete, consistent, and its checksums in use."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest

from agent_tools.errors import UserError
from agent_tools.mle_bench.lite.catalogue import (
    LITE,
    checksums,
    differing_files,
    lite_competition,
    lite_ids,
)


def test_there_are_22_sorted_ids_without_an_underscore() -> None:
    assert len(lite_ids()) == 22 and list(lite_ids()) == sorted(lite_ids())
    assert not any("_" in name for name in lite_ids())


@pytest.mark.parametrize("lite", LITE.values(), ids=lambda lite: lite.id)
def test_import_strings_lead_to_functions(lite) -> None:
    for spec in (lite.grade_fn, lite.preparer):
        if spec:
            module, _, name = spec.partition(":")
            assert callable(getattr(import_module(module), name))
    assert lite.preparer is not None or not lite.raw


@pytest.mark.parametrize("lite", LITE.values(), ids=lambda lite: lite.id)
def test_every_graded_file_has_a_checksum(lite) -> None:
    sums = checksums(lite.id)
    assert all(re.fullmatch("[0-9a-f]{32}", md5) for md5 in sums.values())
    assert {"zip", lite.answers, lite.sample} <= set(sums)
    assert lite.gold is None or lite.gold in sums
    public = {name.removeprefix("public/") for name in sums if name.startswith("public/")}
    assert public <= set(lite.public)


def test_a_prepared_folder_is_compared_with_the_original(tmp_path: Path) -> None:
    missing = differing_files("leaf-classification", tmp_path)
    assert missing == [
        "private/test.csv",
        "public/sample_submission.csv",
        "public/test.csv",
        "public/train.csv",
    ]
    (tmp_path / "private").mkdir()
    (tmp_path / "private/test.csv").write_text("id\n")
    assert differing_files("leaf-classification", tmp_path) == missing


def test_a_folder_with_the_original_files_differs_in_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "checksums.csv"
    empty = "d41d8cd98f00b204e9800998ecf8427e"
    table.write_text(f"competition,file,md5\nleaf-classification,private/test.csv,{empty}\n")
    monkeypatch.setattr("agent_tools.mle_bench.lite.catalogue._CHECKSUMS", table)
    (tmp_path / "private").mkdir()
    (tmp_path / "private/test.csv").touch()
    assert differing_files("leaf-classification", tmp_path) == []


def test_another_id_is_refused_with_the_list() -> None:
    with pytest.raises(UserError, match="choose one of aerial-cactus-identification"):
        lite_competition("spaceship-titanic")
    with pytest.raises(UserError, match="not in MLE-bench Lite"):
        checksums("leaf_classification")
