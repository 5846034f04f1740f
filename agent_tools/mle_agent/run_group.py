"""Where a group of runs lies: MLE-bench's layout, with what resuming and grading need beside it.

OUT/<timestamp>_run-group_<agent>/metadata.json
OUT/<timestamp>_run-group_<agent>/<competition>_<uuid>/{submission,logs,code}
OUT/group.json      the settings: the same command goes on, another one is refused
OUT/scores.jsonl, OUT/best_on_test.jsonl, OUT/findings.jsonl      written by the judge
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from agent_tools.errors import UserError

_NAMES = uuid.UUID("6d1c1a44-3f0b-4a6e-9f57-5e1f0f6f3c11")


@dataclass(frozen=True)
class Task:
    """One run of a group: a competition and the number of its seed."""

    competition: str
    seed: int


@dataclass(frozen=True)
class About:
    """What the rows of a group say about where they come from."""

    agent: str
    suite: str
    suite_version: int
    settings: dict[str, Any]
    model: str
    competitions: tuple[str, ...]
    seeds: tuple[int, ...]
    commit: str | None = None
    checkpoint: str | None = None
    campaign: str | None = None
    round: int | None = None

    def tasks(self) -> list[Task]:
        """All runs, seed by seed, so that an early stop leaves whole seeds."""
        return [Task(name, seed) for seed in self.seeds for name in self.competitions]


class Group:
    """The folders of one group of runs."""

    def __init__(self, out: Path, about: About, folder: Path) -> None:
        self.out = out
        self.about = about
        self.folder = folder

    @classmethod
    def open(cls, out: Path, about: About) -> Group:
        """Make a group, or take up the one that is there.

        Raises `UserError` where OUT holds a group with other settings.
        """
        path = out / "group.json"
        if path.is_file():
            group = cls.load(out)
            ours, theirs = asdict(about), asdict(group.about)
            different = [k for k in ours if _plain(ours[k]) != _plain(theirs[k]) and k != "commit"]
            if different:
                key = different[0]
                raise UserError(
                    f"{out} holds runs with {key} = {_short(theirs[key])}, "
                    f"not {_short(ours[key])}: name another folder with --out"
                )
            if about.commit != group.about.commit and not group.is_complete():
                raise UserError(
                    f"{out} was begun at commit {group.about.commit}, and the code is another now: "
                    "check that one out, or name another folder with --out"
                )
            return group
        if out.is_dir() and any(entry.name != "lock" for entry in out.iterdir()):
            raise UserError(f"{out} holds other files: name an empty or new folder with --out")
        stamp = time.strftime("%Y-%m-%dT%H-%M-%S-UTC", time.gmtime())
        name = f"{stamp}_run-group_{about.agent}"
        out.mkdir(parents=True, exist_ok=True)
        (out / name).mkdir()
        write_json(path, {"folder": name, "about": asdict(about)})
        return cls(out, about, out / name)

    @classmethod
    def load(cls, out: Path) -> Group:
        """The group in a folder. Raises `UserError` where there is none."""
        try:
            data = json.loads((out / "group.json").read_text(encoding="utf-8"))
            values = dict(data["about"])
            values["competitions"] = tuple(values["competitions"])
            values["seeds"] = tuple(values["seeds"])
            return cls(out, About(**values), out / str(data["folder"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{out}: no group of runs there ({error}); make one with "
                "`python -m agent_tools.mle_agent run --out`"
            ) from error

    def run_folder(self, task: Task) -> Path:
        """`<competition>_<uuid>`: the same for the same group, competition and seed."""
        name = uuid.uuid5(_NAMES, f"{self.folder.name}/{task.competition}/{task.seed}")
        return self.folder / f"{task.competition}_{name}"

    def is_done(self, task: Task) -> bool:
        return (self.run_folder(task) / "run.json").is_file()

    def is_complete(self) -> bool:
        """Whether every run has ended."""
        return all(self.is_done(task) for task in self.about.tasks())

    def finish(self, task: Task, record: dict[str, Any]) -> None:
        """Mark a run as ended, with its costs, and write the group's metadata again."""
        write_json(self.run_folder(task) / "run.json", record | {"seed": task.seed})
        done = [item for item in self.about.tasks() if self.is_done(item)]
        write_json(
            self.folder / "metadata.json",
            {
                "run_group": self.folder.name,
                "created_at": self.folder.name.partition("_")[0],
                "agent_id": self.about.agent,
                "runs": {
                    self.run_folder(item).name: {
                        "competition_id": item.competition,
                        "seed": item.seed,
                        "success": (self.run_folder(item) / "submission/submission.csv").is_file(),
                    }
                    for item in done
                },
            },
        )

    def record(self, task: Task) -> dict[str, Any]:
        """What `finish` was given."""
        text = (self.run_folder(task) / "run.json").read_text(encoding="utf-8")
        found: dict[str, Any] = json.loads(text)
        return found


def write_json(path: Path, value: object) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """JSON lines, whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    part.replace(path)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows written by `write_rows`. Raises `UserError` for something else."""
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON lines ({error}); run the judge") from error


def _plain(value: object) -> object:
    return json.loads(json.dumps(value))


def _short(value: object) -> str:
    return json.dumps(value)[:120]
