"""How a command of this package runs: one-line errors, the exit codes of docs/architecture.md."""

from __future__ import annotations

import sys
from typing import NoReturn

import typer

from agent_tools.errors import InfraError, UserError


def run_app(app: typer.Typer, name: str, *, interrupted: str = "") -> NoReturn:
    """Run a typer application as `name`; `interrupted` is said when it is cut short."""
    try:
        code = app(prog_name=name, standalone_mode=False)
    except (UserError, InfraError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except typer.TyperException as error:
        print(f"error: {error.format_message()}; see `{name} --help`", file=sys.stderr)
        sys.exit(UserError.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        if interrupted:
            print(interrupted, file=sys.stderr)
        sys.exit(130)
    sys.exit(code if isinstance(code, int) else 0)
