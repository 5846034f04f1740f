"""Prepare competitions: run each ``prepare`` in the prepare environment, check hashes, split dev.

Files are made in a temporary folder, compared with the competition's committed
``data_hashes.yaml`` and renamed into place, so a competition is either whole and right or absent.
A second run only hashes what is there.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout

from agent_tools.errors import InfraError, UserError
from agent_tools.mle_bench.registry import Config, competition_dir, load_config
from agent_tools.paths import data_dir as default_data_dir
from agent_tools.paths import prepare_python, repo_root

Hashes = dict[str, dict[str, str]]  # folder ("raw", "prepared/public", …) -> file -> SHA-256

HASH_FILE = "data_hashes.yaml"
PREPARE_SECONDS = 600
LOCK_SECONDS = 600
DEV_FIT, DEV_SCORE = 600, 400
# -I keeps the caller's environment and working folder out; the repository is the only addition.
WORKER = """
import sys
sys.path.insert(0, sys.argv[1])
from importlib import import_module
from pathlib import Path
module, _, name = sys.argv[2].partition(":")
raw, public, private = map(Path, sys.argv[3:6])
getattr(import_module(module), name)(raw=raw, public=public, private=private)
"""


def prepare_competition(
    competition_id: str, data_dir: Path | None = None, *, freeze: bool = False
) -> Literal["unchanged", "prepared"]:
    """Make ``<data>/competitions/<id>/{prepared,dev}`` if it is not there or not right.

    ``freeze`` writes the hashes of what was made to the repository instead of checking them;
    it is for whoever changes a competition, which is a new suite version.
    Raises `UserError` for a missing source package or a hash that differs, `InfraError` if the
    preparation itself fails.
    """
    config = load_config(competition_id)
    expected = None if freeze else _read_hashes(config)
    base = competition_dir(competition_id, data_dir)
    base.parent.mkdir(parents=True, exist_ok=True)
    with prepare_lock(base.parent / ".prepare.lock"):
        if expected is not None and _hash_tree(base) == _without_raw(expected):
            _write_descriptions(config, base)
            return "unchanged"
        with _scratch(base) as scratch:
            made = _make(config, scratch, expected)
            if freeze:
                _write_hashes(config, made)
            elif made != expected:
                assert expected is not None
                raise UserError(
                    f"{competition_id}: {_first_difference(expected, made)} differs from "
                    f"{HASH_FILE}: check the versions in prepare_requirements.txt"
                )
            _write_descriptions(config, scratch)
            _move_into_place(scratch, base)
    return "prepared"


def _make(config: Config, scratch: Path, expected: Hashes | None) -> Hashes:
    raw = scratch / "raw"
    raw.mkdir()
    for source in config.raw:
        shutil.copyfile(_source(config, source), raw / Path(source).name)
    made: Hashes = {"raw": _hash_folder(raw)}
    # Before anything is loaded: some sources are pickles, and loading a pickle runs its code.
    if expected is not None and made["raw"] != expected["raw"]:
        wrong = _first_difference({"raw": expected["raw"]}, made)
        raise UserError(
            f"{config.id}: source {wrong} differs from {HASH_FILE}: install the versions in "
            "prepare_requirements.txt with `make setup`"
        )
    _run_prepare(config, raw, scratch / "prepared")
    shutil.rmtree(raw)
    if config.dev:
        _make_dev(config, scratch)
    for folder in (scratch / "prepared", scratch / "dev"):
        if folder.is_dir():
            (folder / "private").chmod(0o700)
    return made | _hash_tree(scratch)


def _run_prepare(config: Config, raw: Path, prepared: Path) -> None:
    result = run_preparer(prepare_python(), repo_root(), config.preparer, raw, prepared, config.id)
    if result.returncode != 0:
        raise InfraError(
            f"{config.id}: preparation failed with exit code {result.returncode} "
            f"({last_line(result.stderr)}): run `make setup` to repair the prepare environment"
        )


def run_preparer(
    python: Path,
    root: Path,
    preparer: str,
    raw: Path,
    prepared: Path,
    competition_id: str,
    *,
    seconds: float = PREPARE_SECONDS,
) -> subprocess.CompletedProcess[str]:
    """Call a ``prepare(raw, public, private)`` in a process of its own; what became of it.

    `preparer` is an import string that `root` is put on the path for. Raises `InfraError` past
    the time limit.
    """
    public, private = prepared / "public", prepared / "private"
    public.mkdir(parents=True)
    private.mkdir()
    argv = [
        *(str(python), "-I", "-B", "-c", WORKER),
        *(str(root), preparer, str(raw), str(public), str(private)),
    ]
    try:
        return subprocess.run(
            argv,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            env={"PATH": os.environ.get("PATH", ""), "LC_ALL": "C.UTF-8"},
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise InfraError(
            f"{competition_id}: preparation took longer than {seconds:g} s: try again"
        ) from None


def last_line(text: str) -> str:
    """The last line of a program's errors."""
    return (text.strip().splitlines() or ["no message"])[-1]


def _make_dev(config: Config, scratch: Path) -> None:
    """Split the public training rows into rows to fit and rows to score; nothing private."""
    import pandas as pd

    from agent_tools.mle_bench.tables import split_by_hash, write_tables

    public = scratch / "prepared" / "public"
    # Cells stay text, so that dev files repeat the public ones to the letter.
    table = pd.read_csv(public / "train.csv", dtype=str, keep_default_na=False).iloc[:, 1:]
    sample = pd.read_csv(public / "sample_submission.csv", float_precision="round_trip")
    fit, score = split_by_hash(
        table, DEV_FIT, DEV_SCORE, salt=f"{config.id}/dev", stratify=config.kind != "regression"
    )
    write_tables(
        fit,
        score,
        scratch / "dev" / "public",
        scratch / "dev" / "private",
        classes=list(sample.columns[1:]) if config.kind == "multiclass" else (),
        fill=float(str(sample.iloc[0, 1])),
    )


def _source(config: Config, source: str) -> Path:
    """A file of the prepare environment: ``site-packages/…``, ``sdists/…`` or ``npm/…``."""
    venv = prepare_python().parent.parent
    area, _, rest = source.partition("/")
    if area == "site-packages":
        found = sorted(venv.glob(f"lib/python3*/site-packages/{rest}"))
        path = found[0] if found else venv / "lib" / source
    else:
        path = venv / source
    if not path.is_file():
        raise UserError(
            f"{config.id}: source file {source} is not in {venv}: install the prepare "
            "environment with `make setup`, for offline-v1 and practice-v1 with `make setup-v1`"
        )
    return path


def _write_descriptions(config: Config, base: Path) -> None:
    text = (config.folder / "description.md").read_text(encoding="utf-8")
    for public in (base / "prepared" / "public", base / "dev" / "public"):
        path = public / "description.md"
        if public.is_dir() and not (path.is_file() and path.read_text(encoding="utf-8") == text):
            path.write_text(text, encoding="utf-8")


def _hash_tree(base: Path) -> Hashes:
    folders = ("prepared/public", "prepared/private", "dev/public", "dev/private")
    return {name: _hash_folder(base / name) for name in folders if (base / name).is_dir()}


def _hash_folder(folder: Path) -> dict[str, str]:
    """One digest a file; one for all of a sub-folder, which may hold thousands of images."""
    return {
        path.name + "/" * path.is_dir(): _digest(path)
        for path in sorted(folder.iterdir())
        if path.name != "description.md"
    }


def _digest(path: Path) -> str:
    if not path.is_dir():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    whole = hashlib.sha256()
    for inner in sorted(path.rglob("*")):
        if inner.is_file():
            name = inner.relative_to(path).as_posix()
            whole.update(f"{name}\0{hashlib.sha256(inner.read_bytes()).hexdigest()}\n".encode())
    return whole.hexdigest()


def _without_raw(hashes: Hashes) -> Hashes:
    return {folder: files for folder, files in hashes.items() if folder != "raw"}


def _first_difference(expected: Hashes, made: Hashes) -> str:
    for folder in sorted(expected.keys() | made.keys()):
        left, right = expected.get(folder, {}), made.get(folder, {})
        for name in sorted(left.keys() | right.keys()):
            if left.get(name) != right.get(name):
                return f"{folder}/{name}"
    return "nothing"


def _read_hashes(config: Config) -> Hashes:
    from ruamel.yaml import YAML

    path = config.folder / HASH_FILE
    if not path.is_file():
        raise UserError(f"{path} is missing: restore it with git")
    hashes: Hashes = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    return hashes


def _write_hashes(config: Config, hashes: Hashes) -> None:
    lines = ["# SHA-256 of the source files and of what `prepare` makes of them.\n"]
    for folder, files in hashes.items():
        lines.append(f"{folder}:\n")
        lines += [f"  {name}: {digest}\n" for name, digest in files.items()]
    (config.folder / HASH_FILE).write_text("".join(lines), encoding="utf-8")


@contextmanager
def prepare_lock(path: Path) -> Iterator[None]:
    """One preparation at a time; `InfraError` if another one does not end."""
    try:
        with FileLock(path, timeout=LOCK_SECONDS):
            yield
    except Timeout:
        raise InfraError(
            f"another preparation holds {path} for over {LOCK_SECONDS} s: wait for it or stop it"
        ) from None


@contextmanager
def _scratch(base: Path) -> Iterator[Path]:
    """A folder beside ``base``; removed afterwards, and leftovers of killed runs before."""
    scratch, old = _beside(base, "new"), _beside(base, "old")
    for leftover in (scratch, old):
        if leftover.exists():
            shutil.rmtree(leftover)
    scratch.mkdir()
    try:
        yield scratch
    finally:
        if scratch.exists():
            shutil.rmtree(scratch)


def _move_into_place(scratch: Path, base: Path) -> None:
    old = _beside(base, "old")
    if base.exists():
        base.rename(old)
    scratch.rename(base)
    if old.exists():
        shutil.rmtree(old)


def _beside(base: Path, tag: str) -> Path:
    return base.with_name(f".{base.name}.{tag}")


def data_root(data_dir: Path | None) -> Path:
    """The data folder in use: the argument, else `agent_tools.paths.data_dir`."""
    return data_dir or default_data_dir()
