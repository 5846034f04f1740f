"""Readers of both logs, on files made by the real wandb and on damaged ones."""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from agent_tools.errors import UserError
from agent_tools.wandb_logs import digest, read_run
from agent_tools.wandb_logs.__main__ import main
from agent_tools.wandb_logs.history import latest_wandb_file
from agent_tools.wandb_logs.records import BLOCK, HEADER
from agent_tools.wandb_logs.rows import MAX_POINTS

REPO = Path(__file__).resolve().parents[2]
NAN, INF = math.nan, math.inf

# NaN, both infinities, a gap in the steps, a key that is missing half-way, a nested one, a
# boolean, text (no metric).
FIXTURE: list[dict] = [
    {"step": 1, "reward/mle/mean": 0.4, "policy/grad_norm": 0.08, "ok": True, "note": "text"},
    {"step": 2, "reward/mle/mean": 0.1 + 0.2, "policy/grad_norm": NAN, "part": {"a": 1}},
    {"step": 3, "reward/mle/mean": 1e-17, "policy/grad_norm": INF, "ok": False},
    {"step": 7, "reward/mle/mean": 3, "policy/grad_norm": -INF, "rollout/valid_frac": 0.5},
]
EXPECTED = [
    {"step": 1, "reward/mle/mean": 0.4, "policy/grad_norm": 0.08, "ok": 1.0},
    {"step": 2, "reward/mle/mean": 0.1 + 0.2, "policy/grad_norm": NAN, "part.a": 1.0},
    {"step": 3, "reward/mle/mean": 1e-17, "policy/grad_norm": INF, "ok": 0.0},
    {"step": 7, "reward/mle/mean": 3.0, "policy/grad_norm": -INF, "rollout/valid_frac": 0.5},
]


def words(value: object) -> object:
    """NaN and infinities as the words that the trainer writes."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}[str(value)]
    return value


def write_sidecar(run_dir: Path, rows: list[dict]) -> None:
    lines = [json.dumps({key: words(v) for key, v in {**row, "t": 1.5}.items()}) for row in rows]
    (run_dir / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))


def write_status(run_dir: Path, state: str, exit_code: int | None, signal: str | None = None):
    status = {"state": state, "exit_code": exit_code, "signal": signal, "pid": 1}
    (run_dir / "status.json").write_text(json.dumps(status))


def log_with_wandb(run_dir: Path, rows: list[dict], end: str = "run.finish()") -> None:
    """A real offline run in its own process, as the trainer makes one."""
    code = f"""
import json, math, sys, wandb
from math import inf, nan
run = wandb.init(mode="offline", project="selfevo", dir=sys.argv[1], id="same",
                 config={{"optim": {{"lr": 0.001}}, "seed": 3}},
                 settings=wandb.Settings(silent=True, console="off"))
for row in {rows!r}:
    run.log({{**row, "t": 1.5}}, step=row["step"])
{end}
"""
    # A service of this process, which a test of the trainer may have started, knows the id already.
    env = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    subprocess.run([sys.executable, "-c", code, str(run_dir)], check=True, timeout=120, env=env)


def equal(a: list[dict], b: list[dict]) -> bool:
    return repr([sorted(r.items()) for r in a]) == repr([sorted(r.items()) for r in b])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run directory with both logs of the same rows, made by the real wandb."""
    run_dir = tmp_path_factory.mktemp("finished")
    log_with_wandb(run_dir, FIXTURE)
    write_sidecar(run_dir, FIXTURE)
    write_status(run_dir, "done", 0)
    return run_dir


@pytest.fixture
def run_dir(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run", symlinks=True))


# A naive writer of the log format, for files that the real wandb would take long to make.
def encode(payloads: list[bytes]) -> bytes:
    data = bytearray(HEADER)
    for payload in payloads:
        rest, first = payload, True
        while first or rest:
            room = BLOCK - len(data) % BLOCK
            if room < 7:
                data += bytes(room)
                room = BLOCK
            part, rest = rest[: room - 7], rest[room - 7 :]
            kind = (1 if not rest else 2) if first else (4 if not rest else 3)
            crc = zlib.crc32(bytes([kind]) + part)
            data += struct.pack("<IHB", crc, len(part), kind) + part
            first = False
    return bytes(data)


def history_record(step: int, metrics: dict[str, float]) -> bytes:
    from wandb.proto import wandb_internal_pb2

    record = wandb_internal_pb2.Record()
    record.history.step.num = step
    for key, value in metrics.items():
        item = record.history.item.add()
        item.nested_key.append(key)
        item.value_json = json.dumps(value)
    return record.SerializeToString()


def wandb_run(tmp_path: Path, data: bytes) -> Path:
    folder = tmp_path / "wandb" / "offline-run-20260101_000000-x"
    folder.mkdir(parents=True)
    (folder / "run-x.wandb").write_bytes(data)
    return tmp_path


def test_both_readers_give_the_same_history(finished):
    from_wandb = read_run(finished, prefer="wandb")
    from_sidecar = read_run(finished, prefer="sidecar")
    assert equal(from_wandb.rows, EXPECTED)
    assert equal(from_sidecar.rows, EXPECTED)
    assert (from_wandb.source, from_sidecar.source) == ("wandb", "sidecar")
    assert from_wandb.state == from_sidecar.state == "done"
    assert from_wandb.warnings == from_sidecar.warnings == []
    assert digest(from_wandb) == digest(from_sidecar)


def test_the_configuration_comes_from_the_resolved_file_else_from_wandb(run_dir):
    assert read_run(run_dir).config == {"optim.lr": 0.001, "seed": 3}
    (run_dir / "config.resolved.yaml").write_text("optim: {lr: 3.0e-4}\nsuite: small\n")
    expected = {"optim.lr": 3e-4, "suite": "small"}
    assert read_run(run_dir, prefer="wandb").config == expected
    assert read_run(run_dir, prefer="sidecar").config == expected


def test_a_run_that_ended_by_itself_is_read_without_its_sidecar(run_dir):
    before = read_run(run_dir)
    (run_dir / "metrics.jsonl").unlink()
    after = read_run(run_dir)
    assert before.source == after.source == "wandb"
    assert digest(after) == digest(before)
    write_status(run_dir, "failed", 6)
    assert read_run(run_dir).source == "wandb"


@pytest.mark.parametrize(
    ("state", "code", "signal"),
    [
        ("running", None, None),
        ("cancelled", 143, "SIGTERM"),
        ("failed", None, "SIGKILL"),
        ("queued", None, None),
    ],
)
def test_a_live_or_crashed_run_is_read_from_its_sidecar(run_dir, state, code, signal):
    write_status(run_dir, state, code, signal)
    history = read_run(run_dir)
    assert (history.source, history.state) == ("sidecar", state)


def test_a_run_that_could_not_report_its_end_takes_the_launchers_word(run_dir):
    write_status(run_dir, "running", None)
    (run_dir / "job.json").write_text(json.dumps({"state": "failed", "reason": "signal"}))
    history = read_run(run_dir)
    assert (history.source, history.state) == ("sidecar", "failed")


def test_a_missing_log_is_replaced_by_the_other_one_with_a_warning(run_dir):
    shutil.rmtree(run_dir / "wandb")
    history = read_run(run_dir)
    assert history.source == "sidecar"
    assert any("wandb log is missing" in warning for warning in history.warnings)
    with pytest.raises(UserError, match=r"no wandb/\*/run-\*\.wandb"):
        read_run(run_dir, prefer="wandb")


def test_a_resumed_run_is_read_from_its_last_file(tmp_path):
    kept = [{"step": 1, "reward/mle/mean": 0.4}, {"step": 2, "reward/mle/mean": 0.5}]
    log_with_wandb(tmp_path, [*kept, {"step": 3, "reward/mle/mean": 0.9}], "import os; os._exit(0)")
    first = latest_wandb_file(tmp_path)
    stamp = first.parent.name.replace("offline-run-2", "offline-run-1")  # surely the older one
    first.parent.rename(first.parent.with_name(stamp))
    log_with_wandb(tmp_path, [*kept, {"step": 3, "reward/mle/mean": 0.6}])
    write_status(tmp_path, "done", 0)
    assert [row["reward/mle/mean"] for row in read_run(tmp_path).rows] == [0.4, 0.5, 0.6]


def test_an_uncaught_exception_reads_as_failed(tmp_path):
    log_with_wandb(tmp_path, FIXTURE[:1], "wandb.finish(exit_code=1)")
    assert read_run(tmp_path).state == "failed"


@pytest.mark.parametrize("cut", [1, 3, 60, 200])
def test_a_truncated_tail_keeps_the_rows_before_it(tmp_path, cut):
    payloads = [history_record(i, {"loss": i / 7}) for i in range(3000)]
    data = encode(payloads)
    assert len(data) > 3 * BLOCK
    run = wandb_run(tmp_path, data[:-cut])
    history = read_run(run, prefer="wandb")
    lost = 1 + (cut - 1) // (len(payloads[-1]) + 7)
    assert [row["loss"] for row in history.rows] == [i / 7 for i in range(3000 - lost)]
    assert any("ends inside a record" in warning for warning in history.warnings)


def test_a_damaged_block_loses_its_own_records_only(tmp_path):
    data = bytearray(encode([history_record(i, {"loss": i / 7}) for i in range(4000)]))
    data[BLOCK + 500] ^= 0xFF
    history = read_run(wandb_run(tmp_path, bytes(data)), prefer="wandb")
    steps = [row["step"] for row in history.rows]
    assert steps[0] == 0 and steps[-1] == 3999
    assert 2500 < len(steps) < 4000
    assert any("damaged" in warning for warning in history.warnings)


def test_a_record_longer_than_a_block_is_joined(tmp_path):
    long = {f"metric-with-a-long-name-{i:05}": float(i) for i in range(1990)}
    payloads = [history_record(1, long), history_record(2, {"loss": 1.0})]
    assert len(payloads[0]) > 2 * BLOCK
    history = read_run(wandb_run(tmp_path, encode(payloads)), prefer="wandb")
    assert history.rows == [{"step": 1, **long}, {"step": 2, "loss": 1.0}]
    assert history.warnings == []


@pytest.mark.parametrize("size", [0, 3, 7])
def test_an_empty_file_or_a_header_only_has_no_rows(tmp_path, size):
    history = read_run(wandb_run(tmp_path, HEADER[:size]), prefer="wandb")
    assert history.rows == []
    assert bool(history.warnings) == (size < 7)
    assert "steps 0" in digest(history).text


def test_an_unknown_record_kind_is_skipped_and_counted(tmp_path):
    future = b"\xfa\x3f\x03abc"  # field 1023, length-delimited
    payloads = [history_record(1, {"loss": 1.0}), future, history_record(2, {"loss": 2.0})]
    history = read_run(wandb_run(tmp_path, encode(payloads)), prefer="wandb")
    assert [row["loss"] for row in history.rows] == [1.0, 2.0]
    assert any("unknown kind" in warning for warning in history.warnings)


def test_a_wrong_file_says_what_where_and_what_next(tmp_path):
    run = wandb_run(tmp_path, b"PK\x03\x04 not a log")
    with pytest.raises(UserError, match=r"run-x\.wandb is not a \.wandb file: give"):
        read_run(run, prefer="wandb")
    (run / "wandb/offline-run-20260101_000000-x/run-x.wandb").write_bytes(HEADER[:-1] + b"\x09")
    with pytest.raises(UserError, match="format version 9"):
        read_run(run, prefer="wandb")
    (run / "metrics.jsonl").write_bytes(b"a,b\n1,2\n")
    with pytest.raises(UserError, match=r"is not a metrics\.jsonl file"):
        read_run(run, prefer="sidecar")
    with pytest.raises(UserError, match="no run directory at"):
        read_run(tmp_path / "nowhere")
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match="is no run directory"):
        read_run(tmp_path / "other")


def test_a_partial_last_line_and_a_damaged_one_are_skipped(tmp_path):
    lines = ['{"step": 1, "loss": 1.0}', "{bad", "[1]", '{"loss": 2}', '{"step": 2, "loss": 2.0}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 3, "lo')
    history = read_run(tmp_path)
    assert history.rows == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}]
    assert sum("no metrics row" in warning for warning in history.warnings) == 3
    assert any("last line" in warning for warning in history.warnings)


def test_a_step_that_goes_back_keeps_the_later_values(tmp_path):
    rows = [{"step": s, "loss": float(i)} for i, s in enumerate([1, 2, 3, 4, 3, 4, 5, 5])]
    write_sidecar(tmp_path, rows)
    history = read_run(tmp_path)
    assert [(row["step"], row["loss"]) for row in history.rows] == [
        (1, 0.0), (2, 1.0), (3, 4.0), (4, 5.0), (5, 7.0),
    ]  # fmt: skip
    assert any("went back" in warning for warning in history.warnings)


@pytest.mark.parametrize("source", ["wandb", "sidecar"])
def test_a_hundred_thousand_rows_need_bounded_memory_and_keep_the_extremes(tmp_path, source):
    count, spike, broken = 100_000, 61_234, 73_210

    def row(step: int) -> dict[str, float]:
        value = 50.0 if step == spike else step % 10 / 100
        return {"policy/grad_norm": value, "loss": NAN if step == broken else 1.0}

    if source == "wandb":
        wandb_run(tmp_path, encode([history_record(i, row(i)) for i in range(count)]))
    else:
        write_sidecar(tmp_path, [{"step": i, **row(i)} for i in range(count)])
    code = f"""
import resource
from pathlib import Path
from wandb.proto import wandb_internal_pb2
from agent_tools.wandb_logs import read_run
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
read_run(Path({str(tmp_path)!r}), prefer={source!r})
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    grown = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True
    )
    assert int(grown.stdout) < 16_000  # KiB; all rows as they are take 40,000
    history = read_run(tmp_path, prefer=source)
    series = history.series("policy/grad_norm")
    assert len(series) <= 2 * MAX_POINTS
    assert (series[0][0], series[-1][0]) == (0, count - 1)
    assert (spike, 50.0) in series
    assert [step for step, value in history.series("loss") if math.isnan(value)] == [broken]
    assert f"peak 50.0@{spike}" in digest(history).text


def test_the_package_starts_without_wandb():
    code = "import sys, agent_tools.wandb_logs as w; print('wandb' in sys.modules)"
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "False"


def test_the_command_prints_the_digest(finished, tmp_path, capsys):
    assert main([str(finished)]) == 0
    text = capsys.readouterr().out
    assert text.startswith("run done steps 7\nreward first 0.400 last 3.00")
    assert main([str(finished), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == text.rstrip("\n")
    assert main([str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith("error: no run directory")
