"""Any OpenAI-compatible chat endpoint, and the bundled server for `--base-url auto`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from agent_tools.errors import InfraError, UserError
from agent_tools.paths import repo_root

START_LIMIT_S = 180.0
CALL_LIMIT_S = 600.0
BUNDLED = Path("model") / "checkpoints" / "nano"


@dataclass(frozen=True)
class Answer:
    """One reply: its text, and the tokens of prompt and reply as the server counts them."""

    text: str
    tokens: int


class ChatModel:
    """A model behind an endpoint; safe for many threads.

    Calls that fail for a moment are tried again by the client. Raises InfraError when the endpoint
    is down, refuses, or answers something else: the journal keeps what was done, and the same
    command goes on.
    """

    def __init__(self, base_url: str, model: str, *, api_key: str = "none") -> None:
        import openai  # slow to import

        if not base_url.startswith(("http://", "https://")):
            raise UserError(f"--base-url {base_url!r}: give a URL such as http://127.0.0.1:8000/v1")
        self.base_url = base_url
        self.model = model
        self.api_key = api_key
        self._openai = openai
        self._client = openai.OpenAI(
            base_url=base_url, api_key=api_key, timeout=CALL_LIMIT_S, max_retries=4
        )

    def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        temperature: float,
        max_tokens: int,
        seed: int,
    ) -> Answer:
        """One chat completion. Raises InfraError as above."""
        found: list[Any] = []

        def ask() -> None:
            try:
                found.append(
                    self._client.chat.completions.create(
                        model=self.model,
                        messages=[dict(message) for message in messages],  # type: ignore[misc]
                        temperature=temperature,
                        max_tokens=max_tokens,
                        seed=seed,
                    )
                )
            except (self._openai.OpenAIError, ValueError, RecursionError) as error:
                found.append(error)

        # The client's own limit is a pause between two bytes: a server that sends blanks for ever
        # would never reach it.
        thread = threading.Thread(target=ask, name="chat", daemon=True)
        thread.start()
        thread.join(5 * CALL_LIMIT_S)
        if not found:
            raise self._down(f"no whole answer within {5 * CALL_LIMIT_S:g} s")
        if isinstance(found[0], Exception):
            detail = " ".join(str(found[0]).split())[:160]
            raise self._down(f"{type(found[0]).__name__}: {detail}") from found[0]
        choices = getattr(found[0], "choices", None)
        content = choices[0].message.content if choices and choices[0].message else None
        if choices is None or not choices:
            raise self._down("a reply without choices")
        usage = getattr(found[0], "usage", None)
        tokens = getattr(usage, "total_tokens", 0) if usage is not None else 0
        return Answer(str(content or ""), int(tokens or 0))

    def _down(self, what: str) -> InfraError:
        return InfraError(
            f"model endpoint {self.base_url}: {what}; start it and give the same command again, "
            "it goes on where it stopped"
        )


class BundledServer:
    """`python -m model.serve` with the bundled model on a free loopback port, for a `with` block.

    It ends with the block, and with this process even if that is killed.
    """

    def __init__(self, checkpoint: Path | None = None) -> None:
        self._checkpoint = checkpoint or repo_root() / BUNDLED
        self._process: subprocess.Popen[bytes] | None = None
        self._folder = tempfile.TemporaryDirectory()
        self.base_url = ""

    def __enter__(self) -> Self:
        if not (self._checkpoint / "config.json").is_file():
            raise UserError(
                f"{self._checkpoint}: no model there; restore the bundled one or give --base-url"
            )
        port_file, log = Path(self._folder.name) / "port", Path(self._folder.name) / "log"
        argv = [sys.executable, "-m", "model.serve", "--checkpoint", str(self._checkpoint)]
        argv += ["--host", "127.0.0.1", "--port", "0", "--port-file", str(port_file)]
        argv += ["--served-model-name", "nano", "--quiet", "--exit-with-parent"]
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                argv, stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True
            )
        try:
            self.base_url = f"{self._wait(port_file, log)}/v1"
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the server."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait(10)
            self._process = None
        self._folder.cleanup()

    def _wait(self, port_file: Path, log: Path) -> str:
        assert self._process is not None
        deadline = time.monotonic() + START_LIMIT_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                last = (log.read_text(errors="replace").strip().splitlines() or ["no output"])[-1]
                raise InfraError(f"the bundled server ended ({last[:160]}): run `make setup`")
            try:
                address = f"http://127.0.0.1:{int(json.loads(port_file.read_text())['port'])}"
                with urllib.request.urlopen(f"{address}/health", timeout=5) as reply:
                    if reply.status == 200:
                        return address
            except (OSError, ValueError, KeyError, urllib.error.URLError):
                pass  # not there yet
            time.sleep(0.1)
        raise InfraError(f"the bundled server did not answer within {START_LIMIT_S:.0f} s")


def api_key(variable: str) -> str:
    """The key in an environment variable, or "none" for servers that need no key."""
    return os.environ.get(variable, "").strip() or "none"
