"""Shared by all tests: sleeping OpenMP threads, and no skip where everything must run.

With SELFEVO_REQUIRE set (CI), a test that would be skipped fails instead; only tests that need a
CUDA device may still be skipped.
"""

import os
from collections.abc import Generator
from typing import Any

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
ALLOWED = "CUDA"

# A busy machine is no reason to fail: examples have no time limit.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


def _refuse_skip(report: Any) -> Any:
    if os.environ.get("SELFEVO_REQUIRE") and report.skipped and ALLOWED not in str(report.longrepr):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"SELFEVO_REQUIRE is set, so this may not be skipped: {reason}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, Any, Any]:
    return _refuse_skip((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, Any, Any]:
    return _refuse_skip((yield))
