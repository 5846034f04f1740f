"""What vLLM says of its replies, checked: `python -m benchmarks.vllm_replay --json`

Starts one vLLM in float32 on the bundled nano (on a card with `PYTHONPATH=SITE`, which holds it),
lets it write long greedy replies, and loads other weights while it writes. Printed:

| figure | what it must be |
|---|---|
| `spans_two` | 1: each reply has two spans that cover it, of the two versions |
| `logprob_max_before`, `…_after` | < 1e-4: largest difference from our model with those weights |
| `logprob_other` | > 1e-3: median difference of what came after from the weights before |
| `experts_rows` | 1: one row for every token but the last (experts on a card only) |
| `experts_equal` | > 0.999: share of the sets that our model chooses too, same weights |
| `experts_equal_after` | the same of the tokens that were read after the load |
| `experts_ms` | what ids, log-probs and experts add to an answer of 32 + 64 tokens |

Each comparison is on the reply's own tokens.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import torch
from torch import Tensor

from benchmarks.common import emit, report
from benchmarks.serve_common import NANO, BenchmarkError, server
from model.attention import CausalAttend
from model.checkpoint import load_model, save_checkpoint
from model.moe import RoutingTape
from model.transformer import Transformer
from rl.engine_http import HttpEngine
from rl.errors import ConfigError, InfraError

PROMPT, NEW, ROWS = 32, 1500, 8
START_S = 240.0
OPTIONS = ("--engine", "vllm", "--dtype", "float32", "--eager", "--control", "--max-batch", "16")


def ask(url: str, prompt: list[int], new: int, *, ids: bool = True) -> dict[str, Any]:
    """One greedy reply of exactly `new` tokens."""
    body = {"prompt": prompt, "max_tokens": new, "temperature": 0, "ignore_eos": True}
    body |= {"return_token_ids": ids}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=300)
    answer.raise_for_status()
    (choice,) = answer.json()["choices"]
    return dict(choice)


@torch.no_grad()
def scored(model: Transformer, ids: list[int]) -> tuple[Tensor, Tensor]:
    """Log-prob of each token behind the first (T − 1), and the experts of each but the last
    (T − 1, L, k), sorted."""
    read = torch.tensor(ids[:-1], device=model.device)
    tape = RoutingTape(keep_choices=True)
    position = torch.arange(len(read), device=model.device)
    hidden_TH = model.run(read, position, CausalAttend(model.config, 1, len(read)), tape)
    logp_TV = model.head(hidden_TH).float().log_softmax(-1)
    next_T1 = torch.tensor(ids[1:], device=model.device)[:, None]
    experts_LTk = torch.stack([torch.as_tensor(x) for x in tape.choices]).long()
    experts_TLk = experts_LTk.transpose(0, 1).sort(-1).values
    return logp_TV.gather(1, next_T1)[:, 0].cpu(), experts_TLk.cpu()


def measure(folder: Path, device: str, experts: bool) -> dict[str, float]:
    """All figures."""
    generator = torch.Generator().manual_seed(2)
    prompts = torch.randint(8, 2048, (ROWS, PROMPT), generator=generator).tolist()
    before, after = load_model(NANO, device=device), load_model(NANO, device=device)
    for weight in after.parameters():
        weight.data.mul_(1.02)
    other = save_checkpoint(after, folder / "other", dtype="float32", tokenizer_from=NANO)
    options = [*OPTIONS, *(["--routed-experts"] if experts else [])]
    with server(*options, device=device, start_s=START_S) as running:
        url = running.url.removesuffix("/v1")
        found: list[dict[str, Any]] = [{}] * ROWS

        def fill(row: int) -> None:
            found[row] = ask(url, prompts[row], NEW)

        with HttpEngine(url) as engine:
            ask(url, prompts[0], 64)  # compiles
            engine.load(NANO, 1)
            began = time.perf_counter()
            ask(url, prompts[0], 100)
            wait_s = (time.perf_counter() - began) / 100 * NEW / 4
            threads = [threading.Thread(target=fill, args=(row,)) for row in range(ROWS)]
            for thread in threads:
                thread.start()
            time.sleep(wait_s)
            engine.pause("keep")
            engine.load(other, 2)
            engine.resume()
            for thread in threads:
                thread.join()
            figures = compare(prompts, found, before, after, experts)
            if experts:
                figures["experts_ms"] = cost_ms(url, prompts)
    return figures


def compare(
    prompts: list[list[int]],
    found: list[dict[str, Any]],
    before: Transformer,
    after: Transformer,
    experts: bool,
) -> dict[str, float]:
    """The figures of replies that span a load."""
    two, rows_fit = True, True
    worst_before, worst_after, others = 0.0, 0.0, list[float]()
    equal: tuple[list[float], list[float]] = ([], [])
    for prompt, choice in zip(prompts, found, strict=True):
        ids, spans = choice["token_ids"], choice["versions"]
        cut = spans[0][1]
        two &= spans == [[0, cut, 1], [cut, len(ids), 2]]
        made = torch.tensor(choice["logprobs"]["token_logprobs"])
        old_T, old_TLk = scored(before, prompt + ids)
        new_T, new_TLk = scored(after, prompt + ids)
        old, new = old_T[PROMPT - 1 :], new_T[PROMPT - 1 :]
        worst_before = max(worst_before, float((made - old)[:cut].abs().max()))
        worst_after = max(worst_after, float((made - new)[cut:].abs().max()))
        others += (made - old)[cut:].abs().tolist()
        if experts:
            rows = torch.tensor(choice["routed_experts"])
            rows_fit &= len(rows) == PROMPT + len(ids) - 1
            rows_TLk = rows.view(len(rows), *old_TLk.shape[1:]).sort(-1).values
            read = PROMPT + cut - 1  # tokens that were read with the weights before
            equal[0].extend((rows_TLk == old_TLk)[:read].all(-1).flatten().float().tolist())
            equal[1].extend((rows_TLk == new_TLk)[read:].all(-1).flatten().float().tolist())
    figures = {
        "spans_two": float(two),
        "logprob_max_before": worst_before,
        "logprob_max_after": worst_after,
        "logprob_other": statistics.median(others),
    }
    if experts:
        figures |= {"experts_rows": float(rows_fit)}
        figures |= {"experts_equal": statistics.fmean(equal[0])}
        figures |= {"experts_equal_after": statistics.fmean(equal[1])}
    return figures


def cost_ms(url: str, prompts: list[list[int]]) -> float:
    """What ids, log-probs and experts add to an answer, in turns."""
    took: tuple[list[float], list[float]] = ([], [])
    for turn in range(20):
        began = time.perf_counter()
        ask(url, prompts[turn % ROWS], 64, ids=bool(turn % 2))
        took[turn % 2].append(time.perf_counter() - began)
    return (statistics.median(took[1]) - statistics.median(took[0])) * 1000


def missed(figures: dict[str, float]) -> list[str]:
    """Names of the figures that are not what they must be."""
    found = [name for name in ("spans_two", "experts_rows") if figures.get(name, 1) != 1]
    found += [n for n in figures if n.startswith("logprob_max") and figures[n] > 1e-4]
    found += [n for n in figures if n.startswith("experts_equal") and figures[n] < 0.999]
    return found + (["logprob_other"] if figures["logprob_other"] < 1e-3 else [])


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 1 if a figure is not what it must be, 5 if it could not be taken."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vllm_replay", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    options = parser.parse_args(arguments)
    began = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory() as folder:
            figures = measure(Path(folder), options.device, options.device == "cuda")
    except (BenchmarkError, InfraError, ConfigError, httpx.HTTPError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 5
    figures["seconds"] = time.perf_counter() - began
    late = missed(figures)
    emit(report("vllm_replay", figures, [], ("torch", "vllm"), missed=late), options.json)
    return int(bool(late))


if __name__ == "__main__":
    sys.exit(main())
