"""What FP8 weights cost the bundled model: `python -m benchmarks.fp8 --json`

The nano is converted by `model.convert` and read back. Both versions then score held-out text:
fresh scripts of the grammar (a seed that no training used) and the decisions over the committed
test digests. Figures, for `scripts` and `decisions`: `perplexity_*` of the bfloat16 weights,
`fp8_perplexity_*`, their `ratio_*` with a 95 % bootstrap interval over texts (`intervals`), and
`logp_change_*`, the mean absolute change of a token's log-probability (nats). `bytes_share` is the
size of the weights on disk; `largest_error` the largest |change| of a quantised weight, as a share
of its bound in `docs/checkpoints.md`.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.agent_digests import TEST_FILE, read_lines
from benchmarks.common import ROOT, emit, report
from model.chat_format import render_ids, render_reply_ids
from model.checkpoint import disk_tensors, load_model
from model.config import FP8_BLOCK
from model.convert import convert
from model.fp8 import quantise
from model.layout import is_fp8_weight
from model.scoring import token_logprobs
from model.tokenizer import Tokenizer
from model.transformer import Transformer
from rl.envs.mle.prompts import Scaffold
from rl.sft_config import PolicySource
from rl.sft_data import policy_examples
from scripts.nano.agent_dialogues import dialogue

NANO = ROOT / "model" / "checkpoints" / "nano"
BATCH, DRAWS = 16, 2000

Rows = Sequence[tuple[list[int], list[int]]]
"""(prompt ids, reply ids)."""


def scripts(tokenizer: Tokenizer, count: int) -> Rows:
    """Fresh scripts with invented descriptions."""
    found = policy_examples(
        PolicySource(kind="policy", invented=1.0),
        count=count,
        seed="fp8/held-out",
        facts=[],
        scaffold=Scaffold(),
        tokenizer=tokenizer,
        max_length=1024,
        workers=1,
    )
    rows = []
    for i in range(len(found)):
        ids = found.flat[found.start[i] : found.start[i + 1]].tolist()
        rows.append((ids[: found.prompt[i]], ids[found.prompt[i] :]))
    return rows


def decisions(tokenizer: Tokenizer, count: int) -> Rows:
    """The right answers to the committed test digests."""
    rng = random.Random(0)
    rows = []
    for line in read_lines(TEST_FILE)[:count]:
        made = dialogue(json.loads(line), rng)
        *prompt, reply = made["messages"]
        rows.append(
            (render_ids(prompt, made["tools"], tokenizer), render_reply_ids(reply, tokenizer))
        )
    return rows


@torch.no_grad()
def score(model: Transformer, rows: Rows) -> list[NDArray[np.float64]]:
    """Log-probabilities of each row's reply, nats."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]) + len(rows[i][1]))
    out: dict[int, NDArray[np.float64]] = {}
    for first in range(0, len(order), BATCH):
        picked = order[first : first + BATCH]
        lengths = [len(rows[i][0]) + len(rows[i][1]) for i in picked]
        ids_BT = torch.zeros(len(picked), max(lengths), dtype=torch.long)
        for b, i in enumerate(picked):
            ids_BT[b, : lengths[b]] = torch.tensor([*rows[i][0], *rows[i][1]])
        logp_BT = token_logprobs(model, ids_BT, torch.tensor(lengths))
        for b, i in enumerate(picked):
            out[i] = logp_BT[b, len(rows[i][0]) : lengths[b]].double().numpy()
    return [out[i] for i in range(len(rows))]


def ratio_interval(
    before: Sequence[NDArray[np.float64]], after: Sequence[NDArray[np.float64]]
) -> tuple[float, float]:
    """95 % interval of the ratio of perplexities, drawing texts."""
    rng = np.random.default_rng(0)
    rise = np.array([b.sum() - a.sum() for b, a in zip(before, after, strict=True)])
    tokens = np.array([len(b) for b in before])
    drawn = rng.integers(0, len(rise), (DRAWS, len(rise)))
    ratios = np.exp(rise[drawn].sum(1) / tokens[drawn].sum(1))
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(low), float(high)


def error_shares(before: Transformer, after: Transformer) -> float:
    """The largest change of a quantised weight as a share of what the format's bound allows."""
    worst = 0.0
    changed = disk_tensors(after)
    for name, weight in disk_tensors(before).items():
        if is_fp8_weight(name):
            scale = quantise(weight)[1].double()
            wide = scale.repeat_interleave(FP8_BLOCK, 0).repeat_interleave(FP8_BLOCK, 1)
            wide = wide[: weight.shape[0], : weight.shape[1]]
            bound: Tensor = (weight.double() / wide).abs().clamp_min(2.0**-6).log2().floor()
            bound = wide * 2.0 ** (bound - 4)
            worst = max(worst, float(((changed[name] - weight).double().abs() / bound).max()))
    return worst


def measure(count: int) -> dict[str, Any]:
    """All figures; `count` bounds the texts of each kind."""
    tokenizer = Tokenizer.load(NANO)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "fp8"
        convert(NANO, folder, "fp8")
        sizes = [
            sum(path.stat().st_size for path in each.glob("*.safetensors"))
            for each in (NANO, folder)
        ]
        before, after = load_model(NANO), load_model(folder)
    figures: dict[str, Any] = {
        "bytes_share": sizes[1] / sizes[0],
        "largest_error": error_shares(before, after),
    }
    intervals, rows = {}, []
    for name, texts in (
        ("scripts", scripts(tokenizer, count)),
        ("decisions", decisions(tokenizer, count)),
    ):
        old, new = score(before, texts), score(after, texts)
        nats = [-float(np.concatenate(each).mean()) for each in (old, new)]
        figures[f"perplexity_{name}"] = math.exp(nats[0])
        figures[f"fp8_perplexity_{name}"] = math.exp(nats[1])
        figures[f"ratio_{name}"] = math.exp(nats[1] - nats[0])
        change = np.concatenate(new) - np.concatenate(old)
        figures[f"logp_change_{name}"] = float(np.abs(change).mean())
        intervals[f"ratio_{name}"] = ratio_interval(old, new)
        rows.append({"kind": name, "texts": len(texts), "tokens": len(change), "nats": nats})
    return report("fp8", figures, rows, ("torch", "safetensors"), intervals=intervals)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--count", type=int, default=400, help="texts of each kind, at most")
    args = parser.parse_args()
    emit(measure(args.count), args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
