"""What must not grow with the number of rounds: notes, report; and a log that is read at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from selfevo import memory, report
from selfevo.campaign import read_view
from selfevo.config import NOTES
from selfevo.records import CampaignView, RoundView
from selfevo.store import LogError, Store, read_events

EXAMPLE = Path(__file__).resolve().parents[2] / "runs" / "example"


def test_older_notes_move_out_and_every_entry_stays_once() -> None:
    files = {NOTES: "# Notes\n\nOne entry a round.\n"}
    for n in range(1, 401):
        entry = f"\n## c1 r{n}: optim.lr 0.1 → 0.2: indecisive\n\n- why (rules): {'x' * 300}\n"
        changed = memory.add_entry(files[NOTES], entry, f"memory/c1-until-r{n}.md")
        assert memory.add_entry(changed[NOTES], entry, "other.md") == {NOTES: changed[NOTES]}
        assert not set(changed) & (set(files) - {NOTES})  # no archive is written twice
        files |= changed
        assert len(files[NOTES]) <= memory.NOTES_LIMIT
        assert files[NOTES].startswith("# Notes\n\nOne entry a round.\n")
        assert files[NOTES].endswith(entry)
    assert 4 < len(files) < 12
    together = "".join(files.values())
    for n in range(1, 401):
        assert together.count(f"## c1 r{n}: ") == 1
    assert files[NOTES].count("(Earlier entries: ") == 1


def test_a_long_report_tells_the_newest_and_the_kept_rounds_in_full(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    view = CampaignView()
    for n in range(121):
        verdict = "accept" if n in (3, 40) else "reverted" if n == 9 else "indecisive"
        view.rounds[n] = RoundView(n, 0.0, verdict=verdict)
    full, short = report.told(view)
    assert full == [3, 9, 40, *range(71, 121)] and sorted(full + short) == list(range(1, 121))
    example = read_view(EXAMPLE)
    monkeypatch.setattr(report, "told", lambda view: ([2], [1]))
    for text in (report.markdown(example, EXAMPLE), report.html(example, EXAMPLE)):
        assert "Rounds in short" in text and "Round 1:" not in text and "Round 2:" in text
        assert example.prs[1].title in text


def test_a_log_is_read_alike_at_once_and_line_by_line(tmp_path: Path) -> None:
    store = Store(tmp_path, "c1")
    for n in range(5):
        store.append("memory", {"line": f"ü {n}", "commit": "c"})
    store.close()
    log = tmp_path / "events.jsonl"
    whole = read_events(log)
    with log.open("ab") as file:
        file.write(b'{"torn\n')  # makes the reader go line by line
    assert read_events(log) == whole
    # lines that make sense together only are no events
    lines = [json.dumps(json.loads(event.line())) for event in whole[0]]
    cut = lines[1].index('"data"')
    log.write_text("\n".join([lines[0], lines[1][:cut], lines[1][cut:], *lines[2:]]) + "\n")
    with pytest.raises(LogError, match="line 2"):
        read_events(log)
