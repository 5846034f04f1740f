"""model.vllm_spans without vLLM: a load comes while outputs of before still wait in the queue."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.vllm_spans import Spans


class Processor:
    """What counts tokens in vLLM's server."""

    def __init__(self) -> None:
        self.request_states: dict[str, Any] = {}

    def add_request(
        self, request: Any, prompt: Any, parent: Any = None, index: int = 0, queue: Any = None
    ) -> None:
        made = list[int]()
        detokenizer = SimpleNamespace(made=made, num_output_tokens=lambda: len(made))
        self.request_states[request.request_id] = SimpleNamespace(detokenizer=detokenizer)


class Client:
    """vLLM's side of the server: a queue of outputs, and the task that reads it in pieces."""

    def __init__(self) -> None:
        self.output_processor = Processor()
        self.engine_core = SimpleNamespace(outputs_queue=asyncio.Queue[Any]())
        self.output_handler: asyncio.Task[None] | None = None

    async def ask(self, name: str, index: int = 0) -> None:
        request = SimpleNamespace(request_id=f"{index}_{name}~", external_req_id=name)
        self.output_processor.add_request(request, None, None, index)
        if self.output_handler is None:
            self.output_handler = asyncio.create_task(self.handle())

    async def handle(self) -> None:
        while True:
            outputs = await self.engine_core.outputs_queue.get()
            for request_id, tokens in outputs.outputs:
                await asyncio.sleep(0)  # others run between two pieces
                state = self.output_processor.request_states[request_id]
                state.detokenizer.made += [0] * tokens

    def send(self, *outputs: tuple[str, int]) -> None:
        self.engine_core.outputs_queue.put_nowait(SimpleNamespace(outputs=outputs))


@given(
    st.lists(
        st.one_of(
            st.tuples(st.integers(0, 2), st.integers(1, 3)), st.sampled_from(["load", "breathe"])
        ),
        max_size=30,
    )
)
@settings(max_examples=60, deadline=None)
def test_spans_are_those_of_the_engine_whatever_waits_in_the_queue(events: list[Any]) -> None:
    async def run() -> None:
        spans, client = Spans(0), Client()
        spans.attach(client)
        version, truth = 0, {i: list[int]() for i in range(3)}
        with spans.following(1, texts=True) as replies:
            for i in range(3):
                await asyncio.create_task(client.ask(f"cmpl-ab-7-{i}"))
            for event in events:
                if event == "load":
                    version += 1
                    await spans.turn(version)
                    assert spans.version == version
                elif event == "breathe":
                    await asyncio.sleep(0)
                else:
                    client.send((f"0_cmpl-ab-7-{event[0]}~", event[1]))
                    truth[event[0]] += [version] * event[1]
            await spans.turn(99)
            for i, versions in truth.items():
                found = replies.spans(i)
                assert found is not None
                assert [of for begin, end, of in found for _ in range(begin, end)] == versions
                assert [begin for begin, _, _ in found] == [0, *(e for _, e, _ in found)][:-1]
        assert client.output_handler is not None
        client.output_handler.cancel()

    asyncio.run(run())


def test_each_choice_is_its_own_reply_and_requests_do_not_mix() -> None:
    async def run() -> None:
        spans, client = Spans(4), Client()
        spans.attach(client)
        spans.attach(client)  # once is enough
        await client.ask("health")  # nobody follows it

        async def request(name: str, texts: bool, prompts: int, tokens: int) -> list[Any]:
            with spans.following(2, texts=texts) as replies:
                for prompt in reversed(range(prompts)):
                    for index in range(2):
                        full = f"{name}-{prompt}" if texts else name
                        await client.ask(full, index)
                        client.send((f"{index}_{full}~", tokens + 10 * prompt + index))
                await spans.turn(4)
                return [replies.spans(choice) for choice in range(2 * prompts + 1)]

        text, chat = await asyncio.gather(
            request("cmpl-1", True, 2, 1), request("chatcmpl-8-1", False, 1, 5)
        )
        assert text == [[(0, 1, 4)], [(0, 2, 4)], [(0, 11, 4)], [(0, 12, 4)], None]
        assert chat == [[(0, 5, 4)], [(0, 6, 4)], None]

    asyncio.run(run())


def test_an_engine_of_another_build_gets_one_version(capsys: pytest.CaptureFixture[str]) -> None:
    spans = Spans(1)
    spans.attach(SimpleNamespace())
    asyncio.run(spans.turn(2))
    assert spans.version == 2 and "no spans" in capsys.readouterr().err
