"""A LangGraph agent for script competitions: write a script, run it, look, improve, submit.

It knows an OpenAI endpoint and two tools, and nothing of who reads its calls. Small models answer
with the script itself; models that call tools call `run_script` and `submit`.
"""

from __future__ import annotations

import inspect
import json
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Annotated, Any, Literal, TypedDict

import openai
from langgraph.graph import END, START, StateGraph

Tool = Callable[[str], str]


class State(TypedDict):
    """Messages and model calls so far, the best script with its percentile, and whether one was
    handed in."""

    messages: Annotated[list[dict[str, Any]], operator.add]
    turn: Annotated[int, operator.add]
    best: tuple[float, str]
    done: bool


def build(
    base_url: str,
    api_key: str,
    model: str,
    tools: Sequence[Tool],
    *,
    turns: int = 3,
    hand_in: Literal["last", "best"] = "last",
    tool_calls: bool = False,
    timeout_s: float = 600.0,
) -> Any:
    """The compiled graph; it is invoked with `{"messages": […]}`.

    turns        model calls at most
    hand_in      without tool calls: the last script, or the one with the best percentile
    tool_calls   tell the model of the tools, and expect calls instead of a script
    """
    client = _connections().with_options(
        base_url=base_url, api_key=api_key, timeout=timeout_s, max_retries=1
    )
    named = {tool.__name__: tool for tool in tools}
    options: dict[str, Any] = {"tools": [_schema(tool) for tool in tools]} if tool_calls else {}

    def think(state: State) -> dict[str, Any]:
        answer = client.chat.completions.create(
            model=model,
            messages=state["messages"],  # type: ignore[arg-type]
            **options,
        )
        message = answer.choices[0].message
        reply: dict[str, Any] = {"role": "assistant", "content": message.content or ""}
        if message.tool_calls:
            reply["tool_calls"] = [call.model_dump() for call in message.tool_calls]
        return {"messages": [reply], "turn": 1}

    def act(state: State) -> dict[str, Any]:
        reply = state["messages"][-1]
        if not tool_calls:
            return act_on_script(state, reply["content"])
        calls = reply.get("tool_calls") or []
        results = [_call(named, call) for call in calls]
        submitted = any(call["function"]["name"] == "submit" for call in calls)
        return {"messages": results, "done": submitted or not calls}

    def act_on_script(state: State, script: str) -> dict[str, Any]:
        last = state["turn"] >= turns
        if last and hand_in == "last":
            return {"messages": [_told(named["submit"](script))], "done": True}
        result = named["run_script"](script)
        tried = (_percentile(result), script)
        best = max(state.get("best") or tried, tried, key=operator.itemgetter(0))
        if last:
            result = named["submit"](best[1])
        return {"messages": [_told(result)], "best": best, "done": last}

    def after(state: State) -> str:
        return END if state.get("done") or state["turn"] >= turns else "think"

    graph = StateGraph(State)
    graph.add_node("think", think)
    graph.add_node("act", act)
    graph.add_edge(START, "think")
    graph.add_edge("think", "act")
    graph.add_conditional_edges("act", after, ["think", END])
    return graph.compile()


@lru_cache(maxsize=1)
def _connections() -> openai.OpenAI:
    """Shared by all graphs: a client of its own costs each 25 ms of CPU."""
    return openai.OpenAI(base_url="http://127.0.0.1", api_key="none")


def _call(named: Mapping[str, Tool], call: dict[str, Any]) -> dict[str, Any]:
    """The tool message of one call; a wrong call is told to the model."""
    name, text = call["function"]["name"], call["function"]["arguments"]
    try:
        code = json.loads(text)["code"]
    except (ValueError, KeyError, TypeError):
        code = None
    if name not in named or not isinstance(code, str):
        result = f"error: call one of {', '.join(named)} with the argument code"
    else:
        result = named[name](code)
    return {"role": "tool", "tool_call_id": call["id"], "content": result}


def _told(result: str) -> dict[str, Any]:
    return {"role": "user", "content": result}


def _percentile(result: str) -> float:
    """The percentile that a result names; 0 for an error."""
    found = re.search(r"percentile ([\d.]+)", result)
    return float(found[1]) if found else 0.0


def _schema(tool: Tool) -> dict[str, Any]:
    parameters = {
        "type": "object",
        "properties": {"code": {"type": "string"}},
        "required": ["code"],
    }
    about = (inspect.getdoc(tool) or "").partition("\n")[0]
    function = {"name": tool.__name__, "description": about, "parameters": parameters}
    return {"type": "function", "function": function}
