"""How a run ends, said alike by the synchronous and the asynchronous loop. No torch here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

from rl.checkpoints import fingerprint
from rl.config import RunConfig
from rl.errors import InfraLimitError, StoppedError, exit_code_of
from rl.run_dir import Row, RunDir, Status
from rl.step_metrics import Counts

MAX_INFRA_SHARE = 0.10


@contextmanager
def run_status(folder: RunDir) -> Iterator[Status]:
    """`status.json` while the body runs; a signal or an error closes it and goes on upwards."""
    status = Status(folder.path / "status.json")
    try:
        yield status
    except StoppedError as error:
        status.close("cancelled", error.exit_code, signal=error.signal_name, reason=str(error))
        raise
    except BaseException as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        status.close("failed", exit_code_of(error), reason=reason)
        raise


def check_infra(counts: Counts, logs: str) -> None:
    """InfraLimitError when too many scripts failed for reasons that are not theirs."""
    if counts.infra_share > MAX_INFRA_SHARE:
        raise InfraLimitError(
            f"{counts.infra} of {counts.scripts} scripts failed for reasons that are not theirs; "
            f"see the {logs} and try again"
        )


def result_of(
    config: RunConfig,
    final: Path,
    *,
    step: int,
    row: Row,
    counts: Counts,
    source: str,
    device: str,
) -> dict[str, Any]:
    """What `result.json` holds. `final`: the last checkpoint; `source`: the first one's print."""
    return {
        "steps": step,
        "checkpoint": f"checkpoints/{final.name}",
        "fingerprint": fingerprint(final),
        "source": str(config.model.checkpoint),
        "source_fingerprint": source,
        "objective": config.objective,
        "seed": config.seed,
        "metrics": {k: v for k, v in row.items() if k not in ("step", "t")},
        "tokens": counts.tokens,
        "scripts": counts.scripts,
        "infra_errors": counts.infra,
        "cpu_seconds": round(counts.cpu_s, 3),
        "seconds": round(counts.seconds, 3),
        "device": device,
        "versions": {name: package_version(name) for name in ("torch", "wandb", "scikit-learn")},
    }
