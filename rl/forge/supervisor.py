"""The supervisor of an asynchronous run: owns the window, the run directory and all processes.

    admit → run members → finish groups → take P of them → step → new weights → release P → row
            └────────── goes on all the while ──────────┘

It holds nothing that a restart could not find: the checkpoint has the frontier, the pool has the
finished members. One thread; every wait has a limit. No torch here.
"""

from __future__ import annotations

import json
import secrets
import select
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rl.config import RunConfig
from rl.errors import (
    CheckpointStateError,
    ConfigError,
    DivergedError,
    InfraError,
    InfraLimitError,
)
from rl.forge.child import AliveLock, Child
from rl.forge.crew import Crew
from rl.forge.groups import Group, Groups
from rl.forge.messages import (
    Ended,
    Failed,
    Message,
    Pong,
    Push,
    Pushed,
    Ready,
    Retire,
    Step,
    Stepped,
)
from rl.forge.places import GroupLog, Places, group_line
from rl.forge.records import Verdict, judge
from rl.forge.resume import Start, known_of
from rl.forge.scorer_client import SCORER
from rl.forge.servers import CONTROL_KEY, EngineControl, Server, engine_command, gateway_command
from rl.pool import Pool
from rl.run_dir import RunDir, write_atomic
from rl.step_metrics import window_metrics
from rl.window import Window, window_size

TICK_S = 0.2
BUSY_TICK_S = 0.05
FAILED_LIMIT = 4
"""Groups in which every member failed, in groups a step, that one step may meet."""

Row = dict[str, Any]


class Supervisor:
    """Processes and state of one session. `on_row` is called with every new row."""

    def __init__(
        self,
        config: RunConfig,
        folder: RunDir,
        source: Path,
        start: Start,
        *,
        on_row: Callable[[Row], None],
        check: Callable[[], None],
    ) -> None:
        self.config, self.folder, self.source, self.check = config, folder, source, check
        self.places = Places(folder.path)
        self.done, self.version, self.weights = start.step, start.version, start.weights
        self.finished = False
        self.device = ""
        self._on_row = on_row
        forge, groups = config.forge, config.groups_per_step
        self.places.forge.mkdir(exist_ok=True)
        self._alive = AliveLock(self.places.forge / "alive.lock")
        self.pool = Pool(self.places.pool_of(config))
        slots = (forge.steps_ahead + 1) * groups
        size = window_size(forge.order, slots, forge.window_share)
        self.window: Window[Group] = Window(slots, size, start.frontier)
        known = known_of(self.pool, start.version, start.frontier)
        total = config.budget.steps * groups
        self.groups = Groups(self.window, config.rollout.group_size, total, forge.attempts, known)
        self.log = GroupLog(self.places.groups)
        self._batch: list[Group] = []
        self._dropped: list[Group] = []
        self._flat = self._failed = 0
        self._sent: Step | None = None
        self._unsaved: list[Step] = []  # since the last checkpoint, to be done again if need be
        self._pushing = False
        self._waiting_since = time.monotonic()
        self._sync_s = 0.0
        self._push_started, self._held = 0.0, 0
        self._scored = (0, 0)  # jobs of the scorer, and how many were equal to earlier ones
        self._make_children()

    def _make_children(self) -> None:
        forge = self.config.forge
        key = {CONTROL_KEY: secrets.token_hex(16)}  # of this session: workers open episodes
        scorer = {SCORER: f"selfevo-{secrets.token_hex(8)}/{secrets.token_hex(16)}"}
        self._engine_version = self.version
        self.engine = self._server("engine", "/health", {})
        self.gateway = self._server("gateway", "/healthz", key)
        self.trainer = self._piped("trainer", {})
        self.scorer = self._piped("scorer", scorer)  # started when a worker says what it is for
        self.workers = [self._piped(f"worker-{n}", key | scorer) for n in range(forge.workers)]
        self.children: list[Child] = [self.engine, self.gateway, self.trainer, *self.workers]
        servers = (self.engine, self.gateway)
        self.crew = Crew(self.config, self.groups, self.pool, self.workers, servers, self.scorer)
        self._engine_control = EngineControl(forge.sync_timeout_s)

    def _server(self, name: str, health: str, environment: dict[str, str]) -> Server:
        return Server(
            name,
            self.places.forge,
            [],
            self._alive,
            health=health,
            start_timeout_s=self.config.forge.start_timeout_s,
            restarts=self.config.forge.restarts,
            environment=environment,
        )

    def _piped(self, name: str, environment: dict[str, str]) -> Child:
        module = f"rl.forge.{name.partition('-')[0]}"
        command = [sys.executable, "-m", module, str(self.folder.path)]
        return Child(
            name,
            self.places.forge,
            lambda: command,
            self._alive,
            piped=True,
            restarts=self.config.forge.restarts,
            environment=environment,
        )

    # ---------------------------------------------------------- the loop

    def run(self) -> None:
        """All remaining steps. Whatever ends it, no child is left. Raises InfraError, ConfigError,
        DivergedError, and what `check` raises."""
        try:
            while not self.finished:
                self.check()
                now = time.monotonic()
                self._start(now)
                self._probe(now)
                self._listen()
                self._reap(time.monotonic())
                self._expire(time.monotonic())
                if self.crew.tasks.ids:
                    self.groups.admit()
                    self.crew.dispatch()
                    self._collect()
        finally:
            self.close()

    def close(self) -> None:
        """End every child."""
        for child in self.children:
            child.kill() if child not in (self.engine, self.scorer) else None
        for child in self.children:
            child.stop()
        self._note_pids()
        self.pool.close()
        self._alive.close()

    def _start(self, now: float) -> None:
        """What is due. The gateway has to know the engine's port, so it comes second."""
        started = False
        for child in self.children:
            if child is self.engine and child.pid is None:
                self._engine_version = self.version
                self.engine.arguments = engine_command(self.config, self.weights, self.version)
            elif child is self.gateway and child.pid is None:
                pool = self.places.pool_of(self.config)
                self.gateway.arguments = gateway_command(
                    self.config, self.engine.url, self.source, pool
                )
            started |= child.start_if_due(now)
        if started:
            self._note_pids()

    def _probe(self, now: float) -> None:
        if not self.engine.ready and self.engine.probe(now):
            self.engine.up()
            if self._engine_version != self.version:  # newer ones came while it started
                self._load()
        if not self.gateway.ready and self.gateway.probe(now):
            self.gateway.up()
        for child in (self.trainer, self.scorer, *self.workers):
            late = now - child.since > self.config.forge.start_timeout_s
            if not child.ready and child.pid is not None and late:
                child.kill()

    def _listen(self) -> None:
        """Wait for messages, but not long; deal with them."""
        starting = not all(child.ready for child in self.children)
        for child in self.children:
            child.flush()
        waiting = [fd for child in self.children if (fd := child.readable) is not None]
        select.select(waiting, [], [], BUSY_TICK_S if starting else TICK_S)
        for child in self.children:
            for message in child.messages():
                self._handle(child, message)

    def _reap(self, now: float) -> None:
        for child in self.children:
            code = child.ended()
            if code is None:
                continue
            for message in child.messages():  # what it said before its end
                self._handle(child, message)
            fault = child not in self.workers or self.crew.buried(child, code)
            port = child.port if isinstance(child, Server) else 0
            outdated = child is self.engine and self._engine_version != self.version
            if isinstance(child, Server) and child.refused(code, outdated=outdated):
                raise ConfigError(f"{child.name}: {child.tail()} (see {child.log})")
            child.bury(now, fault=fault)
            if child is self.engine and port and not self.engine.port and self.gateway.pid:
                self.gateway.kill()  # it asks at a port that the engine cannot have again
            self._note_pids()

    def _expire(self, now: float) -> None:
        """Kill what takes too long: a worker's attempt, a trainer's step."""
        self.crew.expire(now)
        self.scorer.check_pulse(now)
        if self._sent and now - self._waiting_since > self.config.forge.step_timeout_s:
            print(f"step {self._sent.step} takes too long; the trainer is started again")
            self._waiting_since = now
            self.trainer.kill()

    # ---------------------------------------------------------- messages

    def _handle(self, child: Child, message: Message) -> None:
        if isinstance(message, Failed):
            self._fail(child, message)
        elif isinstance(message, Ready) and child is self.trainer:
            self._trainer_ready(message)
        elif isinstance(message, Ready) and child is self.scorer:
            child.up()
        elif isinstance(message, Ready):
            self.crew.ready(child, message)
            if self.crew.scripts and self.scorer not in self.children:
                self.children = [*self.children, self.scorer]
        elif isinstance(message, Pong):
            child.alive_by(message)
            self._scored = (message.jobs, message.hits)
        elif isinstance(message, Ended):
            self.crew.ended(message)
        elif isinstance(message, Retire):
            self.crew.retire(child, message)
        elif isinstance(message, Stepped):
            self._stepped(message)
        elif isinstance(message, Pushed):
            self._pushed(message)

    def _fail(self, child: Child, failed: Failed) -> None:
        if failed.row is not None:
            self._on_row(failed.row)
        kinds: dict[int, type[Exception]] = {5: InfraError, 6: DivergedError}
        kind = kinds.get(failed.code, ConfigError)
        raise kind(f"{child.name}: {failed.message}" if failed.code == 5 else failed.message)

    # ---------------------------------------------------------- groups and steps

    def _collect(self) -> None:
        """Take finished groups for the next step; send it when there are enough, or no more."""
        if self.finished or self._sent or self._pushing or not self.trainer.ready:
            return
        size = self.config.groups_per_step
        while len(self._batch) < size and (taken := self.window.take()) is not None:
            group = taken[1]
            verdict = judge(self.pool, group, self.crew.tasks, self.config)
            self._flat += verdict is Verdict.FLAT
            self._failed += verdict is Verdict.FAILED
            if verdict is Verdict.FLAT and not any(map(self.pool.next_index, group.episodes)):
                print(
                    f"group {group.index}: no attempt made a call; see what the agent prints",
                    file=sys.stderr,
                )
            drop = self.config.forge.zero_variance == "drop" and verdict is Verdict.FLAT
            if drop or verdict is Verdict.FAILED:
                self._dropped.append(group)
                self.window.release(1)
            else:
                self._batch.append(group)
            if self._failed > FAILED_LIMIT * size:
                raise InfraLimitError(
                    f"all members failed in {self._failed} groups of one step; the last one to "
                    f"die: {self.crew.last_death or 'none, see what the environment reports'}"
                )
        if len(self._batch) == size or self.groups.exhausted:
            self._send_step()

    def _send_step(self) -> None:
        now, step = time.monotonic(), self.done + 1
        taken = len(self._batch) + len(self._dropped)
        metrics = {
            "perf/wait_batch_s": now - self._waiting_since,
            "perf/sync_s": self._sync_s,
            "group/zero_std_frac": (self._flat + self._failed) / taken,
            "group/failed": float(self._failed),
            **window_metrics(self.window),
        }
        if self.crew.scripts:
            jobs, hits = self._scored
            metrics |= {"scorer/jobs": float(jobs), "scorer/hit_frac": hits / max(jobs, 1)}
        self._sent = Step(
            step=step,
            groups=tuple(group.episodes for group in self._batch),
            dropped=tuple(group.episodes for group in self._dropped),
            frontier=self.window.frontier().to_dict(),
            tasks=self.crew.tasks.ids,
            domains=self.crew.tasks.domains,
            last=self.groups.exhausted,
            metrics=metrics,
        )
        self._waiting_since = now
        self.trainer.send(self._sent)

    def _trainer_ready(self, ready: Ready) -> None:
        """It starts from a checkpoint: perhaps of the step that was sent, perhaps of an older."""
        self.device = ready.device
        self.trainer.up()
        sent, self._sent = self._sent, None
        behind = [*self._unsaved, *([sent] if sent else [])]
        if sent is not None and ready.step == sent.step:
            self._sent = sent
            assert ready.row is not None
            self._stepped(Stepped(ready.step, ready.version, ready.weights, ready.row, True))
            return
        expected = behind[0].step - 1 if behind else self.done
        if ready.step != expected:
            raise CheckpointStateError(
                f"the trainer goes on after step {ready.step}, not {expected}: the newest "
                "checkpoint was damaged; end the run and resume it"
            )
        if not behind and ready.step and Path(ready.weights) != self.weights:
            self.weights = Path(ready.weights)  # of the same version, but not rounded
            if self.engine.ready:
                self._load()
        self._sent = sent
        for step in behind:
            self.trainer.send(step)
        if self._pushing:
            self._start_push(self._held)

    def _stepped(self, stepped: Stepped) -> None:
        sent = self._sent
        if sent is None or stepped.step != sent.step:
            return  # done again after a restart
        self._sent = None
        self._unsaved = [] if stepped.saved else [*self._unsaved, sent]
        self.trainer.thrive()
        changed = stepped.version != self.version
        self.version, self.weights = stepped.version, Path(stepped.weights)
        self.done, self.finished = stepped.step, sent.last
        self.log.append(group_line(sent, stepped.version))
        self._batch, self._dropped = [], []
        self._flat = self._failed = 0
        held = len(sent.groups)
        self._on_row(stepped.row)
        if self.finished:
            return
        if changed and self.engine.ready:
            if self.config.forge.sync == "ipc":
                self._start_push(held)
                return
            self._load()
        self._released(held)

    def _released(self, held: int) -> None:
        """The weights are where samples come from: the step's slots are free."""
        self.window.release(held)
        self._waiting_since = time.monotonic()
        for child in self.children:
            child.thrive()

    # ---------------------------------------------------------- weights

    def _load(self) -> None:
        """The present weights into the engine; one that fails at it starts again with them."""
        try:
            self._sync_s = self._engine_control.load(self.engine.url, self.weights, self.version)
        except InfraError as error:
            print(f"weights {self.version}: {error}", file=sys.stderr)
            self.engine.kill()
            self.engine.ready = False

    def _start_push(self, held: int) -> None:
        self._pushing, self._push_started, self._held = True, time.monotonic(), held
        if self.trainer.ready:
            self.trainer.send(Push(self.engine.url, self.version, self.engine.starts))

    def _pushed(self, pushed: Pushed) -> None:
        if not self._pushing or pushed.version != self.version:
            return
        self._pushing = False
        self._sync_s = time.monotonic() - self._push_started
        if pushed.error:
            print(f"weights {self.version}: {pushed.error}", file=sys.stderr)
            self.engine.kill()
            self.engine.ready = False
        self._released(self._held)

    # ---------------------------------------------------------- small things

    def _note_pids(self) -> None:
        pids = {child.name: child.pid for child in self.children if child.pid is not None}
        write_atomic(self.places.forge / "pids.json", json.dumps(pids) + "\n")
