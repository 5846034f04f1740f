"""The checks of `selfevo doctor`. Each returns a line about what works, or raises."""

from __future__ import annotations

import errno
import functools
import os
import re
import shutil
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from agent_tools.errors import InfraError, UserError
from selfevo.arms import FULL_ISOLATION, Commands
from selfevo.config import TRAIN_CONFIG, BudgetSection
from selfevo.installed import requirements

FREE_BYTES = 500_000_000  # a campaign of two rounds keeps about six checkpoints of 20 MB
PROBE_BYTES = 4_000_000
SCRIPT_LIMIT_S = 60
TRAIN_LIMIT_S = 300.0
GIT_OLDEST = (2, 31)  # the first that reads configuration from GIT_CONFIG_COUNT
SCRIPT = (
    "import numpy, pandas, sklearn\n"
    "pandas.DataFrame({'a': [1]}).to_csv('submission.csv', index=False)\n"
)
IDENTITY_REPAIR = (
    '`git config --global user.name "Your Name"` and `git config --global user.email you@host`'
)
MODEL_REPAIR = "start the endpoint, or set agent.base_url and agent.model in selfevo.yaml"


class FaultError(Exception):
    """What does not work; `repair` replaces the check's own where it is known better."""

    def __init__(self, message: str, repair: str = "") -> None:
        super().__init__(message)
        self.repair = repair


def _parted(error: Exception, *marks: str) -> FaultError:
    """A one-line error as fault and repair; the repair begins at the last of the marks."""
    text = str(error)
    for mark in marks:
        what, found, rest = text.rpartition(mark)
        if found:
            return FaultError(what, mark.lstrip(":; ") + rest)
    return FaultError(text)


@dataclass(frozen=True)
class Bench:
    """What the checks work with: the lab (None: the template's), a scratch folder, commands."""

    lab: Path | None
    scratch: Path
    commands: Commands

    @functools.cached_property
    def root(self) -> Path:
        """The lab whose configuration is tried: the user's, or a fresh one where that is broken."""
        from selfevo.lab import init_lab, read_lab

        if self.lab is not None:
            try:
                read_lab(self.lab)
                return self.lab
            except UserError:
                pass  # the check of the lab says so; the others still tell about the machine
        fresh = self.scratch / "lab"
        init_lab(fresh)
        return fresh

    @property
    def served(self) -> bool:
        """Whether the model is the bundled one, which this machine has to serve."""
        from selfevo.lab import read_lab

        return read_lab(self.root).lab.agent.base_url == "auto"


def lab(bench: Bench) -> str:
    """Folder, repository, head, configuration, uncommitted changes."""
    from selfevo.lab import check_lab

    if bench.lab is None:
        return "none given: the template's settings are tried"
    try:
        repo = check_lab(bench.lab)
    except UserError as error:
        raise _parted(error, "; ") from error
    return f"{bench.lab} at {(repo.head().commit or '')[:12]}"


def disk(bench: Bench) -> str:
    """Space for a small campaign, and a write that reaches the disk."""
    free = shutil.disk_usage(bench.scratch).free
    if free < FREE_BYTES:
        raise FaultError(
            f"{free / 1e6:.0f} MB free in {bench.scratch.parent}, "
            f"a campaign needs {FREE_BYTES / 1e6:.0f} MB"
        )
    probe = bench.scratch / "probe"
    with probe.open("wb") as file:
        file.write(bytes(PROBE_BYTES))
        file.flush()
        os.fsync(file.fileno())
    probe.unlink()
    return f"{free / 1e9:.1f} GB free"


def git(bench: Bench) -> str:
    """Version, and a branch, a worktree and a commit in a lab of our own."""
    from selfevo.lab import init_lab

    version = _git_version()
    repo = init_lab(bench.scratch / "git-lab")
    head = repo.head().commit
    assert head is not None
    repo.create_branch("selfevo/doctor", head)
    tree = repo.worktree_add(bench.scratch / "tree", "selfevo/doctor")
    (tree / "program.md").write_text("tried\n", encoding="utf-8")
    commit = repo.commit(["program.md"], "Try a commit", worktree=tree)
    repo.worktree_remove(tree)
    if repo.resolve("selfevo/doctor") != commit:
        raise FaultError("a commit in a worktree did not move its branch")
    return f"git {'.'.join(map(str, version))}: worktree and commit work"


def _git_version() -> tuple[int, ...]:
    try:
        done = subprocess.run(["git", "--version"], capture_output=True, text=True, timeout=20)
    except FileNotFoundError as error:
        raise FaultError("git is not installed", "run `apt-get install git`") from error
    version = tuple(int(n) for n in re.findall(r"\d+", done.stdout)[:3])
    if version[:2] < GIT_OLDEST:
        raise FaultError(f"{done.stdout.strip() or 'git'} is too old")
    return version


def identity(bench: Bench) -> str:
    """A name for the person's own commits: protected files are committed by people only."""
    folder = bench.lab if bench.lab is not None and bench.lab.is_dir() else bench.scratch
    found = []
    for key, variable in (("user.name", "GIT_AUTHOR_NAME"), ("user.email", "GIT_AUTHOR_EMAIL")):
        done = subprocess.run(
            ["git", "config", "--get", key], cwd=folder, capture_output=True, text=True, timeout=20
        )
        value = os.environ.get(variable) or done.stdout.strip()
        if not value:
            raise FaultError(
                f"git has no {key}: your own commits in the lab (protected files, merges) will fail"
            )
        found.append(value)
    return f"{found[0]} <{found[1]}>"


def torch(bench: Bench) -> str:
    """The trainer's Python imports a release of torch that the project takes."""
    python = bench.commands.train[0]
    code = "import torch; print(torch.__version__); print(float(torch.ones(2, 2).sum()))"
    try:
        done = subprocess.run(
            [python, "-c", code], capture_output=True, text=True, timeout=180, cwd=bench.scratch
        )
    except FileNotFoundError as error:
        raise FaultError(f"the trainer's Python {python} does not exist") from error
    lines = done.stdout.splitlines()
    if done.returncode or len(lines) != 2 or lines[1] != "4.0":
        fault = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise FaultError(f"torch cannot be used by {python}: {fault}")
    oldest = _oldest_torch()
    if tuple(int(n) for n in re.findall(r"\d+", lines[0])[:2]) < oldest:
        raise FaultError(f"torch {lines[0]} is too old: {'.'.join(map(str, oldest))} or newer")
    return f"torch {lines[0]}"


def _oldest_torch() -> tuple[int, ...]:
    for line in requirements():
        found = re.match(r"torch>=(\d+)\.(\d+)", line.replace(" ", ""))
        if found:
            return tuple(int(n) for n in found.groups())
    return (0, 0)


def environments(bench: Bench) -> str:
    """The Pythons of policy scripts and of data preparation start, and the first has its three.

    Where the data is prepared already, nothing is missed without the second.
    """
    from agent_tools.paths import prepare_python, script_python

    jobs = [(script_python(), "import numpy, pandas, sklearn", ".venv-script")]
    what = "script and prepare environments start"
    try:
        jobs.append((prepare_python(), "pass", ".venv-prepare"))
    except UserError:
        data(bench)
        what = "the script environment starts; none for preparing data, which is there"
    for python, code, folder in jobs:
        repair = f"`rm -rf {folder}`, then `make setup`"
        try:
            done = subprocess.run(
                [str(python), "-I", "-c", code],
                capture_output=True,
                text=True,
                timeout=SCRIPT_LIMIT_S,
                cwd=bench.scratch,
            )
        except OSError as error:
            raise FaultError(f"{python} does not start: {error.strerror}", repair) from error
        if done.returncode:
            fault = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise FaultError(f"{python}: {fault}", repair)
    return what


def data(bench: Bench) -> str:
    """Every competition of the suite is prepared and ranked."""
    from selfevo.lab import read_lab
    from selfevo.preflight import check_machine

    files = read_lab(bench.root)
    suites = dict.fromkeys((files.lab.suite, files.evaluation.suite or files.lab.suite))
    try:
        check_machine(files.lab.suite, files.evaluation.suite)
    except UserError as error:
        raise _parted(error, ": run `") from error
    return f"suite {' and '.join(suites)} {'is' if len(suites) == 1 else 'are'} prepared"


def grader(bench: Bench) -> str:
    """One grader call, on a competition's own sample submission."""
    from agent_tools.mle_bench.grading import grade
    from agent_tools.mle_bench.registry import load_competition, load_suite
    from selfevo.lab import read_lab

    suite = load_suite(read_lab(bench.root).lab.suite)
    competition = load_competition(suite.ids("train")[0], suite=suite)
    report = grade(competition, competition.public("dev") / "sample_submission.csv", "dev")
    if not report.valid:
        raise FaultError(f"{competition.id}: its own sample submission is invalid: {report.error}")
    return f"{competition.id}: the sample submission has percentile {report.percentile:.0f}"


def sandbox(bench: Bench) -> str:
    """A script in a warm worker of the lab's sandbox; names the limits that this host lacks."""
    from agent_tools.config_text import parse_yaml
    from agent_tools.sandbox import ScriptJob, make_pool, require_full

    settings = parse_yaml((bench.root / TRAIN_CONFIG).read_text("utf-8"), TRAIN_CONFIG)
    chosen = settings.get("sandbox")
    kind: Any = chosen.get("kind", "bubblewrap") if isinstance(chosen, dict) else "bubblewrap"
    inputs = bench.scratch / "inputs"
    inputs.mkdir(exist_ok=True)
    try:
        with make_pool(kind, 1) as pool:
            result = pool.run([ScriptJob(SCRIPT, inputs)])[0]
            missing = pool.missing
        if isinstance(chosen, dict) and chosen.get(FULL_ISOLATION) is True:
            require_full(missing)
    except (InfraError, UserError) as error:
        raise _parted(error, ": run `", ": allow ") from error
    if result.status != "ok":
        raise FaultError(f"a script of three imports ended as {result.status}: {result.last_line}")
    return f"{kind}: a script ran in {result.wall_s:.2f} s; " + (
        f"missing here: {'; '.join(missing)}" if missing else "all limits are in force"
    )


def port(bench: Bench) -> str:
    """A port of the loopback address can be bound and reached."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            number = server.getsockname()[1]
            with socket.create_connection(("127.0.0.1", number), timeout=10):
                return "the loopback address can be bound"
    except OSError as error:
        raise FaultError(f"cannot bind a port of 127.0.0.1: {error.strerror or error}") from error


def model(bench: Bench) -> str:
    """A chat request with the agent's tools, answered by a well-formed call."""
    from selfevo.agent_prompts import agent_messages, agent_tools
    from selfevo.agents import Malformed, read_reply
    from selfevo.lab import read_lab
    from selfevo.llm import Endpoint

    files = read_lab(bench.root)
    settings = files.lab.agent
    tools = agent_tools(list(files.space.keys))
    request = {
        "model": settings.model,
        "messages": agent_messages(1, 1, ["control-s0"]),
        "tools": tools,
        "tool_choice": "required",
        "temperature": settings.temperature,
        "max_tokens": settings.max_tokens,
        "seed": 0,
    }
    try:
        with Endpoint(settings, bench.scratch, bench.commands.serve) as endpoint:
            response = endpoint.chat(request)
            address = endpoint.base_url
    except InfraError as error:
        what = str(error).split("; start it")[0]
        raise FaultError(what, _listener(settings.base_url)) from error
    step = read_reply(response["choices"][0]["message"], tools, "call_0")
    if isinstance(step, Malformed):
        raise FaultError(
            f"{address} answers, but not with a tool call: {step.problem}",
            f"serve a model with tool calling as {settings.model}, or set agent.model",
        )
    where = "the bundled model" if settings.base_url == "auto" else f"{settings.model} at {address}"
    return f"{where} answers with a call of {step.name}"


def _listener(url: str) -> str:
    """The repair for an address of this machine: who holds its port, or that nobody does."""
    if url == "auto":
        return "run `make setup`; `python -m model.serve --checkpoint model/checkpoints/nano` alone"
    parts = urlsplit(url)
    number = parts.port or (443 if parts.scheme == "https" else 80)
    if parts.hostname not in ("127.0.0.1", "localhost", "::1"):
        return ""
    holder = _holder(number)
    if holder is None:
        return (
            f"nothing listens on port {number}: start the endpoint there (for example `python -m "
            f"model.serve --checkpoint CHECKPOINT --port {number}`), or set agent.base_url"
        )
    return (
        f"port {number} is taken by {holder}: stop it, or serve the model on another port and set "
        "agent.base_url"
    )


def _holder(number: int) -> str | None:
    """Who listens on a local port; None if nobody does."""
    import psutil

    try:
        with socket.create_connection(("127.0.0.1", number), timeout=5):
            pass
    except OSError as error:
        if error.errno == errno.ECONNREFUSED:
            return None
    try:
        for one in psutil.net_connections("tcp"):
            here = one.laddr and one.laddr.port == number
            if here and one.status == psutil.CONN_LISTEN and one.pid:
                return f"{psutil.Process(one.pid).name()} (pid {one.pid})"
    except psutil.Error:
        pass  # others' processes are not shown to everybody
    return "another program"


def engine(bench: Bench) -> str:
    """What the lab's jobs sample with; a vLLM is imported."""
    from selfevo.asynchronous import check_engine
    from selfevo.lab import read_lab

    try:
        return check_engine(read_lab(bench.root).train, bench.commands.train[0])
    except UserError as error:
        raise _parted(error, ": set ", "; run ", "; set ") from error


def trainer(bench: Bench) -> str:
    """One optimiser step by the lab's trainer through the launcher, and its log read back."""
    from agent_tools.config_text import parse_yaml
    from agent_tools.launcher import JobSpec, LocalLauncher
    from agent_tools.wandb_logs import read_run
    from selfevo.arms import run_config
    from selfevo.lab import read_lab

    files = read_lab(bench.root)
    text = (bench.root / TRAIN_CONFIG).read_text("utf-8")
    values = parse_yaml(text, TRAIN_CONFIG)
    rollout, start = values.get("rollout"), values.get("model")
    group = rollout.get("group_size", 8) if isinstance(rollout, dict) else 8
    parent = start.get("checkpoint", "nano") if isinstance(start, dict) else "nano"
    budget: BudgetSection = files.lab.budget.model_copy(
        update={"steps": 1, "scripts_per_step": max(2, int(group))}
    )
    run_dir = bench.scratch / "train"
    config = bench.scratch / "RUN.yaml"
    config.write_text(
        run_config(
            text,
            budget,
            suite=files.lab.suite,
            parent=str(parent),
            seed=0,
            scaffold=bench.root / "scaffold",
            group="doctor",
            name="doctor",
        ),
        encoding="utf-8",
    )
    launcher = LocalLauncher(bench.scratch / "jobs")
    argv = bench.commands.train_argv(config, run_dir)
    spec = JobSpec(argv, bench.scratch, {"WANDB_MODE": "offline"}, run_dir, TRAIN_LIMIT_S)
    job = launcher.submit(spec, "doctor")
    try:
        status = launcher.wait(job, TRAIN_LIMIT_S + 30)
    finally:
        launcher.cancel(job)
    if status.state != "done" or not (run_dir / "result.json").is_file():
        lines = [line for line in launcher.logs(job, 20, "stderr") if line.strip()]
        last = lines[-1].removeprefix("error: ") if lines else str(status.reason)
        raise FaultError(f"one step ended with exit code {status.exit_code}: {last}")
    history = read_run(run_dir)
    seconds = (status.ended or 0.0) - (status.started or 0.0)
    return (
        f"one step of {budget.scripts_per_step} scripts in {seconds:.0f} s, log read from its "
        + (f"{history.source} file")
    )
