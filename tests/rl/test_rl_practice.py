"""Training on the practice suite: its train side only, and rewards from its dev fields."""

from __future__ import annotations

from pathlib import Path

import pytest
from ruamel.yaml import YAML

from agent_tools.mle_bench.practice.entries import SUITE, entries, val_ids
from agent_tools.mle_bench.practice.prepare import prepare
from rl import train
from rl.cli import run_main
from rl.envs.mle.env import MleTaskset
from rl.errors import SplitError
from rl.splits import held_out_ids, trainable_ids


def test_training_takes_the_train_side_and_refuses_the_held_out_third() -> None:
    ids = set(trainable_ids(SUITE))
    assert ids == set(entries()) - val_ids() and len(ids) > 60
    assert val_ids() <= held_out_ids()
    for competition_id in val_ids():
        with pytest.raises(SplitError, match=f"{competition_id}.*held out"):
            trainable_ids(SUITE, [competition_id])


def test_a_dry_run_names_the_suite_and_a_held_out_id_is_a_configuration_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(f"suite: {SUITE}\n")
    assert run_main(train.main, [str(config), "--dry-run"]) == 0
    assert YAML(typ="safe").load(capsys.readouterr().out)["suite"] == SUITE
    held_out = sorted(val_ids())[0]
    refused = [str(config), f"competitions=[{held_out}]", "--run-dir", str(tmp_path / "run")]
    assert run_main(train.main, refused) == 2
    assert held_out in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_tasks_show_the_rows_of_their_split(tmp_path: Path) -> None:
    trained = "practice-california-schools"
    held_out = "practice-earthquake-magnitude"
    prepare([trained, held_out], tmp_path)
    dev = MleTaskset(SUITE, "dev", tmp_path)
    assert set(dev.ids()) == set(trainable_ids(SUITE))
    assert dev.task(trained).files == tmp_path / "competitions" / trained / "dev" / "public"
    val = MleTaskset(SUITE, "val", tmp_path)
    assert set(val.ids()) == val_ids()
    files = val.task(held_out).files
    assert files == tmp_path / "competitions" / held_out / "prepared" / "public"
    assert not (tmp_path / "competitions" / held_out / "dev").exists()
