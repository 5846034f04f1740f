"""Reader of the trainer's side-car ``metrics.jsonl``: one flushed line a step."""

from __future__ import annotations

import json
from pathlib import Path

from agent_tools.errors import UserError
from agent_tools.wandb_logs.rows import RowCollector, flatten

MAX_LINE = 4 * 1024 * 1024


def read_sidecar(path: Path, rows: RowCollector) -> None:
    """Read ``{"step": n, "t": unix, metric: number, …}`` lines into `rows`.

    A partial last line (the run is writing) and damaged lines are skipped with a warning.
    Raises `UserError` if the file is missing or holds no such line although it is not empty.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the run directory") from error
    good = bad = number = 0
    with file:
        while line := file.readline(MAX_LINE):
            number += 1
            row = _parse(line)
            if row is not None:
                step, metrics = row
                rows.add(step, metrics)
                good += 1
            elif not line.endswith(b"\n") and not file.peek(1):
                rows.warn(f"the last line of {path.name} is incomplete: it was skipped")
            elif line.strip():
                bad += 1
                rows.warn(f"line {number} of {path.name} is no metrics row: it was skipped")
                if bad > 100:
                    break  # not our file, or hopeless; the warnings say so
    if bad and not good:
        raise UserError(
            f"{path} is not a metrics.jsonl file (line 1 is no JSON object with a step): "
            "give a run directory made by rl.train"
        )


def _parse(line: bytes) -> tuple[int, dict[str, object]] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    except RecursionError:  # thousands of open brackets
        return None
    if not isinstance(value, dict):
        return None
    step = value.get("step")
    if isinstance(step, bool) or not isinstance(step, int) or abs(step) >= 2**62:
        return None
    return step, flatten(value)
