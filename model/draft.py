"""Draft heads for a model that stands still: `python -m model.draft {sample,train,measure}`.

    sample   the model's own replies to prompts: the text that its drafts will be used on
    train    MTP modules on such rows by top-K KL (model/draft_loss.py), in a file of their own
    measure  KL and acceptance by depth on rows not trained on

The model is never changed. Exit code 2 for unusable arguments or files.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from model.checkpoint import load_model
from model.draft_data import Batch, TokenRow, batches, read_rows, sample_replies, write_rows
from model.draft_loss import TOP_K, DraftLoss, draft_loss
from model.errors import ModelError
from model.generate import Engine
from model.mtp import MTP, begin_like, draft_config
from model.mtp_files import load_mtp, save_mtp
from model.transformer import Transformer


@dataclass(frozen=True)
class DraftTraining:
    """How to train. One expert is a dense layer. The learning rate warms up for `warmup` steps and
    falls by a cosine to 2 % of itself at the end of `steps` or of `seconds`, whichever is first."""

    steps: int = 1000
    seconds: float = math.inf
    tokens: int = 8192
    lr: float = 2e-3
    warmup: int = 20
    depths: int = 3
    top_k: int = TOP_K
    modules: int = 1
    experts: int = 1
    experts_per_token: int = 1
    width: int = 192
    balance: float = 1e-3
    seed: int = 0


def train(
    model: Transformer,
    rows: Sequence[TokenRow],
    training: DraftTraining,
    tell: Callable[[dict[str, Any]], None] = lambda _: None,
) -> MTP:
    """Modules for this model, on its device. Attention and norms start as the model's last ones."""
    if training.depths < training.modules:
        raise ModelError(
            f"draft: {training.depths} depths do not use {training.modules} modules; "
            "ask for as many depths as modules, or more"
        )
    sizes = draft_config(
        model.config,
        experts=training.experts,
        top_k=training.experts_per_token,
        width=training.width,
    )
    mtp = MTP(sizes, training.modules, seed=training.seed)
    for module in mtp.layers:
        begin_like(module, model)
    mtp = mtp.to(model.device)
    mtp.track_load(training.experts > 1)
    optimiser = torch.optim.AdamW(
        mtp.parameters(), lr=training.lr, betas=(0.9, 0.95), weight_decay=0.01
    )
    start = time.monotonic()
    data = batches(rows, training.tokens, training.seed, model.device)
    for step in range(training.steps):
        done = max(step / training.steps, (time.monotonic() - start) / training.seconds)
        if done >= 1:
            break
        falling = 0.02 + 0.98 * (1 + math.cos(math.pi * done)) / 2
        rate = training.lr * falling * min(1.0, (step + 1) / training.warmup)
        for group in optimiser.param_groups:
            group["lr"] = rate
        found = _loss(model, mtp, next(data), training)
        optimiser.zero_grad()
        found.loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(mtp.parameters(), 1.0)
        optimiser.step()
        mtp.balance(training.balance)
        if step % 20 == 0 or step + 1 == training.steps:
            seconds = time.monotonic() - start
            told = {"kl": found.kl.tolist(), "overlap": found.overlap.tolist()}
            tell({"step": step, "lr": rate, "seconds": seconds, **told})
    return mtp


def _loss(model: Transformer, mtp: MTP, batch: Batch, training: DraftTraining) -> DraftLoss:
    return draft_loss(
        model,
        mtp,
        batch.ids_BT,
        batch.first_B,
        batch.lengths_B,
        depths=training.depths,
        top_k=training.top_k,
    )


@torch.no_grad()
def measure(
    model: Transformer, mtp: MTP, rows: Sequence[TokenRow], depths: int, tokens: int = 8192
) -> dict[str, Any]:
    """Mean KL and mean Σ min(policy, draft) of each depth over all the rows' replies, each batch
    weighing as much as it has rows; and the tokens a round that the second makes one expect."""
    wanted = sum(1 for _ in rows)
    seen, sums = 0, torch.zeros(2, depths, dtype=torch.float64)
    for batch in batches(rows, tokens, 0, model.device):
        found = draft_loss(model, mtp, batch.ids_BT, batch.first_B, batch.lengths_B, depths=depths)
        sums += torch.stack([found.kl.cpu(), found.overlap.cpu()]) * len(batch.first_B)
        seen += len(batch.first_B)
        if seen >= wanted:
            break
    kl, overlap = (sums / seen).tolist()
    expected = sum(math.prod(overlap[:d]) for d in range(depths + 1))
    return {"rows": seen, "kl": kl, "overlap": overlap, "tokens_a_round": expected}


# ------------------------------------------------------------------------------ command line


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    options = _parser().parse_args(argv)
    try:
        device = options.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if options.threads:
            torch.set_num_threads(options.threads)
        model = load_model(options.checkpoint, device=device)
        command: Callable[[argparse.Namespace, Transformer], None] = options.command
        command(options, model)
    except ModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _sample(options: argparse.Namespace, model: Transformer) -> None:
    rows = read_rows(options.prompts, model.config.vocab_size, replies=False)
    engine = Engine(model, max_batch=options.batch)
    made = sample_replies(
        engine, rows, options.count, temperature=options.temperature, seed=options.seed
    )
    write_rows(options.out, made)


def _train(options: argparse.Namespace, model: Transformer) -> None:
    rows = read_rows(options.data, model.config.vocab_size, replies=True)
    names = DraftTraining.__dataclass_fields__
    training = DraftTraining(**{k: v for k, v in vars(options).items() if k in names})
    torch.set_float32_matmul_precision("high")  # on a GPU: a draft need not be exact
    mtp = train(model, rows, training, lambda row: print(json.dumps(row), flush=True))
    kept = {k: v for k, v in asdict(training).items() if v != math.inf}
    held = {}
    if options.held_out is not None:
        test = read_rows(options.held_out, model.config.vocab_size, replies=True)
        held = measure(model, mtp, test, training.depths)
        print(json.dumps(held), flush=True)
    save_mtp(mtp, options.out, metadata={"training": kept, "rows": len(rows), "held_out": held})


def _measure(options: argparse.Namespace, model: Transformer) -> None:
    rows = read_rows(options.data, model.config.vocab_size, replies=True)
    mtp = load_mtp(options.draft, device=model.device)
    print(json.dumps(measure(model, mtp, rows, options.depths)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m model.draft", description=__doc__)
    commands = parser.add_subparsers(required=True)

    def command(name: str, function: Callable[..., None]) -> argparse.ArgumentParser:
        found = commands.add_parser(name)
        found.set_defaults(command=function)
        found.add_argument("--checkpoint", type=Path, required=True)
        found.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
        found.add_argument("--threads", type=int, default=0, help="of the processor; 0: torch's")
        return found

    sample = command("sample", _sample)
    sample.add_argument("--prompts", type=Path, required=True, help="rows without replies")
    sample.add_argument("--count", type=int, required=True)
    sample.add_argument("--temperature", type=float, default=1.0)
    sample.add_argument("--seed", type=int, default=0)
    sample.add_argument("--batch", type=int, default=64)
    sample.add_argument("--out", type=Path, required=True)

    training = command("train", _train)
    training.add_argument("--data", type=Path, required=True, help="rows with replies")
    training.add_argument("--held-out", type=Path, default=None, help="rows to measure on")
    training.add_argument("--out", type=Path, required=True, help="folder of mtp.safetensors")
    for name, value in asdict(DraftTraining()).items():
        training.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)

    measuring = command("measure", _measure)
    measuring.add_argument("--data", type=Path, required=True, help="rows with replies")
    measuring.add_argument("--draft", type=Path, required=True, help="folder of mtp.safetensors")
    measuring.add_argument("--depths", type=int, default=3)
    return parser


if __name__ == "__main__":
    sys.exit(main())
