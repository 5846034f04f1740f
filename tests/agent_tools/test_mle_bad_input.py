"""The benchmark's command line without data and with wrong arguments."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent_tools.mle_bench import cli


def command(monkeypatch: pytest.MonkeyPatch, *args: str) -> object:
    monkeypatch.setattr("sys.argv", ["mle_bench", *args])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


def test_list_names_what_is_not_prepared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, "list", "--data-dir", str(tmp_path)) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert len(lines) == 5 and all(line.endswith("not prepared") for line in lines)


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (("grade", "--competition", "tweet-sentiment"), "--submission"),
        (("grade", "--competition", "tweet-sentimen", "--submission", "x.csv"), "tweet-sentiment"),
        (("grad",), "grad"),
    ],
)
def test_usage_errors_are_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    args: tuple[str, ...],
    word: str,
) -> None:
    assert command(monkeypatch, *args) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and errors.count("\n") == 1 and word in errors
