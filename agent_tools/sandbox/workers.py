"""The owner's side of one worker: starts it, asks it, replaces it."""

from __future__ import annotations

import contextlib
import os
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict
from typing import Any, TypeVar, get_args

from agent_tools.errors import InfraError
from agent_tools.sandbox.cgroups import Cgroup, make_cgroup
from agent_tools.sandbox.inputs import KEPT_FOLDERS, InputFolder
from agent_tools.sandbox.instance import Instance, Sandbox
from agent_tools.sandbox.link import WorkerGoneError
from agent_tools.sandbox.types import Limits, Purpose, ScriptJob, ScriptResult, Status

Started = TypeVar("Started")

START_S = 180.0
# After the wall limit a worker must have killed, cleaned and answered; else it is replaced.
ANSWER_GRACE_S = 5.0
# What a cold worker may take to import what its script needs.
_IMPORT_S = 60.0
_MEMORY_SLACK = 64 << 20
_PACKAGES = 256 << 20  # what a cold worker loads before its script counts
_TASK_SLACK = 4  # the worker and those of a room that are nobody's script
_CPU_SLACK_S = 0.3
_NOT_SHOWN = {n: None for n in (*range(32), *range(127, 160)) if chr(n) not in "\n\t"}
_ANSWER = {
    "status": str, "exit_code": int | None, "stdout": str, "stderr": str,
    "cpu_s": int | float, "wall_s": int | float,
}  # fmt: skip


class Worker:
    """One place in a pool: at most one instance at a time, replaced when it fails."""

    def __init__(self, sandbox: Sandbox, slot: int) -> None:
        self._sandbox = sandbox
        self._slot = slot
        self._aborted = False
        self._instance: Instance | None = None
        self._rooms = False
        self._base_memory = 0
        self._known: OrderedDict[str, None] = OrderedDict()
        self.missing: tuple[str, ...] = ()

    def start(self, limits: Limits) -> None:
        """Start the worker and wait until it is ready. Raises InfraError."""
        self._known.clear()
        instance, ready = start_instance(self._sandbox, self._slot, limits)
        if instance.cgroup is not None:
            self._base_memory = instance.cgroup.memory_bytes()
            self._base_memory += _PACKAGES if self._sandbox.once else 0
        self._instance = instance
        self._rooms = bool(ready["rooms"])
        self.missing = tuple(ready["missing"])

    def abort(self) -> None:
        """End the running script, from another thread; the worker ends with it."""
        self._aborted = True
        instance = self._instance
        if instance is not None:
            instance.link.abort()

    def stop(self) -> None:
        """End the worker."""
        if self._instance is not None:
            self._instance.stop()
            self._instance = None

    def run(self, job: ScriptJob, folder: InputFolder, fd: int) -> ScriptResult:
        """Run a job; a worker that died or could not start it is replaced, and the job tried once
        more."""
        died = ""
        for attempt in range(2):
            if self._instance is None:
                try:
                    self.start(job.limits)
                except InfraError as error:
                    return _failed("infra", str(error))
            assert self._instance is not None
            if self._aborted:
                self.stop()
                return _failed("killed", "the sandbox pool was closed")
            try:
                result = self._ask(self._instance, job, folder, fd)
                if self._sandbox.once or result.status == "infra":
                    self.stop()
                if result.status != "infra" or attempt:
                    return result
            except TimeoutError:
                self.stop()
                return _failed("timeout", "the sandbox stopped a script past its wall limit")
            except WorkerGoneError:
                died = self._instance.log_text()
                self.stop()
                if self._aborted:
                    return _failed("killed", "the sandbox pool was closed")
        last = died.splitlines()[-1] if died else "no message"
        return _failed("killed", f"the sandbox worker died twice under this script ({last})")

    def _ask(
        self, instance: Instance, job: ScriptJob, folder: InputFolder, fd: int
    ) -> ScriptResult:
        apart = self._rooms and instance.cgroup is not None
        own = make_cgroup(self._slot, self._sandbox.hierarchies) if apart else None
        if apart and own is None:
            return _failed("infra", "the host gave a control group to the worker, none to a script")
        group = own or instance.cgroup
        groups: list[int] = []
        try:
            before = self._limit(group, job.limits, 0 if own is not None else self._base_memory)
            groups = own.open_procs() if own is not None else []
            new, request = self._request(job, folder)
            instance.link.send(request, [*([fd] if new else []), *groups])
            patience = job.limits.wall + ANSWER_GRACE_S + (_IMPORT_S if self._sandbox.once else 0)
            answer, outputs = instance.link.receive(patience, job.limits.file_mb << 20)
            return _result(job, answer, outputs, group, before)
        finally:
            for opened in groups:
                os.close(opened)
            if own is not None:
                own.remove()

    def _limit(
        self, group: Cgroup | None, limits: Limits, base_memory: int
    ) -> tuple[int, float | None]:
        """Set a group's limits; its counts of kills and CPU-seconds so far."""
        if group is None:
            return 0, None
        # Lowering below what a big tmpfs still holds is refused; the rlimits hold meanwhile.
        with contextlib.suppress(OSError):
            group.set_limits(
                memory_bytes=base_memory + (limits.memory_mb << 20) + _MEMORY_SLACK,
                tasks=limits.processes + _TASK_SLACK,
            )
        return group.oom_kills(), group.cpu_s()

    def _request(self, job: ScriptJob, folder: InputFolder) -> tuple[bool, dict[str, Any]]:
        new = folder.key not in self._known
        self._known[folder.key] = None
        self._known.move_to_end(folder.key)
        forget = []
        while len(self._known) > KEPT_FOLDERS:
            forget.append(self._known.popitem(last=False)[0])
        return new, {
            "key": folder.key,
            "new": new,
            "forget": forget,
            "folders": folder.folders,
            "files": folder.files,
            "code": job.code,
            "outputs": job.outputs,
            "limits": wire_limits(job.limits),
        }


def start_instance(
    sandbox: Sandbox, slot: int, limits: Limits, purpose: Purpose = "scripts"
) -> tuple[Instance, dict[str, Any]]:
    """Start a worker and read its first message. Raises InfraError with the repair."""
    instance = sandbox.start(slot, limits, purpose)
    try:
        ready, _ = instance.link.receive(START_S, 0)
        if not ready.get("ready"):
            raise InfraError(f"sandbox worker {slot} spoke out of turn: {ready}")
    except (WorkerGoneError, TimeoutError) as error:
        instance.gone(2.0)
        log = instance.log_text()
        instance.stop()
        raise InfraError(sandbox.explain(log)) from error
    return instance, ready


def report_start(ready: Future[Started], start: Callable[[], Started]) -> bool:
    """Call `start` in this thread and tell its result, or what went wrong; True if it worked."""
    try:
        ready.set_result(start())
    except (InfraError, OSError) as error:
        ready.set_exception(
            error if isinstance(error, InfraError) else InfraError(f"sandbox: {error}")
        )
        return False
    finally:
        ready.cancel()  # no effect but after an error that nobody foresaw
    return True


def wire_limits(limits: Limits) -> dict[str, Any]:
    """The limits as a worker reads them."""
    return {**asdict(limits), "wall_seconds": limits.wall}


def checked_status(answer: dict[str, Any]) -> Status:
    """The status of an answer. Raises WorkerGoneError for one that is not made as agreed."""
    for name, kind in _ANSWER.items():
        if not isinstance(answer.get(name), kind):
            raise WorkerGoneError
    for status in get_args(Status):
        if answer["status"] == status:
            return status  # type: ignore[no-any-return]
    raise WorkerGoneError


def shown(text: str) -> str:
    """Text of a program without control characters."""
    return text.translate(_NOT_SHOWN)


def _failed(status: Status, reason: str) -> ScriptResult:
    return ScriptResult(status, None, "", reason + "\n", {}, 0.0, 0.0)


def _result(
    job: ScriptJob, answer: dict[str, Any], outputs: list[bytes], group: Cgroup | None,
    before: tuple[int, float | None],
) -> ScriptResult:  # fmt: skip
    """What a worker says, against what the group counted. Raises WorkerGoneError for nonsense."""
    status = checked_status(answer)
    if status == "ok" and len(outputs) != len(job.outputs):
        raise WorkerGoneError
    files = dict(zip(job.outputs, outputs, strict=True)) if status == "ok" else {}
    oom_before, cpu_before = before
    if group is not None and status in ("killed", "error", "ok"):
        cpu_after = group.cpu_s()
        if status != "ok" and group.oom_kills() > oom_before:
            status = "memory"
        elif cpu_before is not None and cpu_after is not None:
            # Children whose parent ignores them vanish from the worker's count, not from here.
            extra = job.limits.cpu_seconds * 0.1 + _CPU_SLACK_S
            if cpu_after - cpu_before > job.limits.cpu_seconds + extra:
                status, files = "timeout", {}
    return ScriptResult(
        status=status,
        exit_code=answer["exit_code"],
        stdout=shown(answer["stdout"]),
        stderr=shown(answer["stderr"]),
        files=files,
        cpu_s=answer["cpu_s"],
        wall_s=answer["wall_s"],
    )
