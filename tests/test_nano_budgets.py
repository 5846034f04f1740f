"""What the bundled model must read fits its context, by its own tokenizer; and what it was fed."""

import json
from pathlib import Path

from agent_tools.mle_bench.registry import load_suite
from benchmarks.agent_digests import TEST_FILE, read_lines
from model.chat_format import render_ids
from model.config import load_config
from model.tokenizer import Tokenizer
from selfevo.agent_prompts import AGENT_TOOLS, agent_messages, call_message, tool_message

ROOT = Path(__file__).resolve().parent.parent
NANO = ROOT / "model" / "checkpoints" / "nano"
DIGESTS = [json.loads(line) for line in read_lines(TEST_FILE)]


def test_a_digest_has_at_most_300_tokens() -> None:
    tokenizer = Tokenizer.load(NANO)
    lengths = [len(tokenizer.encode(row["digest"], specials=False)) for row in DIGESTS]
    assert len(lengths) >= 50
    assert max(lengths) <= 300


def test_the_agents_prompt_has_at_most_2000_tokens_and_6_tools() -> None:
    tokenizer = Tokenizer.load(NANO)
    longest = max((row["digest"] for row in DIGESTS), key=len)
    messages = agent_messages(
        2,
        2,
        ["control-s0", "control-s1"],
        memory=["r1 rollout.max_new_tokens increase accept diff +12.3"] * 8,
        reviews=["r1 reject : " + "too bold " * 20],
    )
    messages += [call_message("run_digest", {"run": "control-s0"}), tool_message(longest)]
    assert len(AGENT_TOOLS) <= 6
    assert len(render_ids(messages, AGENT_TOOLS, tokenizer)) <= 2000


def test_the_bundled_model_fits_its_limits_and_saw_no_held_out_competition() -> None:
    shards = list(NANO.glob("*.safetensors"))
    assert sum(shard.stat().st_size for shard in shards) <= 20_000_000
    assert max(shard.stat().st_size for shard in shards) <= 12_000_000
    assert load_config(NANO).max_position_embeddings == 4096
    fed = set(json.loads((NANO / "manifest.json").read_text())["competitions"])
    suite = load_suite("offline-small-v0")
    assert fed <= set(suite.ids("train"))
    assert fed.isdisjoint(suite.ids("val"))
