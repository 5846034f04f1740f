"""Tasks of your own: a folder with one folder a task.

tasks/<id>/prompt.md      what the agent is told
tasks/<id>/files/         what it finds in its folder (optional)
tasks/<id>/tests/         what only the grader finds there (optional; replaces equal names)
"""

from __future__ import annotations

from pathlib import Path

from rl.config import nearest
from rl.errors import ConfigError
from rl.types import Task


class FolderTaskset:
    """The tasks of a folder in the order of their names (`rl.types.Taskset`)."""

    def __init__(self, folder: Path, split: str = "train") -> None:
        """ConfigError where the folder holds no task."""
        self._folder = folder = folder.absolute()  # a sandbox looks from elsewhere
        self._split = split
        self._ids = tuple(
            sorted(path.parent.name for path in folder.glob("*/prompt.md") if path.is_file())
        )
        if not self._ids:
            raise ConfigError(f"{folder}: no task there; make {folder}/<id>/prompt.md")

    def ids(self) -> tuple[str, ...]:
        """Names of the task folders."""
        return self._ids

    def task(self, task_id: str) -> Task:
        """One task. ConfigError for an unknown id or a prompt that is not UTF-8."""
        if task_id not in self._ids:
            raise ConfigError(
                f"{self._folder}: no task {task_id!r}; nearest is {nearest(task_id, self._ids)!r}"
            )
        folder = self._folder / task_id
        try:
            prompt = (folder / "prompt.md").read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{folder / 'prompt.md'}: {error}; make it UTF-8 text") from error
        messages = ({"role": "user", "content": prompt},)
        return Task(task_id, messages, folder / "files", self._split, domain="own")


def tests_folder(task: Task) -> Path | None:
    """What only the grader sees of a task of a `FolderTaskset`; None where there is nothing."""
    folder = task.files.parent / "tests"
    return folder if task.files.name == "files" and folder.is_dir() else None
