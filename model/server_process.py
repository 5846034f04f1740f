"""What every server process of ours does alike: its socket, its log, its end with its parent."""

from __future__ import annotations

import argparse
import copy
import os
import signal
import socket
import threading
import time
from typing import Any

_BACKLOG = 1024
_PARENT_POLL_S = 0.5


def port_number(text: str) -> int:
    """An argparse type: a port, 0 for a free one."""
    if text.isascii() and text.isdigit() and int(text) <= 65535:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no port: give a number from 0 to 65535")


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 picks a free one. OSError where there is none to be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sends small answers at once (TCP_NODELAY) only where the socket says that it is TCP
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def log_to_stderr(config: dict[str, Any]) -> dict[str, Any]:
    """uvicorn's logging configuration with every handler on standard error."""
    config = copy.deepcopy(config)
    for handler in config["handlers"].values():
        handler["stream"] = "ext://sys.stderr"
    return config


def exit_with_parent(parent: int) -> None:
    """SIGTERM to this process once `parent` is no longer its parent.

    Polls, because Linux's death signal also fires when only the starting *thread* ends.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_PARENT_POLL_S)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()
