"""All runs of a group, one after the other; what is done is skipped, what was killed goes on."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent_tools.errors import UserError
from agent_tools.mle_agent import leaks
from agent_tools.mle_agent.bridge import Bridge, validate_elsewhere
from agent_tools.mle_agent.container import Container
from agent_tools.mle_agent.executor import ContainerExecutor, Executor, PoolExecutor
from agent_tools.mle_agent.foreign import Agent, run_agent
from agent_tools.mle_agent.model_client import ChatModel
from agent_tools.mle_agent.run_group import Group, Task
from agent_tools.mle_agent.search import Search
from agent_tools.mle_agent.settings import Settings
from agent_tools.mle_agent.solver import ChatSolver, Look, NanoSolver, Solver
from agent_tools.mle_agent.sources import LITE, load_view
from agent_tools.mle_bench.registry import Competition
from agent_tools.paths import script_python
from agent_tools.sandbox import Limits, PoolKind, make_pool

_LOOK_S = 600.0
_AGENT_PROCESSES, _AGENT_FILES = 512, 1024
_START_CPU_S = 10.0  # a script of a new container imports its packages; a warm worker has them


@dataclass(frozen=True)
class Machine:
    """Where and how scripts run. `python` None is the script environment."""

    data_dir: Path | None
    sandbox: PoolKind = "bubblewrap"
    workers: int = 2
    python: Path | None = None
    require_full_isolation: bool = False


def run_searches(
    group: Group,
    settings: Settings,
    model: ChatModel,
    machine: Machine,
) -> None:
    """Our own agent on every task of the group. Raises InfraError where it cannot go on now."""
    leaks.require_clean(machine.python or script_python())
    if settings.container:
        _require_bubblewrap(machine)
    if settings.name == "nano" and group.about.suite == LITE:
        raise UserError("--settings nano: the bundled model knows our own suites only; use real")
    solver: Solver = NanoSolver(model) if settings.name == "nano" else ChatSolver(model)
    with contextlib.ExitStack() as stack:
        pool = None
        for task in group.about.tasks():
            if group.is_done(task):
                continue
            view = load_view(group.about.suite, task.competition, machine.data_dir)
            limits = script_limits(settings, view)
            executor: Executor
            if settings.container:
                executor = ContainerExecutor(
                    limits,
                    _contract(view, settings),
                    machine.python,
                    gpu=settings.gpu,
                    require_full_isolation=machine.require_full_isolation,
                )
            else:
                if pool is None:
                    pool = stack.enter_context(
                        make_pool(
                            machine.sandbox,
                            machine.workers,
                            python=machine.python,
                            require_full_isolation=machine.require_full_isolation,
                        )
                    )
                executor = PoolExecutor(pool, limits)
            _search(group, task, view, solver, executor, settings, machine)


def run_foreign(
    group: Group,
    agent: Agent,
    machine: Machine,
    *,
    base_url: str | None,
    api_key: str,
    memory_mb: int,
) -> None:
    """An agent in MLE-bench's format on every task; a run that was killed starts again."""
    leaks.require_clean(machine.python or script_python())
    _require_bubblewrap(machine)
    limits = Limits(
        cpu_seconds=8 * agent.time_limit_s,
        wall_seconds=agent.time_limit_s,
        memory_mb=memory_mb,
        file_mb=1024,
        processes=_AGENT_PROCESSES,
        open_files=_AGENT_FILES,
        disk_mb=2048,
        output_bytes=1 << 20,
    )
    for task in group.about.tasks():
        if group.is_done(task):
            continue
        view = load_view(group.about.suite, task.competition, machine.data_dir)
        validate = validate_elsewhere(view.id, group.about.suite, machine.data_dir)
        _say(f"{task.competition} seed {task.seed}: {agent.id} starts")
        with Bridge(validate, base_url, api_key) as bridge:
            ended = run_agent(
                agent,
                view,
                bridge,
                group.run_folder(task),
                limits=limits,
                python=machine.python,
                model=group.about.model,
                require_full_isolation=machine.require_full_isolation,
            )
        cost = {"wall_s": ended.wall_s, "cpu_s": ended.cpu_s, "tokens": ended.tokens}
        group.finish(
            task,
            {
                "status": ended.status,
                "exit_code": ended.exit_code,
                "cost": {key: round(value, 3) for key, value in cost.items()}
                | {"scripts": None, "calls": ended.calls},
            },
        )
        _say(f"{task.competition} seed {task.seed}: {ended.status} after {ended.wall_s:.0f} s")


def script_limits(settings: Settings, view: Competition) -> Limits:
    """The suite's limits for a script, unless the settings have their own; wall is thrice the CPU.

    Only the wall limit is wide: a busy machine throws no script out that keeps its CPU limit. A
    script on MLE-bench's data has all cores, and the wall limit counts.
    """
    cpu = settings.script_cpu_s or view.limits.cpu_seconds
    cpu += _START_CPU_S if settings.container else 0.0
    memory_mb = settings.script_memory_mb or view.limits.memory_mb
    wide = view.suite == LITE
    return Limits(
        cpu_seconds=cpu * (os.cpu_count() or 1) if wide else cpu,
        wall_seconds=max(30.0, cpu if wide else 3 * cpu),
        memory_mb=memory_mb,
        file_mb=memory_mb // 8 if wide else 64,
        disk_mb=memory_mb // 4 if wide else 512,
        processes=_AGENT_PROCESSES if settings.container else 32,
    )


def _search(
    group: Group,
    task: Task,
    view: Competition,
    solver: Solver,
    executor: Executor,
    settings: Settings,
    machine: Machine,
) -> None:
    started = time.monotonic()
    with _looks(view, settings, machine) as look:
        found = Search(
            view,
            solver,
            executor,
            settings,
            group.run_folder(task),
            seed=task.seed,
            look=look,
        ).go()
    nodes = found.nodes
    cost: dict[str, Any] = {
        "wall_s": round(time.monotonic() - started, 3),
        "cpu_s": round(sum(node.cpu_s for node in nodes), 3),
        "tokens": sum(node.tokens for node in nodes),
        "scripts": sum(node.scripts for node in nodes),
        "calls": None,
    }
    chosen = found.selected
    group.finish(
        task,
        {
            "status": "ok" if chosen is not None else "no valid script",
            "selected": chosen.id if chosen else None,
            "cv": chosen.cv if chosen else None,
            "nodes": len(nodes),
            "valid_nodes": sum(node.good for node in nodes),
            "ended_by": found.reason,
            "cost": cost,
        },
    )
    shown = f"cross-validation {chosen.cv:.5f}" if chosen and chosen.cv is not None else "nothing"
    _say(
        f"{task.competition} seed {task.seed}: {shown} of {len(nodes)} scripts in "
        f"{cost['wall_s']:.0f} s"
    )


@contextlib.contextmanager
def _looks(view: Competition, settings: Settings, machine: Machine) -> Iterator[Look | None]:
    """A shell with the public data for the model's own commands; opened when first used."""
    if not settings.looks:
        yield None
        return
    limits = Limits(cpu_seconds=_LOOK_S, wall_seconds=_LOOK_S, processes=_AGENT_PROCESSES)
    with contextlib.ExitStack() as stack:
        opened: list[Container] = []

        def look(command: str) -> str:
            if not opened:
                container = Container(
                    view.public_dir,
                    limits,
                    environment=_contract(view, settings),
                    gpu=settings.gpu,
                    python=machine.python,
                    require_full_isolation=machine.require_full_isolation,
                )
                opened.append(stack.enter_context(container))
            done = opened[0].run(command.replace("\0", ""))
            note = "" if done.status == "ok" else f"\n({done.status}, exit code {done.exit_code})"
            return f"{done.stdout}{done.stderr}{note}"

        yield look


def _require_bubblewrap(machine: Machine) -> None:
    if machine.sandbox != "bubblewrap":
        raise UserError(
            f"--sandbox {machine.sandbox}: containers need bubblewrap; "
            "or let scripts run in warm workers with --set container=false"
        )


def _contract(view: Competition, settings: Settings) -> dict[str, str]:
    return {
        "COMPETITION_ID": view.id,
        "TIME_LIMIT_SECS": f"{settings.time_limit_s:.0f}",
        "STEP_LIMIT": str(settings.steps),
    }


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
