"""Train the nano's 2,048-entry tokenizer on what it reads and writes.

Corpus: policy prompts and random-grammar scripts (most of it), and the agent's dialogues over
digests of synthetic metric rows, so that every number form a digest can take is seen.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

from benchmarks.agent_digests import FAULTS
from model.tokenizer import train_tokenizer
from rl.envs.mle.grammar import invented_facts, sample_script
from rl.envs.mle.prompts import result_text, task_messages
from scripts.nano.agent_dialogues import dialogue

FRACTIONS = (
    "reward/mle/mean",
    "rollout/valid_frac",
    "rollout/truncated_frac",
    "rollout/timeout_frac",
    "rollout/memory_frac",
    "group/zero_std_frac",
    "loss/cispo/capped_frac",
)
POSITIVE = (
    "policy/entropy",
    "policy/grad_norm",
    "loss/cispo/weight_max",
    "loss/cispo/weight_mean",
    "mismatch_kl/mean",
    "optim/lr",
)


def synthetic_rows(rng: random.Random) -> list[dict[str, float]]:
    """Metric rows of a run that never happened: only their digits matter."""
    steps = rng.choice((4, 4, 5, 5, 5, 10, 20, 40))
    levels = {key: 10 ** rng.uniform(-6, 1.5) for key in POSITIVE}
    shares = {key: rng.random() for key in FRACTIONS}
    rows = []
    for step in range(1, steps + 1):
        row: dict[str, float] = {"step": step}
        row |= {key: level * 10 ** rng.gauss(0, 0.2) for key, level in levels.items()}
        row |= {
            key: round(min(1.0, max(0.0, rng.gauss(share, 0.1))) * 24) / 24
            for key, share in shares.items()
        }
        rows.append(row)
    return rows


def corpus(scripts: int, dialogues: int, seed: int) -> Iterator[str]:
    """Texts to count pieces in."""
    rng = random.Random(seed)
    for _ in range(scripts):
        facts = invented_facts(rng)
        for message in task_messages(facts):
            yield str(message["content"])
        yield "\n\n" + sample_script(facts, rng)
        if rng.random() < 0.1:
            yield result_text(rng.random(), 100 * rng.random(), "")
    for _ in range(dialogues):
        fault = rng.choice(FAULTS)
        example = {
            "rows": synthetic_rows(rng),
            "fault": {"key": fault.key, "direction": fault.repair} if rng.random() < 0.8 else None,
        }
        record = dialogue(example, rng)
        for message in record["messages"]:
            yield str(message["content"])
            for made in message.get("tool_calls", ()):
                name, arguments = (
                    made["function"]["name"],
                    json.loads(made["function"]["arguments"]),
                )
                yield (
                    f'\n<invoke name="{name}">'
                    + "".join(
                        f'\n<parameter name="{key}">{value}</parameter>'
                        for key, value in arguments.items()
                    )
                    + "\n</invoke>\n"
                )
        yield "\n".join(json.dumps(tool) for tool in record["tools"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scripts", type=int, default=30_000)
    parser.add_argument("--dialogues", type=int, default=2_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    tokenizer = train_tokenizer(corpus(args.scripts, args.dialogues, args.seed))
    tokenizer.save(args.out)
    rng = random.Random(1)
    lengths = []
    for _ in range(500):
        facts = invented_facts(rng)
        lengths.append(len(tokenizer.encode(sample_script(facts, rng), specials=False)))
    print(
        f"{tokenizer.vocab_size} tokens; scripts: mean {sum(lengths) / len(lengths):.0f}, "
        f"longest {max(lengths)}"
    )


if __name__ == "__main__":
    main()
