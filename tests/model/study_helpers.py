"""A size, a corpus and log lines that are small enough for tests."""

from dataclasses import replace
from typing import Any

import numpy as np

from model.study.corpus import Corpus, Package, digest_of, hash_of
from model.study.probes import REACHES, TASKS
from model.study.variants import SIZES

TINY = replace(
    SIZES["mini"],
    name="tiny",
    hidden=32,
    heads=2,
    kv_heads=1,
    experts=4,
    width=16,
    context=128,
    window=8,
    rows=3,
    steps=4,
    eval_rows=5,
    eval_probe_rows=2,
    short_share=0.25,
    short_parts=2,
)


def make_corpus(train: int = 4000, heldout: int = 700, seed: int = 0) -> Corpus:
    """Random tokens: two packages to train on, two held out."""
    draw = np.random.default_rng(seed)
    parts, packages, start = [], [], 0
    for name, split, count in (
        ("a", "train", train // 2),
        ("b", "train", train // 2),
        ("c", "heldout", heldout // 2),
        ("d", "heldout", heldout // 2),
    ):
        ids = draw.integers(8, 2048, count).astype(np.uint16)
        packages.append(Package(name, "1", split, 1, start, start + count, hash_of(ids)))
        parts.append(ids)
        start += count
    return Corpus(np.concatenate(parts), tuple(packages), "hash", digest_of(packages))


def make_line(
    variant: str,
    seed: int,
    *,
    nats: tuple[float, float] = (20.0, 30.0),
    far: float = 0.9,
    near: float = 0.9,
) -> dict[str, Any]:
    """A line of a log: two held-out packages of ten targets, 100 answers in each class."""
    right = [100 * near] * 3 + [100 * far] * 2
    classes = len(REACHES)
    return {
        "variant": variant,
        "seed": seed,
        "setting": "s",
        "recipe": variant,
        "size": "tiny",
        "window": 8,
        "context": 128,
        "corpus": "c",
        "heldout_packages": 2,
        "device": "cpu",
        "parameters": 1_000_000,
        "active": 500_000,
        "tokens": 2_000_000,
        "flops": 1e15,
        "loss": {
            name: {"nats": [total / classes] * classes, "n": [2] * classes}
            for name, total in zip("cd", nats, strict=True)
        },
        "repeats": {"nats": [1.0] * classes, "n": [2] * classes},
        "probes": {task: {"right": right, "n": [100] * classes} for task in TASKS},
        "load": {"cv": 0.1, "max_violation": 0.2},
        "modules": [],
    }
