"""The event log: torn tails are cut, damage is named, blobs are content-addressed."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent_tools.git_configs import LabRepo
from selfevo.arms import Commands
from selfevo.campaign import RunOptions, create, open_campaign
from selfevo.store import LogError, Store, read_blob, read_events
from selfevo.views import reduce


def filled(folder: Path, n: int = 3) -> Store:
    store = Store(folder, "c1")
    for i in range(n):
        store.append("phase", {"from": "observe", "to": str(i)})
    return store


def test_append_read_back_and_reduce(tmp_path: Path) -> None:
    filled(tmp_path).close()
    events, end = read_events(tmp_path / "events.jsonl")
    assert [e.seq for e in events] == [1, 2, 3]
    assert end == (tmp_path / "events.jsonl").stat().st_size
    assert reduce(events).head == 3


@pytest.mark.parametrize("tail", [b'{"v":1,"seq":4,"ts', b'{"v":1,"seq"\n', b"\xff\xfe"])
def test_a_torn_last_line_is_cut_by_the_next_append(tmp_path: Path, tail: bytes) -> None:
    filled(tmp_path).close()
    log = tmp_path / "events.jsonl"
    with log.open("ab") as file:
        file.write(tail)
    store = Store(tmp_path, "c1")
    assert store.extent.events == 3
    store.append("phase", {"from": "a", "to": "b"})
    store.close()
    assert [e.seq for e in read_events(log)[0]] == [1, 2, 3, 4]


def test_damage_before_the_last_line_is_named(tmp_path: Path) -> None:
    filled(tmp_path).close()
    log = tmp_path / "events.jsonl"
    lines = log.read_bytes().split(b"\n")
    log.write_bytes(b"\n".join([lines[0], b"rubbish", *lines[2:]]))
    with pytest.raises(LogError, match="line 2"):
        read_events(log)
    log.write_bytes(b"\n".join([lines[0], *lines[2:]]))
    with pytest.raises(LogError, match="event 3 where 2 was due"):
        read_events(log)


def test_a_second_exception_inside_append_leaves_a_whole_log(tmp_path: Path) -> None:
    store = filled(tmp_path)
    real = store._file

    class Interrupted:
        def __getattr__(self, name: str) -> object:
            return getattr(real, name)

        def write(self, raw: bytes) -> int:
            real.write(raw[: len(raw) // 2])
            real.flush()
            raise KeyboardInterrupt

    store._file = Interrupted()  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        store.append("phase", {"from": "a", "to": "b"})
    store._file = real
    store.append("session.end", {"reason": "interrupted"})
    store.close()
    kinds = [e.kind for e in read_events(tmp_path / "events.jsonl")[0]]
    assert kinds == ["phase", "phase", "phase", "session.end"]


def test_blobs_are_stored_once_and_missing_ones_named(tmp_path: Path) -> None:
    store = filled(tmp_path, 0)
    first, second = store.json_blob({"b": 1, "a": 2}), store.json_blob({"a": 2, "b": 1})
    assert first == second and len(list((tmp_path / "blobs").iterdir())) == 1
    assert read_blob(tmp_path, first) == b'{"a":2,"b":1}'
    with pytest.raises(LogError, match="missing"):
        read_blob(tmp_path, "0" * 64)


def test_unknown_kinds_are_a_programming_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown event kind"):
        filled(tmp_path, 0).append("nonsense")


def test_an_act_is_done_once_a_key(lab: Path, commands: Commands) -> None:
    done: list[str] = []

    def act() -> dict[str, str]:
        done.append("x")
        if len(done) == 1:
            raise KeyboardInterrupt  # killed between intent and outcome
        return {"commit": "made"}

    first = create(lab, LabRepo(lab), RunOptions(agent="rules"), lambda line: None, commands)
    with pytest.raises(KeyboardInterrupt):
        first.once("memory", "k", {"line": "one"}, act)
    first.close()
    again = open_campaign(lab, first.name, lambda line: None, commands)
    outcomes = [again.once("memory", "k", {"line": "one"}, act) for _ in range(3)]
    assert done == ["x", "x"]
    assert outcomes == [{"line": "one", "commit": "made", "key": "k"}] * 3
    again.close()
    kinds = [event.kind for event in read_events(first.folder / "events.jsonl")[0]]
    assert kinds == ["campaign.start", "memory.intent", "memory"]
