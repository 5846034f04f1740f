"""`python -m agent_tools.wandb_logs RUN_DIR [--json]`: print the digest of a run."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from agent_tools.errors import UserError
from agent_tools.wandb_logs.digest import digest
from agent_tools.wandb_logs.history import read_run


def main(argv: list[str] | None = None) -> int:
    """Print the digest; returns the exit code (0, or 2 for an unusable run directory)."""
    parser = argparse.ArgumentParser(prog="python -m agent_tools.wandb_logs", description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--source", choices=("auto", "wandb", "sidecar"), default="auto")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    args = parser.parse_args(argv)
    try:
        history = read_run(args.run_dir, prefer=args.source)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for warning in history.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    result = digest(history)
    if args.json:
        findings = [dataclasses.asdict(finding) for finding in result.findings]
        print(
            json.dumps(
                {
                    "state": history.state,
                    "source": history.source,
                    "text": result.text,
                    "findings": findings,
                }
            )
        )
    else:
        print(result.text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
