"""What a user can get wrong on the training command lines: one line, exit code, nothing made."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from rl_fakes import tiny_checkpoint
from safetensors import SafetensorError

from model.checkpoint import disk_tensors, load_model
from model.config import load_config
from model.layout import INDEX_NAME, tensor_shapes
from rl import train
from rl.checkpoints import bundled_checkpoint
from rl.cli import run_main
from rl.errors import InfraError
from rl.run_dir import RunDir


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("home") / "policy")


def run_file(folder: Path, text: str) -> Path:
    path = folder / "RUN.yaml"
    path.write_text(text)
    return path


def refused(argv: list[str], capsys: pytest.CaptureFixture[str], *words: str) -> None:
    assert run_main(train.main, argv) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("error: ") and shown.err.count("\n") == 1
    for word in words:
        assert word in shown.err, shown.err


def without_a_tensor(folder: Path) -> str:
    index = json.loads((folder / INDEX_NAME).read_text())
    del index["weight_map"]["model.norm.weight"]
    (folder / INDEX_NAME).write_text(json.dumps(index))
    return "tensor model.norm.weight is missing"


def with_another_size(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 48}))
    return "has shape"


def with_a_cut_shard(folder: Path) -> str:
    shard = next(folder.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:1000])
    return f"{shard.name}: damaged or cut off"


def without_tokenizer(folder: Path) -> str:
    (folder / "tokenizer.json").unlink()
    return "tokenizer.json does not exist"


@pytest.mark.parametrize("dry", [True, False])
@pytest.mark.parametrize(
    "spoil", [without_a_tensor, with_another_size, with_a_cut_shard, without_tokenizer]
)
def test_a_checkpoint_that_cannot_be_loaded_is_refused_before_anything_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: object, dry: bool
) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "policy")
    assert callable(spoil)
    word = spoil(checkpoint)
    config = run_file(tmp_path, f"model: {{checkpoint: {checkpoint}}}\n")
    run_dir = tmp_path / "run"
    mode = ["--dry-run"] if dry else ["--run-dir", str(run_dir)]
    refused([str(config), *mode], capsys, word, str(checkpoint))
    assert not run_dir.exists()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("competitions: [vowel-speaker]", ("vowel-speaker", "held out")),
        ("competitions: [food-review]", ("nearest is 'food-reviews'",)),
        ("scaffold: /nowhere", ("/nowhere", "system.md")),
        ("suite: offline-small-v9", ("offline-small-v0",)),
    ],
)
def test_a_dry_run_finds_what_the_run_would_find(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, words: tuple[str]
) -> None:
    config = run_file(tmp_path, f"model: {{checkpoint: {home}}}\n{line}\n")
    refused([str(config), "--dry-run"], capsys, *words)


def test_an_unknown_device_leaves_no_run_directory(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = run_file(tmp_path, f"model: {{checkpoint: {home}}}\ndevice: potato\n")
    refused([str(config), "--run-dir", str(tmp_path / "run")], capsys, "potato")
    assert not (tmp_path / "run").exists()


def test_files_that_are_no_text_and_folders_that_cannot_be_made(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    refused([str(tmp_path / "bytes.yaml"), "--dry-run"], capsys, "bytes.yaml", "UTF-8")
    config = run_file(tmp_path, f"model: {{checkpoint: {home}}}\n")
    refused([str(config), "--run-dir", str(config / "run")], capsys, "run directory", "RUN.yaml")


@pytest.mark.parametrize("fault", [OSError(28, "No space left"), SafetensorError("No space left")])
def test_a_full_disk_is_the_machines_fault(tmp_path: Path, fault: Exception) -> None:
    folder = RunDir(tmp_path / "run")
    folder.open("a: 1\n", resume=False)

    def write(path: Path) -> None:
        (path / "half").write_text("x")
        raise fault

    with pytest.raises(InfraError, match=r"step-1: .*No space left.*--resume"):
        folder.save_checkpoint(1, write, 2)
    assert folder.latest() is None and not (folder.checkpoints / "step-1").exists()
    folder.close()

    def main(argv: object) -> int:
        raise OSError(28, os.strerror(28), "/full/file")

    assert run_main(main) == InfraError.exit_code


@pytest.mark.parametrize("which", ["tiny", "bundled"])
def test_the_table_without_torch_is_the_models_own(home: Path, which: str) -> None:
    folder = home if which == "tiny" else bundled_checkpoint()
    held = {name: tuple(t.shape) for name, t in disk_tensors(load_model(folder)).items()}
    assert tensor_shapes(load_config(folder)) == held
