"""`python -m model.vllm_check [--device cuda]`: whether `--engine vllm` would start here.

Finds the interpreter as `model.serve` does and lets it import vLLM's server. Prints one JSON
object: python, device, version, torch. Exit code 2 where there is none, 5 where it does not import.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence

from model.errors import ModelError
from model.vllm_serve import find_vllm

LIMIT_S = 300
_CODE = (
    "import json, torch, vllm; from vllm.entrypoints.openai import api_server; "
    "print(json.dumps([vllm.__version__, torch.__version__]))"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints what is there; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m model.vllm_check")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    args = parser.parse_args(argv)
    try:
        found = find_vllm(os.environ, args.device)
        done = subprocess.run(
            [found.python, "-c", _CODE],
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            stdin=subprocess.DEVNULL,
        )
    except ModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, subprocess.TimeoutExpired) as error:
        print(f"error: {found.python} cannot import vLLM: {error}", file=sys.stderr)
        return 5
    if done.returncode:
        fault = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        print(f"error: {found.python} cannot import vLLM: {fault}", file=sys.stderr)
        return 5
    version, torch = json.loads(done.stdout.strip().splitlines()[-1])
    record = {"python": str(found.python), "device": found.device}
    print(json.dumps({**record, "version": version, "torch": torch}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
