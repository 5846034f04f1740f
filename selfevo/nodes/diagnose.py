"""diagnose: one bounded tool loop in which the agent decides on an edit, or abstains."""

from __future__ import annotations

import json
import time
from typing import Any

from agent_tools.errors import InfraError, UserError
from selfevo import memory
from selfevo.agent_prompts import (
    DECISIONS,
    Message,
    agent_messages,
    agent_tools,
    program_text,
    schema_error,
    tool_message,
)
from selfevo.agents import (
    Call,
    Hint,
    Malformed,
    plain_message,
    random_decision,
    read_reply,
    rules_decision,
)
from selfevo.campaign import Campaign
from selfevo.config import NOTES
from selfevo.store import canonical
from selfevo.views import TurnView

MAX_STRIKES = 3
RESULT_CHARS = 2000
NOTES_CHARS = 1600


def run(c: Campaign) -> str:
    """Come to a decision; then propose, or end the round as no_proposal."""
    current = c.view.now
    if current.decision is None and current.verdict != "no_proposal":
        if c.config.agent.kind == "model":
            _model_loop(c)
        else:
            _baseline(c)
    if current.verdict == "no_proposal":
        return "reflect"
    assert current.decision is not None
    if current.decision["name"] == "abstain":
        end_round(c, f"abstained: {current.decision['arguments'].get('why', '')}")
        return "reflect"
    return "propose"


def end_round(c: Campaign, why: str) -> None:
    """The round ends without a proposal; a PR that waited for another commit is closed."""
    current = c.view.now
    if current.pr is not None:
        pr = c.view.prs[current.pr]
        if pr.state == "changes_requested":
            c.emit("pr.close", {"number": pr.number, "state": "closed"})
        c.repo.worktree_remove(c.pr_tree(pr.branch))
    c.emit("no_proposal", {"why": memory.clean(why, 300)})


def strike(c: Campaign, reason: str, answer: str, call_id: str = "") -> None:
    """One failed call: logged, and answered to the agent."""
    c.emit("agent.strike", {"reason": reason, "answer": answer, "call_id": call_id}, actor="agent")


# ------------------------------------------------------------------ rules and random


def _baseline(c: Campaign) -> None:
    current = c.view.now
    values = c.control_values()
    if current.strikes >= MAX_STRIKES:
        end_round(c, f"three failed calls, the last one: {current.strike_reasons[-1]}")
        return
    if c.config.agent.kind == "rules":
        hints = [
            Hint(f["name"], f["severity"], f["config_key"], f["direction"], f["evidence"])
            for record in current.digests.values()
            for f in record["findings"]
        ]
        tried = memory.tried(c.view)
        if current.pr is not None:
            proposal = c.view.prs[current.pr].proposal
            tried.append((proposal["key"], proposal["direction"]))
        if current.strikes:
            end_round(c, f"the edit was refused: {current.strike_reasons[-1]}")
            return
        name, arguments = rules_decision(hints, c.space, values, tried)
    else:
        revisions = 0 if current.pr is None else c.view.prs[current.pr].revisions
        seed = f"{c.campaign_seed}/{current.number}/{revisions}/{current.strikes}"
        name, arguments = random_decision(c.space, values, seed)
    c.emit(
        "tool.call",
        {"name": name, "arguments": arguments, "call_id": c.config.agent.kind, "repaired": False},
        actor="agent",
    )


# ------------------------------------------------------------------ model


def _model_loop(c: Campaign) -> None:
    """Ask, read, act, until a decision, three strikes, or the limit of calls."""
    tools = agent_tools(list(c.space.keys))
    current = c.view.now
    while current.decision is None:
        turn = current.turns[-1] if current.turns else None
        if turn is not None and turn.reply and not turn.results:
            if turn.call is None:
                _read(c, turn, tools)
            else:
                _answer(c, turn)
            continue
        if current.strikes >= MAX_STRIKES:
            end_round(c, f"three failed calls, the last one: {current.strike_reasons[-1]}")
            return
        if current.calls >= c.config.agent.max_calls and (turn is None or turn.reply):
            end_round(c, f"no decision within {c.config.agent.max_calls} calls")
            return
        _ask(c, tools)


def _ask(c: Campaign, tools: list[dict[str, Any]]) -> None:
    if c.endpoint is None:
        raise InfraError("the model endpoint is not open; run `selfevo resume`")
    settings = c.config.agent
    request = {
        "model": settings.model,
        "messages": conversation(c),
        "tools": tools,
        "tool_choice": "required",
        "temperature": settings.temperature,
        "max_tokens": settings.max_tokens,
        "seed": c.campaign_seed * 1000 + c.view.round,
    }
    asked = c.emit("agent.request", {"blob": c.store.json_blob(request), "model": settings.model})
    started = time.monotonic()
    response = c.endpoint.chat(request)
    seconds = time.monotonic() - started
    usage = response.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    c.emit(
        "agent.reply",
        {
            "blob": c.store.json_blob(response),
            "seconds": round(seconds, 3),
            "finish_reason": memory.clean(str(response["choices"][0].get("finish_reason")), 40),
            "prompt_tokens": _count(usage.get("prompt_tokens")),
            "completion_tokens": _count(usage.get("completion_tokens")),
        },
        actor="agent",
        cause=asked.seq,
    )


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) else None


def conversation(c: Campaign) -> list[Message]:
    """The messages of the next request: the last request's, the reply to it, and its results."""
    current = c.view.now
    done = [turn for turn in current.turns if turn.reply]
    if not done:
        names = list(current.digests)
        revise = None
        if current.revise and current.pr is not None:
            proposal = c.view.prs[current.pr].proposal
            revise = f"{proposal['key']} {proposal['direction']}"
        return agent_messages(
            current.number,
            c.view.rounds_planned,
            names,
            memory=memory.prompt_memory(c.view),
            reviews=memory.prompt_reviews(c.view),
            revise=revise,
            program=program_text(c.program),
        )
    turn = done[-1]
    request = json.loads(c.store.read(turn.request))
    messages: list[Message] = list(request["messages"])
    messages.append(plain_message(_message(c, turn), _step(c, turn, request["tools"])))
    for result in turn.results:
        if result["call_id"]:
            messages.append(tool_message(result["text"], result["call_id"]))
        else:
            messages.append({"role": "user", "content": result["text"]})
    return messages


def _message(c: Campaign, turn: TurnView) -> dict[str, Any]:
    message: dict[str, Any] = json.loads(c.store.read(turn.reply))["choices"][0]["message"]
    return message


def _step(c: Campaign, turn: TurnView, tools: list[dict[str, Any]]) -> Call | Malformed:
    return read_reply(_message(c, turn), tools, f"call_{len(c.view.now.all_turns)}")


def _read(c: Campaign, turn: TurnView, tools: list[dict[str, Any]]) -> None:
    step = _step(c, turn, tools)
    if isinstance(step, Malformed):
        strike(c, step.problem, schema_error(step.problem, tools))
        return
    c.emit(
        "tool.call",
        {
            "name": step.name,
            "arguments": dict(step.arguments),
            "call_id": step.id,
            "repaired": step.repaired,
        },
        actor="agent",
    )


def _answer(c: Campaign, turn: TurnView) -> None:
    """Do a looking call and give its result back."""
    assert turn.call is not None
    call = turn.call
    if call["name"] in DECISIONS:
        return
    same = [
        t
        for t in c.view.now.turns[:-1]
        if t.call
        and t.call["name"] == call["name"]
        and canonical(t.call["arguments"]) == canonical(call["arguments"])
    ]
    if same:
        strike(
            c,
            f"{call['name']} was asked twice",
            "error: already answered above ; call propose_edit or abstain",
            call["call_id"],
        )
        return
    text, problem = look(c, call["name"], call["arguments"])
    if problem:
        strike(c, problem, f"error: {problem}", call["call_id"])
        return
    c.emit(
        "tool.result",
        {"call_id": call["call_id"], "name": call["name"], "text": text[:RESULT_CHARS]},
    )


def look(c: Campaign, name: str, arguments: dict[str, Any]) -> tuple[str, str]:
    """(result, problem) of a tool that only looks; one of the two is empty."""
    current = c.view.now
    if name == "run_digest":
        record = current.digests.get(arguments["run"])
        if record is None:
            return "", f"no such run ; runs {' '.join(current.digests)}"
        return str(record["text"]), ""
    if name == "config_get":
        key = arguments["key"]
        values = c.control_values()
        if key not in values:
            return "", f"no such key ; keys {' '.join(c.space.keys)}"
        return f"{key} {memory.number(values[key])}", ""
    if name == "memory_read":
        notes = c.repo.read_file(c.view.incumbent_head, NOTES)
        lines = [memory.clean(line) for line in notes[-NOTES_CHARS:].splitlines()]
        return "\n".join(line for line in lines if line) or "no notes", ""
    skill = arguments["name"]
    try:
        page = c.repo.read_file(c.view.incumbent_head, f"skills/{skill}/SKILL.md")
    except UserError:
        pages = c.repo.list_files(c.view.incumbent_head, "skills/")
        names = sorted({path.split("/")[1] for path in pages if path.endswith("/SKILL.md")})
        return "", f"no such skill ; skills {' '.join(names)}"
    return page[:RESULT_CHARS], ""
