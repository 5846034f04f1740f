"""What the nano's draft head is worth on a processor: `python -m benchmarks.speculation --json`

Native code, one thread. Two kinds of prompts that the head was not trained on: `policy`, openings
of policy episodes with invented tasks (replies end by themselves), and `text`, the first 64 tokens
of the committed scripts, continued for 128 tokens whatever comes. Temperature 1. For 1, 8 and 32
requests at once, plain decoding (a running batch, as the server has it) and speculation with 1, 2
and 3 guesses a round are run in turns; what is compared is processor time a token, which hardly
depends on what else the machine does.

By kind, with rule "reject": `accepted_KIND_kN` is the share of N guesses a round that stood,
`tokens_a_round_KIND_kN` the tokens that a round gave, `speed_up_KIND_R_kN` the median of the paired
ratios at R requests, and `speed_up_KIND_R` the best N's. `rows` has all of it for both rules:
"match" gives the samples of plain decoding, and `same` says that it did.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import ROOT, emit, report
from benchmarks.serve_common import prompts as text_prompts
from model.checkpoint import load_model
from model.errors import ModelError
from model.generate import Engine, GenRequest, Row
from model.mtp_files import load_mtp
from model.native.draft import NativeDrafter
from model.native.step import NativeModel
from model.running import RunningBatch
from model.speculative import Rule, Speculated, speculate
from model.tokenizer import Tokenizer
from model.transformer import Transformer
from scripts.nano.draft_prompts import policy_prompts

NANO = ROOT / "model" / "checkpoints" / "nano"
KINDS = ("policy", "text")
NEW = 128
SEED = 77_000  # of prompts; the head's own come from others


def requests_of(kind: str, count: int, tokenizer: Tokenizer, eos: int) -> list[GenRequest]:
    """The first `count` of a kind."""
    if kind == "text":
        asked = text_prompts(tokenizer)[:count]
        return [GenRequest(tuple(ids), NEW, seed=i) for i, ids in enumerate(asked)]
    rows = policy_prompts(tokenizer, random.Random(SEED))
    stop = frozenset([eos])
    return [GenRequest(next(rows).prompt, 192, seed=i, stop_ids=stop) for i in range(count)]


def plainly(batch: RunningBatch, asked: Sequence[GenRequest]) -> list[list[int]]:
    """Replies of a running batch that does not guess."""
    rows = [Row(request) for request in asked]
    batch.join(rows)
    while batch.running:
        batch.step()
    return [row.ids for row in rows]


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What it gives, and the processor seconds it took."""
    start = time.process_time()
    made = work()
    return made, time.process_time() - start


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speculation", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--draft", type=Path, default=NANO, help="folder with mtp.safetensors")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--guesses", type=int, nargs="+", default=[1, 2, 3])
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    try:
        model, mtp = load_model(NANO), load_mtp(options.draft)
        native = NativeModel(model)
        drafter = NativeDrafter(native, mtp)
    except ModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    tokenizer, eos = Tokenizer.load(NANO), model.config.eos_token_id
    assert eos is not None
    batch = RunningBatch(Engine(model), max_batch=max(options.requests), prefix_tokens=0)
    rows: list[dict[str, Any]] = []
    for kind in KINDS:
        for count in options.requests:
            asked = requests_of(kind, count, tokenizer, eos)
            rows += _compare(kind, asked, model, batch, drafter, native, options)
    emit(report("speculation", _figures(rows, options), rows, ("torch",)), options.json)
    return 0


def _compare(
    kind: str,
    asked: list[GenRequest],
    model: Transformer,
    batch: RunningBatch,
    drafter: NativeDrafter,
    native: NativeModel,
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    """All settings at one number of requests, warmed and in turns, with other seeds each time."""
    settings: list[tuple[Rule, int]] = [
        (rule, k) for rule in ("reject", "match") for k in options.guesses
    ]
    found: list[list[tuple[list[Speculated], float]]] = [[] for _ in settings]
    plain: list[tuple[list[list[int]], float]] = []
    repeats = max(options.repeats, -(-options.repeats * 4 // len(asked)))
    for repeat in range(repeats + 1):
        now = [replace(r, seed=1000 * repeat + i) for i, r in enumerate(asked)]
        once = timed(lambda: plainly(batch, now))  # noqa: B023
        if repeat:
            plain.append(once)
        for (rule, k), kept in zip(settings, found, strict=True):
            done = timed(
                lambda: speculate(
                    model,
                    drafter,
                    now,  # noqa: B023
                    draft_tokens=k,  # noqa: B023
                    rule=rule,  # noqa: B023
                    checker=native,
                )
            )
            if repeat:
                kept.append(done)
    base = [seconds / sum(map(len, made)) for made, seconds in plain]
    out = []
    for (rule, k), kept in zip(settings, found, strict=True):
        every = [one for made, _ in kept for one in made]
        cost = [s / sum(len(one.generation.ids) for one in made) for made, s in kept]
        row = {
            "kind": kind,
            "requests": len(asked),
            "rule": rule,
            "guesses": k,
            "rounds": sum(one.rounds for one in every),
            "drafted": sum(one.drafted for one in every),
            "accepted": sum(one.accepted for one in every),
            "tokens": sum(len(one.generation.ids) - 1 for one in every),
            "plain_us_a_token": statistics.median(base) * 1e6,
            "us_a_token": statistics.median(cost) * 1e6,
            "speed_up": statistics.median(b / c for b, c in zip(base, cost, strict=True)),
        }
        if rule == "match":
            row["same"] = all(
                a.generation.ids == b
                for (made, _), (like, _) in zip(kept, plain, strict=True)
                for a, b in zip(made, like, strict=True)
            )
        out.append(row)
    return out


def _figures(rows: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, float]:
    figures: dict[str, float] = {}
    for kind in KINDS:
        found = {
            (row["requests"], row["guesses"]): row
            for row in rows
            if row["kind"] == kind and row["rule"] == "reject"
        }
        for k in options.guesses:
            own = [found[count, k] for count in options.requests]
            rounds, drafted, accepted = (
                sum(row[name] for row in own) for name in ("rounds", "drafted", "accepted")
            )
            figures[f"accepted_{kind}_k{k}"] = accepted / drafted
            figures[f"tokens_a_round_{kind}_k{k}"] = 1 + accepted / rounds
        for count in options.requests:
            each = {k: found[count, k]["speed_up"] for k in options.guesses}
            figures |= {f"speed_up_{kind}_{count}_k{k}": value for k, value in each.items()}
            figures[f"speed_up_{kind}_{count}"] = max(each.values())
    return figures


if __name__ == "__main__":
    sys.exit(main())
