"""`python -m model.serve --checkpoint DIR`: an OpenAI-compatible server for one checkpoint.

`--engine vllm` starts vLLM behind the same command line (`model.vllm_serve`).

Exit codes: 2 unusable arguments or checkpoint, 5 the port cannot be had, 130 and 143 after
SIGINT and SIGTERM; with vLLM also 1, when it ends by itself.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from model import vllm_serve
from model.errors import ModelError
from model.port_file import write_port_file
from model.server_process import exit_with_parent, listen, log_to_stderr, port_number

if TYPE_CHECKING:
    from model.service import Service

SMALL_HIDDEN = 512
"""Below this size one thread generates as fast as two, and another core is left for HTTP."""

_GRACE_S = 3


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until a signal comes. Returns the exit code."""
    parent = os.getppid()
    options = _parser().parse_args(argv)
    if options.exit_with_parent:
        exit_with_parent(parent)
    if options.engine == "vllm":
        return vllm_serve.serve(options)
    try:
        if options.control:
            _check_control(options.host)
        service = load_service(
            options.checkpoint,
            device=options.device,
            name=options.served_model_name,
            limits=Limits(
                max_batch=options.max_batch,
                max_queue=options.max_queue,
                cache_tokens=options.cache_tokens,
                prefix_tokens=options.prefix_cache_tokens,
                prefill_tokens=options.prefill_tokens,
            ),
            threads=options.threads,
            native=options.native == "auto",
            draft=options.draft,
            draft_tokens=options.draft_tokens,
            draft_rule=options.draft_rule,
            version=options.weights_version,
        )
    except ModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        listener = listen(options.host, options.port)
    except OSError as error:
        where = f"{options.host}:{options.port}"
        print(f"error: cannot listen on {where}: {error}; try --port 0", file=sys.stderr)
        return 5
    return _serve(
        service, listener, options.port_file, quiet=options.quiet, control=options.control
    )


@dataclass(frozen=True)
class Limits:
    """What bounds the server's memory: requests that run and that wait, rows × columns of the
    key/value cache, and tokens of the prefix cache (0 turns that off). And what bounds a step:
    prompt tokens read between two decode steps (None is what suits the device)."""

    max_batch: int = 64
    max_queue: int = 512
    cache_tokens: int = 131_072
    prefix_tokens: int = 32_768
    prefill_tokens: int | None = None


def load_service(
    checkpoint: Path,
    *,
    device: str = "auto",
    name: str | None = None,
    limits: Limits = Limits(),
    threads: int | None = None,
    native: bool = True,
    draft: Path | None = None,
    draft_tokens: int = 3,
    draft_rule: Literal["match", "reject"] = "match",
    version: int = 0,
) -> Service:
    """Loads a checkpoint folder and starts its engine. Raises `ModelError`.

    Torch is imported here, so that `--help` and wrong arguments answer at once.
    """
    for option, value, least in (
        ("--max-queue", limits.max_queue, 0),
        ("--prefix-cache-tokens", limits.prefix_tokens, 0),
        ("--prefill-tokens", 1 if limits.prefill_tokens is None else limits.prefill_tokens, 1),
        ("--threads", 1 if threads is None else threads, 1),
        ("--draft-tokens", draft_tokens, 1),
    ):
        if value < least:
            raise ModelError(f"{option} is {value}; it must be ≥ {least}")
    import torch

    from model.batching import Batcher
    from model.checkpoint import load_model
    from model.generate import Engine
    from model.layout import check_vocabulary
    from model.mtp_files import load_mtp
    from model.running import RunningBatch
    from model.running_draft import DraftOptions
    from model.service import Service
    from model.tokenizer import Tokenizer

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ModelError("--device cuda: no CUDA device here; use --device cpu")
    tokenizer = Tokenizer.load(checkpoint)
    model = load_model(checkpoint, device=device)
    if threads is not None:
        torch.set_num_threads(threads)
    elif model.config.hidden_size < SMALL_HIDDEN and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    check_vocabulary(checkpoint, tokenizer, model.config)
    guess = None
    if draft is not None:
        guess = DraftOptions(load_mtp(draft, device=device), draft_tokens, rule=draft_rule)
    running = RunningBatch(
        Engine(model, device=device, max_batch=limits.max_batch, version=version),
        max_batch=limits.max_batch,
        cache_tokens=limits.cache_tokens,
        prefix_tokens=limits.prefix_tokens,
        prefill_tokens=limits.prefill_tokens,
        native=native,
        draft=guess,
    )
    print(f"forward pass: {running.path}", file=sys.stderr, flush=True)
    return Service(
        name=name or checkpoint.resolve().name,
        tokenizer=tokenizer,
        batcher=Batcher(running, max_batch=limits.max_batch, max_queue=limits.max_queue),
        context=model.config.max_position_embeddings,
        vocab_size=model.config.vocab_size,
        like=model,
    )


def _check_control(host: str) -> None:
    """Raise ModelError where more than this machine could replace the weights."""
    try:
        inside = ipaddress.ip_address(host).is_loopback
    except ValueError:
        inside = host == "localhost"
    if not inside:
        raise ModelError(
            f"--control on {host}: whoever reaches it may replace the weights; use --host 127.0.0.1"
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m model.serve", description=__doc__)
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="folder in the Hugging Face layout")
    add("--host", default="127.0.0.1")
    add("--port", type=port_number, default=8000, help="0 picks a free one")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"])
    add("--served-model-name", default=None, help="default: the checkpoint folder's name")
    add("--port-file", type=Path, default=None, help='gets {"port", "pid"} once it listens')
    add("--max-batch", type=int, default=Limits.max_batch, help="requests that run together")
    add("--max-queue", type=int, default=Limits.max_queue, help="requests that wait; more get 429")
    add(
        "--cache-tokens",
        type=int,
        default=Limits.cache_tokens,
        help="bound of the key/value cache, rows x columns",
    )
    add(
        "--prefix-cache-tokens",
        type=int,
        default=Limits.prefix_tokens,
        help="bound of the prefix cache; 0 turns it off",
    )
    add(
        "--prefill-tokens",
        type=int,
        default=None,
        help="prompt tokens read between two decode steps; default: what suits the device",
    )
    add("--threads", type=int, default=None, help="of the processor; default: 1 for a small model")
    add(
        "--native",
        default="auto",
        choices=["auto", "off"],
        help="auto: code compiled for this processor where a C compiler and the model allow it",
    )
    add("--control", action="store_true", help="routes that pause and load; loopback hosts only")
    add("--weights-version", type=int, default=0, help="of the checkpoint, until another is loaded")
    add("--draft", type=Path, default=None, help="folder of mtp.safetensors to guess tokens with")
    add("--draft-tokens", type=int, default=3, help="guesses a step")
    add(
        "--draft-rule",
        default="match",
        choices=["match", "reject"],
        help="match: the same replies as without; reject: more guesses stand, samples differ",
    )
    add("--exit-with-parent", action="store_true", help="stop when the starting process ends")
    add("--quiet", action="store_true", help="no access log")
    add("--engine", default="own", choices=["own", "vllm"])
    vllm_serve.add_arguments(parser)
    return parser


def _serve(
    service: Service,
    listener: socket.socket,
    port_file: Path | None,
    *,
    quiet: bool,
    control: bool,
) -> int:
    import uvicorn

    from model.serve_app import create_app

    received: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        # uvicorn shuts down on its own and then raises the signal again for us to see
        signal.signal(number, lambda signum, _: received.append(signum))
    host, port = listener.getsockname()[:2]
    config = uvicorn.Config(
        create_app(service, control=control),
        log_level="warning" if quiet else "info",
        log_config=log_to_stderr(uvicorn.config.LOGGING_CONFIG),
        timeout_graceful_shutdown=_GRACE_S,
    )
    if port_file is not None:
        write_port_file(port_file, port)
    shown = f"[{host}]" if ":" in host else host
    print(f"serving {service.name} on http://{shown}:{port}/v1", file=sys.stderr, flush=True)
    uvicorn.Server(config).run(sockets=[listener])
    if port_file is not None:
        port_file.unlink(missing_ok=True)
    code = 128 + received[0] if received else 0
    if not service.batcher.close(timeout_s=1):
        # a batch is still being generated for nobody; its thread would hold the process
        sys.stderr.flush()
        os._exit(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
