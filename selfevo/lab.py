"""The lab on disk: finding it, checking it, making it, and the lock that one process holds."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from agent_tools.config_text import parse_yaml
from agent_tools.errors import InfraError, UserError
from agent_tools.git_configs import LabRepo, edit_yaml, init_lab_repo
from selfevo.asynchronous import Engine, section
from selfevo.config import (
    PROTECTED,
    TRAIN_CONFIG,
    EvalConfig,
    LabConfig,
    SearchSpace,
    flatten,
    load_eval,
    load_lab_config,
    load_space,
    nearest,
)

TEMPLATE = Path(__file__).parent / "lab_template"
#: What `selfevo init --healthy` writes over the template's documented bad setting.
HEALTHY_EDITS = {"optim.lr": 3.0e-4}
ISOLATION_EDITS = {"sandbox.require_full_isolation": True}
ARM_PATHS = (TRAIN_CONFIG, "scaffold")  # what makes an arm


@dataclass(frozen=True)
class LabFiles:
    """The lab's configuration at one moment, parsed and checked."""

    lab: LabConfig
    space: SearchSpace
    evaluation: EvalConfig
    train: dict[str, object]


def init_lab(
    path: Path,
    *,
    healthy: bool = False,
    full_isolation: bool = False,
    rollouts: Engine | None = None,
) -> LabRepo:
    """Write the template into `path` and commit it. Raises `UserError` if the folder is in use.

    `full_isolation` makes the lab's jobs refuse a host that cannot give every protection;
    `rollouts` makes them asynchronous, with this engine.
    """
    path = path.absolute()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} exists and is not empty; choose a new folder for the lab")
    part = path.with_name(f".{path.name}.part-{os.getpid()}")
    shutil.rmtree(part, ignore_errors=True)
    try:
        shutil.copytree(TEMPLATE, part, ignore=shutil.ignore_patterns("__pycache__"))
        (part / "gitignore").rename(part / ".gitignore")
        edits = {
            **(HEALTHY_EDITS if healthy else {}),
            **(ISOLATION_EDITS if full_isolation else {}),
        }
        for key, value in edits.items():
            edit_yaml(part / TRAIN_CONFIG, key, value)
        if rollouts is not None:
            with (part / TRAIN_CONFIG).open("a", encoding="utf-8") as file:
                file.write(section(rollouts))
        init_lab_repo(part, message="Start the lab")
        if path.exists():
            path.rmdir()
        part.rename(path)
    except OSError as error:
        raise UserError(
            f"cannot make the lab at {path}: {error.strerror}; choose another folder"
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return LabRepo(path)


def check_lab(lab: Path) -> LabRepo:
    """The lab's repository, ready for a campaign; `UserError` says what to mend.

    Looked at in this order: folder, repository, head, YAML of every configuration file as it
    stands on disk, then uncommitted changes in files that a campaign starts from.
    """
    if not lab.is_dir():
        raise UserError(f"{lab}: no such folder; make a lab with `selfevo init {_word(lab)}`")
    repo = LabRepo(lab)
    repo.require_clean_head()
    read_lab(lab)
    dirty = repo.dirty_paths([*PROTECTED, *ARM_PATHS, "program.md"])
    protected = [path for path in dirty if path in PROTECTED]
    if protected:
        raise UserError(
            f"{lab}: the protected file {protected[0]} has uncommitted changes; commit them or "
            f"take them back with `git -C {_word(lab)} checkout -- {protected[0]}`"
        )
    if dirty:
        raise UserError(
            f"{lab}: {dirty[0]} has uncommitted changes, and a campaign starts from the last "
            "commit; commit them or take them back"
        )
    return repo


def _word(path: Path) -> str:
    """A path as one word of a command line."""
    return shlex.quote(str(path))


def read_lab(lab: Path) -> LabFiles:
    """Parse and check the lab's configuration files on disk."""

    def text(name: str) -> str:
        try:
            return (lab / name).read_text(encoding="utf-8")
        except FileNotFoundError as error:
            raise UserError(
                f"{lab}: {name} is missing; this is not a lab: make one with `selfevo init`"
            ) from error
        except (UnicodeDecodeError, OSError) as error:
            raise UserError(f"{lab / name}: cannot be read as UTF-8 text; mend it") from error

    return parse_lab(
        text("selfevo.yaml"),
        text("search_space.yaml"),
        text("configs/eval.yaml"),
        text(TRAIN_CONFIG),
    )


def parse_lab(selfevo: str, space: str, evaluation: str, train: str) -> LabFiles:
    """The four configuration files as models; every key of the space must exist in the run."""
    run = parse_yaml(train, TRAIN_CONFIG)
    files = LabFiles(load_lab_config(selfevo), load_space(space), load_eval(evaluation), run)
    keys = flatten(run)
    for key in files.space.keys:
        if key not in keys:
            raise UserError(
                f"search_space.yaml: key {key} is not in {TRAIN_CONFIG}; the nearest there is "
                f"{nearest(key, keys)}"
            )
    return files


def find_campaign(path: Path, name: str | None = None) -> tuple[Path, str]:
    """(lab, campaign name) for a lab folder or a campaign folder; the newest one by default."""
    path = path.absolute()
    if (path / "events.jsonl").is_file():
        if path.parent.name != "runs":
            return path, path.name
        return path.parent.parent, path.name
    found = campaigns(path)
    if name is not None:
        if name not in found:
            known = f"known: {', '.join(found)}" if found else "there is none yet"
            raise UserError(f"{path}: no campaign {name}; {known}")
        return path, name
    if not found:
        raise UserError(f"{path}: no campaign here; start one with `selfevo run {_word(path)}`")
    return path, found[-1]


def campaign_folder(lab: Path, name: str) -> Path:
    """Folder of a campaign; a campaign folder outside a lab is its own `lab`."""
    return lab if (lab / "events.jsonl").is_file() else lab / "runs" / name


def campaigns(lab: Path) -> list[str]:
    """Names of the lab's campaigns, oldest first."""
    runs = lab / "runs"
    if not runs.is_dir():
        return []
    logs = [log for log in runs.glob("*/events.jsonl") if log.stat().st_size]
    return sorted((log.parent.name for log in logs), key=_number)


def next_name(lab: Path, repo: LabRepo) -> str:
    """c1, c2, …: the next name that neither a folder nor a branch uses."""
    used = [_number(name) for name in campaigns(lab)]
    used += [_number(branch.split("/")[1]) for branch in repo.branches("selfevo/")]
    runs = lab / "runs"
    if runs.is_dir():
        used += [_number(p.name) for p in runs.iterdir()]
    return f"c{max(used, default=0) + 1}"


def _number(name: str) -> int:
    match = re.fullmatch(r"c(\d+)", name)
    return int(match.group(1)) if match else 0


# ------------------------------------------------------------------ lock


@contextmanager
def locked(lab: Path, what: str) -> Iterator[None]:
    """Hold the lab's lock; `UserError` with the owner's pid and host if another process does.

    The lock is a kernel lock, so it ends with its owner however that ends.
    """
    runs = lab / "runs"
    try:
        runs.mkdir(parents=True, exist_ok=True)
        lock = FileLock(runs / "lock")
        lock.acquire(timeout=0)
    except Timeout as error:
        owner = _owner(runs / "owner.json")
        raise UserError(
            f"{lab} is in use by {owner}; wait for it, or stop it, then try again"
        ) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InfraError(f"no space left in {runs}: free some and try again") from error
        raise UserError(f"cannot write in {runs}: {error.strerror}; make it writable") from error
    try:
        record = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "command": what,
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        (runs / "owner.json").write_text(json.dumps(record))
        yield
    finally:
        (runs / "owner.json").unlink(missing_ok=True)
        lock.release()


def _owner(path: Path) -> str:
    try:
        record = json.loads(path.read_text())
        return f"pid {record['pid']} on {record['host']} (`{record['command']}`)"
    except (OSError, ValueError, KeyError):
        return "another process (its record is not readable yet)"
