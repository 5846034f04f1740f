"""Run variants and seeds that a log lacks, and time them."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from model.errors import ModelError
from model.study.batches import Batches
from model.study.corpus import Corpus
from model.study.costs import Plan, plan
from model.study.log import Line, append, claim, finished, recipe_of, setting_of
from model.study.measure import measure
from model.study.train import new_model, stepper, train
from model.study.variants import STUDIES, VARIANTS, Size

_TIMED, _UNTIMED = 12, 4


def device_of(name: str) -> torch.device:
    """`cpu`, `cuda` or `cuda:N`. Raises ModelError where there is no such device."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ModelError(f"--device {name}: use cpu, cuda or cuda:N") from None
    if device.type == "cuda":
        if not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count():
            raise ModelError(f"--device {name}: no such device here; use cpu")
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    return device


def run_all(
    size: Size,
    corpus: Corpus,
    names: Sequence[str],
    seeds: Sequence[int],
    device: torch.device,
    log: Path,
) -> int:
    """Run what is neither in the log nor claimed by another process; the number of runs made.

    Lines come seed by seed, so that a stop leaves whole comparisons.
    """
    made = 0
    log.parent.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        for name in names:
            made += run_one(plan(size, VARIANTS[name]), corpus, seed, device, log)
    return made


def run_one(plan: Plan, corpus: Corpus, seed: int, device: torch.device, log: Path) -> bool:
    """Train and measure one variant and seed, and add its line; False where that is not needed."""
    recipe = recipe_of(plan, corpus)
    with claim(log, recipe, seed) as ours:
        if not ours or (recipe, seed) in finished(log):
            return False
        start = time.perf_counter()
        label = f"{plan.variant.name} seed {seed}"
        trained = train(plan, corpus, seed, device, lambda text: _say(f"{label}: {text}"))
        line: Line = {
            "variant": plan.variant.name,
            "seed": seed,
            "studies": [study for study, names in STUDIES.items() if plan.variant.name in names],
            "setting": setting_of(plan, corpus),
            "recipe": recipe,
            "size": plan.size.name,
            "window": plan.size.window,
            "context": plan.size.context,
            "corpus": corpus.digest,
            "heldout_packages": 0,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "torch": str(torch.__version__),
            "steps": plan.steps,
            "tokens": plan.tokens,
            "parameters": plan.parameters,
            "active": plan.active,
            "flops": plan.flops,
            "train_seconds": round(trained.seconds, 1),
            **measure(plan, corpus, trained),
            "curve": trained.curve,
        }
        line["heldout_packages"] = len(line["loss"])
        line["seconds"] = round(time.perf_counter() - start, 1)
        append(log, line)
        _say(f"{label}: done in {line['seconds']} s")
    return True


def timings(
    size: Size, corpus: Corpus, names: Sequence[str], device: torch.device
) -> Iterator[Line]:
    """Time some steps with whole rows of each variant: milliseconds a step, TFLOP/s, and seconds
    for the whole run (a little too many, as its short rows are cheaper)."""
    whole = replace(size, short_share=0.0)
    for name in names:
        planned = plan(whole, VARIANTS[name])
        variant = replace(planned.variant, convert_at=0.0)
        short = replace(planned, steps=_UNTIMED + _TIMED, variant=variant)
        model, modules = new_model(short, 0, device)
        batches = Batches(whole, corpus, 0, short.steps, device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        steps = stepper(short, batches, model, modules)
        start = time.perf_counter()
        for _ in range(_UNTIMED):
            next(steps)
        _wait(device)
        first = time.perf_counter()
        for _ in range(_TIMED):
            next(steps)
        _wait(device)
        each = (time.perf_counter() - first) / _TIMED
        flops = planned.flops / planned.steps
        line: Line = {
            "variant": name,
            "ms_a_step": round(each * 1e3, 2),
            "first_steps_s": round(first - start, 1),
            "tok_s": round(size.rows * size.context / each),
            "tflop_s": round(flops / each / 1e12, 1),
            "steps": planned.steps,
            "run_s": round(each * planned.steps, 1),
        }
        if device.type == "cuda":
            line["memory_gb"] = round(torch.cuda.max_memory_allocated(device) / 1e9, 1)
        yield line


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
