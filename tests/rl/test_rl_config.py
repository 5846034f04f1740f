"""Run files and command lines: errors that help, no torch where none is needed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rl import evaluate, sft, train
from rl.cli import run_main
from rl.config import RunConfig, dump_config, load_config, merge, parse_yaml, validate
from rl.errors import ConfigError, SplitError
from rl.sft_config import SftConfig
from rl.splits import held_out_ids, refuse_held_out_text, trainable_ids

NO_TORCH = (
    "import sys\n"
    "class Guard:\n"
    "    def find_spec(self, name, path=None, target=None):\n"
    "        if name.split('.')[0] in ('torch', 'transformers', 'vllm'):\n"
    "            raise AssertionError(name + ' was imported')\n"
    "sys.meta_path.insert(0, Guard())\n"
)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_files_merge_left_to_right_and_overrides_come_last(tmp_path: Path) -> None:
    base = write(tmp_path / "a.yaml", "optim: {lr: 1e-3, warmup_steps: 2}\nseed: 1\n")
    over = write(tmp_path / "b.yaml", "optim: {lr: 2e-3}\ncompetitions: [diamonds-price]\n")
    last = write(tmp_path / "c.yaml", "seed: 7\n")
    config = load_config(base, [over, last], ["optim.grad_clip=0.5", "wandb.mode=disabled"])
    assert (config.optim.lr, config.optim.warmup_steps, config.seed) == (2e-3, 2, 7)
    assert (config.optim.grad_clip, config.wandb.mode) == (0.5, "disabled")
    assert config.competitions == ("diamonds-price",)
    assert merge({"a": {"b": 1}}, {"a": 3}) == {"a": 3}


def test_resolved_file_reads_back_equal(tmp_path: Path) -> None:
    config = RunConfig()
    path = write(tmp_path / "r.yaml", dump_config(config))
    assert load_config(path) == config


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("optim: {wamup_steps: 3}", "unknown key 'optim.wamup_steps'; nearest known key is "
         "'optim.warmup_steps'"),
        ("learning_rate: 3", "unknown key 'learning_rate'"),
        ("optim:\n  lr: [1\nseed: 2\n", "line 3"),
        ("- 1", "expected a mapping"),
        ("optim: {lr: -1}", "optim.lr"),
        ("forge: {deadline_s: .inf}", "forge.deadline_s: Input should be a finite number"),
        ("agent: {kind: langgraph, step: 3}", "'agent.step'; nearest known key is 'agent.steps'"),
        ("agent: {kind: command, command: []}", " agent.command: Tuple should have"),
        ("agent: {kind: langgraph}", "set forge.mode async"),
        (
            "{forge: {mode: async}, agent: {kind: command, command: [x], tasks: nowhere}}",
            "nowhere: no task there",
        ),
        (
            "{forge: {mode: async}, agent: {kind: langgraph, options: {colour: red}}}",
            "agent.options: rl.agents.langgraph_mle:build cannot be called with them (got an "
            "unexpected keyword argument 'colour'); it takes (base_url",
        ),
        (
            "{forge: {mode: async}, agent: {kind: langgraph, graph: 'rl.agents.nowhere:build'}}",
            "rl.agents.nowhere:build: No module named 'rl.agents.nowhere'; install it",
        ),
        (
            "{forge: {mode: async}, agent: {kind: command, command: [x], "
            "grader: {kind: python, call: 'math:nothing'}}}",
            "math:nothing: the module has no function 'nothing'",
        ),
        ("rollout: {max_new_tokens: 300}", "budget.tokens_per_script"),
        ("env: {cpu_seconds: 9}", "budget.cpu_seconds_per_script"),
        ("rollout: {group_size: 7}", "not a multiple"),
        ("rollout: {repetition_stop: {tokens: 255}}\nforge: {mode: async, engine: vllm}",
         "rollout.repetition_stop: forge.engine vllm cannot end a reply after 255 tokens"),
    ],
)  # fmt: skip
def test_mistakes_are_named_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, expected: str
) -> None:
    path = write(tmp_path / "run.yaml", text)
    assert run_main(train.main, [str(path), "--dry-run"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert expected in captured.err


def test_a_dry_run_of_an_agent_tells_of_its_tasks_and_limits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "tasks/adding/prompt.md", "Add.")
    agent = f"agent: {{kind: command, command: [x], tasks: {tmp_path / 'tasks'}}}\n"
    path = write(tmp_path / "run.yaml", agent + "forge: {mode: async, episode_calls: 7}\n")
    assert run_main(train.main, [str(path), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "1 tasks in turn: step 1 adding" in out and "each of at most 7 calls of 256" in out
    assert "script executions" not in out


def test_unknown_keys_inside_list_items_name_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"data\.invented"):
        validate(SftConfig, parse_yaml("data: [{kind: policy, invnted: 1}]", "x"), "x")


@pytest.mark.parametrize("bad", ["optim.lr", "=3", "a..b=1", "optim.lr=[1"])
def test_malformed_overrides(tmp_path: Path, bad: str) -> None:
    with pytest.raises(ConfigError, match="override"):
        load_config(write(tmp_path / "a.yaml", ""), (), [bad])


@pytest.mark.parametrize("module", ["rl.train", "rl.sft"])
def test_dry_run_prints_every_value_without_torch(tmp_path: Path, module: str) -> None:
    text = "seed: 3\n" if module == "rl.train" else "data: [{kind: policy}]\nseed: 3\n"
    path = write(tmp_path / "run.yaml", text)
    code = (
        f"{NO_TORCH}import runpy\nsys.argv = [{module!r}, {str(path)!r}, '--dry-run']\n"
        f"runpy.run_module({module!r}, run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert parse_yaml(done.stdout, "out")["seed"] == 3


def test_measuring_an_endpoint_needs_no_torch() -> None:
    names = "evaluate engine rollout collect envs rewards advantages samples step_metrics plan"
    code = NO_TORCH + "\n".join(f"import rl.{name}" for name in names.split())
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("held_out", ["electricity-demand", "vowel-speaker"])
def test_held_out_competitions_are_refused_whatever_the_config_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], held_out: str
) -> None:
    run_dir = tmp_path / "run"
    path = write(tmp_path / "run.yaml", f"competitions: [diamonds-price, {held_out}]\n")
    assert run_main(train.main, [str(path), "--run-dir", str(run_dir)]) == 2
    assert held_out in capsys.readouterr().err
    assert not run_dir.exists()
    path = write(tmp_path / "sft.yaml", f"competitions: [{held_out}]\ndata: [{{kind: policy}}]\n")
    assert run_main(sft.main, [str(path), "--out", str(tmp_path / "sft")]) == 2
    assert held_out in capsys.readouterr().err
    assert not (tmp_path / "sft").exists()


def test_train_ids_and_unknown_ids() -> None:
    assert set(trainable_ids("offline-small-v0")) == {
        "tweet-sentiment", "diamonds-price", "food-reviews"
    }  # fmt: skip
    assert held_out_ids() >= {"electricity-demand", "vowel-speaker"}
    for held_out in held_out_ids():
        with pytest.raises(SplitError, match=f"{held_out}.*held out"):
            trainable_ids("offline-small-v0", ["diamonds-price", held_out])
    with pytest.raises(ConfigError, match="nearest is 'diamonds-price'"):
        trainable_ids("offline-small-v0", ["diamond-prices"])
    with pytest.raises(SplitError, match="record 3"):
        refuse_held_out_text("about vowel-speaker", "record 3", held_out_ids())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--split", "dev", "--out", "x"], "--checkpoint DIR or --base-url"),
        (["--split", "dev", "--out", "x", "--checkpoint", "/nowhere"], "no config.json"),
        (["--split", "test", "--out", "x"], "invalid choice"),
        (["--split", "dev", "--out", "x", "--checkpoint", "a", "--samples", "0"], "1 or more"),
    ],
)
def test_evaluate_refuses_bad_arguments(
    capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    assert run_main(evaluate.main, arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and expected in error and error.count("\n") == 1


def test_missing_run_dir_and_missing_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(train.main, [str(tmp_path / "no.yaml")]) == 2
    assert "no such file" in capsys.readouterr().err
    assert run_main(train.main, [str(write(tmp_path / "a.yaml", ""))]) == 2
    assert "--run-dir" in capsys.readouterr().err


@pytest.mark.parametrize("pool", ["absent", "foreign"])
def test_an_unusable_pool_leaves_no_run_directory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], pool: str
) -> None:
    (tmp_path / "foreign").touch()
    path, run_dir = write(tmp_path / "run.yaml", ""), tmp_path / "run"
    arguments = [str(path), "--run-dir", str(run_dir), "--from-pool", str(tmp_path / pool)]
    assert run_main(train.main, arguments) == 2
    assert "pool; name the file that a run has written" in capsys.readouterr().err
    assert not run_dir.exists()


def test_missing_checkpoint_leaves_no_run_directory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "a.yaml", f"model: {{checkpoint: {tmp_path}/none}}\n")
    assert run_main(train.main, [str(path), "--run-dir", str(tmp_path / "run")]) == 2
    assert "no config.json" in capsys.readouterr().err
    assert not os.path.lexists(tmp_path / "run")
