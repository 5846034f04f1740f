"""What the command lines share: arguments, one-line errors, exit codes. No torch here."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel

from model.errors import ModelError
from rl.config import dump_config, load_data, validate
from rl.errors import ConfigError, DivergedError, InfraError, StoppedError, UserError

ConfigT = TypeVar("ConfigT", bound=BaseModel)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise ConfigError(f"{message}; see python -m {self.prog} --help")


def config_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """Parser with the run file, `-c`, overrides and `--dry-run`."""
    parser = _Parser(prog=prog, description=description)
    parser.add_argument("config", type=Path, help="YAML file")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="a.b=value", help="overrides, after all files"
    )
    parser.add_argument(
        "-c",
        dest="merges",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="YAML file merged over the first; may be given several times, left to right",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved configuration and stop"
    )
    return parser


def resolve_or_print(
    kind: type[ConfigT],
    args: argparse.Namespace,
    check: Callable[[ConfigT], None] = lambda config: None,
    plan: Callable[[ConfigT], str] = lambda config: "",
) -> ConfigT | None:
    """The resolved configuration, or None after printing it for `--dry-run`.

    `check` raises if what the configuration names cannot be used. `plan`: what a dry run says
    after the configuration, as YAML comments.
    """
    data = load_data(args.config, args.merges, args.overrides)
    config = validate(kind, data, str(args.config))
    check(config)
    if args.dry_run:
        sys.stdout.write(dump_config(config) + plan(config))
        return None
    return config


def plain_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """Parser of a command without a run file, with the same one-line errors."""
    return _Parser(prog=prog, description=description)


def run_main(main: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None) -> int:
    """`main`, with expected errors printed as `error: …` and turned into exit codes."""
    try:
        return main(argv)
    except (UserError, InfraError, ModelError, DivergedError, StoppedError) as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return int(error.exit_code)
    except OSError as error:
        print(f"error: {_one_line(error)}; free some space or mend the folder", file=sys.stderr)
        return InfraError.exit_code
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130


def main_guard(main: Callable[[Sequence[str] | None], int]) -> None:
    """`if __name__ == "__main__"` body."""
    sys.exit(run_main(main))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
