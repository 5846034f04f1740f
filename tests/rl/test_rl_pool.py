"""The data pool: exact round trip, append-only, killed writers, damage, bad input."""

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.errors import ConfigError, InfraError
from rl.pool import Pool, main
from rl.types import CallRecord, RewardRecord

CALL = CallRecord(
    episode="g3-0",
    group=3,
    index=0,
    prompt_ids=(1, 2, 200_000),
    response_ids=(5, 6),
    logprobs=(-0.1, -1e-300),
    versions=((0, 1, 4), (1, 2, 5)),
    finish_reason="stop",
    t_start=1.5,
    t_end=2.5,
    temperature=0.7,
    tokenizer_hash="abc",
    routed_experts=((1, 2), (0, 3)),
)
REWARD = RewardRecord("g3-0", 0.25, ((0, -0.1),), 3.0, 2.0, "timeout")

floats = st.floats(allow_nan=False, allow_infinity=False)
calls = st.lists(st.tuples(st.integers(0, 2**31 - 1), floats), max_size=8).flatmap(
    lambda pairs: st.builds(
        CallRecord,
        episode=st.text(min_size=1, max_size=8).filter(
            lambda t: "\x00" not in t and t.isprintable()
        ),
        group=st.integers(0, 9),
        index=st.integers(0, 99),
        prompt_ids=st.lists(st.integers(0, 2**31 - 1), max_size=9).map(tuple),
        response_ids=st.just(tuple(id for id, _ in pairs)),
        logprobs=st.just(tuple(x for _, x in pairs)),
        versions=st.just(((0, len(pairs), 1),)),
        finish_reason=st.sampled_from(["stop", "length"]),
        t_start=floats,
        t_end=floats,
    )
)


@settings(max_examples=50, deadline=None)
@given(calls)
def test_records_come_back_exactly(call):
    with Pool(":memory:") as pool:
        pool.add_call(call)
        assert list(pool.all_calls()) == [call]


def test_an_episode(tmp_path):
    with Pool(tmp_path / "pool.sqlite") as pool:
        second = replace(CALL, index=1, prompt_ids=(1, 2, 200_000, 5, 6, 9))
        for call in (second, CALL):
            pool.add_call(call)
        assert pool.reward("g3-0") is None
        pool.add_reward(REWARD)
    with Pool(tmp_path / "pool.sqlite") as pool:
        assert pool.calls("g3-0") == [CALL, second]
        assert pool.reward("g3-0") == REWARD and pool.rewards() == [REWARD]
        assert pool.stats().statuses == {"timeout": 1}


def test_nothing_is_written_twice_changed_or_removed(tmp_path):
    path = tmp_path / "pool.sqlite"
    with Pool(path) as pool:
        pool.add_call(CALL)
        pool.add_reward(REWARD)
        for again in (lambda: pool.add_call(CALL), lambda: pool.add_reward(REWARD)):
            with pytest.raises(InfraError, match="UNIQUE"):
                again()
    db = sqlite3.connect(path)
    for statement in ("DELETE FROM calls", "UPDATE rewards SET episode = 'x'"):
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            db.execute(statement)


def test_fewer_log_probs_than_ids_are_refused(tmp_path):
    with Pool(tmp_path / "pool.sqlite") as pool:
        with pytest.raises(ValueError, match="2 ids but 1 log-probs"):
            pool.add_call(replace(CALL, logprobs=(-1.0,)))
        assert pool.stats().calls == 0


WRITER = """
import sys
from dataclasses import replace
from rl.pool import Pool
from tests.rl.test_rl_pool import CALL
pool = Pool(sys.argv[1])
for i in range(10**9):
    pool.add_call(replace(CALL, episode=sys.argv[2], index=i, prompt_ids=tuple(range(2000))))
    print(i, flush=True)
"""


def test_killed_writers_lose_nothing_that_they_reported(tmp_path):
    path = tmp_path / "pool.sqlite"
    Pool(path).close()
    command = [sys.executable, "-c", WRITER, str(path)]
    writers = [
        subprocess.Popen([*command, name], stdout=subprocess.PIPE, text=True) for name in ("a", "b")
    ]
    said = [[writer.stdout.readline()] for writer in writers]  # both have begun
    time.sleep(0.5)
    for writer, lines in zip(writers, said, strict=True):
        os.kill(writer.pid, signal.SIGKILL)
        lines += writer.stdout.read().splitlines(keepends=True)
        writer.wait()
    with Pool(path) as pool:
        for name, lines in zip("ab", said, strict=True):
            reported = sum(line.endswith("\n") for line in lines)
            assert reported <= len(pool.calls(name)) <= reported + 1
        assert pool.stats().damaged == ()
        pool.add_call(CALL)


def test_a_damaged_record_is_named(tmp_path, capsys):
    path = tmp_path / "pool.sqlite"
    with Pool(path) as pool:
        pool.add_call(CALL)
        pool.add_reward(REWARD)
    assert main(["verify", str(path)]) == 0
    db = sqlite3.connect(path)
    db.execute("DROP TRIGGER calls_UPDATE")
    db.execute("UPDATE calls SET response = ?", (b"\x01\x00\x00\x00\x02\x00\x00\x00",))
    db.commit()
    db.close()
    assert main(["verify", str(path)]) == 3
    assert "damaged: call 0 of g3-0" in capsys.readouterr().out
    assert main(["export", str(path)]) == 3  # read as good by nobody, trainers included
    assert "call 0 of g3-0 is damaged; `python -m rl.pool verify`" in capsys.readouterr().err
    with Pool(path) as pool:
        assert pool.reward("g3-0") == REWARD


def test_command_line(tmp_path, capsys):
    path = tmp_path / "pool.sqlite"
    with Pool(path) as pool:
        pool.add_call(CALL)
        pool.add_reward(REWARD)
    assert main(["stats", str(path)]) == 0
    assert json.loads(capsys.readouterr().out)["response_tokens"] == 2
    assert main(["export", str(path)]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["kind"] for line in lines] == ["call", "reward"]
    assert lines[0]["response_ids"] == [5, 6]
    assert main(["stats", str(tmp_path / "absent")]) == 2
    assert "no such pool" in capsys.readouterr().err


def test_a_file_of_others_is_looked_at_and_not_changed(tmp_path, capsys):
    foreign, empty = tmp_path / "foreign.db", tmp_path / "empty.db"
    with contextlib.closing(sqlite3.connect(foreign)) as db:
        db.execute("CREATE TABLE notes (text)")
        db.commit()
    empty.touch()
    for path in (foreign, empty):
        before = path.read_bytes()
        for what in ("stats", "verify", "export"):
            assert main([what, str(path)]) == 2
            assert "is no pool" in capsys.readouterr().err
        assert path.read_bytes() == before


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path):
    with Pool(tmp_path / "pool.sqlite") as pool:
        pool.add_call(CALL)
    command = [sys.executable, "-m", "rl.pool", "export", str(tmp_path / "pool.sqlite")]
    piped = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    piped.stdout.close()  # before the first line
    with piped.stderr as said:
        assert said.read() == b""
    assert piped.wait(60) == 0


def test_files_that_are_no_pool(tmp_path, monkeypatch):
    (tmp_path / "text").write_text("not a database, but long enough to be looked at " * 9)
    with pytest.raises(InfraError, match="not a database"):
        Pool(tmp_path / "text")
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(ConfigError, match=r"install selfevo\[postgres\]"):
        Pool("postgresql://localhost/none")
