"""OpenAI's text completions: a raw prompt, text or ids, without a chat template."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from model.tokenizer import Tokenizer
from rl.gateway.dialects import reading
from rl.gateway.dialects.chat import DONE, extras, usage
from rl.gateway.dialects.openai_errors import OpenAIErrors
from rl.gateway.dialects.reading import event
from rl.gateway.sampling import wishes
from rl.gateway.types import Answer, Ask, Json, refused

_DEFAULT_TOKENS = 16


class Completions(OpenAIErrors):
    """POST /v1/completions."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def read(self, body: Json, earlier: Mapping[str, Sequence[Json]]) -> Ask:
        return Ask(
            model=reading.text(body, "model", "model"),
            body=body,
            text=self._prompt(body.get("prompt")),
            max_tokens=reading.count(body, "max_tokens") or _DEFAULT_TOKENS,
            stops=reading.stops(body, "stop"),
            wishes=wishes(body),
            stream=reading.flag(body, "stream"),
        )

    def _prompt(self, prompt: object) -> str | list[int]:
        if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
            prompt = prompt[0]
        if isinstance(prompt, str):
            return prompt
        if not isinstance(prompt, list) or not all(type(id) is int for id in prompt):
            raise refused("prompt", "expected one text or one list of ids; ask for several apart")
        if any(not 0 <= id < self._tokenizer.vocab_size for id in prompt):
            raise refused("prompt", f"ids go from 0 to {self._tokenizer.vocab_size - 1}")
        return prompt

    def whole(self, ask: Ask, answer: Answer) -> Json:
        return self._body(ask, answer, answer.text, answer.cut) | {"usage": usage(answer)}

    def events(self, ask: Ask, answer: Answer) -> Iterable[bytes]:
        for piece in reading.pieces(answer.text):
            yield event(self._body(ask, answer, piece, None))
        yield event(self._body(ask, answer, "", answer.cut))
        if (ask.body.get("stream_options") or {}).get("include_usage"):
            yield event(self._head(ask, answer) | {"choices": [], "usage": usage(answer)})
        yield DONE

    def _head(self, ask: Ask, answer: Answer) -> Json:
        return {
            "id": f"cmpl-{answer.id}",
            "object": "text_completion",
            "created": answer.created,
            "model": ask.model,
        }

    def _body(self, ask: Ask, answer: Answer, text: str, finish: str | None) -> Json:
        choice: Json = {"index": 0, "text": text, "finish_reason": finish, "logprobs": None}
        if finish is not None:
            choice |= {"logprobs": self._logprobs(ask, answer), **extras(ask, answer)}
        return self._head(ask, answer) | {"choices": [choice]}

    def _logprobs(self, ask: Ask, answer: Answer) -> Json | None:
        if ask.body.get("logprobs") is None:
            return None
        tokens = [self._tokenizer.decode([id]) for id in answer.drawn.ids]
        offsets, at = [], 0
        for token in tokens:
            offsets.append(at)
            at += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": answer.drawn.logprobs,
            "top_logprobs": [
                {token: value} for token, value in zip(tokens, answer.drawn.logprobs, strict=True)
            ],
            "text_offset": offsets,
        }
