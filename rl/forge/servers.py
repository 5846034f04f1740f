"""Engine and gateway as children: a port file, a health route, and the weights an engine has.

No torch here.
"""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import httpx

from rl.config import RunConfig
from rl.engine_http import HttpEngine
from rl.errors import ConfigError
from rl.forge.child import AliveLock, Child

PROBE_TIMEOUT_S = 2.0
CONTROL_KEY = "SELFEVO_GATEWAY_KEY"
"""`rl.gateway.app.CONTROL_KEY`, without loading a web server."""

PORT_TAKEN = 5
"""Exit code of a server that cannot listen."""


class Server(Child):
    """A child that serves HTTP, on a port that is chosen before it starts. After a restart it
    listens on the same one, so that whoever knows its URL goes on; where another process took it,
    on a new one."""

    def __init__(
        self,
        name: str,
        folder: Path,
        command: Sequence[str],
        alive: AliveLock,
        *,
        health: str,
        start_timeout_s: float,
        restarts: int,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(
            name,
            folder,
            lambda: self._with_port(),
            alive,
            piped=False,
            restarts=restarts,
            environment=environment,
        )
        self.arguments = list(command)
        self.port = 0
        self._health, self._timeout_s = health, start_timeout_s
        self._port_file = folder / f"{name}.port"

    def _with_port(self) -> list[str]:
        self._port_file.unlink(missing_ok=True)
        self.port = self.port or free_port()
        files = ["--port-file", str(self._port_file)]
        return [sys.executable, *self.arguments, "--port", str(self.port), *files]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def bury(self, now: float, *, fault: bool = True) -> None:
        assert self._process is not None
        if self._process.returncode == PORT_TAKEN:
            self.port = 0
        super().bury(now, fault=fault)

    def refused(self, code: int, *, outdated: bool) -> bool:
        """Whether it ended because of its arguments, and would again. `outdated`: an engine whose
        weights were replaced while it started; their folder may have been removed since."""
        return code == ConfigError.exit_code and not self.ready and not outdated

    def probe(self, now: float) -> bool:
        """Whether it answers now. Killed when it takes too long to start."""
        if self.pid is None:
            return False
        try:
            found = json.loads(self._port_file.read_text(encoding="utf-8"))
            if found["pid"] == self.pid:
                answer = httpx.get(self.url + self._health, timeout=PROBE_TIMEOUT_S)
                if answer.status_code == 200:
                    return True
        except (OSError, ValueError, KeyError, httpx.HTTPError):
            pass  # not yet
        if now - self.since > self._timeout_s:
            print(f"{self.name} does not answer within {self._timeout_s:.0f} s", file=sys.stderr)
            self.kill()
        return False


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        return int(holder.getsockname()[1])


def engine_command(config: RunConfig, weights: Path, version: int) -> list[str]:
    """Arguments of `model.serve` for these weights: its first reply carries their version."""
    command = ["-m", "model.serve", "--checkpoint", str(weights), "--control", "--quiet"]
    command += ["--served-model-name", "policy", "--engine", config.forge.engine]
    command += ["--weights-version", str(version), "--exit-with-parent"]
    if config.device in ("cpu", "cuda"):
        command += ["--device", config.device]
    return [*command, *config.forge.engine_options]


def gateway_command(config: RunConfig, engine: str, model: Path, pool: str) -> list[str]:
    """Arguments of `rl.gateway`."""
    forge = config.forge
    command = ["-m", "rl.gateway", "--engine", engine, "--model", str(model), "--pool", pool]
    command += ["--quiet", "--exit-with-parent"]
    command += ["--episode-calls", str(forge.episode_calls)]
    command += ["--episode-tokens", str(forge.episode_tokens)]
    command += ["--engine-wait", str(forge.start_timeout_s)]
    return [*command, "--deadline", str(forge.deadline_s)]


class EngineControl:
    """Weights into a running engine, by file. Every wait ends after `timeout_s`."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s

    def load(self, url: str, weights: Path, version: int) -> float:
        """Freeze what runs, replace the weights, go on under the new version. Returns seconds.

        Raises InfraError when the engine is away, ConfigError when it refuses the folder; then it
        goes on with what it has.
        """
        started = time.monotonic()
        with HttpEngine(url, timeout_s=self._timeout_s) as engine:
            engine.pause("keep")
            try:
                engine.load(weights, version)
            finally:
                engine.resume()
        return time.monotonic() - started
