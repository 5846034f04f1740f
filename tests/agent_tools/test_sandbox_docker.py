"""The Docker engine: what it says without one, and what it leaves behind with one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sandbox_support

from agent_tools.errors import InfraError
from agent_tools.sandbox import Limits, ScriptJob, docker_engine, make_pool
from agent_tools.sandbox.docker_engine import DockerSandbox

PATIENT = Limits(cpu_seconds=3, wall_seconds=60, memory_mb=256)


@pytest.fixture(scope="module")
def python() -> Iterator[Path]:
    with sandbox_support.plain_python() as made:
        yield made


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    """The engine's client; an engine of our own where none is given."""
    with sandbox_support.docker_host():
        import docker

        made = docker.from_env(timeout=60)
        yield made
        made.close()


def test_missing_engine_is_named(
    python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("docker", reason="docker: `pip install 'selfevo[docker]'`")
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none")
    with pytest.raises(InfraError, match=rf"no Docker engine answers at unix://{tmp_path}/none"):
        make_pool("docker", 1, python=python)


def test_missing_sdk_is_named(python: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "docker", None)
    with pytest.raises(InfraError, match=r"pip install 'selfevo\[docker\]'"):
        make_pool("docker", 1, python=python)


def containers(client: Any) -> list[Any]:
    ours = {"label": "selfevo.sandbox.owner"}
    found: list[Any] = client.containers.list(all=True, filters=ours, ignore_removed=True)
    return found


@pytest.mark.real
def test_results_files_and_nothing_left(client: Any, python: Path, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "train.csv").write_text("id\n1\n")
    code = "import shutil; shutil.copy('sub/train.csv', 'a'); print('out'); open('b', 'wb')"
    with make_pool("docker", 2, python=python, require_full_isolation=True) as pool:
        job = ScriptJob(code, tmp_path, ("a", "b"), PATIENT)
        results = pool.run([job] * 3)
        assert [(r.status, r.stdout, r.files) for r in results] == [
            ("ok", "out\n", {"a": b"id\n1\n", "b": b""})
        ] * 3
        slow = pool.submit(ScriptJob("import time; time.sleep(60)", tmp_path, (), PATIENT))
        give_up = time.monotonic() + 60
        while not containers(client) and time.monotonic() < give_up:
            time.sleep(0.05)
    assert slow.result(1).status == "killed"
    assert containers(client) == []


@pytest.mark.real
def test_every_limit_and_lock_is_asked_for(client: Any, python: Path) -> None:
    sandbox = DockerSandbox(python)
    instance = sandbox.start(0, Limits(memory_mb=100, processes=7, disk_mb=9))
    try:
        asked = client.api.inspect_container(instance.container.id)
    finally:
        instance.stop()
    host = asked["HostConfig"]
    assert asked["Config"]["User"] == "65534:65534"
    assert (host["NetworkMode"], host["IpcMode"], host["ReadonlyRootfs"]) == (
        "none", "private", True,
    )  # fmt: skip
    assert host["CapDrop"] == ["ALL"]
    assert host["Memory"] == host["MemorySwap"] == (100 + 352) << 20
    assert (host["PidsLimit"], host["NanoCpus"]) == (11, 1_250_000_000)
    assert "size=9m" in host["Tmpfs"]["/sandbox/work"]
    assert "no-new-privileges" in host["SecurityOpt"]
    profiles = [o for o in host["SecurityOpt"] if o.startswith("seccomp=")]
    assert "io_uring_setup" in json.loads(profiles[0][8:])["syscalls"][0]["names"]
    assert not host["Binds"] and not host["Privileged"]


OWNER = """
import sys, time
from pathlib import Path
from agent_tools.sandbox import Limits, ScriptJob, make_pool
pool = make_pool("docker", 1, python=Path(sys.argv[1]))
pool.submit(ScriptJob("while True: pass", Path(sys.argv[2]), (), Limits(100, 100)))
print("ready", flush=True)
time.sleep(100)
"""


@pytest.mark.real
def test_killed_owner_leaves_no_container(client: Any, python: Path, tmp_path: Path) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(python), str(tmp_path)],
        stdout=subprocess.PIPE,
        cwd=sandbox_support.ROOT,
        env=dict(os.environ),
    )
    assert owner.stdout is not None
    assert owner.stdout.readline() == b"ready\n"
    give_up = time.monotonic() + 60
    while time.monotonic() < give_up:  # one that never started is for the next owner to sweep
        if any(container.status == "running" for container in containers(client)):
            break
        time.sleep(0.1)
    owner.send_signal(signal.SIGKILL)
    owner.wait(10)
    owner.stdout.close()
    give_up = time.monotonic() + 60
    while containers(client) and time.monotonic() < give_up:
        time.sleep(0.2)
    assert containers(client) == []


@pytest.mark.real
def test_container_that_does_not_start_is_removed(
    client: Any, python: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_container: object) -> None:
        raise OSError("no stream")

    sandbox = DockerSandbox(python)
    monkeypatch.setattr(docker_engine, "_attach", refuse)
    with pytest.raises(InfraError, match="starts no container: no stream"):
        sandbox.start(0, Limits())
    assert containers(client) == []


@pytest.mark.real
def test_containers_of_dead_owners_are_swept_and_no_others(client: Any, python: Path) -> None:
    image = DockerSandbox(python)._image
    ended = subprocess.Popen(["true"])
    ended.wait()
    homes = {"dead": docker_engine._home(), "elsewhere": "another-boot/1"}
    made = {}
    for name, home in homes.items():
        label = {"selfevo.sandbox.owner": f"{home}/{ended.pid}"}
        made[name] = client.containers.create(image, "true", labels=label)
    try:
        DockerSandbox(python)
        assert [found.id for found in containers(client)] == [made["elsewhere"].id]
    finally:
        made["elsewhere"].remove(force=True)


@pytest.mark.real
@sandbox_support.needs_system_python
def test_python_of_the_system_has_an_image_too(client: Any, tmp_path: Path) -> None:
    with make_pool("docker", 1, python=sandbox_support.SYSTEM_PYTHON) as pool:
        job = ScriptJob("import json, ctypes; print(1)", tmp_path, (), PATIENT)
        assert pool.run([job])[0].stdout == "1\n"


@pytest.mark.real
def test_image_is_made_once_and_never_pulled(client: Any, python: Path) -> None:
    first = DockerSandbox(python)
    made = {image.id for image in client.images.list()}
    second = DockerSandbox(python)
    assert {image.id for image in client.images.list()} == made
    assert first._image == second._image
    assert not any(image.attrs.get("RepoDigests") for image in client.images.list())
