"""Run by a test: saves checkpoints in children that are killed part of the way."""

import os
import signal
import sys
from pathlib import Path

import model.shards as shards
from model.checkpoint import load_model, save_checkpoint

PHASES = {
    "second shard": (shards, "save_file", 2),
    "index": (shards, "_write_json", 2),
    "flush": (shards, "fsync", 3),
    "renaming": (shards, "_put_in_place", 1),
    "swap": (shards, "_exchange", 1),
    "cleaning": (shards.shutil, "rmtree", 1),
}
"""Phase → module, function and which call of it is the last thing that the process does."""


def die_at(module, name, number):
    """Replace a function by one that kills this process when it is called that often."""
    real, calls = getattr(module, name), 0

    def function(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(module, name, function)


def main(home: Path) -> None:
    """Each phase into a new place `new PHASE` and over an old checkpoint `old PHASE`."""
    changed = load_model(home / "start")
    changed.norm.weight.data.fill_(2.0)
    for phase, point in PHASES.items():
        for kind in ("new", "old"):
            child = os.fork()
            if not child:
                die_at(*point)
                save_checkpoint(
                    changed,
                    home / f"{kind} {phase}",
                    dtype="float32",
                    tokenizer_from=None,
                    max_shard_bytes=20_000,
                )
                os._exit(0)
            status = os.waitpid(child, 0)[1]
            print(kind, phase, "killed" if status == signal.SIGKILL else status, sep="/")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
