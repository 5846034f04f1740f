"""The ledger is a cache of the logs; the medal table's figures are what they say they are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import duckdb
import numpy as np
import pytest

from selfevo.campaign import read_view
from selfevo.cli_medals import incumbents, sheets
from selfevo.ledger import LEDGER_FILE, campaign_rows, open_ledger
from selfevo.medal_plot import medal_svg
from selfevo.medal_stats import rate, stats
from selfevo.store import LogError, read_events

EXAMPLE = Path(__file__).parents[2] / "runs" / "example"


@pytest.fixture
def campaign(tmp_path: Path) -> Path:
    """The recorded example as campaign c1 of a lab."""
    folder = tmp_path / "lab" / "runs" / "c1"
    shutil.copytree(EXAMPLE, folder)
    (tmp_path / "lab" / "selfevo.yaml").write_text("rounds: 1\n")
    return folder


def test_rows_add_up_to_what_the_log_counted(campaign: Path) -> None:
    rows = list(campaign_rows(read_events(campaign / "events.jsonl")[0], campaign))
    view = read_view(campaign)
    for score in view.scores.values():
        own = [r for r in rows if (r.arm, r.seed) == (score.arm, score.score.seed)]
        assert len(own) == score.medals["scripts"]
        for medal in ("gold", "silver", "bronze"):
            assert sum(r.medal == medal for r in own) == score.medals[medal]
        assert sum(r.above_median for r in own) == score.medals["above_median"]
        by_competition = {r.competition: [] for r in own}
        for row in own:
            by_competition[row.competition].append(row.percentile)
        mean = np.mean([np.mean(v) for v in by_competition.values()])
        assert mean == pytest.approx(score.score.score)
    kept = next(pr for pr in view.prs.values() if pr.state == "merged")
    assert {r.commit for r in rows if r.arm == kept.arm} == {kept.commit}
    assert all(r.checkpoint.endswith("/checkpoints/step-5") for r in rows)
    assert {r.strata for r in rows} == {"time", "signal"}
    hours = [r.wall_hours for r in rows]
    assert hours == sorted(hours) and rows[-1].job_hours > rows[0].job_hours > 0


def test_the_file_follows_the_logs_and_deleting_it_loses_nothing(campaign: Path) -> None:
    def count() -> int:
        with open_ledger(campaign) as connection:
            found = connection.execute("SELECT count(*) FROM scores").fetchone()
        assert found is not None
        return int(found[0])

    path = campaign.parent / LEDGER_FILE
    whole = count()
    assert whole == 128 and path.is_file() and count() == whole
    shutil.copytree(campaign, campaign.parent / "c2")
    assert count() == 2 * whole
    log = campaign.parent / "c2" / "events.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    last = max(n for n, line in enumerate(lines) if '"kind":"eval.scores"' in line)
    log.write_text("".join(lines[:last]))  # as it was before its last measurement
    assert count() == 2 * whole - 32
    path.unlink()
    assert count() == 2 * whole - 32


@pytest.mark.parametrize("content", [b"", b"not a database" * 400])
def test_a_damaged_file_is_no_obstacle(campaign: Path, content: bytes) -> None:
    (campaign.parent / LEDGER_FILE).write_bytes(content)
    with open_ledger(campaign) as connection:
        assert connection.execute("SELECT count(*) FROM scores").fetchone() == (128,)


def test_a_file_that_another_process_holds_is_no_obstacle(campaign: Path) -> None:
    with (
        duckdb.connect(str(campaign.parent / LEDGER_FILE)),
        open_ledger(campaign) as connection,
    ):
        assert connection.execute("SELECT count(*) FROM scores").fetchone() == (128,)


def test_a_lost_blob_is_named(campaign: Path) -> None:
    events, _ = read_events(campaign / "events.jsonl")
    rows = next(e.data["rows"] for e in events if e.kind == "eval.scores")
    (campaign / "blobs" / rows).unlink()
    with pytest.raises(LogError, match=rows):
        list(campaign_rows(events, campaign))


# ------------------------------------------------------------------ figures


def test_a_rate_is_the_mean_over_seeds_with_its_standard_error() -> None:
    values = [[[100.0, 0.0], [0.0, 0.0, 0.0]], [[100.0, 100.0], [0.0]]]  # seed, competition, script
    found = rate(values)
    assert found.mean == pytest.approx((25 + 50) / 2)
    assert found.sem == pytest.approx(np.std([25, 50], ddof=1) / np.sqrt(2))
    assert rate(values[:1]).sem == 0.0
    # the one competition whose scripts differ has means 0, 50 and 100 with chances 1/4, 1/2, 1/4
    assert (found.low, found.high) == (pytest.approx(25.0), pytest.approx(50.0))


def test_one_run_a_competition_and_seed_is_drawn_over_the_seeds() -> None:
    values = [[[100.0], [0.0]], [[0.0], [0.0]]]  # seed, competition, run
    assert (rate(values).low, rate(values).high) == (25.0, 25.0)  # no stratum has two to draw from
    row = {"campaign": "c", "round": 0, "arm": "a", "role": "start", "medal": None}
    hours = {"wall_hours": 0.0, "job_hours": 0.0, "gpu_hours": 0.0}
    rows = [
        {**row, **hours, "seed": seed, "competition": name, "any_medal": value > 0,
         "above_median": False, "percentile": value, "valid": True}
        for seed, cells in enumerate(values)
        for name, (value,) in zip("xy", cells, strict=True)
    ]  # fmt: skip
    (line,) = stats(rows, "round")
    found = line.rates["any_medal"]
    # x comes out as 0, 50 and 100 with chances 1/4, 1/2, 1/4, and y as 0
    assert (found.mean, found.low, found.high) == (25.0, 0.0, 50.0)
    assert found.sem == pytest.approx(25.0)


def test_the_interval_covers_the_true_rate() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        scripts = [[list(100.0 * (rng.random(32) < p)) for p in (0.2, 0.6)] for _ in range(2)]
        found = rate(scripts, draws=400)
        hits += found.low <= 40.0 <= found.high
    assert 0.88 <= hits / 200 <= 0.99


def test_groups_keep_the_order_of_the_log(campaign: Path) -> None:
    view = read_view(campaign)
    rows = sheets(campaign, view, view.info["suite"])[0].rows
    assert [line.round for line in stats(rows, "round")] == [0, 1]
    assert [line.group for line in stats(rows, "competition")] == [
        "electricity-demand",
        "vowel-speaker",
    ] * 2
    assert [line.scripts for line in stats(rows, "seed")] == [32, 32, 32, 32]
    assert incumbents(view) == [line.arm for line in stats(rows, "arm")]


def test_the_plot_is_well_formed_and_names_every_arm(campaign: Path) -> None:
    from xml.etree import ElementTree

    view = read_view(campaign)
    lines = stats(sheets(campaign, view, view.info["suite"])[0].rows, "arm")
    text = medal_svg(lines, incumbents(view), title="a < b & c")
    tree = ElementTree.fromstring(text)
    circles = [e for e in tree.iter() if e.tag.endswith("circle")]
    assert len(circles) == 2 * len(lines) and "minutes of jobs, no GPU" in text
    assert "NaN" not in text and json.dumps(text)
