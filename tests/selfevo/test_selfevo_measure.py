"""`selfevo medals run`: kept policies on any suite, in logs of their own; killed, it goes on."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from selfevo_lab import new_lab
from selfevo_measure import ME, selfevo

from agent_tools.mle_bench.registry import SUITES
from selfevo import cli, loop
from selfevo.arms import Commands
from selfevo.campaign import RunOptions, read_view
from selfevo.cli_medals import Sheet, sheets
from selfevo.events import Event
from selfevo.ledger import open_ledger
from selfevo.measure import subject, targets
from selfevo.store import Store, canonical, read_events

SUITE = ("--suite", "offline-small-v0")
KINDS = ["measure.start", *["measure.scores"] * 6, "measure.end"]


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A lab whose campaign c1 kept one change."""
    lab = new_lab(tmp_path_factory.mktemp("kept") / "lab")
    double = str(Path(__file__).with_name("selfevo_double.py"))
    commands = Commands(
        (sys.executable, double, "train"), (sys.executable, double, "evaluate"), check_machine=False
    )
    assert loop.start(lab, RunOptions(agent="rules"), lambda line: None, commands)[0] == 0
    return lab


@pytest.fixture
def lab(campaign: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(campaign, tmp_path / "lab", symlinks=True))


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.is_symlink()
    }


def measurements(lab: Path) -> list[Path]:
    return sorted(log.parent for log in (lab / "runs/medals").glob("*/events.jsonl"))


def kinds(folder: Path) -> list[str]:
    return [event.kind for event in read_events(folder / "events.jsonl")[0]]


def solved(folder: Path) -> list[str]:
    """Names of the commits that the agent was started for, in order."""
    return [line.split()[1] for line in (folder / "groups/solved.log").read_text().splitlines()]


def in_ledger(lab: Path) -> list[tuple[Any, ...]]:
    with open_ledger(lab / "runs/c1") as connection:
        return connection.execute(
            "SELECT round, arm, role, agent, seed, competition, score, medal, fold, evaluator, "
            "board, checkpoint, wall_hours > 0, job_hours > 0, tokens FROM scores "
            "WHERE starts_with(source, 'medals/') ORDER BY ALL"
        ).fetchall()


def test_each_kept_commit_is_measured_by_its_own_policy(lab: Path) -> None:
    before = contents(lab / "runs/c1")
    head = (lab / ".git/HEAD").read_text()
    done = selfevo("medals", "run", lab, *SUITE, "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    view = read_view(lab / "runs/c1")
    kept = next(pr for pr in view.prs.values() if pr.state == "merged")
    assert record["measured"] == [view.info["commit"], kept.commit] and not record["known"]
    assert [row["name"] for row in record["rows"]] == ["start", kept.title]
    assert [row["bronze"] for row in record["rows"]] == [0, 6]
    assert [row["incumbent"] for row in record["rows"]] == [False, True]
    assert record["rows"][1]["rates"]["percentile"]["mean"] == pytest.approx(71.0)
    assert record["medals"] == "offline medals" and record["agent"] == "selfevo-nano"
    (folder,) = measurements(lab)
    assert record["measurement"] == folder.name and kinds(folder) == KINDS
    rows = in_ledger(lab)
    assert len(rows) == 2 * 3 * 2
    assert {row[1:4] for row in rows} == {
        (view.info["arm"], "start", "selfevo-nano"), (kept.arm, "kept", "selfevo-nano"),
    }  # fmt: skip
    # each score is the number in the checkpoint of the arm's first seed, as its server told it
    for row in rows:
        policy = json.loads((lab / "runs/c1/jobs" / row[11] / "policy.json").read_text())
        assert row[6] == policy["quality"] and policy["seed"] == 0
        assert row[12:] == (True, True, 40) and row[8:11] == (None, "e" * 12, "fitted")
    # the campaign is as it was: nothing was written there but what a ledger caches
    assert contents(lab / "runs/c1") == before and (lab / ".git/HEAD").read_text() == head
    again = selfevo("medals", "run", lab, *SUITE, "--json")
    assert json.loads(again.stdout)["known"] == record["measured"]
    assert kinds(folder) == KINDS and len(solved(folder)) == 2
    last = selfevo("medals", "run", lab, *SUITE, "--commits", "last", "--json")
    assert json.loads(last.stdout)["known"] == [kept.commit] and len(solved(folder)) == 2
    other = selfevo("medals", "run", lab, *SUITE, "--seeds", "2", "--commits", "start")
    assert other.returncode == 0 and len(measurements(lab)) == 2
    assert "2 competitions × 2 seeds" in other.stderr


@pytest.mark.parametrize("point", ["measure.start 1", "measure.scores 1", "measure.scores 3",
                                   "measure.scores 4", "measure.end 1"])  # fmt: skip
def test_killed_it_goes_on_and_measures_nothing_twice(lab: Path, point: str) -> None:
    assert selfevo("medals", "run", lab, *SUITE, SELFEVO_DIE=point).returncode == -9
    (folder,) = measurements(lab)
    whole = kinds(folder).count("measure.scores") >= 3
    done = selfevo("medals", "run", lab, *SUITE, "--json")
    assert done.returncode == 0, done.stderr
    assert measurements(lab) == [folder]
    assert kinds(folder) == KINDS
    keys = [
        e.data["key"] for e in read_events(folder / "events.jsonl")[0] if e.kind == "measure.scores"
    ]
    assert len(keys) == len(set(keys)) == 6
    names = solved(folder)
    if whole:  # the start was in the log before the kill
        assert sum(name.startswith("r0-") for name in names) == 1
    assert len(in_ledger(lab)) == 12 and len(json.loads(done.stdout)["rows"]) == 2


def test_server_and_agent_end_with_a_killed_command(lab: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, ME, "cli", "medals", "run", str(lab), *SUITE],
        env={**os.environ, "SELFEVO_SOLVE_S": "60"},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    line = ""
    while "tweet" not in line:
        line = process.stderr.readline()
        assert line, "it ended too early"
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) == 2
    busy = selfevo("medals", "run", lab, *SUITE)
    assert busy.returncode == 2 and "another process measures there" in busy.stderr
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    deadline = time.monotonic() + 20
    while any(c.is_running() and c.status() != psutil.STATUS_ZOMBIE for c in children):
        assert time.monotonic() < deadline, "a child outlived the command"
        time.sleep(0.05)
    process.stderr.close()


def test_sigterm_ends_it_and_says_what_goes_on(lab: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, ME, "cli", "medals", "run", str(lab), *SUITE],
        env={**os.environ, "SELFEVO_SOLVE_S": "60"},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    while "tweet" not in process.stderr.readline():
        pass
    process.send_signal(signal.SIGTERM)
    rest = process.communicate(timeout=60)[1]
    assert process.returncode == 143 and "terminated: the same command goes on" in rest


# ------------------------------------------------------------------ what cannot be measured


def test_a_missing_checkpoint_is_named_and_the_others_are_measured(lab: Path) -> None:
    start, kept = targets(subject(lab, None), "kept")
    assert start.folder is not None and kept.folder is not None
    shutil.rmtree(start.folder)
    done = selfevo("medals", "run", lab, *SUITE, "--json")
    assert done.returncode == 1
    record = json.loads(done.stdout)
    assert record["measured"] == [kept.commit]
    assert "restore it from a backup" in record["missing"][start.commit]
    assert str(start.folder) in done.stderr and "1 of 2 commits" in done.stderr
    shutil.rmtree(kept.folder)
    gone = selfevo("medals", "run", lab, *SUITE, "--seeds", "1")
    assert gone.returncode == 2 and "no policy to measure" in gone.stderr
    # what was measured before the loss still stands
    assert selfevo("medals", "run", lab, *SUITE, "--commits", "last").returncode == 0


def test_usage_errors_are_one_line_with_the_next_step(
    lab: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refused(*argv: str | Path, words: str) -> None:
        monkeypatch.setattr(sys, "argv", ["selfevo", "medals", "run", *map(str, argv)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        said = capsys.readouterr().err
        assert left.value.code == 2, said
        assert said.startswith("error: ") and said.count("\n") == 1, said
        for word in words.split(" … "):
            assert word in said, said

    monkeypatch.setattr(signal, "signal", lambda *args: None)

    empty = new_lab(tmp_path / "empty")
    example = Path(__file__).parents[2] / "runs/example"
    refused(empty, *SUITE, words="no campaign here; start one with `selfevo run")
    refused(example, *SUITE, words="in no lab")
    refused(lab, words="--suite")
    refused(lab, "--suite", "nonsense", words="no suite 'nonsense' … offline-small-v0")
    refused(lab, *SUITE, "--commits", "all", words="kept, last, start")
    refused(lab, *SUITE, "--split", "sealed", words="val, train, all")
    refused(lab, *SUITE, "--settings", "big", words="real, nano")
    refused(lab, *SUITE, "--base-url", "http://x/v1", words="--model")
    endpoint = ("--base-url", "http://127.0.0.1:9/v1", "--model", "m")
    refused(lab, *SUITE, *endpoint, "--commits", "kept", words="one policy; choose last or start")
    refused(lab, *SUITE, "-c", "c9", words="known: c1")
    lite = ("--suite", "mle-bench-lite")
    monkeypatch.delenv("SELFEVO_MLEBENCH", raising=False)
    monkeypatch.setenv("SELFEVO_MLEBENCH_DATA", str(tmp_path / "nothing"))
    refused(lab, *lite, "--split", "val", words="has no splits")
    refused(lab, *lite, "--settings", "nano", words="choose real")
    refused(
        lab, *lite,
        words="Kaggle … lite-prepare … MD5 … git lfs pull … SELFEVO_MLEBENCH … SHA-256",
    )  # fmt: skip
    refused(
        lab, *lite, "--competition", "spooky-author-identification",
        words="is not prepared … kaggle.com/c/spooky-author-identification/rules … MD5",
    )  # fmt: skip
    assert measurements(lab) == []


def test_an_endpoint_that_is_down_ends_it_with_5_and_no_secret_is_logged(lab: Path) -> None:
    url = "http://user:hunter2@127.0.0.1:9/v1?key=hunter2"
    done = selfevo("medals", "run", lab, *SUITE, "--base-url", url, "--model", "m")
    assert done.returncode == 5 and "the same command goes on" in done.stderr
    (folder,) = measurements(lab)
    event = read_events(folder / "events.jsonl")[0][0]
    assert event.data["base_url"] == "http://127.0.0.1:9/v1" and event.data["model"] == "m"
    assert "hunter2" not in (folder / "events.jsonl").read_text()


# ------------------------------------------------------------------ tables


def recorded(lab: Path, name: str, suite: str, version: int, boards: list[str]) -> None:
    """A measurement's log as `measure` writes it, one run a board."""
    folder = lab / "runs/medals" / name
    store = Store(folder, "c1")
    store.append("measure.start", {"suite": suite, "suite_version": version})
    rows = [
        {
            "competition": f"competition-{i}", "seed": 0, "fold": None, "split": "test",
            "score": 1.0, "percentile": 90.0, "medal": "gold", "gold": True, "any_medal": True,
            "thresholds": {"gold": 1.0, "silver": 2.0, "bronze": 3.0, "median": 4.0},
            "above_median": True, "valid": True, "status": "ok", "board": board,
            "evaluator_hash": "f" * 64,
        }
        for i, board in enumerate(boards)
    ]  # fmt: skip
    about = {"round": 0, "commit": "c", "arm": "a", "role": "start", "checkpoint": "x"}
    hours = {"wall_hours": 1.0, "job_hours": 1.0, "gpu_hours": 0.0}
    blob = store.blob("".join(canonical(row) + "\n" for row in rows))
    store.append(
        "measure.scores",
        {**about, "key": "c/s0", "agent": "selfevo-real", "suite": suite, "seed": 0,
         "suite_version": version, "hours": hours, "rows": blob},
    )  # fmt: skip
    store.close()


def test_one_table_holds_one_suite_version_split_and_measurement(lab: Path) -> None:
    assert selfevo("medals", "run", lab, *SUITE).returncode == 0
    assert selfevo("medals", "run", lab, *SUITE, "--seeds", "1").returncode == 0
    recorded(lab, "c1-a", "offline-v1", 1, ["fitted"])
    recorded(lab, "c1-b", "offline-v1", 2, ["fitted"])
    view, folder = read_view(lab / "runs/c1"), lab / "runs/c1"

    def parts(suite: str) -> list[tuple[str | None, int, str, str]]:
        found = sheets(folder, view, suite)
        return [(one.measurement, one.version, one.split, one.agent) for one in found]

    own, *others = parts("offline-small-v0")
    assert own == (None, 0, "val", "policy")
    assert len({name for name, *_ in others}) == 2
    assert all(other[1:] == (0, "val", "selfevo-nano") for other in others)
    assert parts("offline-v1") == [
        ("c1-a", 1, "test", "selfevo-real"), ("c1-b", 2, "test", "selfevo-real"),
    ]  # fmt: skip
    text = selfevo("medals", lab).stdout
    assert text.count("offline medals, suite offline-small-v0, version 0, val") == 3
    assert "offline-v1" not in text and text.count("measurement c1-") == 2
    assert text.index("scripts") < text.index("measurement")
    record = json.loads(selfevo("medals", lab, "--json").stdout)
    assert record["measurement"] is None and len(record["others"]) == 2
    one = json.loads(selfevo("medals", lab, "--json", "--measurement", others[0][0] or "").stdout)
    assert one["measurement"] == others[0][0] and "others" not in one
    assert "nothing measured" in selfevo("medals", lab, "--suite", "mle-bench-lite").stdout
    plot = lab / "plot.svg"
    assert selfevo("medals", lab, "--suite", "offline-v1", "--plot", plot).returncode == 0
    assert "suite offline-v1, version 1" in plot.read_text()


@pytest.mark.parametrize(
    ("suite", "boards", "name"),
    [
        ("mle-bench-lite", ["verified", "verified"], "MLE-bench Lite medals"),
        ("mle-bench-lite", ["verified", "unverified"], "offline medals"),
        ("mle-bench-lite", ["reported"], "offline medals"),
        ("offline-v1", ["verified"], "offline medals"),
    ],
)
def test_medals_are_mle_benchs_in_verified_leaderboards_only(
    lab: Path, suite: str, boards: list[str], name: str
) -> None:
    recorded(lab, "c1-x", suite, 1, boards)
    (sheet,) = sheets(lab / "runs/c1", read_view(lab / "runs/c1"), suite)
    assert sheet.medals == name and sheet.title().startswith(f"{name}, suite {suite}, version 1")
    assert selfevo("medals", lab, "--suite", suite).stdout.startswith(name)
    assert Sheet("mle-bench-lite", 1, "test", "a", "m", []).medals == "offline medals"


def test_a_lab_named_like_a_command_is_reached_by_its_path(lab: Path, tmp_path: Path) -> None:
    shutil.move(lab, tmp_path / "run")
    assert "val competitions" in selfevo("medals", f"{tmp_path}/run").stdout
    assert "val competitions" in selfevo("medals", "table", tmp_path / "run").stdout
    assert "sealed" in selfevo("medals", "--help").stdout


# ------------------------------------------------------------------ sealed


SEALED_SUITE = """
name: sealed-test
version: 3
competitions:
  - {id: electricity-demand, split: val, strata: time}
  - {id: diamonds-price, split: sealed, strata: table}
  - {id: vowel-speaker, split: sealed, strata: signal}
"""


@pytest.fixture
def sealed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """Options of a suite with sealed competitions."""
    suites = Path(shutil.copytree(SUITES, tmp_path / "suites"))
    (suites / "sealed-test.yaml").write_text(SEALED_SUITE)
    monkeypatch.setenv("SELFEVO_SUITES", str(suites))
    monkeypatch.setenv("SELFEVO_PREPARE_PYTHON", sys.executable)
    monkeypatch.setenv("SELFEVO_SCRIPT_PYTHON", sys.executable)
    return ("--suite", "sealed-test")


def log_of(lab: Path) -> list[Event]:
    return read_events(lab / "runs/medals/c1-sealed/events.jsonl")[0]


def test_sealed_is_explained_then_opened_once(lab: Path, sealed: tuple[str, ...]) -> None:
    asked = selfevo("medals", "sealed", lab, *sealed)
    assert asked.returncode == 2 and asked.stdout == "" and not measurements(lab)
    for words in ("once a campaign", "--yes", "diamonds-price", "2 sealed", "round 0, start"):
        assert words in asked.stderr
    done = selfevo("medals", "sealed", lab, *sealed, "--yes", "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["split"] == "sealed" and [row["round"] for row in record["rows"]] == [0, 1]
    assert [event.kind for event in log_of(lab)] == ["measure.start", "sealed.open", *KINDS[1:]]
    assert log_of(lab)[1].actor == "human"
    folder = lab / "runs/medals/c1-sealed"
    (call,) = [json.loads(line) for line in (folder / "prepared.log").read_text().splitlines()]
    assert call[0] == ["--suite", "sealed-test", "--sealed"] and "sealed.open" in call[1]
    ids = ["diamonds-price", "vowel-speaker"]
    for line in (folder / "groups/solved.log").read_text().splitlines():
        assert "--sealed" in line and [w for w in line.split() if w in ids] == ids
    for again in (sealed, (*sealed, "--seeds", "5")):
        second = selfevo("medals", "sealed", lab, *again, "--yes")
        assert second.returncode == 2 and "that is done once" in second.stderr
    assert len(solved(folder)) == 2


@pytest.mark.parametrize("point", ["sealed.open 1", "measure.scores 2", "measure.scores 4"])
def test_an_opening_that_was_killed_is_finished_by_the_same_command_only(
    lab: Path, sealed: tuple[str, ...], point: str
) -> None:
    killed = selfevo("medals", "sealed", lab, *sealed, "--yes", SELFEVO_DIE=point)
    assert killed.returncode == -9
    other = selfevo("medals", "sealed", lab, *sealed, "--yes", "--seeds", "5")
    assert other.returncode == 2 and "were opened with seeds = 3" in other.stderr
    shown = selfevo("medals", "sealed", lab, *sealed)
    assert shown.returncode == 2 and "was begun and not finished" in shown.stderr
    done = selfevo("medals", "sealed", lab, *sealed, "--yes")
    assert done.returncode == 0, done.stderr
    assert [event.kind for event in log_of(lab)].count("sealed.open") == 1
    assert len(in_ledger(lab)) == 2 * 3 * 2
    assert selfevo("medals", "sealed", lab, *sealed, "--yes").returncode == 2


def test_nothing_is_opened_that_could_not_be_measured(
    lab: Path, sealed: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = selfevo("medals", "sealed", lab, *SUITE, "--yes")
    assert small.returncode == 2 and "no sealed competitions" in small.stderr
    start = targets(subject(lab, None), "start")[0]
    assert start.folder is not None
    shutil.move(start.folder, lab / "away")
    gone = selfevo("medals", "sealed", lab, *sealed, "--yes")
    assert gone.returncode == 2 and "nothing was opened" in gone.stderr
    shutil.move(lab / "away", start.folder)
    monkeypatch.setenv("SELFEVO_PREPARE_PYTHON", str(lab / "none"))
    bare = selfevo("medals", "sealed", lab, *sealed, "--yes")
    assert bare.returncode == 2 and "data preparation" in bare.stderr
    assert measurements(lab) == []
