"""Shared by all tests: sleeping OpenMP threads, and what becomes of a test that cannot run here.

A test that lacks something skips itself with a reason that begins with the thing's name in
`SERVICES` and a colon: `pytest.skip("docker: set DOCKER_HOST")`. A host without bubblewrap needs no
word from the test: the sandbox's own refusal is taken for one. What was not run, and why, is listed
at the end of the run.

SELFEVO_REQUIRE=bwrap,docker makes a test fail that would be skipped for one of the named; `all`
(CI) is every name but `cuda`, and reasons without a name.
"""

import os
import re
from collections import Counter
from collections.abc import Generator
from typing import Any

import pytest
from hypothesis import settings

from agent_tools.errors import InfraError

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")

VARIABLE = "SELFEVO_REQUIRE"
SERVICES = (
    *("bwrap", "cgroup", "compiler", "cuda", "docker", "landlock", "package", "postgres", "root"),
    "vllm",
)
NOT_IN_ALL = "cuda"
_NO_BWRAP = re.compile(r"bubblewrap is (not installed|refused namespaces)")

# A busy machine is no reason to fail: examples have no time limit.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


def pytest_configure() -> None:
    unknown = sorted(_required() - {"all", *SERVICES})
    if unknown:
        raise pytest.UsageError(
            f"{VARIABLE}: no service {unknown[0]!r}; choose all or from {', '.join(SERVICES)}"
        )


def _required() -> set[str]:
    return {name.strip() for name in os.environ.get(VARIABLE, "").split(",")} - {""}


def _reason(report: Any) -> str:
    found = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return found.removeprefix("Skipped: ")


def _service(reason: str) -> str:
    """What a reason says to be missing; "" where it names nothing."""
    if reason.startswith("could not import"):
        return "package"
    name = reason.partition(":")[0]
    return name if name in SERVICES else ""


def _judged(report: Any) -> Any:
    """The report, failed where it was skipped for something that is required."""
    if report.skipped and not hasattr(report, "wasxfail"):
        required, service = _required(), _service(_reason(report))
        if service in required or ("all" in required and service != NOT_IN_ALL):
            report.outcome = "failed"
            report.longrepr = (
                f"{VARIABLE} wants {service or 'all'}, so this may not be skipped: "
                + (_reason(report))
            )
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, Any, Any]:
    report = yield
    error = call.excinfo.value if call.excinfo is not None else None
    if report.failed and isinstance(error, InfraError) and _NO_BWRAP.match(str(error)):
        report.outcome = "skipped"
        report.longrepr = (str(item.path), item.location[1] or 0, f"Skipped: bwrap: {error}")
    return _judged(report)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, Any, Any]:
    return _judged((yield))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = Counter(_reason(report) for report in skipped)
    if reasons:
        terminalreporter.section("not run here")
        for reason, count in sorted(reasons.items()):
            terminalreporter.line(f"{count:4} {reason}")
