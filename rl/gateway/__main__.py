"""`python -m rl.gateway --engine URL --model DIR --pool POOL`: the gateway as a process.

Exit codes: 2 unusable arguments, tokenizer or engine; 5 no engine, pool or port; 130 and 143 after
SIGINT and SIGTERM.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from model.errors import ModelError
from model.port_file import write_port_file
from model.server_process import exit_with_parent, listen, log_to_stderr, port_number
from model.tokenizer import Tokenizer
from rl.errors import ConfigError, InfraError, exit_code_of
from rl.gateway.app import CONTROL_KEY, App
from rl.gateway.core import Gateway
from rl.gateway.engine import Engine
from rl.gateway.settings import EpisodeSampling, Limits
from rl.gateway.writer import Writer
from rl.pool import Pool

_GRACE_S = 3
_SWITCH_S = 0.0005  # the pool's thread must not wait 5 ms for the interpreter


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until a signal comes. Returns the exit code."""
    parent = os.getppid()
    options = _parser().parse_args(argv)
    if options.exit_with_parent:
        exit_with_parent(parent)
    try:
        sampling = EpisodeSampling(
            options.temperature, options.max_tokens, options.seed, options.on_conflict
        )
        limits = Limits(options.episode_calls, options.episode_tokens, options.deadline)
        tokenizer = Tokenizer.load(options.model)
        engine = Engine(
            options.engine,
            tokenizer_hash=tokenizer.hash,
            eos_id=tokenizer.eos_id,
            patience_s=options.engine_patience,
        )
        with Pool(options.pool) as pool:
            return _serve(options, tokenizer, engine, pool, sampling, limits)
    except (ModelError, ConfigError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (InfraError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_code_of(error)


def _serve(
    options: argparse.Namespace,
    tokenizer: Tokenizer,
    engine: Engine,
    pool: Pool,
    sampling: EpisodeSampling,
    limits: Limits,
) -> int:
    import uvicorn

    received: list[int] = []
    serving = False

    def stop(signum: int, _: object) -> None:
        # uvicorn shuts down on its own and then raises the signal again for us to see
        received.append(signum)
        if not serving:
            raise SystemExit(128 + signum)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        listener = listen(options.host, options.port)
    except OSError as error:
        raise InfraError(
            f"cannot listen on {options.host}:{options.port}: {error}; try --port 0"
        ) from error

    async def run() -> None:
        nonlocal serving
        await engine.check(options.engine_wait)
        writer = Writer(pool)
        gateway = Gateway(
            tokenizer,
            engine,
            writer,
            sampling=sampling,
            limits=limits,
            keep=options.keep,
            repeat=options.repeat,
            auto_open=options.auto_open,
            linger_s=options.linger,
        )
        config.app = App(
            gateway,
            max_body=options.max_body,
            ping_s=options.ping,
            control_key=os.environ.get(CONTROL_KEY, ""),
        )
        host, port = listener.getsockname()[:2]
        if options.port_file is not None:
            write_port_file(options.port_file, port)
        shown = f"[{host}]" if ":" in host else host
        print(f"gateway on http://{shown}:{port}/v1", file=sys.stderr, flush=True)
        serving = True
        try:
            await uvicorn.Server(config).serve(sockets=[listener])
        finally:
            await asyncio.to_thread(writer.close)
            engine.close()

    config = uvicorn.Config(
        "rl.gateway.app:App",
        log_level="warning" if options.quiet else "info",
        log_config=log_to_stderr(uvicorn.config.LOGGING_CONFIG),
        access_log=False,
        lifespan="off",
        interface="asgi3",
        timeout_graceful_shutdown=_GRACE_S,
        timeout_keep_alive=75,  # an agent runs its tools meanwhile
    )
    sys.setswitchinterval(_SWITCH_S)
    gc.freeze()
    with listener, asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(run())
    if options.port_file is not None:
        options.port_file.unlink(missing_ok=True)
    return 128 + received[0] if received else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m rl.gateway", description=__doc__)
    add = parser.add_argument
    add("--engine", required=True, help="URL of model.serve or vLLM, without /v1")
    add("--model", type=Path, required=True, help="folder with the engine's tokenizer.json")
    add("--pool", required=True, help="file or postgresql:// URL of the data pool")
    add("--host", default="127.0.0.1")
    add("--port", type=port_number, default=8100, help="0 picks a free one")
    add("--port-file", type=Path, default=None, help='gets {"port", "pid"} once it listens')
    add("--episode-calls", type=int, default=Limits.calls)
    add("--episode-tokens", type=int, default=Limits.tokens, help="sampled ones")
    add("--deadline", type=float, default=Limits.deadline_s, help="seconds of an episode")
    add("--temperature", type=float, default=EpisodeSampling.temperature)
    add("--max-tokens", type=int, default=EpisodeSampling.max_tokens, help="of one call")
    add("--seed", type=int, default=None, help="call k of an episode draws with seed + k")
    add(
        "--on-conflict",
        default="refuse",
        choices=["refuse", "override"],
        help="a request that wants another sampling gets 400, or the wish is left out",
    )
    add(
        "--repeat",
        default="join",
        choices=["join", "sample"],
        help="a request equal to an earlier one: its answer, or a new call unless marked a retry",
    )
    add(
        "--keep",
        default="stored",
        choices=["stored", "template"],
        help="across user turns: the stored ids, or thinking dropped as the template does",
    )
    add("--auto-open", action="store_true", help="unknown episodes open with these settings")
    add("--linger", type=float, default=2.0, help="seconds that a call outlives its client")
    add("--ping", type=float, default=10.0, help="seconds between comments in a waiting stream")
    add("--max-body", type=int, default=16 * 2**20, help="bytes of a request")
    add("--engine-wait", type=float, default=120.0, help="seconds to wait for the engine at start")
    add("--engine-patience", type=float, default=60.0, help="seconds a call tries to reach it")
    add("--exit-with-parent", action="store_true", help="stop when the starting process ends")
    add("--quiet", action="store_true", help="warnings only")
    return parser


if __name__ == "__main__":
    sys.exit(main())
