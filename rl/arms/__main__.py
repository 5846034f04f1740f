"""The command line of `rl.arms`. torch is imported by `arm` alone."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

from model.errors import ModelError
from model.study.report import write_into
from rl.arms import __doc__ as about_arms
from rl.arms.log import read_logs
from rl.arms.report import curve, tables
from rl.arms.run import run_arms
from rl.arms.spec import MAIN, START, VARIANTS, Arm, Settings, grid, run_config
from rl.cli import main_guard, plain_parser
from rl.errors import ConfigError, InfraError
from rl.train import StopSignals


def _parser() -> argparse.ArgumentParser:
    parser = plain_parser("rl.arms", about_arms or "")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="run arms, several at once; resumable")
    run.add_argument("--work", type=Path, required=True, help="where runs keep their state")
    run.add_argument("--log", type=Path, required=True, help="folder of the arms' logs")
    run.add_argument("--variants", nargs="+", choices=[*VARIANTS], default=[*MAIN])
    run.add_argument("--updates", nargs="+", type=int, default=[1, 4], help="a batch")
    run.add_argument("--passes", type=int, default=1, help="through the batch")
    run.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    run.add_argument(
        "--only", nargs="+", metavar="ARM", help="these arms instead, e.g. cispo-u1-s0"
    )
    run.add_argument("--no-start", action="store_true", help="do not measure the start")
    run.add_argument(
        "--minutes", type=float, default=600.0, help="then stop; goes on when repeated"
    )
    run.add_argument("--parallel", type=int, default=1, help="arms at once")
    run.add_argument("--gpus", type=int, default=0, help="cards that they share; 0: as --device")
    run.add_argument("--name-device", default="", help="what the logs say they ran on")
    run.add_argument("--dry-run", action="store_true", help="list the arms and stop")
    _settings_arguments(run)
    arm = commands.add_parser("arm", help="one arm in this process")
    arm.add_argument("name")
    arm.add_argument("--work", type=Path, required=True)
    _settings_arguments(arm)
    report = commands.add_parser("report", help="print the tables of finished arms")
    report.add_argument("logs", nargs="+", type=Path, metavar="LOG")
    report.add_argument("--into", type=Path, metavar="DOC", help="replace the tables of a page")
    short = commands.add_parser("curve", help="slope of each arm's train curve, and its power")
    short.add_argument("logs", nargs="+", type=Path, metavar="LOG")
    return parser


def _settings_arguments(parser: argparse.ArgumentParser) -> None:
    for field in fields(Settings):
        if field.name == "overrides":
            parser.add_argument("--set", dest="overrides", action="append", default=[])
        else:
            flag = f"--{field.name.replace('_', '-')}"
            kind = type(field.default)
            parser.add_argument(flag, type=kind, default=field.default, help=str(field.default))


def _settings(args: argparse.Namespace) -> Settings:
    values: dict[str, Any] = {f.name: getattr(args, f.name) for f in fields(Settings)}
    values["overrides"] = tuple(values["overrides"])
    for name in ("steps", "scripts", "eval_every", "samples", "final_samples", "workers"):
        if values[name] < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be 1 or more")
    return Settings(**values)


def _run(args: argparse.Namespace) -> int:
    settings = _settings(args)
    if args.only:
        names = [name if name == START else Arm.parse(name).name for name in args.only]
    else:
        arms = grid(args.variants, args.updates, args.seeds, args.passes)
        names = ([] if args.no_start else [START]) + [arm.name for arm in arms]
    if len(set(names)) < len(names) or args.parallel < 1:
        raise ConfigError("an arm is named twice, or --parallel is below 1")
    for name in names:
        if name != START:
            run_config(Arm.parse(name), settings)  # every run file is sound before one starts
    if args.dry_run:
        print("\n".join(names))
        return 0
    about = {"device": args.name_device or args.device, "torch": package_version("torch")}
    signals = StopSignals()
    try:
        state = run_arms(
            names,
            settings,
            args.work,
            args.log,
            minutes=args.minutes,
            parallel=args.parallel,
            gpus=args.gpus,
            about=about,
            check=signals.check,
        )
    finally:
        signals.restore()
    counts = {kind: sum(s == kind for s in state.values()) for kind in sorted(set(state.values()))}
    print(f"{len(names)} arms: " + ", ".join(f"{n} {kind}" for kind, n in counts.items()))
    if counts.get("failed"):
        raise InfraError(f"{counts['failed']} arms failed; see WORK/ARM/log.txt")
    return 0


def _arm(args: argparse.Namespace) -> int:
    from rl.arms.arm import run_arm

    signals = StopSignals()
    try:
        run_arm(args.name, _settings(args), args.work, signals.check)
    finally:
        signals.restore()
    return 0


def _report(args: argparse.Namespace) -> int:
    text = tables(read_logs(args.logs))
    if args.into is None:
        sys.stdout.write(text)
        return 0
    try:
        page = args.into.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{args.into}: {error.strerror}; name a page with the marks") from None
    try:
        page = write_into(page, text)
    except ModelError as error:
        raise ConfigError(f"{args.into}: {error}") from None
    args.into.write_text(page, encoding="utf-8")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and do; returns the exit code."""
    args = _parser().parse_args(argv)
    if args.command == "run":
        return _run(args)
    if args.command == "arm":
        return _arm(args)
    if args.command == "report":
        return _report(args)
    for log in read_logs(args.logs):
        if log.arm is not None:
            print(curve(log))
    return 0


if __name__ == "__main__":
    main_guard(main)
