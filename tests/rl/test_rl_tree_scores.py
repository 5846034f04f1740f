"""One pass over a prefix tree against one pass a call: log-probs and all gradients, float64."""

import random
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F

from model.config import PRESETS
from model.moe import RoutingTape
from model.transformer import Transformer
from rl.prefix_tree import build_packs
from rl.tree_scores import score_pack

DENSE = replace(
    PRESETS["nano"],
    vocab_size=23,
    hidden_size=24,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    rotary_dim=4,
    num_local_experts=1,
    num_experts_per_tok=1,
    max_position_embeddings=128,
    initializer_range=0.3,
)
MOE = replace(DENSE, num_local_experts=6, num_experts_per_tok=2)
WINDOWS = replace(MOE, attn_type_list=(2, 1), sliding_window=5, num_sink_tokens=2)


@dataclass(frozen=True)
class One:
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]


def episodes(seed):
    """Branching dialogues 18 turns deep, equal calls, a call that is another's beginning, and a
    fork at the first token of a response."""
    rng = random.Random(seed)

    def draw(count):
        return tuple(rng.randrange(23) for _ in range(count))

    calls, history = [], draw(3)
    for turn in range(18):
        answer = draw(2)
        calls.append(One(history, answer))
        if turn % 5 == 0:
            calls.append(One(history, draw(3)))  # a sibling
            calls.append(One(history, (answer[0], *draw(2))))  # parts at its second token
            calls.append(calls[-1])
        history = history + answer + draw(1)
    calls.append(One(history[:6], history[6:11]))  # a path that other calls go on from
    calls.append(One(draw(4), draw(5)))  # nothing shared
    return calls


def alone(model, call, temperature):
    """log-probs of one call's response by a pass of its own."""
    ids = torch.tensor([[*call.prompt_ids, *call.response_ids]])
    table = F.log_softmax(model(ids[:, :-1])[0] / temperature, -1)
    start = len(call.prompt_ids) - 1
    return table[start:].gather(1, ids[0, start + 1 :, None])[:, 0]


@pytest.mark.parametrize("config", [DENSE, MOE, WINDOWS], ids=["dense", "moe", "windows"])
@pytest.mark.parametrize("budget", [None, 40, 70])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["f64", "f32"]
)
def test_a_tree_gives_every_calls_log_probs_and_gradients(config, budget, dtype, tolerance):
    model = Transformer(config, seed=1).cast(dtype)
    calls = [call for call in episodes(3) if budget is None or len(call.prompt_ids) < budget - 5]
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(len(c.response_ids), generator=generator).to(dtype) for c in calls]

    expected = [alone(model, call, 0.7) for call in calls]
    sum((w * x).sum() for w, x in zip(weights, expected, strict=True)).backward()
    theirs = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()

    packs = build_packs(calls, budget)
    assert (len(packs) > 1) == (budget is not None)
    for pack in packs:
        logp_n, _ = score_pack(model, pack, 0.7)
        weight_n = torch.stack(
            [weights[c][t] for c, t in zip(pack.call_n, pack.offset_n, strict=True)]
        )
        found = torch.stack(
            [expected[c][t] for c, t in zip(pack.call_n, pack.offset_n, strict=True)]
        )
        assert (logp_n - found).abs().max() <= tolerance * 10
        (weight_n * logp_n).sum().backward()
    for mine, other in zip((p.grad for p in model.parameters()), theirs, strict=True):
        assert (mine - other).norm() <= tolerance * max(1.0, float(other.norm()))


def test_load_is_counted_by_multiplicity():
    model = Transformer(MOE, seed=1).double()
    calls = episodes(5)
    (pack,) = build_packs(calls)
    tape = RoutingTape(multiplicity_M=torch.from_numpy(pack.calls_M))
    score_pack(model, pack, 1.0, tape)
    apart = 0
    for call in calls:
        one = RoutingTape()
        ids = torch.tensor([[*call.prompt_ids, *call.response_ids][:-1]])
        model(ids, tape=one)
        apart = apart + one.load_LE
    assert torch.equal(tape.load_LE, apart)
