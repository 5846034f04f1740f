"""The round as a LangGraph state machine, and running it to the next stop.

LangGraph gives the machine, durable waiting and resume; its SQLite checkpoint is only a cache of
what the event log says. On resume the log decides: where checkpoint and log disagree, or the
database is gone, a new thread starts at the phase that the log reduces to.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import sqlite3
import uuid
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any

from agent_tools.errors import InfraError
from selfevo import jobs
from selfevo.campaign import Campaign
from selfevo.nodes import (
    confirm,
    diagnose,
    drop,
    evaluate,
    gate,
    guard,
    keep,
    launch,
    observe,
    open_pr,
    propose,
    reflect,
    review,
    stop,
    wait,
)
from selfevo.state import GraphState
from selfevo.store import no_collection

with no_collection():  # a tenth of the time that LangGraph takes to import
    from langchain_core.runnables import RunnableConfig, RunnableLambda
    from langgraph.checkpoint.sqlite import SqliteSaver
    from langgraph.graph import END, START, StateGraph
    from langgraph.types import Command, interrupt

Node = Callable[[Campaign], str]

NODES: dict[str, Node] = {
    "observe": observe.run,
    "diagnose": diagnose.run,
    "propose": propose.run,
    "guard": guard.run,
    "open_pr": open_pr.run,
    "review": review.run,
    "launch": launch.run,
    "wait": wait.run,
    "evaluate": evaluate.run,
    "gate": gate.run,
    "keep": keep.run,
    "confirm": confirm.run,
    "drop": drop.run,
    "reflect": reflect.run,
    "stop": stop.run,
}

#: Allowed next steps; `end` leaves the graph.
EDGES: dict[str, tuple[str, ...]] = {
    "observe": ("diagnose",),
    "diagnose": ("propose", "reflect"),
    "propose": ("guard", "diagnose"),
    "guard": ("open_pr", "diagnose"),
    "open_pr": ("review",),
    "review": ("launch", "drop", "diagnose"),
    "launch": ("wait", "drop"),
    "wait": ("evaluate",),
    "evaluate": ("gate", "stop"),
    "gate": ("keep", "drop"),
    "keep": ("confirm", "reflect"),
    "confirm": ("reflect",),
    "drop": ("reflect",),
    "reflect": ("stop",),
    "stop": ("observe", "end"),
}
KEPT_CHECKPOINTS = 4
PROBE_WAIT_S = 2  # for a lock on the checkpoint database when a session starts
LOCK_WAIT_S = 30  # and later, while it runs
STEPS_A_ROUND = 40  # bound of node visits a round, strikes and revisions included


def build(c: Campaign, before_round: Node | None = None) -> StateGraph[GraphState]:
    """The graph over an open campaign; it enters at the phase that the state names."""
    builder: StateGraph[GraphState] = StateGraph(GraphState)
    for name, node in NODES.items():
        first = before_round if name == "observe" else None
        builder.add_node(name, RunnableLambda(_step(c, name, node, first), name=name))
        targets: dict[Hashable, str] = {t: (END if t == "end" else t) for t in EDGES[name]}
        builder.add_conditional_edges(name, _phase, targets)
    builder.add_conditional_edges(START, _phase, {name: name for name in NODES})
    return builder


def _phase(state: GraphState) -> str:
    return state["phase"]


def _step(
    c: Campaign, name: str, node: Node, first: Node | None
) -> Callable[[GraphState], GraphState]:
    def step(state: GraphState) -> GraphState:
        if first is not None:
            first(c)
        following = node(c)
        if following == review.WAIT:
            pr = c.view.now.pr
            # the review node has done nothing but look; it runs again after the answer
            interrupt(
                {
                    "action": "review",
                    "pr": pr,
                    "accept": True,
                    "respond": True,
                    "edit": True,
                    "ignore": False,
                }
            )
            following = node(c)
            if following == review.WAIT:
                raise InfraError("resumed without an answer to the review; run `selfevo resume`")
        if following not in EDGES[name]:
            raise AssertionError(f"{name} may not be followed by {following}")
        c.emit("phase", {"from": name, "to": following, "seconds": c.lap()})
        return snapshot(c)

    return step


def snapshot(c: Campaign) -> GraphState:
    """The state that the log says now."""
    current = c.view.rounds.get(c.view.round)
    return {
        "campaign": c.name,
        "round": c.view.round,
        "phase": c.view.phase,
        "seq": c.view.head,
        "pr": (current.pr or 0) if current else 0,
        "verdict": current.verdict if current else "",
    }


def run(c: Campaign, command: str, startup_s: float = 0.0) -> str:
    """Run or resume until the campaign ends or waits for a person: `done`, `budget` or `review`.

    The caller holds the lock. Whatever ends the process early, the log can be resumed.
    """
    if c.view.state == "done":
        return _reason(c)
    if c.view.pending_review() is not None and c.view.sessions:
        return "review"
    prepare(c)
    with _saver(c.folder / "checkpoints.sqlite") as saver:
        graph = build(c, lambda c: _trim(saver)).compile(checkpointer=saver)
        thread, entry = _entry(c, graph)
        c.emit(
            "session.start",
            {
                "thread": thread,
                "pid": os.getpid(),
                "host": socket.gethostname(),
                "command": command,
                "startup_s": round(startup_s, 3),
            },
        )
        c.lap()
        jobs.resubmit(c)
        config: RunnableConfig = {
            "configurable": {"thread_id": thread},
            "recursion_limit": STEPS_A_ROUND * (c.view.rounds_planned + 1),
        }
        reason = "error"
        try:
            result = graph.invoke(entry, config, durability="sync")
            reason = "review" if "__interrupt__" in result else _reason(c)
        except (KeyboardInterrupt, SystemExit):
            reason = "interrupted"
            raise
        finally:
            c.emit("session.end", {"reason": reason, "seconds": c.lap()})
    return reason


def _reason(c: Campaign) -> str:
    return "budget" if c.view.stop_reason == "budget" else "done"


def _entry(c: Campaign, graph: Any) -> tuple[str, Any]:
    """(thread, input): go on with the checkpoint where it agrees with the log, else afresh."""
    thread = c.view.thread
    if thread:
        state = graph.get_state({"configurable": {"thread_id": thread}})
        agrees = (
            state.next == (c.view.phase,)
            and state.values.get("round") == c.view.round
            and state.values.get("phase") == c.view.phase
        )
        if agrees:
            pending = any(task.interrupts for task in state.tasks)
            return thread, (Command(resume="answered") if pending else None)
    return f"{c.name}-{uuid.uuid4().hex[:8]}", snapshot(c)


@contextlib.contextmanager
def _saver(path: Path) -> Iterator[SqliteSaver]:
    """The checkpoint database. It is only a cache: one that is damaged or locked is set aside."""
    if not _usable(path):
        for name in (path, Path(f"{path}-wal"), Path(f"{path}-shm")):
            if name.exists():
                name.replace(name.with_name(name.name.replace(".sqlite", ".damaged")))
    try:
        with SqliteSaver.from_conn_string(str(path)) as saver:
            saver.setup()
            saver.conn.execute("pragma synchronous = normal")  # a cache: no fsync a step
            saver.conn.execute(f"pragma busy_timeout = {LOCK_WAIT_S * 1000}")
            yield saver
    except sqlite3.OperationalError as error:
        hint = "close what holds it" if "locked" in str(error) else "free some space"
        raise InfraError(f"cannot write {path}: {error}; {hint}, then `selfevo resume`") from error


def _usable(path: Path) -> bool:
    """Whether SQLite can read and lock the database, or there is none."""
    try:
        probe = sqlite3.connect(path, timeout=PROBE_WAIT_S)
        try:
            probe.execute("pragma schema_version").fetchone()
            probe.execute("begin immediate")
            probe.rollback()
        finally:
            probe.close()
    except sqlite3.DatabaseError as error:
        return "disk is full" in str(error)  # nothing wrong with the file
    return True


def _trim(saver: SqliteSaver) -> str:
    """Drop all but the newest checkpoints; the saver would keep one a step for ever."""
    with saver.cursor() as cursor:
        for table in ("writes", "checkpoints"):
            cursor.execute(
                f"delete from {table} where checkpoint_id not in (select checkpoint_id from "
                "checkpoints order by checkpoint_id desc limit ?)",
                (KEPT_CHECKPOINTS,),
            )
    return ""


def prepare(c: Campaign) -> None:
    """Bring git to where the log says: the incumbent branch exists, leftovers of a kill are gone.

    Worktrees hold nothing that is not in commits or made again, except while a person may be
    working in one (a review waits).
    """
    if not c.repo.branch_exists(c.incumbent_branch):
        c.repo.create_branch(c.incumbent_branch, c.view.incumbent_head)
    refs = c.lab / ".git" / "refs" / "heads" / "selfevo" / c.name
    for lock in refs.glob("**/*.lock"):
        lock.unlink()
    keep = c.view.phase == "review"
    trees = c.folder / "worktrees"
    for path in c.repo.worktrees():
        if path.parent == trees and not (keep and path != c.incumbent_tree):
            c.repo.worktree_remove(path)
            shutil.rmtree(path, ignore_errors=True)
    for path in trees.iterdir() if trees.is_dir() else ():
        if not (keep and path != c.incumbent_tree):
            shutil.rmtree(path, ignore_errors=True)
