"""LangGraph agents through a real gateway: exact records, rewards, deadlines, parallel calls."""

from __future__ import annotations

import ast
import inspect
import operator
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Annotated, Any, TypedDict

import openai
import pytest
import torch
from agent_parts import TOKENIZER, ScriptedEngine, Stage, gateway
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, StateGraph
from langgraph.prebuilt import create_react_agent
from mle_tasks import constant, made_up

from agent_tools.mle_agent.model_client import BundledServer
from agent_tools.sandbox import Limits, make_pool
from model.checkpoint import load_model
from model.scoring import token_logprobs
from rl.agents import langgraph_mle
from rl.agents.context import INSTRUCTION
from rl.agents.langgraph_env import LangGraphAgent
from rl.agents.registry import agent_env
from rl.checkpoints import bundled_checkpoint
from rl.envs.mle.env import MleEnv, make_task
from rl.envs.mle.verifier import Verifier
from rl.errors import ConfigError, InfraError
from rl.prefix_tree import build_packs
from rl.rollout import CachingPool
from rl.types import CallRecord, Sampling, Task

SAMPLING = {"max_tokens": 512, "seed": 5}


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """The bundled model behind a gateway."""
    with BundledServer() as server:
        engine = server.base_url.removesuffix("/v1")
        with gateway(engine, tmp_path_factory.mktemp("nano")) as stage:
            yield stage


class Scripted:
    """A scripted engine behind a gateway; a test sets `engine.say`."""

    def __init__(self, engine: ScriptedEngine, stage: Stage) -> None:
        self.engine = engine
        self.stage = stage


@pytest.fixture(scope="module")
def scripted_stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scripted]:
    with (
        ScriptedEngine(lambda prompt: "") as engine,
        gateway(engine.url, tmp_path_factory.mktemp("scripted")) as stage,
    ):
        yield Scripted(engine, stage)


@pytest.fixture
def scripted(scripted_stage: Scripted) -> Scripted:
    scripted_stage.engine.drawn.clear()
    return scripted_stage


@pytest.fixture(scope="module")
def env(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MleEnv]:
    """A made-up competition; the task is `TASK`."""
    competition = made_up(tmp_path_factory.mktemp("data"), "train")
    TASKS["made-up"] = make_task(competition, "dev", turns=3)
    verifier = Verifier({"made-up": competition})
    with CachingPool(make_pool("process", 1)) as pool:
        yield MleEnv(pool, Limits(cpu_seconds=2, wall_seconds=30), verifier=verifier)


TASKS: dict[str, Task] = {}


def task(episode: str, **sampling: Any) -> Task:
    return replace(TASKS["made-up"], episode=episode, sampling=Sampling(1.0, 48, 5))


def earned(env: MleEnv, script: str) -> float:
    outcome = env.attempt(TASKS["made-up"], script, last=True)
    return outcome.percentile / 100 if outcome.valid else 0.0


def said(call: CallRecord) -> str:
    """What the agent was answered, from the record's ids."""
    return TOKENIZER.decode(call.response_ids, skip_specials=True).partition("\n\n")[2]


def check_ids(calls: Sequence[CallRecord], engine: ScriptedEngine) -> None:
    """The records hold the ids that went to the engine and came from it, and nothing else."""
    told = sorted((tuple(prompt), tuple(ids)) for prompt, ids in engine.drawn)
    assert sorted((call.prompt_ids, call.response_ids) for call in calls) == told
    for call in calls:
        assert call.logprobs == tuple(-0.5 - i / 1024 for i in range(len(call.response_ids)))
        assert call.versions == ((0, len(call.response_ids), 3),)


# ------------------------------------------------------------------ the bundled agent


def test_the_agent_holds_no_training_code() -> None:
    tree = ast.parse(inspect.getsource(langgraph_mle))
    imported = {
        name.partition(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    ours = {"rl", "model", "agent_tools", "selfevo", "torch"}
    assert not imported & ours
    assert {"langgraph", "openai"} <= imported


def test_the_nano_plays_and_the_trainers_model_gives_the_recorded_log_probs(
    nano: Stage, env: MleEnv
) -> None:
    agent = agent_env("langgraph", {"options": {"turns": 3}}, env)
    sampling = {"max_tokens": 48, "seed": 5}
    base_url = nano.open("g4-0.0", group=4, sampling=sampling)
    reward = agent.run(task("g4-0.0"), base_url, "key", 120)
    calls = nano.close("g4-0.0")
    assert len(calls) == 3
    assert (reward.episode, reward.status) == ("g4-0.0", "done")
    scripts = [said(call) for call in calls]
    assert reward.outcome == earned(env, scripts[-1])
    assert reward.t_tool > 0
    assert [script.script for script in reward.scripts] == scripts
    model = load_model(bundled_checkpoint(), device="cpu")
    for call in calls:
        assert (call.group, call.temperature, call.constrained) == (4, 1.0, False)
        assert call.tokenizer_hash == TOKENIZER.hash
        ids = torch.tensor([[*call.prompt_ids, *call.response_ids]])
        with torch.no_grad():
            logp = token_logprobs(model.float(), ids, torch.tensor([ids.shape[1]]))
        worst = (logp[0, len(call.prompt_ids) :] - torch.tensor(call.logprobs)).abs().max()
        assert worst < 1e-4
    # The same seed opens the same episode again.
    again = nano.open("g4-0.1", group=4, sampling=sampling)
    assert agent.run(task("g4-0.1"), again, "key", 120).outcome == reward.outcome
    assert [c.response_ids for c in nano.close("g4-0.1")] == [c.response_ids for c in calls]


def test_the_last_script_counts_and_results_are_told(scripted: Scripted, env: MleEnv) -> None:
    scripts = iter([constant("unknown_name"), constant("50.0"), constant("0.0")])
    scripted.engine.say = lambda prompt: next(scripts)
    agent = agent_env("langgraph", {"options": {"turns": 3}}, env)
    base_url = scripted.stage.open("last", sampling=SAMPLING)
    reward = agent.run(task("last"), base_url, "key", 60)
    calls = scripted.stage.close("last")
    check_ids(calls, scripted.engine)
    assert reward.outcome == earned(env, constant("0.0")) > 0
    assert "error: NameError" in TOKENIZER.decode(calls[1].prompt_ids)
    assert "percentile 0" in TOKENIZER.decode(calls[2].prompt_ids)


def test_the_best_script_can_be_handed_in_instead(scripted: Scripted, env: MleEnv) -> None:
    scripts = iter([constant("0.0"), constant("unknown_name"), constant("50.0")])
    scripted.engine.say = lambda prompt: next(scripts)
    agent = agent_env("langgraph", {"options": {"turns": 3, "hand_in": "best"}}, env)
    base_url = scripted.stage.open("best", sampling=SAMPLING)
    reward = agent.run(task("best"), base_url, "key", 60)
    assert reward.outcome == earned(env, constant("0.0")) > 0
    assert [script.valid for script in reward.scripts] == [True, False, True, True]
    assert len(scripted.stage.close("best")) == 3


def test_no_torch_is_imported_for_agents() -> None:
    code = (
        "import sys; import rl.agents.registry, rl.agents.langgraph_mle\n"
        "sys.exit('torch' in sys.modules or 'vllm' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


# ------------------------------------------------------------------ an agent of LangGraph's own


def react(base_url: str, api_key: str, model: str, tools: Sequence[Callable[[str], str]]) -> Any:
    """LangGraph's prebuilt agent with LangChain's client: neither is ours."""
    llm = ChatOpenAI(base_url=base_url, api_key=api_key, model=model, max_retries=0)
    return create_react_agent(llm, list(tools))


def tool_call(name: str, code: str) -> str:
    return (
        f'<minimax:tool_call>\n<invoke name="{name}">\n<parameter name="code">{code}</parameter>\n'
        "</invoke>\n</minimax:tool_call>"
    )


def test_langgraphs_prebuilt_agent_trains_as_it_is(scripted: Scripted, env: MleEnv) -> None:
    replies = iter(
        [
            tool_call("run_script", constant("50.0")),
            tool_call("submit", constant("0.0")),
            "I have submitted.",
        ]
    )
    scripted.engine.say = lambda prompt: next(replies)
    agent = LangGraphAgent(env, react, model="nano")
    base_url = scripted.stage.open("react", sampling=SAMPLING)
    reward = agent.run(task("react"), base_url, "key", 60)
    calls = scripted.stage.close("react")
    check_ids(calls, scripted.engine)
    assert len(calls) == 3
    assert (reward.status, reward.outcome) == ("done", earned(env, constant("0.0")))
    shown = TOKENIZER.decode(calls[2].prompt_ids)
    assert "<response>score" in shown
    assert "<response>submitted</response>" in shown
    for before, call in pairwise(calls):
        whole = before.prompt_ids + before.response_ids
        assert call.prompt_ids[: len(whole)] == whole  # stored ids: nothing was encoded again


def test_a_limit_of_the_gateway_ends_the_episode_with_what_was_tried(
    scripted: Scripted, env: MleEnv
) -> None:
    scripted.engine.say = lambda prompt: tool_call("run_script", constant("0.0"))
    base_url = scripted.stage.open("limit", sampling=SAMPLING, limits={"calls": 2})
    reward = LangGraphAgent(env, react, model="nano").run(task("limit"), base_url, "key", 60)
    assert (reward.status, reward.outcome) == ("done", earned(env, constant("0.0")))
    assert len(scripted.stage.close("limit")) == 2


# ------------------------------------------------------------------ agents that never end


class Loop(TypedDict):
    messages: Annotated[list[dict[str, Any]], operator.add]


def endless(base_url: str, api_key: str, model: str, tools: Sequence[Any]) -> Any:
    """Asks the model again and again."""
    client = openai.OpenAI(base_url=base_url, api_key=api_key, max_retries=0)

    def think(state: Loop) -> dict[str, Any]:
        answer = client.chat.completions.create(model=model, messages=state["messages"])  # type: ignore[arg-type]
        tools[1](constant("0.0"))  # also what was submitted earns nothing then
        text = answer.choices[0].message.content
        return {
            "messages": [
                {"role": "assistant", "content": text},
                {"role": "user", "content": "go on"},
            ]
        }

    graph = StateGraph(Loop)
    graph.add_node("think", think)
    graph.add_edge(START, "think")
    graph.add_edge("think", "think")
    return graph.compile()


def test_an_agent_that_never_ends_is_a_timeout_that_earns_nothing(
    scripted: Scripted, env: MleEnv
) -> None:
    scripted.engine.say = lambda prompt: "and so on"
    agent = LangGraphAgent(env, endless, model="nano", steps=10**6, scripts=10**6)
    base_url = scripted.stage.open("endless", sampling=SAMPLING)
    reward = agent.run(task("endless"), base_url, "key", 1.5)
    assert (reward.status, reward.outcome) == ("timeout", 0.0)
    assert scripted.stage.close("endless")  # its calls are recorded all the same


def hanging(base_url: str, api_key: str, model: str, tools: Sequence[Any]) -> Any:
    """Hangs in a node, then asks the model."""
    client = openai.OpenAI(base_url=base_url, api_key=api_key, max_retries=0)

    def hang(state: Loop) -> dict[str, Any]:
        RELEASE.wait(60)
        try:
            client.chat.completions.create(model=model, messages=state["messages"])  # type: ignore[arg-type]
        except openai.APIStatusError as error:
            LATE.append(error.code or "")
        LATE_DONE.set()
        return {"messages": []}

    graph = StateGraph(Loop)
    graph.add_node("hang", hang)
    graph.add_edge(START, "hang")
    graph.add_edge("hang", END)
    return graph.compile()


RELEASE, LATE_DONE = threading.Event(), threading.Event()
LATE: list[str] = []


def test_a_node_that_hangs_is_left_behind_and_its_late_calls_are_refused(
    scripted: Scripted, env: MleEnv
) -> None:
    base_url = scripted.stage.open("hang", sampling=SAMPLING)
    reward = LangGraphAgent(env, hanging, model="nano").run(task("hang"), base_url, "key", 0.5)
    assert (reward.status, reward.outcome) == ("timeout", 0.0)
    assert scripted.stage.close("hang") == []
    RELEASE.set()
    assert LATE_DONE.wait(30)
    assert LATE == ["episode_closed"]
    assert scripted.engine.drawn == []


def waiting(base_url: str, api_key: str, model: str, tools: Sequence[Any]) -> Any:
    """Awaits a reply that takes for ever."""
    client = openai.AsyncOpenAI(base_url=base_url, api_key=api_key, max_retries=0)

    async def think(state: Loop) -> dict[str, Any]:
        answer = await client.chat.completions.create(model=model, messages=state["messages"])  # type: ignore[arg-type]
        tools[1](answer.choices[0].message.content)
        return {"messages": []}

    graph = StateGraph(Loop)
    graph.add_node("think", think)
    graph.add_edge(START, "think")
    graph.add_edge("think", END)
    return graph.compile()


def test_coroutines_run_and_are_cancelled_at_the_deadline(scripted: Scripted, env: MleEnv) -> None:
    slow = threading.Event()

    def say(prompt: str) -> str:
        slow.wait(0 if len(scripted.engine.drawn) == 0 else 30)
        return constant("0.0")

    scripted.engine.say = say
    agent = LangGraphAgent(env, waiting, model="nano", is_async=True)
    base_url = scripted.stage.open("awaits", sampling=SAMPLING)
    reward = agent.run(task("awaits"), base_url, "key", 60)
    assert (reward.status, reward.outcome) == ("done", earned(env, constant("0.0")))
    check_ids(scripted.stage.close("awaits"), scripted.engine)
    base_url = scripted.stage.open("cancelled", sampling=SAMPLING)
    reward = agent.run(task("cancelled"), base_url, "key", 0.5)
    assert (reward.status, reward.outcome) == ("timeout", 0.0)
    assert scripted.stage.close("cancelled") == []  # a cancelled call is no record
    slow.set()


def test_the_gateways_own_deadline_is_a_timeout_too(scripted: Scripted, env: MleEnv) -> None:
    scripted.engine.say = lambda prompt: "and so on"
    agent = LangGraphAgent(env, endless, model="nano", steps=10**6, scripts=10**6)
    base_url = scripted.stage.open("over", sampling=SAMPLING, limits={"deadline_s": 0.7})
    reward = agent.run(task("over"), base_url, "key", 60)
    assert (reward.status, reward.outcome) == ("timeout", 0.0)


def test_an_endpoint_that_is_gone_is_no_fault_of_the_agent(env: MleEnv) -> None:
    for agent in (LangGraphAgent(env, react, model="nano"), agent_env("mle", {}, env)):
        with pytest.raises(InfraError, match="away"):
            agent.run(task("gone"), "http://127.0.0.1:9/v1", "key", 60)


def test_an_episode_that_a_restarted_gateway_does_not_know_is_to_be_run_again(
    scripted: Scripted, env: MleEnv
) -> None:
    for agent in (LangGraphAgent(env, react, model="nano"), agent_env("mle", {}, env)):
        with pytest.raises(InfraError, match=r"answered 404: .*no episode 'never-opened'"):
            agent.run(task("x"), f"{scripted.stage.url}/e/never-opened/v1", "key", 60)


def test_what_the_run_forbids_is_an_error_of_the_agent_not_a_reward(
    scripted: Scripted, env: MleEnv
) -> None:
    def cold(base_url: str, api_key: str, model: str, tools: Sequence[Any]) -> Any:
        llm = ChatOpenAI(base_url=base_url, api_key=api_key, model=model, temperature=0.2)
        return create_react_agent(llm, list(tools))

    base_url = scripted.stage.open("cold", sampling=SAMPLING)
    with pytest.raises(ConfigError, match=r"temperature=0\.2 is not allowed in this run"):
        LangGraphAgent(env, cold, model="nano").run(task("cold"), base_url, "key", 60)


# ------------------------------------------------------------------ branches and sub-agents


class Branches(TypedDict):
    messages: list[dict[str, Any]]
    ideas: Annotated[list[str], operator.add]


def team(base_url: str, api_key: str, model: str, tools: Sequence[Any]) -> Any:
    """Two branches think at the same time; one asks a sub-agent; their ideas become a script."""
    client = openai.OpenAI(base_url=base_url, api_key=api_key, max_retries=0)

    def ask(system: str, words: str) -> str:
        messages = [{"role": "system", "content": system}, {"role": "user", "content": words}]
        answer = client.chat.completions.create(model=model, messages=messages)  # type: ignore[arg-type]
        return answer.choices[0].message.content or ""

    def left(state: Branches) -> dict[str, Any]:
        return {"ideas": [ask("branch", "left")]}

    def right(state: Branches) -> dict[str, Any]:
        return {"ideas": [ask("branch", "right"), ask("sub-agent", "help the right one")]}

    def join(state: Branches) -> dict[str, Any]:
        tools[1](ask("writer", " and ".join(sorted(state["ideas"]))))
        return {}

    graph = StateGraph(Branches)
    for node in (left, right, join):
        graph.add_node(node.__name__, node)
    graph.add_edge(START, "left")
    graph.add_edge(START, "right")
    graph.add_edge(["left", "right"], "join")
    graph.add_edge("join", END)
    return graph.compile()


def test_branches_and_sub_agents_each_have_a_record(scripted: Scripted, env: MleEnv) -> None:
    together = threading.Barrier(2, timeout=30)

    def say(prompt: str) -> str:
        if "branch" in prompt:
            together.wait()  # both branches are in flight, or the test fails
            return "idea " + ("left" if "left" in prompt else "right")
        return "advice" if "sub-agent" in prompt else constant("0.0")

    scripted.engine.say = say
    base_url = scripted.stage.open("team", sampling=SAMPLING)
    reward = LangGraphAgent(env, team, model="nano").run(task("team"), base_url, "key", 60)
    calls = scripted.stage.close("team")
    assert (reward.status, reward.outcome) == ("done", earned(env, constant("0.0")))
    check_ids(calls, scripted.engine)
    assert sorted(map(said, calls)) == sorted(
        ["idea left", "idea right", "advice", constant("0.0")]
    )
    assert [call.index for call in calls] == [0, 1, 2, 3]
    assert "advice and idea left and idea right" in TOKENIZER.decode(calls[3].prompt_ids)


def test_branches_that_ask_the_same_each_get_a_sample(scripted: Scripted, env: MleEnv) -> None:
    """With `repeat: sample`; the default answers equal requests with one record."""
    numbers = iter(range(9))
    scripted.engine.say = lambda prompt: f"number {next(numbers)}"

    def twins(base_url: str, api_key: str, model: str, tools: Sequence[Any]) -> Any:
        client = openai.OpenAI(base_url=base_url, api_key=api_key, max_retries=0)

        def think(state: Branches) -> dict[str, Any]:
            answer = client.chat.completions.create(model=model, messages=state["messages"])  # type: ignore[arg-type]
            return {"ideas": [answer.choices[0].message.content or ""]}

        graph = StateGraph(Branches)
        for name in ("one", "two"):
            graph.add_node(name, think)
            graph.add_edge(START, name)
            graph.add_edge(name, END)
        return graph.compile()

    for episode, repeat, records in (("twins", "sample", 2), ("joined", "join", 1)):
        scripted.engine.drawn.clear()
        base_url = scripted.stage.open(episode, sampling=SAMPLING, repeat=repeat)
        LangGraphAgent(env, twins, model="nano").run(task(episode), base_url, "key", 60)
        calls = scripted.stage.close(episode)
        assert len(calls) == records
        check_ids(calls, scripted.engine)


# ------------------------------------------------------------------ managed context


def test_a_white_box_agent_keeps_its_budget_and_its_summary_is_recorded(
    scripted: Scripted, env: MleEnv
) -> None:
    numbers = iter(range(1, 99))

    def say(prompt: str) -> str:
        return "all were constants" if INSTRUCTION in prompt else constant(f"{next(numbers)}.0")

    scripted.engine.say = say
    context = {
        "budget": 150,
        "target": 0.6,
        "actions": [{"do": "summarise", "max_tokens": 20}, {"do": "truncate"}],
    }
    agent = agent_env("mle", {"context": context}, env)
    base_url = scripted.stage.open("context", sampling=SAMPLING)
    reward = agent.run(replace(task("context"), turns=6), base_url, "key", 60)
    calls = scripted.stage.close("context")
    check_ids(calls, scripted.engine)
    summaries = [i for i, call in enumerate(calls) if said(call) == "all were constants"]
    assert summaries
    assert len(calls) == 6 + len(summaries)
    assert all(len(call.prompt_ids) <= 150 for call in calls)
    first = summaries[0]
    edited, before = calls[first + 1], calls[first - 1]
    assert "all were constants" in TOKENIZER.decode(edited.prompt_ids)
    assert edited.prompt_ids[: len(before.prompt_ids)] != before.prompt_ids  # another branch
    assert reward.outcome == earned(env, said(calls[-1]))
    packs = build_packs(calls, 4096)
    assert {int(c) for pack in packs for c in pack.call_n} == set(range(len(calls)))


def test_a_budget_that_the_task_alone_exceeds_ends_the_episode(
    scripted: Scripted, env: MleEnv
) -> None:
    base_url = scripted.stage.open("full", sampling=SAMPLING)
    agent = agent_env("mle", {"context": {"budget": 5}}, env)
    reward = agent.run(task("full"), base_url, "key", 60)
    assert (reward.status, reward.outcome) == ("done", 0.0)
    assert scripted.stage.close("full") == []


def test_a_white_box_agent_is_stopped_too(scripted: Scripted, env: MleEnv) -> None:
    def slow(prompt: str) -> str:
        time.sleep(0.4)
        return constant("0.0")

    scripted.engine.say = slow
    base_url = scripted.stage.open("slow", sampling=SAMPLING)
    agent = agent_env("mle", {}, env)
    reward = agent.run(replace(task("slow"), turns=50), base_url, "key", 1.0)
    assert (reward.status, reward.outcome) == ("timeout", 0.0)
    assert len(scripted.stage.close("slow")) < 50
