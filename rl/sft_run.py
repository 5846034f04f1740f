"""Everything of one supervised run: data, training, checkpoint, manifest."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from agent_tools.mle_bench.facts import TaskFacts
from agent_tools.mle_bench.registry import load_competition
from agent_tools.paths import data_dir
from model.checkpoint import load_model, save_checkpoint
from model.config import PRESETS, ModelConfig
from model.tokenizer import Tokenizer, train_tokenizer
from model.transformer import Transformer
from rl.checkpoints import resolve_checkpoint
from rl.config import dump_config
from rl.device import pick_device
from rl.envs.mle.prompts import Scaffold, load_scaffold
from rl.errors import ConfigError
from rl.sft_config import DialogueSource, PolicySource, SftConfig
from rl.sft_data import (
    Examples,
    dialogue_examples,
    dialogue_texts,
    policy_examples,
    policy_texts,
)
from rl.sft_train import Prepared, train
from rl.splits import trainable_ids

HELD_BACK = 0.02
"""Share of dialogues kept for the fresh-sample loss (at least one)."""


# ------------------------------------------------------------------ data


def train_facts(config: SftConfig) -> dict[str, TaskFacts]:
    """Facts of the train competitions that policy sources may describe; SplitError on others."""
    ids = trainable_ids(config.suite, config.competitions)
    if all(not isinstance(s, PolicySource) or s.invented == 1.0 for s in config.data):
        return {}
    return {name: load_competition(name, data_dir()).facts for name in ids}


def make_tokenizer(
    config: SftConfig, facts: Mapping[str, TaskFacts], scaffold: Scaffold
) -> Tokenizer:
    """The named tokenizer, the start checkpoint's, or one trained on the data."""
    if config.tokenizer is not None:
        return Tokenizer.load(Path(config.tokenizer))
    if config.init != "random":
        return Tokenizer.load(resolve_checkpoint(config.init))
    texts: list[str] = []
    for source in config.data:
        if isinstance(source, PolicySource):
            texts += policy_texts(
                config.tokenizer_texts,
                f"{config.seed}/tokenizer",
                source.invented,
                list(facts.values()),
                scaffold,
            )
        else:
            texts += dialogue_texts(Path(source.path))
    return train_tokenizer(texts, PRESETS[config.preset].vocab_size)


def prepare(
    config: SftConfig, tokenizer: Tokenizer, facts: Mapping[str, TaskFacts], scaffold: Scaffold
) -> list[Prepared]:
    """Generate and tokenise every source."""
    out = []
    for index, source in enumerate(config.data):
        if isinstance(source, PolicySource):
            sets = [
                policy_examples(
                    source,
                    count=count,
                    seed=f"{config.seed}/{index}/{part}",
                    facts=list(facts.values()),
                    scaffold=scaffold,
                    tokenizer=tokenizer,
                    max_length=config.max_length,
                    workers=config.workers,
                )
                for part, count in (("train", source.count), ("fresh", config.eval_examples))
            ]
            train, fresh = sets
        else:
            train, fresh = _split(
                dialogue_examples(Path(source.path), tokenizer, config.max_length, config.workers),
                config.eval_examples,
            )
        if not len(train):
            raise ConfigError(f"data.{index}: no example fits max_length {config.max_length}")
        out.append(Prepared(_name(index, source), train, fresh, source.share, source.token_weight))
    return out


def _name(index: int, source: PolicySource | DialogueSource) -> str:
    return f"{index}_{source.kind}"


def _split(examples: Examples, most: int) -> tuple[Examples, Examples]:
    """The last few examples (whole dialogues stand together) are held back."""
    held = max(1, min(most, int(len(examples) * HELD_BACK)))
    if len(examples) <= held:
        return examples, examples
    cut = len(examples) - held
    edge = examples.start[cut]
    return (
        Examples(examples.flat[:edge], examples.start[: cut + 1], examples.prompt[:cut]),
        Examples(examples.flat[edge:], examples.start[cut:] - edge, examples.prompt[cut:]),
    )


# ------------------------------------------------------------------ the run


def model_shape(config: SftConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The preset with the tokenizer's special ids; ConfigError if the vocabulary does not fit."""
    if config.preset not in PRESETS:
        raise ConfigError(f"preset {config.preset!r} is unknown; known: {', '.join(PRESETS)}")
    shape = PRESETS[config.preset]
    if tokenizer.vocab_size > shape.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, preset {config.preset} takes "
            f"{shape.vocab_size}; use another tokenizer"
        )
    return replace(
        shape,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id,
    )


def run(config: SftConfig, out: Path) -> dict[str, Any]:
    """Everything: data, training, checkpoint and manifest under `out`; returns the manifest."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.resolved.yaml").write_text(dump_config(config), encoding="utf-8")
    device = pick_device(config.device)
    torch.manual_seed(config.seed)
    facts = train_facts(config)
    scaffold = load_scaffold(Path(config.scaffold) if config.scaffold else None)
    clock = time.monotonic()
    tokenizer = make_tokenizer(config, facts, scaffold)
    sources = prepare(config, tokenizer, facts, scaffold)
    prepared_s = time.monotonic() - clock
    for source in sources:
        print(
            f"data {source.name}: {len(source.train)} examples, "
            f"{source.train.trained_tokens} trained tokens, longest {source.train.lengths.max()}",
            file=sys.stderr,
            flush=True,
        )
    if config.init == "random":
        model = Transformer(model_shape(config, tokenizer), seed=config.seed).to(device)
    else:
        model = load_model(resolve_checkpoint(config.init), device=device)
    with (out / "metrics.jsonl").open("w", encoding="utf-8") as log:
        result = train(model, sources, config, log)
    manifest = {
        "kind": "supervised",
        "competitions": sorted(facts),
        "suite": config.suite,
        "seed": config.seed,
        "init": config.init,
        "sources": [
            {
                "name": s.name,
                "examples": len(s.train),
                "trained_tokens": s.train.trained_tokens,
                "share": s.share,
            }
            for s in sources
        ],
        "steps": result.steps,
        "batch": config.batch,
        "seconds": round(result.seconds, 1),
        "data_seconds": round(prepared_s, 1),
        "trained_tokens": result.tokens,
        "train_loss": result.train_loss,
        "expert_load_max": result.expert_load_max,
        **result.fresh,
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokenizer_hash": tokenizer.hash,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "versions": {"torch": torch.__version__},
    }
    tokenizer.save(out / "tokenizer")
    save_checkpoint(
        model,
        out / "checkpoint",
        tokenizer_from=out / "tokenizer",
        metadata={"manifest": json.dumps(manifest)},
    )
    text = json.dumps(manifest, indent=2) + "\n"
    (out / "manifest.json").write_text(text, encoding="utf-8")
    (out / "checkpoint" / "manifest.json").write_text(text, encoding="utf-8")
    return manifest
