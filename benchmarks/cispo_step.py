"""A CISPO step beside TRL's: `make bench-setup`, then
`.venv-bench/bin/python -m benchmarks.cispo_step --json`

Loss and backward pass of one optimiser step, in turns in one process, on equal weights, ids,
recorded log-probs, advantages and ceiling: ours is `rl.tree_update.backward_packs`, planning
included; TRL's is `GRPOTrainer._compute_loss` (`loss_type="cispo"`) and `accelerator.backward` over
micro-batches that share one `num_items_in_batch`, with transformers' own class of the model, its
fastest experts and no activation checkpointing. `speedup_*` is over TRL as it batches: samples in
their order, prompts padded to the longest prompt of the step and completions to the longest
completion. `sorted_*` is over the same code on samples sorted by length and padded to their own
micro-batch's longest, which TRL does not do.

    append_calls    agents that append only, one sample a call (what a request-level pool holds)
    append_rows     the same, TRL with each episode joined in one row under a `tool_mask`
    nothing_shared  single calls of uneven length

Where TRL's step is much longer than ours, every k-th micro-batch is timed and scaled by tokens
(`timed_share`); losses and gradient norms are compared on a part that both compute whole. On a
CPU: the bundled `nano` in float32, seconds are CPU-seconds of one thread. On a GPU: `small` with
random weights in bfloat16 and FP32 logits. Exit code 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import ROOT, emit, report
from benchmarks.prefix_tree import CPU_20, FULL, TINY, One, Workload, workloads
from model.checkpoint import load_model, save_checkpoint
from model.config import PRESETS
from model.convert import convert
from model.transformer import Transformer
from rl.config import OptimSection
from rl.masters import MasterAdamW
from rl.objectives import cispo
from rl.prefix_tree import build_packs
from rl.tree_scores import score_pack
from rl.tree_update import backward_packs

NANO = ROOT / "model" / "checkpoints" / "nano"
CEILING = 1.5
TARGETS = {"speedup_append_calls": 3.0, "speedup_nothing_shared": 1.5}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Row:
    """A sample as TRL takes it: ids, where the completion begins, and for each of its tokens if it
    is trained, its recorded log-prob and its advantage."""

    ids: np.ndarray[Any, Any]
    prompt: int
    trained: np.ndarray[Any, Any]
    recorded: np.ndarray[Any, Any]
    advantage: np.ndarray[Any, Any]


def call_rows(calls: Sequence[One]) -> list[Row]:
    """One sample a call."""
    return [
        Row(
            np.concatenate([c.prompt_ids, c.response_ids]),
            len(c.prompt_ids),
            np.ones(len(c.response_ids), np.int64),
            c.logprobs,
            np.full(len(c.response_ids), c.advantage),
        )
        for c in calls
    ]


def episode_rows(calls: Sequence[One]) -> list[Row]:
    """One sample an episode whose calls extend each other; observations are not trained."""
    rows = []
    for episode in sorted({c.episode for c in calls}):
        own = sorted((c for c in calls if c.episode == episode), key=lambda c: len(c.prompt_ids))
        ids = np.concatenate([own[-1].prompt_ids, own[-1].response_ids])
        prompt = len(own[0].prompt_ids)
        trained = np.zeros(len(ids) - prompt, np.int64)
        recorded, advantage = np.zeros(len(trained)), np.zeros(len(trained))
        for c in own:
            at = slice(len(c.prompt_ids) - prompt, len(c.prompt_ids) - prompt + len(c.response_ids))
            trained[at], recorded[at], advantage[at] = 1, c.logprobs, c.advantage
        rows.append(Row(ids, prompt, trained, recorded, advantage))
    return rows


Batch = dict[str, Tensor]


def _widths(rows: Sequence[Row]) -> tuple[int, int]:
    """The longest prompt and the longest completion."""
    return max(row.prompt for row in rows), max(len(row.trained) for row in rows)


class Ours:
    """Our model, with the optimiser that adds its gradients up (in float32)."""

    def __init__(self, model: Transformer, budget: int) -> None:
        self.model, self.budget = model, budget
        self.optimizer = MasterAdamW(list(model.parameters()), OptimSection())

    def recorded(self, calls: Sequence[One], spread: float) -> list[One]:
        """The calls with log-probs as another policy would have recorded them."""
        rng = np.random.default_rng(1)
        found = [np.zeros(len(c.response_ids)) for c in calls]
        with torch.no_grad():
            for pack in build_packs(calls, self.budget):
                logp_n, _ = score_pack(self.model, pack, 1.0)
                values = zip(pack.call_n, pack.offset_n, logp_n.double().tolist(), strict=True)
                for call, offset, value in values:
                    found[call][offset] = value
        noise = [rng.normal(0, spread, len(x)) for x in found]
        return [replace(c, logprobs=x + n) for c, x, n in zip(calls, found, noise, strict=True)]

    def step(self, calls: Sequence[One]) -> float:
        sums = backward_packs(self.model, calls, cispo(CEILING), 1.0, self.budget)
        return sums.loss

    def norm(self) -> float:
        grads = [m.grad for m in self.optimizer.masters if m.grad is not None]
        return math.sqrt(sum(float(g.double().pow(2).sum()) for g in grads))

    def forget(self) -> None:
        self.optimizer.forget()


class Theirs:
    """TRL's trainer around transformers' model of the same checkpoint."""

    def __init__(self, checkpoint: Path, dtype: torch.dtype, budget: int, experts: str) -> None:
        from datasets import Dataset
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from trl import GRPOConfig, GRPOTrainer

        self.budget, cuda = budget, torch.cuda.is_available()
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=dtype, experts_implementation=experts
        )
        settings = GRPOConfig(
            output_dir=tempfile.mkdtemp(),
            loss_type="cispo",
            epsilon_high=CEILING,
            beta=0.0,
            temperature=1.0,
            num_generations=2,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=1,
            steps_per_generation=1,
            gradient_checkpointing=False,
            cast_lm_head_to_fp32=dtype != torch.float32,
            bf16=False,
            use_cpu=not cuda,
            report_to=[],
        )
        self.trainer = GRPOTrainer(
            model=model,
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=settings,
            train_dataset=Dataset.from_dict({"prompt": ["a", "b"]}),
            processing_class=AutoTokenizer.from_pretrained(checkpoint),
        )
        self.model = self.trainer.model.train()
        self.model.to("cuda" if cuda else "cpu")
        self.trainer.current_gradient_accumulation_steps = 1
        self.dtype = dtype

    def batches(self, rows: Sequence[Row], trained: int, by_length: bool) -> list[Batch]:
        """Micro-batches of at most `budget` padded tokens, padded as the module's page says."""
        order = sorted(rows, key=lambda row: -len(row.ids)) if by_length else list(rows)
        all_of_them = _widths(rows)
        batches = []
        while order:
            width = len(order[0].ids) if by_length else sum(all_of_them)
            some = order[: max(1, self.budget // width)]
            batches.append(self._batch(some, trained, _widths(some) if by_length else all_of_them))
            order = order[len(some) :]
        return batches

    def _batch(self, rows: Sequence[Row], trained: int, widths: tuple[int, int]) -> Batch:
        before, behind = widths
        prompt, completion = (np.zeros((len(rows), n), np.int64) for n in (before, behind))
        prompt_mask, completion_mask = (np.zeros_like(x) for x in (prompt, completion))
        tool_mask, (old, advantage) = (
            np.zeros_like(completion),
            np.zeros((2, len(rows), behind), np.float32),
        )
        for b, row in enumerate(rows):
            n = len(row.trained)
            prompt[b, before - row.prompt :] = row.ids[: row.prompt]
            prompt_mask[b, before - row.prompt :] = 1
            completion[b, :n], completion_mask[b, :n] = row.ids[row.prompt :], 1
            tool_mask[b, :n], old[b, :n] = row.trained, row.recorded
            advantage[b, :n] = row.advantage
        found = {
            "prompt_ids": prompt,
            "prompt_mask": prompt_mask,
            "completion_ids": completion,
            "completion_mask": completion_mask,
            "tool_mask": tool_mask,
            "old_per_token_logps": old,
            "advantages": advantage,
            "num_items_in_batch": np.array(float(trained), np.float32),
        }
        return {name: torch.from_numpy(x).to(self.model.device) for name, x in found.items()}

    def step(self, batches: Sequence[Batch]) -> float:
        total = 0.0
        for batch in batches:
            loss = self.trainer._compute_loss(self.model, batch)
            self.trainer.accelerator.backward(loss)
            total += float(loss.detach())
        return total

    def norm(self) -> float:
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        return math.sqrt(sum(float(g.double().pow(2).sum()) for g in grads))

    def forget(self) -> None:
        self.model.zero_grad(set_to_none=True)


def timed(step: Callable[[], float]) -> float:
    """Seconds: of the wall on a GPU, of this process's processor on a CPU."""
    cuda = torch.cuda.is_available()
    clock = time.perf_counter if cuda else time.process_time
    if cuda:
        torch.cuda.synchronize()
    start = clock()
    step()
    if cuda:
        torch.cuda.synchronize()
    return clock() - start


def agreement(ours: Ours, theirs: Theirs, calls: Sequence[One]) -> dict[str, float]:
    """Relative differences of loss (by the sum of its parts' sizes) and gradient norm."""
    trained = sum(len(c.response_ids) for c in calls)
    scale = sum(abs(c.advantage) * float(np.abs(c.logprobs).sum()) for c in calls) / trained
    mine = ours.step(calls)
    other = theirs.step(theirs.batches(call_rows(calls), trained, by_length=True))
    norms = ours.norm(), theirs.norm()
    ours.forget()
    theirs.forget()
    return {
        "loss_ours": mine,
        "loss_trl": other,
        "loss_error": abs(mine - other) / scale,
        "norm_error": abs(norms[0] - norms[1]) / norms[1],
    }


def compare(
    ours: Ours, theirs: Theirs, name: str, calls: Sequence[One], rows: list[Row], repeats: int
) -> dict[str, Any]:
    """One workload: ours on all calls, TRL's on the rows."""
    trained = sum(len(c.response_ids) for c in calls)
    packed = sum(pack.tokens for pack in build_packs(calls))
    row: dict[str, Any] = {
        "workload": name,
        "calls": len(calls),
        "trl_rows": len(rows),
        "trl_tokens": sum(len(row.ids) for row in rows),
        "tree_tokens": packed,
    }
    forms = {}
    for form, by_length in (("", False), ("sorted_", True)):
        batches = theirs.batches(rows, trained, by_length)
        sizes = [batch["prompt_ids"].numel() + batch["completion_ids"].numel() for batch in batches]
        every = max(1, round(sum(sizes) / (4 * packed)))
        share = sum(sizes[every // 2 :: every]) / sum(sizes)
        forms[form] = batches[every // 2 :: every], share
        row[f"{form}padded_tokens"], row[f"{form}timed_share"] = sum(sizes), share
    took: dict[str, list[float]] = {"ours": [], **{form: [] for form in forms}}
    for _ in range(repeats + 1):  # the first turn is a warm-up
        took["ours"].append(timed(lambda: ours.step(calls)))
        ours.forget()
        for form, (batches, share) in forms.items():
            took[form].append(timed(partial(theirs.step, batches)) / share)
            theirs.forget()
    row["ours_s"] = statistics.median(took["ours"][1:])
    for form in forms:
        row[f"{form}trl_s"] = statistics.median(took[form][1:])
        ratios = zip(took[form][1:], took["ours"][1:], strict=True)
        row[f"{form or 'trl_'}speedup"] = statistics.median(a / b for a, b in ratios)
    return row


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the result; exit code 1 if a target is missed, 2 without TRL."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cispo_step", description=__doc__)
    add = parser.add_argument
    add("--json", action="store_true", help="one JSON object on stdout")
    add("--preset", choices=["nano", "small", "base"], help="default: nano, on a GPU small")
    add("--experts", default="grouped_mm", help="transformers' experts: grouped_mm or eager")
    add("--repeats", type=int, default=3)
    add("--trl-tokens", type=int, help="most padded tokens of a TRL micro-batch")
    add("--tiny", action="store_true", help="rehearsal: a few tokens, no target")
    options = parser.parse_args(arguments)
    try:
        import trl  # noqa: F401
    except ImportError as error:
        print(f"error: {error}; run make bench-setup and use .venv-bench", file=sys.stderr)
        return 2
    warnings.filterwarnings("ignore")
    cuda = torch.cuda.is_available()
    dtype = torch.bfloat16 if cuda else torch.float32
    if not cuda:
        torch.set_num_threads(1)
    preset = options.preset or ("small" if cuda else "nano")
    sizes, agents, turns = (FULL, 8, 10) if cuda else (CPU_20, 4, 10)
    budget = 98_304 if cuda else 2_048
    if options.tiny:
        sizes, agents, turns = TINY, 2, 3
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "model"
        if preset == "nano":
            convert(NANO, checkpoint, "bfloat16" if cuda else "float32")
        else:
            config = replace(PRESETS[preset], max_position_embeddings=32_768)
            save_checkpoint(
                Transformer(config, seed=0).cast(torch.bfloat16), checkpoint, tokenizer_from=NANO
            )
        model = load_model(checkpoint).cast(dtype).to("cuda" if cuda else "cpu")
        theirs = Theirs(
            checkpoint, dtype, options.trl_tokens or (32_768 if cuda else budget), options.experts
        )
    ours = Ours(model, budget)
    vocab = 2048
    rows, figures = [], {}
    shared: Workload = workloads("append-20", (sizes, sizes), vocab, agents, turns)
    alone = workloads("nothing-shared", (sizes, sizes), vocab, agents, turns)
    for work, form, make in (
        (shared, "append_calls", call_rows),
        (shared, "append_rows", episode_rows),
        (alone, "nothing_shared", call_rows),
    ):
        calls = ours.recorded(work.calls, 0.4)
        row = compare(ours, theirs, form, calls, make(calls), options.repeats)
        if form != "append_rows":
            few = sorted(calls, key=lambda c: len(c.prompt_ids))[:: max(1, len(calls) // 8)]
            row |= agreement(ours, theirs, few)
        rows.append(row)
        figures[f"speedup_{form}"] = row["trl_speedup"]
        figures[f"sorted_{form}"] = row["sorted_speedup"]
        print(row, file=sys.stderr, flush=True)
    figures["loss_error_max"] = max(row.get("loss_error", 0.0) for row in rows)
    figures["norm_error_max"] = max(row.get("norm_error", 0.0) for row in rows)
    packages = ("numpy", "torch", "transformers", "trl", "accelerate")
    emit(report("cispo_step", figures, rows, packages, ceiling=CEILING), options.json)
    met = all(figures[name] >= value for name, value in TARGETS.items())
    agree = figures["loss_error_max"] <= TOLERANCE[dtype]
    return 0 if agree and (met or options.tiny) else 1


if __name__ == "__main__":
    sys.exit(main())
