"""Prompts that the nano's draft head is trained and measured on.

In turns: the opening of a policy episode with an invented task; and the first tokens of a grammar
script as plain text, to be continued past its end. Where `--dialogues` names the file of
scripts.nano.agent_dialogues, every ninth is one of the agent's turns. No text of a val competition.
One `{"prompt_ids": …}` a line, as `python -m model.draft sample` reads it.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from model.chat_format import render_ids
from model.draft_data import TokenRow, write_rows
from model.tokenizer import Tokenizer
from rl.envs.mle.grammar import invented_facts, sample_script
from rl.envs.mle.prompts import task_messages
from rl.sft_data import dialogue_pairs, read_dialogues


def policy_prompts(tokenizer: Tokenizer, rng: random.Random) -> Iterator[TokenRow]:
    """Openings of episodes, as the rollout renders them."""
    while True:
        yield TokenRow(tuple(render_ids(task_messages(invented_facts(rng)), None, tokenizer)))


def text_prompts(tokenizer: Tokenizer, rng: random.Random) -> Iterator[TokenRow]:
    """Beginnings of scripts behind a line of comment; the reply goes on for 128 tokens."""
    while True:
        facts = invented_facts(rng)
        text = f"# {rng.randrange(1000)} {facts.kind}\n{sample_script(facts, rng)}"
        ids = tokenizer.encode(text)
        yield TokenRow(tuple(ids[: rng.randint(8, 64)]), max_new=128, ignore_eos=True)


def agent_prompts(path: Path, tokenizer: Tokenizer, rng: random.Random) -> Iterator[TokenRow]:
    """The agent's turns over digests."""
    records = read_dialogues(path)
    while True:
        for prompt, _ in dialogue_pairs(rng.choice(records), tokenizer):
            yield TokenRow(tuple(prompt), max_new=160)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=Path("model/checkpoints/nano"))
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dialogues", type=Path, default=None)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(argv)
    tokenizer, rng = Tokenizer.load(options.checkpoint), random.Random(options.seed)
    kinds = [policy_prompts(tokenizer, rng), text_prompts(tokenizer, rng)] * 4
    if options.dialogues is not None:
        kinds.append(agent_prompts(options.dialogues, tokenizer, rng))
    write_rows(options.out, (next(kinds[i % len(kinds)]) for i in range(options.count)))


if __name__ == "__main__":
    main()
