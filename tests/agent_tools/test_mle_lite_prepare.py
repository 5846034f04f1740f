"""Preparation of Lite competitions from a user's download, and what lite-status says."""

from __future__ import annotations

import json
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from agent_tools.errors import InfraError, UserError
from agent_tools.mle_bench import folders
from agent_tools.mle_bench.folders import FolderCompetition, FolderRegistry, md5
from agent_tools.mle_bench.lite_prepare import lite_status, prepare_lite
from agent_tools.mle_bench.reports import grade_submission
from tests.agent_tools.lite_raw import make_raw
from tests.agent_tools.mle_layout import command, make_checkout

ID = "leaf-classification"
LARGE = "aptos2019-blindness-detection"  # no preparer of ours

PREPARER = """\
from pathlib import Path


class UserError(Exception):
    pass


def prepare(raw: Path, public: Path, private: Path) -> None:
    rows = (raw / "all.csv").read_text().splitlines(keepends=True)
    if len(rows) < 3:
        raise UserError("all.csv is too short")
    (public / "train.csv").write_text("".join(rows[:-1]))
    (public / "test.csv").write_text(rows[0])
    (public / "sample_submission.csv").write_text(rows[0])
    (private / "test.csv").write_text(rows[0] + rows[-1])
    assert rows[-1] != "crash\\n", "crashed"
"""
RAW = "id\n1\n2\n3\n"
TABLES = {
    "public/train.csv": "id\n1\n2\n",
    "public/test.csv": "id\n",
    "public/sample_submission.csv": "id\n",
    "private/test.csv": "id\n3\n",
}


class Registry(FolderRegistry):
    """A registry whose leaf-classification is prepared by the preparer above."""

    def get(self, competition_id: str) -> FolderCompetition:
        found = super().get(competition_id)
        root = self.lite_data.parent / "code"
        if competition_id != ID or not root.is_dir():
            return found
        sums = json.loads((root / "sums.json").read_text())
        return replace(found, preparer="some_preparer:prepare", roots=(root,), checksums=sums)


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    monkeypatch.delenv(folders.CHECKOUT_VARIABLE, raising=False)
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "some_preparer.py").write_text(PREPARER)
    archive = zipped(tmp_path / "zip" / f"{ID}.zip", RAW)
    sums = {"zip": md5(archive)}
    for name, text in TABLES.items():
        (tmp_path / "one").write_text(text)
        sums[name] = md5(tmp_path / "one")
    (tmp_path / "code" / "sums.json").write_text(json.dumps(sums))
    return Registry((), lite_data=tmp_path / "data")


def zipped(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(zipfile.ZipInfo("all.csv"), text)
    return path


def base(registry: Registry) -> Path:
    return registry.lite_data / ID


def state(registry: Registry) -> str:
    (row,) = [row for row in lite_status(registry) if row.competition_id == ID]
    return row.data


def test_a_verified_zip_becomes_verified_folders(registry: Registry) -> None:
    zipped(base(registry) / f"{ID}.zip", RAW)
    assert state(registry) == "downloaded"
    assert prepare_lite(registry, ID) == "prepared"
    prepared = base(registry) / "prepared"
    for name, text in TABLES.items():
        assert (prepared / name).read_text() == text
    assert (prepared / "private").stat().st_mode & 0o077 == 0
    assert state(registry) == "verified" and registry.get(ID).missing(grading_only=False) is None
    assert prepare_lite(registry, ID) == "unchanged"
    assert [path.name for path in registry.lite_data.iterdir()] == [ID]


def test_an_unpacked_raw_folder_will_do_and_a_changed_folder_is_made_again(
    registry: Registry,
) -> None:
    raw = base(registry) / "raw"
    raw.mkdir(parents=True)
    (raw / "all.csv").write_text(RAW)
    assert prepare_lite(registry, ID) == "prepared"
    (base(registry) / "prepared" / "private" / "test.csv").write_text("id\n9\n")
    assert state(registry) == "differs"
    assert prepare_lite(registry, ID) == "prepared" and state(registry) == "verified"


def test_a_wrong_zip_is_refused_before_it_is_unpacked(registry: Registry) -> None:
    zipped(base(registry) / f"{ID}.zip", RAW + "4\n")
    with pytest.raises(UserError, match=r"MD5 [0-9a-f]{32}, but MLE-bench used .*--skip"):
        prepare_lite(registry, ID)
    assert not (base(registry) / "prepared").exists()
    assert prepare_lite(registry, ID, verify=False) == "prepared"
    assert state(registry) == "differs"


def test_wrong_tables_are_refused_and_leave_nothing(registry: Registry) -> None:
    raw = base(registry) / "raw"
    raw.mkdir(parents=True)
    (raw / "all.csv").write_text(RAW + "4\n")
    with pytest.raises(UserError, match=r"private/test.csv has MD5 .*MLE-bench's has"):
        prepare_lite(registry, ID)
    assert [path.name for path in base(registry).iterdir()] == ["raw"]
    assert [path.name for path in registry.lite_data.iterdir()] == [ID]


@pytest.mark.parametrize(
    ("id_", "best"), [("aerial-cactus-identification", 1.0), ("spooky-author-identification", 0.0)]
)
def test_generated_raw_data_goes_through_our_preparer_and_our_grader(
    tmp_path: Path, id_: str, best: float
) -> None:
    registry = FolderRegistry((), lite_data=tmp_path / "data")
    raw = registry.get(id_).raw_dir
    raw.mkdir(parents=True)
    make_raw(id_, raw)
    assert prepare_lite(registry, id_, verify=False) == "prepared"
    found = registry.get(id_)
    assert found.missing(grading_only=False) is None
    perfect = grade_submission(found, found.gold_submission, found.reported())
    sample = grade_submission(found, found.sample_submission, found.reported())
    assert perfect.report.score == best and perfect.report.gold_medal
    assert sample.report.valid_submission and not sample.report.any_medal


@pytest.mark.parametrize(
    ("text", "error", "word"),
    [
        ("id\n1\n", UserError, "leaf-classification: all.csv is too short"),
        ("id\n1\ncrash\n", InfraError, "preparation failed .*crashed"),
        (None, InfraError, "preparation failed .*all.csv"),
    ],
)
def test_a_preparer_that_fails_is_one_line(
    registry: Registry, text: str | None, error: type[Exception], word: str
) -> None:
    raw = base(registry) / "raw"
    raw.mkdir(parents=True)
    (raw / ("all.csv" if text else "other.csv")).write_text(text or "x")
    with pytest.raises(error, match=word) as caught:
        prepare_lite(registry, ID)
    assert "\n" not in str(caught.value) and not (base(registry) / "prepared").exists()


def test_without_data_it_says_what_to_fetch_and_makes_no_folder(registry: Registry) -> None:
    with pytest.raises(UserError, match=r"no folder .*kaggle.com/c/leaf-classification/rules"):
        prepare_lite(registry, ID)
    assert not registry.lite_data.exists()
    base(registry).mkdir(parents=True)
    with pytest.raises(UserError, match=r"no data in .*download the competition's data as one zip"):
        prepare_lite(registry, ID)


def test_two_zips_and_a_broken_one_are_refused(registry: Registry) -> None:
    path = base(registry) / "a.zip"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(UserError, match="not a whole zip"):
        prepare_lite(registry, ID, verify=False)
    zipped(base(registry) / "b.zip", RAW)
    with pytest.raises(UserError, match="holds 2 zip files"):
        prepare_lite(registry, ID)


def test_large_and_other_competitions_name_what_prepares_them(registry: Registry) -> None:
    with pytest.raises(UserError, match=r"small competitions only.*--engine mlebench"):
        prepare_lite(registry, LARGE)
    with pytest.raises(UserError, match="not in MLE-bench Lite"):
        prepare_lite(registry, "diamonds-price")


def test_lite_status_without_anything_names_the_first_step(tmp_path: Path) -> None:
    done = command("lite-status", "--data-dir", tmp_path / "none", "--json")
    assert done.returncode == 1, done.stderr
    rows = json.loads(done.stdout)["competitions"]
    assert len(rows) == 22 and {row["data"] for row in rows} == {"missing"}
    assert {row["leaderboard"] for row in rows} == {"missing"}
    done = command("lite-status", "--data-dir", tmp_path / "none")
    assert len(done.stdout.splitlines()) == 23
    assert "kaggle.com/c/aerial-cactus-identification/rules" in done.stderr


def test_lite_status_tells_pointers_from_wrong_files(tmp_path: Path) -> None:
    checkout = make_checkout(tmp_path).add(ID).add(LARGE)
    (checkout.folder(LARGE) / "leaderboard.csv").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    )
    where = ("--checkout", checkout.root, "--data-dir", checkout.data)
    done = command("lite-status", *where, "--json")
    rows = {row["competition_id"]: row for row in json.loads(done.stdout)["competitions"]}
    assert rows[ID]["leaderboard"] == "wrong" and rows[LARGE]["leaderboard"] == "pointer"
    assert rows[ID]["data"] == "differs" and rows[LARGE]["preparer"] == "mlebench"
