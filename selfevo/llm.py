"""The model endpoint: the openai client, and the bundled server for `agent.base_url: auto`."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from agent_tools.errors import InfraError, UserError
from agent_tools.paths import repo_root
from selfevo.config import AgentSection

START_LIMIT_S = 180.0
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class ServeCommand:
    """How the bundled server is started; tests put their own program here."""

    argv: tuple[str, ...] = (sys.executable, "-m", "model.serve")

    def full(self, checkpoint: Path, port_file: Path) -> list[str]:
        return [
            *self.argv,
            "--checkpoint",
            str(checkpoint),
            "--host",
            "127.0.0.1",
            "--port",
            "0",
            "--port-file",
            str(port_file),
            "--served-model-name",
            "nano",
            "--quiet",
        ]


class Endpoint:
    """An OpenAI-compatible chat endpoint, for the duration of a `with` block.

    With `base_url: auto` the bundled checkpoint is served by a child process that ends with the
    block, and with this process even if that is killed. Raises `InfraError` when nothing answers.
    """

    def __init__(
        self, settings: AgentSection, folder: Path, command: ServeCommand | None = None
    ) -> None:
        self._settings = settings
        self._folder = folder
        self._command = command or ServeCommand()
        self._server: subprocess.Popen[bytes] | None = None
        self._client: Any = None
        self.base_url = settings.base_url

    def __enter__(self) -> Endpoint:
        import openai  # slow to import

        if self._settings.base_url == "auto":
            try:
                self.base_url = self._start()
            except BaseException:
                self.close()
                raise
        key = os.environ.get(self._settings.api_key_env, "") or "none"
        self._client = openai.OpenAI(
            base_url=self.base_url, api_key=key, timeout=self._settings.timeout_s, max_retries=2
        )
        try:
            self._client.models.list()
        except openai.APIConnectionError as error:
            self.close()
            raise self._down("no connection") from error
        except (openai.OpenAIError, ValueError, AttributeError):
            pass  # it answers; many servers lack this route or guard it, the chat call will tell
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None
        if self._server is not None:
            self._server.terminate()
            try:
                self._server.wait(10)
            except subprocess.TimeoutExpired:
                self._server.kill()
                self._server.wait(10)
            self._server = None

    def chat(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """One chat completion; returns the reply as plain JSON with at least one choice.

        Raises `InfraError` when the endpoint is down, refuses, or answers something else.
        """
        import openai

        assert self._client is not None, "use Endpoint as a context manager"
        try:
            reply = self._client.chat.completions.create(**request)
        except openai.APIConnectionError as error:
            raise self._down("no connection") from error
        except openai.APIStatusError as error:
            detail = " ".join(str(error).split())[:160]
            raise self._down(f"HTTP {error.status_code}: {detail}") from error
        except (openai.OpenAIError, ValueError) as error:
            raise self._down(f"not a chat completion ({type(error).__name__})") from error
        if not hasattr(reply, "model_dump"):
            raise self._down("not a chat completion")
        record: dict[str, Any] = reply.model_dump(mode="json", exclude_none=True, warnings=False)
        choices = record.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            raise self._down("a reply without choices")
        if not isinstance(choices[0].get("message"), dict):
            raise self._down("a choice without a message")
        return record

    def _down(self, what: str) -> InfraError:
        return InfraError(
            f"model endpoint {self.base_url}: {what}; start it or set agent.base_url in "
            "selfevo.yaml, then `selfevo resume`"
        )

    def _start(self) -> str:
        checkpoint = repo_root() / "model" / "checkpoints" / "nano"
        if not (checkpoint / "config.json").is_file():
            raise UserError(
                f"{checkpoint}: the bundled model is missing; restore it, or set agent.base_url "
                "and agent.model in selfevo.yaml"
            )
        port_file = self._folder / "serve.json"
        port_file.unlink(missing_ok=True)
        log = self._folder / "serve.log"
        with log.open("wb") as out:
            self._server = subprocess.Popen(
                self._command.full(checkpoint, port_file),
                stdout=out,
                stderr=out,
                stdin=subprocess.DEVNULL,
                preexec_fn=_die_with_parent,
            )
        deadline = time.monotonic() + START_LIMIT_S
        while time.monotonic() < deadline:
            if self._server.poll() is not None:
                tail = log.read_text(errors="replace").strip().splitlines() or ["no output"]
                raise InfraError(
                    f"the bundled server ended with exit code {self._server.returncode}: "
                    f"{tail[-1][:160]}; see {log}"
                )
            address = _address(port_file)
            if address and _healthy(address):
                return f"{address}/v1"
            time.sleep(0.1)
        raise InfraError(
            f"the bundled server did not answer within {START_LIMIT_S:.0f} s; see {log}"
        )


def _address(port_file: Path) -> str | None:
    try:
        return f"http://127.0.0.1:{int(json.loads(port_file.read_text())['port'])}"
    except (OSError, ValueError, KeyError):
        return None  # not written yet


def _healthy(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _die_with_parent() -> None:
    """In the child: SIGKILL when the parent goes, however it goes; own group, so Ctrl-C is ours."""
    os.setpgid(0, 0)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
