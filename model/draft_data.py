"""Token rows that draft heads train on: read, sampled from the model itself, put in batches.

A row is one JSON object a line: `prompt_ids`, and `reply_ids` once there is a reply. A row to be
continued may say `max_new_tokens` and `ignore_eos`. Shapes: B rows, T columns.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.errors import ModelError
from model.generate import Engine, GenRequest

MAX_NEW = 192


@dataclass(frozen=True)
class TokenRow:
    """Ids of a prompt and of the reply to it; `max_new` and `ignore_eos` say how to make one."""

    prompt: tuple[int, ...]
    reply: tuple[int, ...] = ()
    max_new: int = MAX_NEW
    ignore_eos: bool = False

    def to_json(self) -> str:
        values: dict[str, Any] = {"prompt_ids": self.prompt, "max_new_tokens": self.max_new}
        if self.ignore_eos:
            values["ignore_eos"] = True
        if self.reply:
            values["reply_ids"] = self.reply
        return json.dumps(values, separators=(",", ":"))


def read_rows(path: Path, vocab_size: int, *, replies: bool) -> list[TokenRow]:
    """Rows of a JSONL file. Raises ModelError that names the line at fault; with `replies`, a row
    without one is a fault."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: cannot be read ({error}); name a JSONL file of rows") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            rows.append(_row(line, f"{path} line {number}", vocab_size, replies))
    if not rows:
        raise ModelError(f"{path}: holds no rows; make some with `python -m model.draft sample`")
    return rows


def _row(line: str, where: str, vocab_size: int, replies: bool) -> TokenRow:
    try:
        values = json.loads(line)
        row = TokenRow(
            tuple(values["prompt_ids"]),
            tuple(values.get("reply_ids", ())),
            int(values.get("max_new_tokens", MAX_NEW)),
            bool(values.get("ignore_eos", False)),
        )
        ids = [*row.prompt, *row.reply]
        known = all(isinstance(id, int) and 0 <= id < vocab_size for id in ids)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{where}: no row ({error!r}); see model/draft_data.py") from None
    if not row.prompt or not known:
        raise ModelError(
            f"{where}: prompt_ids must be ids from 0 to {vocab_size - 1}, at least one"
        )
    if replies and not row.reply:
        raise ModelError(f"{where}: no reply_ids; make them with `python -m model.draft sample`")
    return row


def write_rows(path: Path, rows: Iterable[TokenRow]) -> None:
    """One line a row, in place at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text("".join(row.to_json() + "\n" for row in rows), encoding="utf-8")
    part.replace(path)


def sample_replies(
    engine: Engine, rows: Sequence[TokenRow], count: int, *, temperature: float, seed: int
) -> Iterator[TokenRow]:
    """`count` replies of the model to these prompts, which are repeated in order as needed."""
    eos, context = engine.model.config.eos_token_id, engine.model.config.max_position_embeddings
    pool = engine.max_batch * 8
    for first in range(0, count, pool):
        part = [rows[i % len(rows)] for i in range(first, min(count, first + pool))]
        requests = [
            GenRequest(
                row.prompt,
                min(row.max_new, context - len(row.prompt)),
                temperature=temperature,
                seed=seed + first + i,
                stop_ids=frozenset() if row.ignore_eos or eos is None else frozenset([eos]),
            )
            for i, row in enumerate(part)
        ]
        for row, made in zip(part, engine.generate(requests), strict=True):
            yield TokenRow(row.prompt, tuple(made.ids), row.max_new, row.ignore_eos)


@dataclass(frozen=True)
class Batch:
    """Right-padded rows: ids (B, T), where each reply begins (B) and the row ends (B)."""

    ids_BT: Tensor
    first_B: Tensor
    lengths_B: Tensor


def pad(rows: Sequence[TokenRow], device: torch.device | str = "cpu") -> Batch:
    """Rows as one batch."""
    full = [[*row.prompt, *row.reply] for row in rows]
    lengths = [len(ids) for ids in full]
    width = max(lengths)
    ids_BT = torch.tensor([ids + [0] * (width - len(ids)) for ids in full])
    first_B = torch.tensor([len(row.prompt) for row in rows])
    return Batch(ids_BT.to(device), first_B.to(device), torch.tensor(lengths).to(device))


def batches(
    rows: Sequence[TokenRow], tokens: int, seed: int, device: torch.device | str = "cpu"
) -> Iterator[Batch]:
    """Batches of at most `tokens` padded tokens (or one row), without end: rows of similar length
    together, a new order each time through."""
    rng = random.Random(seed)
    while True:
        order = list(rows)
        rng.shuffle(order)
        order.sort(key=lambda row: (len(row.prompt) + len(row.reply)) // 16)
        parts: list[list[TokenRow]] = []
        widest = 0
        for row in order:
            width = len(row.prompt) + len(row.reply)
            widest = max(widest, width)
            if not parts or (len(parts[-1]) + 1) * widest > tokens:
                parts.append([])
                widest = width
            parts[-1].append(row)
        rng.shuffle(parts)
        for part in parts:
            yield pad(part, device)
