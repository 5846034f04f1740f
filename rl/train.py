"""`python -m rl.train RUN.yaml --run-dir DIR [--resume] [-c FILE] [a.b=value …] [--dry-run]
[--from-pool POOL] [--require-full-isolation]`.

`--from-pool`: compute the updates of a run again from the pool that it wrote (`pool:` in its run
file): no engine, no scripts, the same weights. `--dry-run`: the resolved file, then the plan.

Exit codes: 0 done · 2 configuration · 5 infrastructure errors on over a tenth of the scripts ·
6 non-finite loss or stop rule · 130 interrupted · 143 terminated, state saved.

The loop itself is `rl.loop`; it is imported after the arguments are checked, so a dry run and a
wrong argument never load torch.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from model.layout import check_checkpoint
from rl.agents.options import CommandOptions, MiniSweOptions, MleAgent
from rl.agents.tasks import FolderTaskset
from rl.checkpoints import resolve_checkpoint
from rl.cli import config_parser, main_guard, resolve_or_print
from rl.config import RunConfig
from rl.envs.mle.prompts import load_scaffold
from rl.errors import ConfigError, StoppedError
from rl.plan import plan_text
from rl.pool import Pool
from rl.splits import trainable_ids


class StopSignals:
    """Remembers SIGTERM and SIGINT; `check` raises StoppedError once one has come.

    The loop calls `check` where state is consistent, so a signal never tears an update apart.
    """

    def __init__(self) -> None:
        self._seen: int | None = None
        self._before = {
            number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)
        }

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        self._seen = self._seen or number

    def check(self) -> None:
        """Raise if a signal has come."""
        if self._seen is not None:
            code = 143 if self._seen == signal.SIGTERM else 130
            raise StoppedError(signal.Signals(self._seen).name, code)

    def restore(self) -> None:
        """Put the earlier handlers back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)


def check_inputs(config: RunConfig) -> None:
    """Raise for tasks, an agent, a scaffold or a checkpoint that a run could not use; no torch."""
    if config.forge.mode == "sync" and config.agent != MleAgent():
        raise ConfigError(
            f"agent (kind {config.agent.kind}) belongs to asynchronous runs; set forge.mode async"
        )
    if config.agent != MleAgent():
        from rl.agents.registry import check_agent  # imports whatever the agent's module does

        check_agent(config.agent)
    _task_ids(config)
    load_scaffold(Path(config.scaffold) if config.scaffold else None)
    check_checkpoint(resolve_checkpoint(config.model.checkpoint))


def plan(config: RunConfig) -> str:
    """What `--dry-run` says of the run."""
    return plan_text(config, _task_ids(config))


def _task_ids(config: RunConfig) -> tuple[str, ...]:
    """Of the agent's own folder, or the competitions."""
    if isinstance(config.agent, CommandOptions | MiniSweOptions) and config.agent.tasks:
        return FolderTaskset(Path(config.agent.tasks)).ids()
    return trainable_ids(config.suite, config.competitions)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, check, run; returns the exit code."""
    parser = config_parser("rl.train", "train a policy")
    parser.add_argument("--run-dir", type=Path, help="run directory (required unless --dry-run)")
    parser.add_argument(
        "--resume", action="store_true", help="go on with the run in the directory, if there is one"
    )
    parser.add_argument(
        "--require-full-isolation",
        action="store_true",
        help="refuse to run scripts on a host that cannot give every protection",
    )
    parser.add_argument(
        "--from-pool", metavar="POOL", help="train on a run's records: a file or postgresql:// URL"
    )
    args = parser.parse_intermixed_args(argv)
    if args.require_full_isolation:
        args.overrides.append("sandbox.require_full_isolation=true")
    config = resolve_or_print(RunConfig, args, check_inputs, plan)
    if config is None:
        return 0
    if args.run_dir is None:
        raise ConfigError("--run-dir DIR is missing; name the run directory")
    if args.from_pool is not None:
        Pool(args.from_pool, create=False).close()  # refused before there is a run directory
    competitions = trainable_ids(config.suite, config.competitions)
    config = config.model_copy(update={"competitions": competitions})
    signals = StopSignals()
    try:
        if config.forge.mode == "async" and args.from_pool is None:
            from rl.forge.run import run as run_processes

            return run_processes(config, args.run_dir, resume=args.resume, check=signals.check)
        from rl.loop import run
        from rl.mle_parts import mle_parts

        return run(
            config,
            args.run_dir,
            resume=args.resume,
            parts=mle_parts,
            check=signals.check,
            from_pool=args.from_pool,
        )
    finally:
        signals.restore()


if __name__ == "__main__":
    main_guard(main)
