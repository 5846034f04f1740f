"""What computing common beginnings once saves: `python -m benchmarks.shared_prefix --json`

Forward and backward of the bundled model, with and without sharing, in turns, on two batches: 3
groups of 8 scripts (an update of the first lab) and 20 agent dialogues of committed training
digests. Figures: `group_speedup` and `dialogue_speedup`, the median over the repeats of paired
CPU-seconds, and the share of the tokens that is left to compute. `*_tree_speedup` is what the whole
update by `rl.tree_update` (loss included) gains over rows that share one level.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from agent_tools.mle_bench.registry import load_competition, load_suite
from benchmarks.agent_digests import read_lines
from benchmarks.common import ROOT, emit, report
from model import shared_prefix
from model.chat_format import render_ids
from model.checkpoint import load_model
from model.scoring import score_tokens
from model.tokenizer import Tokenizer
from model.transformer import Transformer
from rl.config import OptimSection
from rl.envs.mle.grammar import sample_script
from rl.envs.mle.prompts import task_messages
from rl.objectives import cispo
from rl.samples import Sample
from rl.tree_update import backward_packs
from scripts.nano.agent_dialogues import dialogue

NANO = ROOT / "model" / "checkpoints" / "nano"
DIGESTS = ROOT / "scripts" / "nano" / "data" / "agent_train.jsonl.xz"
GROUP, DIALOGUES = 8, 20

Rows = Sequence[tuple[list[int], list[int]]]
"""(prompt ids, reply ids)."""


def groups(tokenizer: Tokenizer, rng: random.Random) -> Rows:
    """Scripts of the grammar, `GROUP` for each train competition."""
    suite = load_suite("offline-small-v0")
    rows = []
    for name in suite.ids("train"):
        facts = load_competition(name, suite=suite).facts
        prompt = render_ids(task_messages(facts), None, tokenizer)
        rows += [(prompt, tokenizer.encode(sample_script(facts, rng))) for _ in range(GROUP)]
    return rows


def dialogues(tokenizer: Tokenizer, rng: random.Random) -> Rows:
    """The last decision of dialogues over real digests."""
    rows = []
    for line in read_lines(DIGESTS)[:DIALOGUES]:
        made = dialogue(json.loads(line), rng)
        messages, tools = made["messages"], made["tools"]
        prompt = render_ids(messages[:-1], tools, tokenizer)
        whole = render_ids(messages, tools, tokenizer, add_generation_prompt=False)
        rows.append((prompt, whole[len(prompt) :]))
    return rows


def seconds(model: Transformer, rows: Rows, *, shared: bool) -> tuple[float, int]:
    """CPU-seconds of one forward and backward pass, and how many tokens it computed."""
    width = max(len(prompt) + len(reply) for prompt, reply in rows)
    ids_BT = torch.zeros(len(rows), width, dtype=torch.long)
    wanted_BT = torch.zeros(len(rows), width, dtype=torch.bool)
    for b, (prompt, reply) in enumerate(rows):
        end = len(prompt) + len(reply)
        ids_BT[b, :end] = torch.tensor([*prompt, *reply])
        wanted_BT[b, len(prompt) : end] = True
    lengths_B = torch.tensor([len(prompt) + len(reply) for prompt, reply in rows])
    usual = shared_prefix.WORTHWHILE
    shared_prefix.WORTHWHILE = usual if shared else math.inf
    try:
        tokens = len(shared_prefix.lay_out(ids_BT, lengths_B, model.config, tree=False).row_M)
        start = time.process_time()
        scores = score_tokens(model, ids_BT, lengths_B, wanted_BT=wanted_BT)
        (-scores.logp_BT.sum()).backward()  # type: ignore[no-untyped-call]
        took = time.process_time() - start
    finally:
        shared_prefix.WORTHWHILE = usual
    model.zero_grad()
    return took, tokens


def tree_seconds(model: Transformer, rows: Rows) -> float:
    """CPU-seconds of the same by `rl.tree_update`, as a CISPO update."""
    calls = [Sample(tuple(p), tuple(reply), (-1.0,) * len(reply), 1.0) for p, reply in rows]
    start = time.process_time()
    backward_packs(model, calls, cispo(5.0), 1.0, OptimSection().pack_tokens)
    took = time.process_time() - start
    model.zero_grad()
    return took


def measure(repeats: int) -> dict[str, Any]:
    """Both batches, after one untimed pass each."""
    torch.set_num_threads(1)
    model = load_model(NANO).cast(torch.float32)
    tokenizer = Tokenizer.load(NANO)
    rng = random.Random(0)
    batches = {"group": groups(tokenizer, rng), "dialogue": dialogues(tokenizer, rng)}
    figures: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    for name, batch in batches.items():
        seconds(model, batch, shared=True)
        tree_seconds(model, batch)
        pairs, trees = [], []
        for repeat in range(repeats):
            plain, whole = seconds(model, batch, shared=False)
            once, left = seconds(model, batch, shared=True)
            merged = tree_seconds(model, batch)
            pairs.append(plain / once)
            trees.append(once / merged)
            rows.append({"batch": name, "repeat": repeat, "plain_s": plain, "shared_s": once})
            rows[-1]["tree_s"] = merged
        figures[f"{name}_speedup"] = statistics.median(pairs)
        figures[f"{name}_tree_speedup"] = statistics.median(trees)
        figures[f"{name}_token_share"] = left / whole
    return report("shared_prefix", figures, rows, ("torch",))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.shared_prefix", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(arguments)
    emit(measure(options.repeats), options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
