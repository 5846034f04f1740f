"""The study's tables: known numbers, the rule of the verdict, and the committed page."""

from pathlib import Path

import numpy as np
import pytest

from model.errors import ModelError
from model.study.__main__ import main
from model.study.log import append, read_log
from model.study.report import BEGIN, END, tables, verdict, write_into
from model.study.statistics import package_interval, share_interval, t_interval
from model.study.variants import STUDIES
from tests.model.study_helpers import make_line

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "architecture_study.md"
SPREAD = (-0.001, 0.0, 0.001)


def _runs(**changes: object) -> dict[str, dict[int, dict[str, object]]]:
    """Full attention and a hybrid, three seeds each; `changes` are the hybrid's."""
    runs: dict[str, dict[int, dict[str, object]]] = {"base": {}, "hybrid-5to1": {}}
    for seed, noise in enumerate(SPREAD):
        runs["base"][seed] = make_line("base", seed)
        values = {key: value + noise for key, value in changes.items()}  # type: ignore[operator]
        runs["hybrid-5to1"][seed] = make_line("hybrid-5to1", seed, **values)
    return runs


def test_students_interval_of_three_seeds() -> None:
    found = t_interval([1.0, 2.0, 3.0])
    assert found.mean == 2 and found.high - found.mean == pytest.approx(4.303 / 3**0.5, abs=1e-3)
    assert np.isnan(t_interval([1.0]).low)


def test_wilsons_interval_of_a_share() -> None:
    found = share_interval(5, 6)
    for share in (found.low, found.high):  # its ends are where the score test gives z
        error = (share * (1 - share) / 6) ** 0.5
        assert abs(found.mean - share) / error == pytest.approx(1.96, abs=1e-6)
    assert share_interval(0, 3).low == 0 and share_interval(3, 3).high == 1


def test_seeds_that_learnt_to_look_far_are_counted() -> None:
    lines = [make_line("base", seed, far=0.95) for seed in range(3)]
    lines += [make_line("hybrid-5to1", seed, far=(0.95, 0.2, 0.93)[seed]) for seed in range(3)]
    text = tables(lines)
    assert "| `base` | 3 of 3 | 100 [44, 100] |" in text
    assert "| `hybrid-5to1` | 2 of 3 | 67 [21, 94] |" in text


def test_packages_are_resampled_as_wholes() -> None:
    same = package_interval(np.array([[1.0, 2.0], [3.0, 2.0]]), np.array([10.0, 10.0]))
    assert same.mean == pytest.approx(0.2) and same.low == same.high == pytest.approx(0.2)
    mixed = package_interval(np.array([[0.0, 10.0]]), np.array([10.0, 10.0]))
    assert (mixed.low, mixed.high) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"far": 0.5}, "reproduces the report"),
        ({"far": 0.9}, "contradicts the report"),
        ({"far": 0.87}, "contradicts the report"),
        ({"near": 0.9, "far": 0.6, "nats": None}, "worse on ordinary text already"),
    ],
)
def test_the_verdict_follows_its_rule(changes: dict[str, float | None], said: str) -> None:
    worse = changes.pop("nats", 0) is None
    runs = _runs(**changes)
    if worse:
        for seed in range(3):
            line = make_line("hybrid-5to1", seed, nats=(22.0 + seed / 10, 33.0), far=0.6)
            runs["hybrid-5to1"][seed] = line
    assert said in verdict("hybrid-5to1", runs)


def test_no_verdict_without_a_learnt_task_or_an_interval() -> None:
    runs = {
        name: {seed: make_line(name, seed, near=0.1, far=0.1) for seed in range(3)}
        for name in ("base", "window")
    }
    assert "learnt no task" in verdict("window", runs)
    runs = {name: {0: make_line(name, 0)} for name in ("base", "window")}
    assert "one seed" in verdict("window", runs)


def test_tables_hold_means_and_paired_differences() -> None:
    lines = []
    for seed, noise in enumerate((0.0, 1.0, 2.0)):  # common to both: it cancels in the difference
        lines.append(make_line("base", seed, nats=(20 + noise, 30 + noise)))
        lines.append(make_line("fine", seed, nats=(19 + noise, 29 + noise)))
    text = tables(lines)
    assert "| `base` | 2.6000 |  |  |" in text
    assert "| `fine` | 2.5000 | -0.1000 [-0.1000, -0.1000] | [-0.1000, -0.1000] |" in text
    assert "## granularity" in text and "## mtp" not in text


def test_logs_of_two_settings_are_refused() -> None:
    lines = [make_line("base", 0), make_line("fine", 0) | {"setting": "other"}]
    with pytest.raises(ModelError, match="2 settings"):
        tables(lines)
    with pytest.raises(ModelError, match="0 settings"):
        tables([])


def test_the_command_writes_tables_into_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log, page = tmp_path / "log.jsonl", tmp_path / "page.md"
    for name in STUDIES["granularity"]:
        append(log, make_line(name, 0))
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert main(["report", str(log), "--into", str(page)]) == 0
    text = page.read_text()
    assert text == f"before\n{BEGIN}\n{tables(read_log([log]))}{END}\nafter\n"
    page.write_text("no marks")
    assert main(["report", str(log), "--into", str(page)]) == 2
    assert main(["report", str(tmp_path / "absent")]) == 2
    assert "absent: cannot be read" in capsys.readouterr().err


def test_the_pages_tables_are_those_of_the_committed_logs() -> None:
    logs = sorted(ROOT.glob("benchmarks/results/study-*/*.jsonl"))
    page = PAGE.read_text(encoding="utf-8")
    expected = tables(read_log(logs)) if logs else ""
    assert page == write_into(page, expected)
