"""Generation: log-probs that training can compute again, and samples that stand alone."""

from dataclasses import replace

import pytest
import torch
from small_model import CONFIG, VOCAB

from model.cache import KVCache
from model.errors import ModelError
from model.generate import Engine, GenRequest
from model.scoring import score_tokens, token_logprobs
from model.transformer import Transformer


@pytest.fixture(scope="module")
def policy():
    return Transformer(CONFIG, seed=0)


@pytest.fixture
def engine(policy):
    return Engine(policy)


def prompts():
    """Five prompts of different lengths."""
    generator = torch.Generator().manual_seed(5)
    return [
        tuple(torch.randint(0, VOCAB, (n,), generator=generator).tolist()) for n in (9, 3, 14, 9, 1)
    ]


def requests(**settings):
    """Ten requests: each prompt twice, with other seeds, lengths and stop ids."""
    return [
        GenRequest(
            prompt,
            20 + 5 * (i % 3),
            seed=i,
            stop_ids=frozenset({i % VOCAB, 7}),
            **settings,
        )
        for i, prompt in enumerate(prompts() * 2)
    ]


def rescored(model, request, generation, temperature):
    ids = [*request.prompt_ids, *generation.ids]
    with torch.no_grad():
        logp_BT = token_logprobs(
            model, torch.tensor([ids]), torch.tensor([len(ids)]), temperature=temperature
        )
    return logp_BT[0, len(request.prompt_ids) :]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_equal_rescoring(engine, policy, temperature):
    asked = requests(temperature=temperature)
    generated = engine.generate(asked)
    for request, generation in zip(asked, generated, strict=True):
        expected = rescored(policy, request, generation, temperature)
        got = torch.tensor(generation.logprobs)
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
    assert max(len(g.ids) for g in generated) > 15
    assert {g.finish_reason for g in generated} == {"stop", "length"}


def test_a_sample_depends_on_its_own_seed_only(engine, policy):
    asked = requests()
    together = engine.generate(asked)
    for request, generation in zip(asked, together, strict=True):
        (alone,) = engine.generate([request])
        assert alone.ids == generation.ids
        torch.testing.assert_close(
            torch.tensor(alone.logprobs), torch.tensor(generation.logprobs), atol=1e-5, rtol=0
        )
    small_batches = Engine(policy, max_batch=3).generate(asked[::-1])[::-1]
    assert [g.ids for g in small_batches] == [g.ids for g in together]
    other = engine.generate([replace(request, seed=99 + i) for i, request in enumerate(asked)])
    assert [g.ids for g in other] != [g.ids for g in together]
    filtered = engine.generate([*asked, replace(asked[0], top_p=0.5, top_k=9, temperature=0.3)])
    assert [g.ids for g in filtered[:-1]] == [g.ids for g in together]


def test_no_seed_draws_a_new_sample_each_time(engine):
    request = GenRequest(prompts()[0], 20)
    (a,), (b,) = engine.generate([request]), engine.generate([request])
    assert a.ids != b.ids


def test_stopping(engine):
    for request, generation in zip(requests(), engine.generate(requests()), strict=True):
        assert not request.stop_ids & set(generation.ids[:-1])
        assert len(generation.ids) == len(generation.logprobs) <= request.max_new_tokens
        if generation.finish_reason == "stop":
            assert generation.ids[-1] in request.stop_ids
        else:
            assert len(generation.ids) == request.max_new_tokens
            assert generation.ids[-1] not in request.stop_ids
        assert not generation.constrained


def test_greedy_takes_the_best_token_and_reports_temperature_one(engine, policy):
    request = GenRequest(prompts()[2], 12, temperature=0.0, seed=3)
    sampled = replace(request, temperature=1.0)
    generation = engine.generate([sampled, request])[1]
    ids = [*request.prompt_ids, *generation.ids]
    with torch.no_grad():
        best_T = policy(torch.tensor([ids]))[0].argmax(-1)
    assert best_T[len(request.prompt_ids) - 1 : -1].tolist() == generation.ids
    expected = rescored(policy, request, generation, 1.0)
    torch.testing.assert_close(torch.tensor(generation.logprobs), expected, atol=1e-4, rtol=0)


def test_top_k_and_top_p_limit_samples_but_not_logprobs(engine, policy):
    asked = [GenRequest((5, 6), 30, seed=i, top_k=3) for i in range(8)]
    asked += [GenRequest((5, 6), 30, seed=i, top_p=0.4) for i in range(8)]
    for request, generation in zip(asked, engine.generate(asked), strict=True):
        ids = [*request.prompt_ids, *generation.ids]
        with torch.no_grad():
            probs_TV = policy(torch.tensor([ids]))[0].softmax(-1)
        for t, id in enumerate(generation.ids, start=1):
            larger_V = probs_TV[t][probs_TV[t] > probs_TV[t, id]]
            if request.top_k:
                assert len(larger_V) < 3
            else:
                assert larger_V.sum() < 0.4
        expected = rescored(policy, request, generation, 1.0)
        torch.testing.assert_close(torch.tensor(generation.logprobs), expected, atol=1e-4, rtol=0)


def test_samples_follow_the_distribution(engine, policy):
    count, prompt = 2000, prompts()[1]
    asked = [GenRequest(prompt, 1, seed=i, temperature=2.0) for i in range(count)]
    drawn = [g.ids[0] for g in Engine(policy, max_batch=count).generate(asked)]
    share_V = torch.tensor(drawn).bincount(minlength=VOCAB) / count
    with torch.no_grad():
        probs_V = (policy(torch.tensor([prompt]))[0, -1] / 2.0).softmax(-1)
    assert (share_V - probs_V).abs().max() < 4 * (0.25 / count) ** 0.5
    assert probs_V.max() < 0.9


class Alternate:
    """Even ids, then odd ids, … ; ends itself after `limit` tokens; every third step is free."""

    def __init__(self, limit, dead_end=False):
        self.taken, self.limit, self.dead_end = [], limit, dead_end

    def mask(self):
        if self.dead_end and len(self.taken) == 2:
            return torch.zeros(VOCAB, dtype=torch.bool)
        if len(self.taken) % 3 == 2:
            return None
        return torch.arange(VOCAB) % 2 == len(self.taken) % 3

    def accept(self, id):
        self.taken.append(id)

    def done(self):
        return len(self.taken) >= self.limit


@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_constraints_limit_tokens_and_leave_logprobs_alone(engine, policy, temperature):
    asked = requests()
    plain = engine.generate(asked)
    limits = [3, 8, 5]
    held = [
        GenRequest(prompt, 30, temperature, seed=i, constraint=Alternate(limits[i]))
        for i, prompt in enumerate(prompts()[:3])
    ]
    mixed = engine.generate([*held, *asked])
    assert [g.ids for g in mixed[3:]] == [g.ids for g in plain]
    for request, generation, limit in zip(held, mixed, limits, strict=False):
        assert generation.constrained and generation.finish_reason == "stop"
        assert generation.ids == request.constraint.taken and len(generation.ids) == limit
        for t, id in enumerate(generation.ids):
            assert t % 3 == 2 or id % 2 == t % 3
        expected = rescored(policy, request, generation, 1.0)
        torch.testing.assert_close(torch.tensor(generation.logprobs), expected, atol=1e-4, rtol=0)


def test_a_constraint_with_no_way_on_ends_its_row_only(engine):
    asked = requests()[:2]
    stuck = GenRequest(prompts()[0], 30, seed=1, constraint=Alternate(9, dead_end=True))
    generated = engine.generate([*asked, stuck])
    assert len(generated[2].ids) == 2 and generated[2].finish_reason == "stop"
    assert [g.ids for g in generated[:2]] == [g.ids for g in engine.generate(asked)]


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (GenRequest((1,) * 100, 29), "100 prompt .* 29 new .* 128"),
        (GenRequest((), 5), "empty"),
        (GenRequest((1, VOCAB), 5), "0 to 60"),
        (GenRequest((1,), 0), "max_new_tokens"),
        (GenRequest((1,), 5, temperature=-1.0), "temperature"),
        (GenRequest((1,), 5, top_p=0.0), "top_p"),
    ],
)
def test_requests_that_cannot_be_served(engine, request_, said):
    with pytest.raises(ModelError, match=said):
        engine.generate([requests()[0], request_])


def test_the_whole_context_can_be_used(engine, policy):
    request = GenRequest((1,) * 100, 28, seed=0)
    (generation,) = engine.generate([request])
    assert len(generation.ids) == 28
    expected = rescored(policy, request, generation, 1.0)
    torch.testing.assert_close(torch.tensor(generation.logprobs), expected, atol=1e-4, rtol=0)


def test_new_weights_and_versions(policy):
    engine = Engine(policy)
    request = requests()[0]
    (first,) = engine.generate([request])
    assert first.version == 0
    engine.load(Transformer(CONFIG, seed=1), version=4)
    (second,) = engine.generate([request])
    assert second.version == 4 and second.ids != first.ids
    engine.load(policy, version=5)
    assert engine.generate([request])[0].ids == first.ids
    assert engine.generate([]) == []


@torch.no_grad()
def test_padding_on_either_side_changes_nothing(policy):
    rows = [torch.tensor(prompt) for prompt in prompts()]
    width = max(len(row) for row in rows)
    right = torch.stack([torch.cat([r, torch.full((width - len(r),), 3)]) for r in rows])
    left = torch.stack([torch.cat([torch.full((width - len(r),), 3), r]) for r in rows])
    pad_left_B = torch.tensor([width - len(r) for r in rows])
    right_logits, left_logits = policy(right), policy(left, pad_left_B=pad_left_B)
    for i, row in enumerate(rows):
        alone = policy(row[None])[0]
        torch.testing.assert_close(right_logits[i, : len(row)], alone, atol=1e-5, rtol=0)
        torch.testing.assert_close(left_logits[i, width - len(row) :], alone, atol=1e-5, rtol=0)
    assert not left_logits.isnan().any()
    cache = KVCache(CONFIG, len(rows), width, policy.device, policy.dtype)
    parts = [
        policy(part, pad_left_B=pad_left_B, cache=cache) for part in left.split([9, 4, 1], dim=1)
    ]
    torch.testing.assert_close(parts[-1], left_logits[:, -1:], atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_cache_gives_the_logits_of_the_whole_row(policy):
    ids = torch.tensor([prompts()[2], prompts()[2][::-1]])
    whole = policy(ids)
    cache = KVCache(CONFIG, 2, 20, policy.device, policy.dtype)
    parts = [policy(part, cache=cache) for part in ids.split([5, 1, 8], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=0)


def test_scores_of_a_padded_batch_and_their_gradient(policy, monkeypatch):
    rows = [*prompts()]
    width = max(len(row) for row in rows)
    ids_BT = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    lengths_B = torch.tensor([len(row) for row in rows])
    scores = score_tokens(policy, ids_BT, lengths_B, temperature=0.7)
    for i, row in enumerate(rows):
        logp_TV = (policy(torch.tensor([row]))[0] / 0.7).log_softmax(-1)
        for t in range(1, len(row)):
            assert abs(scores.logp_BT[i, t].item() - logp_TV[t - 1, row[t]].item()) < 1e-4
            entropy = torch.distributions.Categorical(logits=logp_TV[t - 1]).entropy()
            assert abs(scores.entropy_BT[i, t].item() - entropy.item()) < 1e-4
        assert not scores.logp_BT[i, len(row) :].any() and scores.logp_BT[i, 0] == 0

    def gradient():
        policy.zero_grad()
        score_tokens(policy, ids_BT, lengths_B).logp_BT.sum().backward()
        return policy.lm_head.grad.clone(), policy.embed_tokens.grad.clone()

    at_once = gradient()
    monkeypatch.setattr("model.scoring.PIECE_NUMBERS", 7 * VOCAB)
    for whole, pieces in zip(at_once, gradient(), strict=True):
        assert whole.abs().max() > 0
        torch.testing.assert_close(whole, pieces, atol=1e-4, rtol=1e-4)
    wanted_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
    wanted_BT[:, 5:] = True
    some = score_tokens(policy, ids_BT, lengths_B, temperature=0.7, wanted_BT=wanted_BT)
    torch.testing.assert_close(some.logp_BT, scores.logp_BT * wanted_BT, atol=1e-5, rtol=0)
    none = score_tokens(policy, ids_BT, torch.ones(len(rows), dtype=torch.long))
    assert not none.logp_BT.any()
    with pytest.raises(ModelError, match="length of 99"):
        score_tokens(policy, ids_BT, torch.tensor([99] * len(rows)))
