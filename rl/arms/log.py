"""An arm's log: a small JSON line for its settings, each step, each measurement, and its end.

    {"arm": "cispo-u1-s0", "settings": {…}, "device": …}
    {"step": 1, "scripts": 72, "train": 41.2, "valid": 0.86, "entropy": …, "capped": …, …}
    {"step": 10, "val": {"competition": [percentile, …]}}
    {"done": true, "steps": 40, "scripts": 2880, "seconds": …}

`train` is the mean percentile of the step's scripts on the dev rows of the train competitions (0 to
100); `val` the percentiles on the private tests of held-out competitions. No torch here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rl.arms.spec import START, Arm, Settings
from rl.errors import ConfigError
from rl.run_dir import Row, RunDir, write_atomic

Line = dict[str, Any]
Val = dict[str, list[float]]
VAL_FILE = "val.jsonl"

_SHORT = {
    "valid": "rollout/valid_frac",
    "zero_std": "group/zero_std_frac",
    "entropy": "policy/entropy",
    "grad": "policy/grad_norm",
    "kl": "mismatch_kl/mean",
    "updates": "optim/updates",
}


@dataclass
class Log:
    """One arm's log, read. `arm` is None for the measurement of the start."""

    arm: Arm | None
    head: Line
    steps: list[Line] = field(default_factory=list)
    val: dict[int, Val] = field(default_factory=dict)
    done: Line | None = None


def small_line(row: Row, scripts: int) -> Line:
    """A step's row in short; `scripts` executed so far."""
    line: Line = {"step": row["step"], "scripts": scripts}
    line["train"] = round(100 * row["reward/mle/mean"], 2)
    for name, key in _SHORT.items():
        if key in row:
            line[name] = _short(row[key])
    for key, value in row.items():
        if key.startswith("loss/") and key.endswith(("/weight_max", "/capped_frac")):
            line[key.rsplit("/", 1)[1].removesuffix("_frac")] = _short(value)
    return line


def write_log(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Replace the log in one piece."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, "".join(json.dumps(line, allow_nan=True) + "\n" for line in lines))


def read_log(path: Path) -> Log:
    """ConfigError naming file and line of what is no such log; a cut-off last line is ignored."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); name a log") from None
    log: Log | None = None
    lines = text.split("\n")
    for number, line in enumerate(lines[:-1], 1):
        try:
            value = json.loads(line)
            if "arm" in value:
                name = value["arm"]
                log = Log(None if name == START else Arm.parse(name), value)
            elif log is None:
                raise ValueError("no arm yet")
            elif "done" in value:
                log.done = value
            elif "val" in value:
                log.val[int(value["step"])] = value["val"]
            else:
                log.steps.append(value | {"step": int(value["step"])})
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}, line {number}: not a line of an arm's log") from error
    if log is None:
        raise ConfigError(f"{path}: empty; name a log of `rl.arms run`")
    return log


def read_logs(paths: Iterable[Path]) -> list[Log]:
    """Files, or folders of `*.jsonl` files."""
    files: list[Path] = []
    for path in paths:
        files += sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    return [read_log(file) for file in files]


def read_val(folder: Path) -> dict[int, Val]:
    """What has been measured of an arm in its folder; a cut-off last line is ignored."""
    path = folder / VAL_FILE
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
    return {int(v["step"]): v["val"] for v in map(json.loads, lines)}


def log_lines(name: str, settings: Settings, folder: Path, about: dict[str, Any]) -> list[Line]:
    """The log of an arm whose state is in `folder`, as it stands."""
    lines: list[Line] = [{"arm": name, "settings": asdict(settings), **about}]
    run_dir = RunDir(folder / "run")
    scripts = 0
    for row in run_dir.rows():
        scripts += int(row["rollout/attempts"])
        lines.append(small_line(row, scripts))
    lines += [{"step": step, "val": val} for step, val in sorted(read_val(folder).items())]
    if (folder / "done").is_file():
        result = run_dir.result or {}
        kept = ("steps", "scripts", "seconds", "cpu_seconds", "device", "source_fingerprint")
        lines.append({"done": True} | {key: result[key] for key in kept if key in result})
    return lines


def _short(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value
