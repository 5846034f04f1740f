"""One-line faults that the tests must catch: `make mutants`.

Each mutant replaces one line of a scratch copy of the project and runs the tests named beside it.
A mutant is *caught* when at least one of those tests fails; the same tests must pass on the
unchanged copy first, so a test that always fails catches nothing.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from agent_tools.paths import data_dir, script_python
from tests.mutant_list import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("model", "rl", "agent_tools", "selfevo")
TESTS_FAILED = 1  # pytest's exit code; 2..5 mean that the tests did not really run
TOO_LONG = -1
LIMIT_S = 600


@dataclass(frozen=True)
class Outcome:
    mutant: Mutant
    caught: bool
    detail: str
    seconds: float


def scratch_copy(target: Path) -> None:
    """Copy every file that git would carry; the bundled weights are linked."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split("\0")
    for name in filter(None, listed):
        source = ROOT / name
        if not source.is_file():
            continue
        destination = target / name
        destination.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix == ".safetensors":
            destination.symlink_to(source)
        else:
            shutil.copy2(source, destination)


def run_python(folder: Path, *arguments: str) -> tuple[int, str]:
    """Run python in `folder` with the packages of that copy; exit code and last lines."""
    settings = {
        "PYTHONPATH": str(folder),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # plugins of our dependencies: seconds a start
        "OMP_NUM_THREADS": "1",  # one core a worker
        "SELFEVO_DATA": str(data_dir()),
        "SELFEVO_SCRIPT_PYTHON": str(script_python()),
    }
    try:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=folder,
            env=os.environ | settings,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
        )
    except subprocess.TimeoutExpired:
        return TOO_LONG, f"did not end in {LIMIT_S} s"
    return done.returncode, "\n".join((done.stdout + done.stderr).splitlines()[-12:])


def run_tests(folder: Path, tests: tuple[str, ...]) -> tuple[int, str]:
    """Run the named tests in `folder`; the exit code and the last lines of output."""
    return run_python(folder, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests)


def foreign_packages(folder: Path) -> str:
    """What python would import from elsewhere than `folder`; an editable install could do that."""
    code = (
        "import importlib.util, pathlib\n"
        f"for name in {PACKAGES!r}:\n"
        "    origin = pathlib.Path(importlib.util.find_spec(name).origin).resolve()\n"
        f"    if not origin.is_relative_to({str(folder.resolve())!r}): print(origin)"
    )
    return run_python(folder, "-c", code)[1]


def try_mutant(mutant: Mutant, folder: Path) -> Outcome:
    """Apply one fault in its own copy and see whether its tests notice."""
    started = time.monotonic()
    path = folder / mutant.file
    text = path.read_text()
    found = text.count(mutant.before)
    if found != 1:
        return Outcome(mutant, False, f"the line stands {found} times in {mutant.file}", 0.0)
    path.write_text(text.replace(mutant.before, mutant.after))
    try:
        code, tail = run_tests(folder, mutant.tests)
    finally:
        path.write_text(text)
    detail = "" if code == TESTS_FAILED else f"pytest exit {code}\n{tail}"
    return Outcome(mutant, code == TESTS_FAILED, detail, time.monotonic() - started)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="only these mutants")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    unknown = sorted(set(args.names) - {m.name for m in MUTANTS})
    if unknown:
        print(f"error: no fault {unknown[0]!r} in tests/mutant_list.py", file=sys.stderr)
        return 2
    chosen = [m for m in MUTANTS if not args.names or m.name in args.names]
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutants-") as scratch:
        folders = [Path(scratch) / str(i) for i in range(args.workers)]
        for folder in folders:
            scratch_copy(folder)
            foreign = foreign_packages(folder)
            if foreign:
                print(f"error: the copy would be tested with other code: {foreign}")
                return 1
        every = tuple(sorted({test for mutant in chosen for test in mutant.tests}))
        code, tail = run_tests(folders[0], every)
        if code != 0:
            print(f"error: the tests fail without any fault (pytest exit {code}):\n{tail}")
            return 1
        free = list(folders)

        def one(mutant: Mutant) -> Outcome:
            folder = free.pop()
            try:
                return try_mutant(mutant, folder)
            finally:
                free.append(folder)

        outcomes = []
        with ThreadPoolExecutor(args.workers) as pool:
            for outcome in pool.map(one, chosen):
                outcomes.append(outcome)
                word = "caught" if outcome.caught else "MISSED"
                print(
                    f"{word}  {outcome.mutant.name:34} {outcome.seconds:5.1f} s  "
                    f"{outcome.mutant.file}",
                    flush=True,
                )
                if not outcome.caught:
                    print(outcome.detail)
    caught = sum(outcome.caught for outcome in outcomes)
    print(f"{caught} of {len(outcomes)} faults caught in {time.monotonic() - started:.0f} s")
    return 0 if caught == len(outcomes) else 1


if __name__ == "__main__":
    raise SystemExit(main())
