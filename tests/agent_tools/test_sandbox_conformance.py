"""The cases of `sandbox_cases` on every engine, and as an ordinary user.

warm      scripts are forks of one worker; after each an honest script must find a clean place
cold      a new bubblewrap sandbox a script
docker    a container a script, on a real engine (make test-real)
ordinary  the warm worker of a user without privileges, in a process of that user
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from sandbox_case import LEAK, ROOM, Case, World, make_world, run_case
from sandbox_cases import CASES
from sandbox_support import (
    SYSTEM_PYTHON,
    as_user,
    docker_host,
    needs_system_python,
    open_copy,
    plain_python,
)

from agent_tools.sandbox import ScriptJob, WarmPool, make_pool

HONEST = """
import os, shutil
print(",".join(sorted(os.listdir("."))))
for place in (os.environ["TMPDIR"], "/dev/shm"):
    print(",".join(os.listdir(place)) or "none")
print(len([p for p in os.listdir("/proc") if p.isdigit() and p != str(os.getpid())]))
shutil.copy("train.csv", "submission.csv")
"""
named = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module", params=["warm", "cold"])
def pool(request: pytest.FixtureRequest) -> Iterator[WarmPool]:
    with (
        pytest.MonkeyPatch.context() as patch,
        plain_python() as python,
        make_pool("bubblewrap", 1, python=python, cold=request.param == "cold") as made,
    ):
        patch.setenv(LEAK, "a secret of the owner")
        yield made


@pytest.fixture(scope="module")
def containers() -> Iterator[WarmPool]:
    with (
        pytest.MonkeyPatch.context() as patch,
        plain_python() as python,
        docker_host(),
        make_pool("docker", 1, python=python) as made,
    ):
        patch.setenv(LEAK, "a secret of the owner")
        yield made


@named
def test_bubblewrap(case: Case, pool: WarmPool, world: World) -> None:
    run_case(case, pool, world)
    honest = pool.run([ScriptJob(HONEST, world.inputs, limits=ROOM)])[0]
    assert honest.status == "ok", honest
    assert honest.files["submission.csv"] == (world.inputs / "train.csv").read_bytes()
    assert honest.stdout.split() == ["script.py,train.csv", "none", "none", "1"], honest.stdout


@pytest.mark.real
@named
def test_docker(case: Case, containers: WarmPool, world: World) -> None:
    run_case(case, containers, world)


# ---------------------------------------------------------------- as an ordinary user

DRIVER = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from agent_tools.errors import UserError
from agent_tools.sandbox import make_pool
from sandbox_case import World, run_case
from sandbox_cases import CASES
world = World(Path(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]))
python = Path("/usr/bin/python3")
found = {}
with make_pool("bubblewrap", 1, python=python) as pool:
    found["missing"] = pool.missing
    for case in CASES:
        try: run_case(case, pool, world); found[case.name] = ""
        except AssertionError as error: found[case.name] = str(error) or "failed"
try:
    with make_pool("bubblewrap", 1, python=python, require_full_isolation=True): pass
    found["required"] = ["started", 0]
except UserError as error:
    found["required"] = [str(error), error.exit_code]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def ordinary(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """What became of every case in a process without privileges; "" where it was contained."""
    with open_copy(*Path(__file__).parent.glob("sandbox_*case*.py")) as folder:
        world = make_world(folder / "world")
        done = subprocess.run(
            [
                *as_user(), str(SYSTEM_PYTHON), "-B", "-c", DRIVER, str(folder), str(world.inputs),
                str(world.secret), str(world.repository),
            ],
            capture_output=True,
            timeout=300,
            cwd="/",
            env={**os.environ, LEAK: "a secret of the owner"},
        )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    answer: dict[str, object] = json.loads(done.stdout)
    return answer


@needs_system_python
@named
def test_ordinary_user(case: Case, ordinary: dict[str, object]) -> None:
    assert ordinary[case.name] == ""


@needs_system_python
def test_ordinary_user_is_told_what_is_missing(ordinary: dict[str, object]) -> None:
    (missing,) = ordinary["missing"]  # type: ignore[misc]
    assert missing.startswith("no control group")
    assert "systemd-run --user --scope" in missing
    message, code = ordinary["required"]  # type: ignore[misc]
    assert code == 2
    assert message.startswith("full isolation is required, but missing here: no control group")
    assert "\n" not in message


def test_there_are_enough_cases() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names) >= 40
