"""The likeliest tokens of a place, and the scores of a prompt's own tokens.

Shapes: M places, B rows, T tokens of a piece of a prompt, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from model.generate import PromptScores, Row, Top

SCORE_TOKENS = 256  # logits of a prompt's tokens are made for this many at a time


def likeliest(logp_MV: Tensor, count: int) -> list[Top]:
    """The `count` likeliest tokens of each place, best first."""
    best = logp_MV.topk(min(count, logp_MV.shape[1]), dim=-1)
    rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [list(zip(ids, values, strict=True)) for ids, values in rows]


def give_likeliest(rows: Sequence[Row], logp_BV: Tensor, most: int) -> None:
    """Give each row as many of the likeliest tokens as it asks for, `most` of them at most."""
    for row, top in zip(rows, likeliest(logp_BV, most), strict=True):
        if row.finish is None and row.request.top_logprobs:
            row.top.append(top[: row.request.top_logprobs])


def score_piece(head: Callable[[Tensor], Tensor], row: Row, start: int, x_TH: Tensor) -> None:
    """Add to a row's prompt scores what hidden states of its prompt's tokens from `start` on say:
    the scores of the tokens behind them."""
    request = row.request
    scores = row.prompt = row.prompt or PromptScores([], [])
    ids_t = torch.tensor(request.prompt_ids[start + 1 : start + 1 + len(x_TH)], device=x_TH.device)
    for begin in range(0, len(ids_t), SCORE_TOKENS):
        id_t1 = ids_t[begin : begin + SCORE_TOKENS, None]
        logp_tV = head(x_TH[begin : begin + len(id_t1)]).log_softmax(-1)
        scores.logprobs.extend(logp_tV.gather(1, id_t1)[:, 0].tolist())
        if request.top_logprobs:
            scores.top.extend(likeliest(logp_tV, request.top_logprobs))
