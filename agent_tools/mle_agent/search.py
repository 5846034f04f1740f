"""One search: draft, debug and improve scripts, remember, criticise, select by cross-validation.

It sees a competition only through `folds.public_view`. No test score exists while it runs: the
submissions of all candidates are kept and graded later, by another process (`judge.py`).
"""

from __future__ import annotations

import random
import re
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from agent_tools.errors import InfraError
from agent_tools.mle_agent import memory
from agent_tools.mle_agent.executor import SUBMISSION, Executor, Run
from agent_tools.mle_agent.folds import check_form, make_folds
from agent_tools.mle_agent.journal import Journal, Move, Node, Reply, best_of, next_move
from agent_tools.mle_agent.settings import Settings
from agent_tools.mle_agent.solver import Ask, Look, Solver
from agent_tools.mle_bench.grading import score
from agent_tools.mle_bench.policy_text import one_line
from agent_tools.mle_bench.registry import Competition
from agent_tools.sandbox import ScriptResult

_REPORTED = re.compile(
    r"^\s*cross-validation score:\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*$", re.MULTILINE
)


class Clock(Protocol):
    """Seconds that only grow; tests put their own here."""

    def __call__(self) -> float: ...


@dataclass(frozen=True)
class Found:
    """What a search ended with; `selected` None where no script was valid."""

    selected: Node | None
    nodes: tuple[Node, ...]
    reason: str


@dataclass
class _Judged:
    """A script on its way through the folds."""

    reply: Reply
    status: str = "ok"
    error: str = ""
    folds: tuple[float, ...] = ()
    printed: float | None = None
    submission: bytes | None = None
    cpu_s: float = 0.0
    wall_s: float = 0.0
    scripts: int = 0
    log: str = ""

    def took(self, result: ScriptResult) -> None:
        self.cpu_s += result.cpu_s
        self.wall_s += result.wall_s
        self.scripts += 1

    def fail(self, status: str, error: str) -> None:
        self.status, self.error = status, one_line(error) or status


class Search:
    """A search in a run folder; `go` starts it, or takes up one that was killed."""

    def __init__(
        self,
        view: Competition,
        solver: Solver,
        executor: Executor,
        settings: Settings,
        folder: Path,
        *,
        seed: int,
        look: Look | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        """view: from `folds.public_view`."""
        self._view = view
        self._solver = solver
        self._executor = executor
        self._settings = settings
        self._folder = folder
        self._seed = seed
        self._look = look
        self._clock = clock
        self._lower = view.lower_is_better
        for name in ("submission", "code", "logs", "candidates"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        self._journal = Journal(folder / "logs" / "journal.jsonl", self._lower)
        self._started = clock()
        self._before_s = self._journal.spent_s

    def go(self) -> Found:
        """Run to the end of the budget. Raises InfraError where model or sandbox are down."""
        if self._journal.ended is None:
            self._folds = (
                make_folds(self._view, self._settings.folds, self._seed, self._folder / "folds")
                if self._settings.folds
                else []
            )
            reason = "steps"
            while len(self._journal.nodes) < self._settings.steps:
                if self._spent() >= self._settings.time_limit_s:
                    reason = "time"
                    break
                self._step()
            self._finish(reason)
        nodes = tuple(self._nodes())
        ended = self._journal.ended
        assert ended is not None
        chosen = ended["selected"]
        return Found(
            self._journal.nodes[chosen] if chosen is not None else None, nodes, ended["reason"]
        )

    def _step(self) -> None:
        """One or, where they do not depend on each other, several scripts; then their criticism."""
        if self._criticise():  # a kill came between judgement and criticism
            return
        moves = self._moves()
        with ThreadPoolExecutor(max_workers=len(moves)) as threads:
            replies = list(threads.map(lambda item: self._reply(*item), moves))
        judged = self._judge(replies)
        for one in judged:
            self._write_files(one)
        self._journal.keep_nodes([self._node(one) for one in judged])
        self._criticise()
        memory.write(self._folder / "logs" / "memory.md", self._nodes(), self._lower)
        self._journal.clock(self._spent())

    def _criticise(self) -> bool:
        """Let the model criticise the nodes that it has not; whether there were any."""
        waiting = [n for n in self._nodes() if n.id not in self._journal.criticised]
        if not self._settings.feedback or not waiting:
            return False
        for node in waiting:
            text, tokens = self._solver.reflect(
                self._ask(Move(node.stage, node.parent), node.id), node
            )
            self._journal.keep_feedback(node.id, text, tokens)
        return True

    def _moves(self) -> list[tuple[int, Move]]:
        """Up to `width` moves; more than one only while there is nothing to learn from, drafts."""
        nodes = self._nodes()
        pending = self._journal.replies
        if pending:  # a kill came between reply and judgement
            return [(id_, _move(reply)) for id_, reply in sorted(pending.items())]
        first = len(nodes)
        room = min(self._settings.width, self._settings.steps - first)
        drafts = sum(node.stage == "draft" for node in nodes)
        missing = self._settings.drafts - drafts
        if missing > 0:
            return [(first + n, Move("draft")) for n in range(min(room, missing))]
        rng = random.Random(f"{self._seed}/{first}")
        return [
            (first + n, next_move(nodes, self._settings, self._lower, rng)) for n in range(room)
        ]

    def _reply(self, id_: int, move: Move) -> Reply:
        """The model's reply for a node, from the journal where it is there already."""
        known = self._journal.replies.get(id_)
        if known is not None:
            return known
        proposal = self._solver.propose(self._ask(move, id_))
        return Reply(
            id=id_,
            stage=move.stage,
            parent=move.parent,
            text=proposal.text,
            plan=proposal.plan,
            code=proposal.code,
            tokens=proposal.tokens,
        )

    def _ask(self, move: Move, id_: int) -> Ask:
        parent = self._journal.nodes[move.parent] if move.parent is not None else None
        output = ""
        if parent is not None:
            log = self._folder / "logs" / f"node-{parent.id}.txt"
            output = log.read_text(encoding="utf-8") if log.is_file() else parent.error
        return Ask(
            stage=move.stage,
            view=self._view,
            settings=self._settings,
            parent=parent,
            output=output,
            memory=memory.for_prompt(self._nodes(), self._lower, self._settings.memory_chars),
            seed=random.Random(f"{self._seed}/{self._view.id}/{id_}").getrandbits(31),
            look=self._look,
        )

    def _judge(self, replies: Sequence[Reply]) -> list[_Judged]:
        """Run the scripts: first fold, other folds of the finalists, then the test set."""
        fresh = [reply for reply in replies if reply.id not in self._journal.replies]
        if fresh:
            self._journal.keep_replies(fresh)
        seen = {node.code for node in self._nodes()}
        judged = []
        for reply in replies:
            one = _Judged(reply)
            if not reply.code.strip():
                one.fail("error", "the reply holds no script")
            elif reply.code in seen:
                one.fail("repeat", "the same script as in an earlier step")
            seen.add(reply.code)
            judged.append(one)
        alive = [one for one in judged if one.status == "ok"]
        if self._folds:
            self._score_fold(alive, 0)
            alive = self._finalists([one for one in alive if one.status == "ok"])
            for number in range(1, len(self._folds)):
                self._score_fold(alive, number)
                alive = [one for one in alive if one.status == "ok"]
        self._test(alive)
        return judged

    def _finalists(self, alive: list[_Judged]) -> list[_Judged]:
        if not self._settings.finalists or len(alive) <= self._settings.finalists:
            return alive
        ranked = sorted(alive, key=lambda one: one.folds[0], reverse=not self._lower)
        return ranked[: self._settings.finalists]

    def _score_fold(self, batch: Sequence[_Judged], number: int) -> None:
        fold = self._folds[number]
        for one, result in self._run(batch, fold.public_dir, f"fold {number}"):
            if one.status != "ok":
                continue
            value, error = score(fold, result.files[SUBMISSION])
            if value is None:
                one.fail("invalid", error or "invalid submission")
            else:
                one.folds = (*one.folds, value)

    def _test(self, batch: Sequence[_Judged]) -> None:
        for one, result in self._run(batch, self._view.public_dir, "test"):
            if one.status != "ok":
                continue
            data = result.files[SUBMISSION]
            problem = check_form(self._view.public_dir, data)
            if problem is not None:
                one.fail("invalid", f"submission.csv {problem}")
                continue
            one.submission = data
            if not self._folds:
                printed = _REPORTED.findall(result.stdout)
                if printed:
                    one.printed = float(printed[-1])
                else:
                    one.fail("invalid", "the script printed no line `cross-validation score: X`")

    def _run(
        self, batch: Sequence[_Judged], public: Path, what: str
    ) -> list[tuple[_Judged, ScriptResult]]:
        results = self._executor.run([Run(one.reply.code, public) for one in batch])
        for one, result in zip(batch, results, strict=True):
            if result.status == "infra":
                raise InfraError(
                    f"the sandbox failed ({one_line(result.stderr) or 'no message'}): give the "
                    "same command again, it goes on where it stopped"
                )
            one.took(result)
            one.log += f"== {what}: {result.status}\n{result.stdout}\n{result.stderr}\n"
            if result.status != "ok":
                one.fail(result.status, _fault(result))
        return list(zip(batch, results, strict=True))

    def _node(self, one: _Judged) -> Node:
        reply = one.reply
        cv = None
        if one.status == "ok":
            cv = sum(one.folds) / len(one.folds) if one.folds else one.printed
        return Node(
            id=reply.id,
            stage=reply.stage,
            parent=reply.parent,
            plan=reply.plan,
            code=reply.code,
            status=one.status,
            error=one.error,
            cv=cv,
            folds=one.folds,
            submission=one.submission is not None,
            cpu_s=round(one.cpu_s, 4),
            wall_s=round(one.wall_s, 4),
            scripts=one.scripts,
            tokens=reply.tokens,
        )

    def _write_files(self, one: _Judged) -> None:
        """Files come first, then the journal's line that says so."""
        name = f"node-{one.reply.id}"
        _write(self._folder / "code" / f"{name}.py", one.reply.code)
        _write(self._folder / "logs" / f"{name}.txt", one.log)
        if one.submission is not None:
            (self._folder / "candidates" / f"{one.reply.id}.csv").write_bytes(one.submission)

    def _finish(self, reason: str) -> None:
        """Select, copy the selected submission to where it is graded, write the end."""
        best = best_of((n for n in self._nodes() if n.submission), self._lower)
        target = self._folder / "submission" / SUBMISSION
        target.unlink(missing_ok=True)
        if best is not None:
            shutil.copyfile(self._folder / "candidates" / f"{best.id}.csv", target)
            _write(self._folder / "code" / "solution.py", best.code)
        shutil.rmtree(self._folder / "folds", ignore_errors=True)
        self._journal.clock(self._spent())
        self._journal.end(best.id if best is not None else None, reason)

    def _nodes(self) -> list[Node]:
        return [self._journal.nodes[id_] for id_ in sorted(self._journal.nodes)]

    def _spent(self) -> float:
        return self._before_s + self._clock() - self._started


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", errors="replace")


def _move(reply: Reply) -> Move:
    return Move(reply.stage, reply.parent)


def _fault(result: ScriptResult) -> str:
    if result.status == "timeout":
        return f"time limit reached after {result.cpu_s:.1f} CPU seconds"
    if result.status == "memory":
        return "memory limit reached"
    return one_line(result.stderr) or f"script ended as {result.status}"
