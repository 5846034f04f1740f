"""One gateway process and its scripted engine for all tests of rl.gateway that need no other."""

from collections.abc import Iterator

import pytest
from gateway_fakes import Running, ScriptedEngine, answer, gateway


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ScriptedEngine, Running]]:
    engine = ScriptedEngine()
    engine.start()
    folder = tmp_path_factory.mktemp("gateway")
    options = ["--linger", "0.4", "--ping", "0.3", "--max-body", "100000", "--engine-patience", "2"]
    with gateway(engine.url, folder, *options) as running:
        yield engine, running
    engine.stop()


@pytest.fixture
def both(shared: tuple[ScriptedEngine, Running]) -> tuple[ScriptedEngine, Running]:
    engine, running = shared
    engine.reply = lambda body: answer()
    engine.bodies.clear()
    engine.gate.set()
    engine.left = 0
    return engine, running


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """An episode of this test's own."""
    kept = [c if c.isalnum() else "-" for c in request.node.name]
    return f"g3-{''.join(kept)}.0"[:150]
