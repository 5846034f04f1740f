"""Doubles of what a measurement starts, and the command line that uses them.

`serve` stands for `model.serve`: it tells which policy it serves. `solve` stands for the
competition agent: it asks the server for that, and hands in a submission whose score is the
policy's number. `prepare` stands for the preparation of data. `cli …` is `selfevo` with all three;
SELFEVO_DIE="KIND NUMBER" kills it right after its NUMBER-th event of KIND; SELFEVO_SUITES
is a folder of suites to use instead of ours.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

ME = str(Path(__file__).resolve())
EVALUATOR = "e" * 12


def serve(argv: list[str]) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--port-file", type=Path, required=True)
    args, _ = parser.parse_known_args(argv)
    policy = (args.checkpoint / "policy.json").read_bytes()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(policy)))
            self.end_headers()
            self.wfile.write(policy)

        def log_message(self, *args: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    part = args.port_file.with_suffix(".part")
    part.write_text(json.dumps({"port": server.server_address[1]}))
    part.replace(args.port_file)
    server.serve_forever()
    return 0


def solve(argv: list[str]) -> int:
    parser = argparse.ArgumentParser()
    for name in ("--out", "--suite", "--base-url", "--model", "--checkpoint", "--campaign"):
        parser.add_argument(name, required=True)
    parser.add_argument("--seeds", type=int, required=True)
    parser.add_argument("--round", type=int, required=True)
    parser.add_argument("--competition", action="append", required=True)
    parser.add_argument("--sealed", action="store_true")
    args, _ = parser.parse_known_args(argv)
    out = Path(args.out)
    out.mkdir(exist_ok=True)
    with (out.parent / "solved.log").open("a") as file:
        file.write(f"{os.getpid()} {out.name} {' '.join(argv)}\n")
    with urllib.request.urlopen(f"{args.base_url}/models", timeout=20) as reply:
        quality = float(json.loads(reply.read())["quality"])
    print("tweet: seed 0: ok", file=sys.stderr, flush=True)
    time.sleep(float(os.environ.get("SELFEVO_SOLVE_S", "0")))
    rows = [
        row(args, competition, seed, quality)
        for competition in args.competition
        for seed in range(args.seeds)
    ]
    (out / "scores.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    return 0


def row(args: argparse.Namespace, competition: str, seed: int, quality: float) -> dict[str, Any]:
    """A row in the judge's columns; a policy that was not destroyed gets bronze."""
    good = quality > 0.5
    return {
        "competition": competition,
        "seed": seed,
        "suite": args.suite,
        "split": "sealed" if args.sealed else "val",
        "fold": None,
        "score": quality,
        "percentile": 70.0 + seed if good else 0.0,
        "thresholds": {"gold": 3.0, "silver": 2.0, "bronze": 0.9, "median": 0.5},
        "medal": "bronze" if good else None,
        "above_median": good,
        "valid": True,
        "evaluator_hash": EVALUATOR,
        "board": "fitted",
        "index": 0,
        "status": "ok",
        "any_medal": good,
        "gold": False,
        "silver": False,
        "bronze": good,
        "cpu_s": 1.5,
        "wall_s": 2.5,
        "tokens": 40,
    }


def prepare(argv: list[str]) -> int:
    """Notes what was in the log when sealed data was asked for."""
    log = Path("events.jsonl").read_text()
    kinds = [json.loads(line)["kind"] for line in log.splitlines()]
    with Path("prepared.log").open("a") as file:
        file.write(json.dumps([argv, kinds]) + "\n")
    return 0


def cli(argv: list[str]) -> int:
    from agent_tools.mle_bench import evaluator, registry
    from selfevo import arms
    from selfevo import cli as program
    from selfevo.llm import ServeCommand
    from selfevo.store import Store

    commands = arms.Commands(
        serve=ServeCommand((sys.executable, ME, "serve")),
        solve=(sys.executable, ME, "solve"),
        prepare=(sys.executable, ME, "prepare"),
    )
    arms.Commands = lambda: commands  # type: ignore[assignment,misc]
    kind, _, number = os.environ.get("SELFEVO_DIE", "").partition(" ")
    left = int(number or 0)
    real = Store.append

    def append(self: Store, event: str, *args: Any, **kwargs: Any) -> Any:
        nonlocal left
        made = real(self, event, *args, **kwargs)
        left -= event == kind
        if event == kind and left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return made

    Store.append = append  # type: ignore[method-assign]
    if "SELFEVO_SUITES" in os.environ:
        registry.SUITES = evaluator.SUITES = Path(os.environ["SELFEVO_SUITES"])
    sys.argv = ["selfevo", *argv]
    program.main()


def selfevo(
    *argv: str | Path, timeout: float = 120, **variables: str
) -> subprocess.CompletedProcess[str]:
    """The command line with the doubles, in a process of its own."""
    return subprocess.run(
        [sys.executable, ME, "cli", *map(str, argv)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **variables},
    )


if __name__ == "__main__":
    programs = {"serve": serve, "solve": solve, "prepare": prepare, "cli": cli}
    sys.exit(programs[sys.argv[1]](sys.argv[2:]))
