"""SELFEVO_REQUIRE: which skips are failures, and what the end of a run lists."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = """
import pytest
from agent_tools.errors import InfraError

def test_docker(): pytest.skip("docker: set DOCKER_HOST")
@pytest.mark.skipif(True, reason="cuda: needs a CUDA device")
def test_cuda(): pass
def test_package(): pytest.importorskip("no_such_package")
def test_unnamed(): pytest.skip("the moon is down")
@pytest.fixture
def pool(): raise InfraError("bubblewrap is not installed: run `apt-get install bubblewrap`")
def test_bwrap(pool): pass
def test_other_fault(): raise InfraError("no sandbox: bubblewrap is not installed")
@pytest.mark.xfail
def test_expected(): assert False
def test_runs(): pass
"""
MODULE = 'import pytest\npytest.skip("docker: the module", allow_module_level=True)\n'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path)
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / "test_module.py").write_text(MODULE)
    return tmp_path


def outcomes(folder: Path, required: str) -> tuple[set[str], str]:
    """Names of the failed tests and what was printed."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-rfE",
            "--continue-on-collection-errors",
            "-p",
            "no:cacheprovider",
        ],
        cwd=folder,
        env={**os.environ, "SELFEVO_REQUIRE": required, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    failed = {
        line.split()[1].rpartition("::test_")[2].rpartition("/")[2]
        for line in done.stdout.splitlines()
        if line.startswith(("FAILED ", "ERROR "))
    }
    return failed, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("required", "failed"),
    [
        ("", set()),
        ("docker", {"docker", "test_module.py"}),
        ("docker, package", {"docker", "test_module.py", "package"}),
        ("bwrap", {"bwrap"}),
        ("cuda", {"cuda"}),
        ("all", {"docker", "test_module.py", "package", "bwrap", "unnamed"}),
        ("all,cuda", {"docker", "test_module.py", "package", "bwrap", "unnamed", "cuda"}),
    ],
)
def test_what_is_required_may_not_be_skipped(folder: Path, required: str, failed: set[str]) -> None:
    found, text = outcomes(folder, required)
    assert found == failed | {"other_fault"}, text


def test_what_was_not_run_is_listed_with_its_reason(folder: Path) -> None:
    _, text = outcomes(folder, "")
    end = text[text.index("not run here") :]
    for reason in (
        "1 bwrap: bubblewrap is not installed: run `apt-get install bubblewrap`",
        "1 cuda: needs a CUDA device",
        "1 docker: set DOCKER_HOST",
        "1 docker: the module",
        "1 the moon is down",
        "1 could not import 'no_such_package'",
    ):
        assert f"   {reason}" in end, end
    _, text = outcomes(folder, "docker")
    assert "SELFEVO_REQUIRE wants docker, so this may not be skipped: docker: set" in text


def test_a_service_that_nobody_knows_is_refused(folder: Path) -> None:
    _, text = outcomes(folder, "docker,dokcer")
    assert "SELFEVO_REQUIRE: no service 'dokcer'; choose all or from bwrap, cgroup" in text
