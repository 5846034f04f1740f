"""The model endpoint: the openai client, and the bundled server for `agent.base_url: auto`."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
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
from selfevo.agents import printable
from selfevo.config import AgentSection

START_LIMIT_S = 180.0
GREETING_LIMIT_S = 20.0
RETRIES = 2
RETRY_PAUSES_S = 20.0  # what the client may sleep between its attempts
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


class Served:
    """A checkpoint behind an OpenAI-compatible server of our own on a free loopback port.

    The server ends with `stop`, and with this process even if that is killed. `folder` takes its
    log and the file with its port.
    """

    def __init__(self, command: ServeCommand, checkpoint: Path, folder: Path) -> None:
        self._command = command
        self._checkpoint = checkpoint
        self._folder = folder
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> str:
        try:
            return self.start()
        except BaseException:
            self.stop()
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> str:
        """Start the server and wait for it; its base URL. Raises `InfraError`."""
        port_file = self._folder / "serve.json"
        port_file.unlink(missing_ok=True)
        log = self._folder / "serve.log"
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                self._command.full(self._checkpoint, port_file),
                stdout=out,
                stderr=out,
                stdin=subprocess.DEVNULL,
                preexec_fn=die_with_parent,
            )
        deadline = time.monotonic() + START_LIMIT_S
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                tail = log.read_text(errors="replace").strip().splitlines() or ["no output"]
                raise InfraError(
                    f"the bundled server ended with exit code {self.process.returncode}: "
                    f"{tail[-1][:160]}; see {log}"
                )
            address = _address(port_file)
            if address and _healthy(address):
                return f"{address}/v1"
            time.sleep(0.1)
        raise InfraError(
            f"the bundled server did not answer within {START_LIMIT_S:.0f} s; see {log}"
        )

    def stop(self) -> None:
        """End the server; harmless where none runs."""
        if self.process is not None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(10)
            self.process = None


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
        self._served: Served | None = None
        self._client: Any = None
        self.base_url = settings.base_url

    def __enter__(self) -> Endpoint:
        import openai  # slow to import

        if self._settings.base_url == "auto":
            try:
                self._served = Served(self._command, _bundled_checkpoint(), self._folder)
                self.base_url = self._served.start()
            except BaseException:
                self.close()
                raise
        key = os.environ.get(self._settings.api_key_env, "") or "none"
        self._client = openai.OpenAI(
            base_url=self.base_url,
            api_key=key,
            timeout=self._settings.timeout_s,
            max_retries=RETRIES,
        )
        limit = min(GREETING_LIMIT_S, self._settings.timeout_s)
        try:
            self._client.models.list(timeout=limit)
        except openai.APITimeoutError as error:
            self.close()
            raise self._down(f"no answer within {limit:g} s") from error
        except openai.APIConnectionError as error:
            self.close()
            raise self._down("no connection") from error
        except (openai.OpenAIError, ValueError, AttributeError, RecursionError):
            pass  # it answers; many servers lack this route or guard it, the chat call will tell
        return self

    def check(self) -> None:
        """Raise if the model is not there; starts no server and leaves nothing open."""
        if self._settings.base_url == "auto":
            _bundled_checkpoint()
        else:
            with self:
                pass

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
        if self._served is not None:
            self._served.stop()
            self._served = None

    def chat(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """One chat completion; returns the reply as plain JSON with at least one choice.

        Raises `InfraError` when the endpoint is down, refuses, or answers something else.
        """
        import openai

        assert self._client is not None, "use Endpoint as a context manager"
        try:
            reply = self._within_limit(request)
        except openai.APITimeoutError as error:
            raise self._down(f"no answer within {self._settings.timeout_s:g} s") from error
        except openai.APIConnectionError as error:
            raise self._down("no connection") from error
        except openai.APIStatusError as error:
            detail = " ".join(str(error).split())[:160]
            raise self._down(f"HTTP {error.status_code}: {detail}") from error
        except (openai.OpenAIError, ValueError, RecursionError) as error:
            raise self._down(f"not a chat completion ({type(error).__name__})") from error
        if not hasattr(reply, "model_dump"):
            raise self._down("not a chat completion")
        record: dict[str, Any] = printable(
            reply.model_dump(mode="json", exclude_none=True, warnings=False)
        )
        choices = record.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            raise self._down("a reply without choices")
        if not isinstance(choices[0].get("message"), dict):
            raise self._down("a choice without a message")
        return record

    def _within_limit(self, request: Mapping[str, Any]) -> Any:
        """The client's answer; raises what it raises, or `InfraError` if all its time is up.

        The client's own limit is a pause between two bytes, which a server that sends blanks to
        keep the line open never reaches; the thread that waits for it ends with its socket.
        """
        found: list[Any] = []

        def ask() -> None:
            try:
                found.append(self._client.chat.completions.create(**request))
            except Exception as error:  # noqa: BLE001 - raised again by who waits
                found.append(error)

        thread = threading.Thread(target=ask, name="chat", daemon=True)
        thread.start()
        limit = self._settings.timeout_s * (RETRIES + 1) + RETRY_PAUSES_S
        thread.join(limit)
        if not found:
            raise self._down(f"no whole answer within {limit:g} s")
        if isinstance(found[0], Exception):
            raise found[0]
        return found[0]

    def _down(self, what: str) -> InfraError:
        return InfraError(
            f"model endpoint {self.base_url}: {what}; start it and try again (`selfevo resume` "
            "goes on with a campaign), or set agent.base_url in selfevo.yaml and `selfevo run`"
        )


def _bundled_checkpoint() -> Path:
    checkpoint = repo_root() / "model" / "checkpoints" / "nano"
    if not (checkpoint / "config.json").is_file():
        raise UserError(
            f"{checkpoint}: the bundled model is missing; restore it, or set agent.base_url "
            "and agent.model in selfevo.yaml"
        )
    return checkpoint


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


def die_with_parent() -> None:
    """In the child: SIGKILL when the parent goes, however it goes; own group, so Ctrl-C is ours."""
    os.setpgid(0, 0)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
