"""The snapshot of the view: it changes nothing but the time, and is passed over where it lies."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from selfevo_lab import point_at, quiet

from selfevo import loop, snapshot, views
from selfevo.arms import Commands
from selfevo.campaign import RunOptions, open_campaign, read_view
from selfevo.events import Event
from selfevo.records import CampaignView
from selfevo.snapshot import SNAPSHOT, Keeper, fold, keep
from selfevo.store import LOG, LogError, Store, parse_events
from selfevo.views import reduce

NEXT = {"from": "launch", "to": "wait", "seconds": 0.5}
EXAMPLE = Path(__file__).resolve().parents[2] / "runs" / "example"


# ------------------------------------------------------------------ logs of every kind of event


def made_up(dice: random.Random, rounds: int) -> list[Event]:
    """A log with every kind of event that the reducer knows, in an order that it accepts."""
    events: list[Event] = []

    def add(kind: str, n: int, /, **data: Any) -> None:
        actor: Any = dice.choice(["agent", "human", "system"])
        ts = 1e9 + round(dice.random() * 1e6, 3)
        events.append(Event(len(events) + 1, ts, "c1", n, kind, actor, None, data))

    add("campaign.start", 0, commit="h0", arm="a0", parent="nano", review="always", rounds=rounds)
    add("session.start", 0, thread="t", startup_s=0.5)
    for n in range(1, rounds + 1):
        add("round.start", n)
        add("digest", n, run="s0", text="ü\ud800"[:1], keys={"a": [1, 2.5, None]})
        add("digest", n, run="s0", as_in_round=n)
        for turn in range(dice.randrange(1, 4)):
            for _ in range(dice.randrange(1, 3)):
                add("agent.request", n, blob=f"q{turn}")
            add("agent.reply", n, blob=f"r{turn}", seconds=dice.random())
            add("tool.call", n, name=dice.choice(["run_digest", "propose_edit", "abstain"]))
            add("tool.result", n, call_id=turn, text="\x00\u2028'")
            if dice.random() < 0.3:
                add("agent.strike", n, reason="bad", answer="no", call_id=turn)
        add("proposal", n, key="optim.lr", value=0.1)
        add("guard", n, verdict="ok")
        opened = {"branch": f"b{n}", "base": "h0", "arm": f"a{n % 3}", "title": f"t{n}"}
        more = {"diff": "d", "proposal": {"key": "optim.lr"}, "key": f"pr{n}"}
        add("pr.open.intent", n, number=n, key=f"pr{n}")
        add("pr.open", n, number=n, commit=f"p{n}", **opened, **more)
        for _ in range(dice.randrange(3)):
            answer = dice.choice(["approve", "reject", "request_changes"])
            commit = dice.choice([f"p{n}", f"x{n}"])
            review = {"answer": answer, "commit": commit, "ts": 1.0}
            add("review.answer", n, number=n, arm="ax", diff="dx", **review)
            add("agent.request", n, blob="again")
            add("agent.reply", n, blob="reply", seconds=0.25)
        add("pr.comment", n, number=n, body="words")
        add("pr.edit", n, number=n, title="t", proposal={}, commit="e", arm="ae", diff="de")
        for i in range(dice.randrange(1, 5)):
            kind, run = dice.choice(["train", "eval"]), f"run{dice.randrange(3 * n)}"
            key = f"job{dice.randrange(6 * n)}"
            where = {"arm": f"a{n % 3}", "parent": "nano", "seed": i, "index": i}
            job = {"job": f"j{i}", "kind": kind, "role": "control", "folder": "jobs/x"}
            add("job.submit", n, key=key, run=run, **where, **job)
            ended = {"state": "done", "reason": "", "exit_code": 0, "result": {"steps": 3}}
            if dice.random() < 0.8:
                add("job.done", n, job_key=key, curves="blob", **ended)
            shares = {"samples": 8, "infra": 0, "score": 40.5, "sampling_var": 1e-9}
            medals = {"medals": {"gold": 1}, "competitions": {"c": {"p": 0.1}}}
            found = {"valid_share": 1.0, "diverged": False, "job": key, "run": run}
            found |= dice.choice([{}, {"evaluator": "v1"}])
            add("eval.scores", n, **where, **shares, **medals, **found)
        add("integrity", n, problems=["changed"])
        add("gate", n, verdict="accept", alpha=0.05)
        add("pr.merge", n, number=n, commit=f"m{n}", parent="nano", key=f"merge{n}")
        add("confirm.start", n, index=1_000_000)
        add("confirm", n, number=n, verdict="failed")
        if dice.random() < 0.5:
            add("pr.revert", n, number=n, commit=f"v{n}")
        if dice.random() < 0.5:
            add("pr.close", n, number=n, state="closed", why="no", verdict="reject")
        add("pr.merge_into", n, number=n, into="main")
        add("no_proposal", n, why="nothing")
        add("memory", n, line="- l", commit=f"n{n}")
        add("phase", n, **{"from": "reflect", "to": "stop", "seconds": dice.choice([None, 0.125])})
        add("round.end", n, verdict="accept")
        if dice.random() < 0.3:
            add(dice.choice(["campaign.pause", "campaign.stop"]), n)
            add("session.end", n, reason="review", seconds=1.5)
            add("session.start", n, thread=f"t{n}")
    add("campaign.end", rounds, reason="budget")
    return events


def text(events: list[Event]) -> bytes:
    return "".join(event.line() + "\n" for event in events).encode()


def write(folder: Path, events: list[Event]) -> bytes:
    raw = text(events)
    (folder / LOG).write_bytes(raw)
    return raw


def snapshot_of(folder: Path, raw: bytes, path: Path = Path(LOG)) -> None:
    """The snapshot that a campaign with this log leaves."""
    events, extent = parse_events(raw, path)
    keep(folder, reduce(events), extent)


def plain(view: CampaignView) -> dict[str, Any]:
    """The view with the order of its dictionaries."""
    return snapshot.dump(view)


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32), rounds=st.integers(1, 6), data=st.data())
def test_snapshot_and_tail_make_the_view_of_the_whole_log(
    tmp_path_factory: pytest.TempPathFactory, seed: int, rounds: int, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("log")
    events = made_up(random.Random(seed), rounds)
    raw = write(folder, events)
    whole = reduce(events)
    assert fold(folder).view == whole and fold(folder).covered == 0
    cut = data.draw(st.integers(0, len(events)))
    lines = raw.splitlines(keepends=True)
    snapshot_of(folder, b"".join(lines[:cut]))
    found = fold(folder)
    assert found.covered == cut and found.extent.events == len(events)
    assert found.extent.end == len(raw)
    assert found.view == whole and plain(found.view) == plain(whole)
    for name in ("jobs", "prs", "rounds", "scores", "intents", "outcomes", "node_seconds"):
        assert list(getattr(found.view, name)) == list(getattr(whole, name))
    snapshot_of(folder, raw)
    (folder / LOG).write_bytes(raw + b'{"torn')
    assert fold(folder).covered == len(events) and fold(folder).view == whole


def test_the_made_up_logs_hold_every_kind_that_the_reducer_knows() -> None:
    kinds = {e.kind for n in range(20) for e in made_up(random.Random(n), 6)}
    assert kinds >= set(views._HANDLERS)


def test_every_cut_of_the_recorded_campaign(tmp_path: Path) -> None:
    raw = (EXAMPLE / LOG).read_bytes()
    lines = raw.splitlines(keepends=True)
    (tmp_path / LOG).write_bytes(raw)
    whole = read_view(EXAMPLE)
    for cut in range(len(lines) + 1):
        snapshot_of(tmp_path, b"".join(lines[:cut]))
        found = fold(tmp_path)
        assert found.covered == cut and found.view == whole


# ------------------------------------------------------------------ one that is passed over


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A folder with a log of several rounds and a snapshot of its first half."""
    raw = write(tmp_path, made_up(random.Random(3), 4))
    lines = raw.splitlines(keepends=True)
    snapshot_of(tmp_path, b"".join(lines[: len(lines) // 2]))
    assert fold(tmp_path).covered == len(lines) // 2
    return tmp_path


def passed_over(folder: Path) -> bool:
    """Whether the snapshot is not used, and the view is that of the log."""
    events, _ = parse_events((folder / LOG).read_bytes(), folder / LOG)
    found = fold(folder)
    return found.covered == 0 and found.view == reduce(events)


def test_a_damaged_snapshot_is_passed_over(kept: Path) -> None:
    path = kept / SNAPSHOT
    good = path.read_bytes()
    dice = random.Random(0)
    for place in [*range(0, 600, 7), *(dice.randrange(len(good)) for _ in range(100))]:
        bad = bytearray(good)
        bad[place] ^= 1 << dice.randrange(8)
        path.write_bytes(bad)
        assert passed_over(kept), place
    for length in [0, 1, 128, 129, 200, len(good) - 1]:
        path.write_bytes(good[:length])
        assert passed_over(kept)
    path.write_bytes(good + b"x")
    assert passed_over(kept)
    path.unlink()
    assert passed_over(kept)
    path.mkdir()
    assert passed_over(kept)


CHANGES: dict[str, Callable[[bytes], bytes]] = {
    "edited in its first line": lambda raw: raw.replace(b'"nano"', b'"mega"', 1),
    "edited without a change of length": lambda raw: raw.replace(
        b'"thread":"t"', b'"thread":"u"', 1
    ),
    "cut before the snapshot's end": lambda raw: b"".join(raw.splitlines(keepends=True)[:20]),
    "cut within a line": lambda raw: raw[: len(raw) // 4],
    "emptied": lambda raw: b"",
    "of another campaign": lambda raw: text(made_up(random.Random(4), 4)),
    "longer at its beginning": lambda raw: raw.replace(b'"rounds":4', b'"rounds":40', 1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_log_that_was_changed_is_reduced_whole(kept: Path, change: str) -> None:
    raw = (kept / LOG).read_bytes()
    other = CHANGES[change](raw)
    assert other != raw
    (kept / LOG).write_bytes(other)
    assert passed_over(kept)
    (kept / LOG).write_bytes(raw)
    assert fold(kept).covered


def test_damage_is_named_by_its_line_before_and_after_the_snapshot(kept: Path) -> None:
    lines = (kept / LOG).read_bytes().splitlines(keepends=True)
    for number in (2, len(lines) - 2):
        bad = [*lines[: number - 1], b"rubbish\n", *lines[number:]]
        (kept / LOG).write_bytes(b"".join(bad))
        with pytest.raises(LogError, match=rf"line {number}: not an event"):
            fold(kept)
        (kept / LOG).write_bytes(b"".join([*lines[: number - 1], *lines[number:]]))
        with pytest.raises(LogError, match=rf"event {number + 1} where {number} was due"):
            fold(kept)


def test_a_snapshot_of_other_code_is_passed_over(
    kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot, "CODE", snapshot.CODE + b"# another reducer")
    assert passed_over(kept)


def test_the_code_of_every_record_and_of_the_reducer_is_sealed_in() -> None:
    parts = (views, snapshot)
    found = {m.__name__ for m in parts} | {snapshot.SeedScore.__module__, Event.__module__}
    found |= {kind.__module__ for kind in (CampaignView, views.JobView, views.RoundView)}
    assert found == {f"selfevo.{name}" for name in snapshot.MODULES}
    assert b"def _job_submit(" in snapshot.CODE and b"def dump(" in snapshot.CODE


# ------------------------------------------------------------------ writing one


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A snapshot after every node."""
    monkeypatch.setattr(snapshot, "EVERY", 1)
    monkeypatch.setattr(snapshot, "SHARE", 0.0)
    yield


@pytest.mark.usefixtures("often")
def test_a_full_disk_costs_the_snapshot_and_nothing_else(tmp_path: Path) -> None:
    store, view = Store(tmp_path, "c1"), CampaignView()
    store.listeners.append(lambda event: views.apply(view, event) and None)
    store.listeners.append(Keeper(store, view, 0))
    part = (tmp_path / SNAPSHOT).with_suffix(".part")
    store.append("round.start", round_=1)
    store.append("phase", NEXT)
    good = (tmp_path / SNAPSHOT).read_bytes()
    assert fold(tmp_path).covered == 2 and not part.exists()
    part.symlink_to("/dev/full")
    store.append("phase", NEXT)
    assert (tmp_path / SNAPSHOT).read_bytes() == good and not part.is_symlink()
    assert fold(tmp_path).covered == 2 and fold(tmp_path).view == view
    part.write_bytes(b"of a writer that was killed" * 100)
    store.append("phase", NEXT)
    assert fold(tmp_path).covered == 4
    (tmp_path / SNAPSHOT).unlink()
    (tmp_path / SNAPSHOT).mkdir()  # nothing can be put in its place
    store.append("phase", NEXT)
    assert not part.exists() and passed_over(tmp_path)
    store.close()


@pytest.mark.usefixtures("often")
def test_a_log_edited_under_a_running_campaign_voids_its_snapshots(tmp_path: Path) -> None:
    store, view = Store(tmp_path, "c1"), CampaignView()
    store.listeners.append(lambda event: views.apply(view, event) and None)
    store.listeners.append(Keeper(store, view, 0))
    store.append("round.start", round_=1)
    log = tmp_path / LOG
    log.write_bytes(log.read_bytes().replace(b'"round":1', b'"round":2'))
    store.append("round.start", round_=1)
    store.append("phase", NEXT)
    store.close()
    assert (tmp_path / SNAPSHOT).exists() and passed_over(tmp_path)


@pytest.mark.usefixtures("often")
def test_a_running_campaign_keeps_the_view_of_its_log(lab: Path, commands: Commands) -> None:
    """What a live loop folds is what its log says, to the last digit and type."""
    point_at(lab, "auto")
    code, folder = loop.start(lab, RunOptions(agent="rules"), quiet, commands)
    assert code == 0
    found = fold(folder)
    events, _ = parse_events((folder / LOG).read_bytes(), folder / LOG)
    last = max(e.seq for e in events if e.kind == "phase")
    assert found.covered == last and found.view == reduce(events) == read_view(folder)
    c = open_campaign(lab, "c1", quiet, commands)
    assert c.store.extent.events == len(events)
    c.emit("campaign.pause", {"pair": (1, 2)}, actor="human")
    assert fold(folder).view == c.view
    c.close()


def test_snapshots_cost_a_constant_share_of_a_log() -> None:
    written, due = [], snapshot._next(0)
    for seq in range(46, 200_000, 46):
        if seq >= due:
            written.append(seq)
            due = snapshot._next(seq)
    assert len(written) < 60 and sum(written) < 10 * 200_000
    assert all(b - a < 1100 or b / a < 1.15 for a, b in pairwise(written))
