"""Speculative decoding changes how fast tokens come, not which: exact tests and a chi-square."""

import itertools
from dataclasses import replace

import pytest
import torch
from scipy.stats import chi2
from small_model import CONFIG, CONTEXT, VOCAB, make_uneven

from model import speculative
from model.errors import ModelError
from model.generate import Engine, GenRequest
from model.mtp import MTP, draft_config
from model.speculative import Accepted, Guesses, TorchDrafter, speculate
from model.transformer import Transformer

DENSE = draft_config(CONFIG, experts=1, top_k=1, width=24)


def a_model() -> Transformer:
    return make_uneven(Transformer(CONFIG, seed=1), 2, 0.3).cast(torch.float64)


def some_requests(seed=0, **settings) -> list[GenRequest]:
    generator = torch.Generator().manual_seed(seed)
    lengths = (1, 7, 3, 12, 5)
    return [
        GenRequest(
            tuple(torch.randint(0, VOCAB, (n,), generator=generator).tolist()),
            max_new_tokens=6 + 5 * i,
            seed=100 + i,
            **settings,
        )
        for i, n in enumerate(lengths)
    ]


class Perfect(TorchDrafter):
    """Guesses with the policy's own logits: every one is accepted."""

    window = 0

    def __init__(self, model):
        self.model = model  # no modules: it asks the model itself

    def propose(self, tails, sampler, uniform_Bk):
        rows, ids, logits = [list(tail.ids) for tail in tails], [], []
        for d in range(uniform_Bk.shape[1]):
            last = torch.cat([self.model(torch.tensor([row]))[:, -1] for row in rows])
            id_B, _, _ = sampler.draw(last, uniform_Bk[:, d], None)
            for row, id in zip(rows, id_B.tolist(), strict=True):
                row.append(id)
            ids.append(id_B)
            logits.append(last)
        return Guesses(torch.stack(ids, 1), torch.stack(logits, 1))

    def move(self, source, target):
        pass


@pytest.mark.parametrize("rule", ["reject", "match"])
@pytest.mark.parametrize(("count", "k"), [(1, 1), (1, 3), (2, 1), (2, 3), (3, 3), (3, 5)])
def test_greedy_replies_are_those_of_plain_decoding(rule, count, k):
    model = a_model()
    requests = some_requests(temperature=0.0)
    plain = Engine(model).generate(requests)
    made = speculate(
        model, MTP(DENSE, count).cast(torch.float64), requests, draft_tokens=k, rule=rule
    )
    for ours, theirs in zip(made, plain, strict=True):
        assert ours.generation.ids == theirs.ids
        assert ours.generation.finish_reason == theirs.finish_reason
        torch.testing.assert_close(ours.generation.logprobs, theirs.logprobs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("rule", ["reject", "match"])
def test_perfect_drafts_are_all_accepted(rule):
    model = a_model()
    for temperature in (0.0, 0.8):
        requests = some_requests(temperature=temperature)
        for made in speculate(model, Perfect(model), requests, draft_tokens=3, rule=rule):
            assert made.accepted == made.drafted > 0
            assert made.rounds == -(-(len(made.generation.ids) - 1) // 4)


def test_matched_replies_are_the_samples_of_plain_decoding():
    model = a_model()
    requests = some_requests(temperature=0.7)
    requests += [replace(r, top_p=0.8) for r in requests] + [replace(r, top_k=3) for r in requests]
    plain = Engine(model).generate(requests)
    for drafter in (MTP(DENSE, 2).cast(torch.float64), Perfect(model)):
        made = speculate(model, drafter, requests, draft_tokens=2, rule="match")
        assert [one.generation.ids for one in made] == [one.ids for one in plain]


def test_log_probs_are_the_policys_at_the_requests_temperature():
    model = a_model()
    made = speculate(model, MTP(DENSE).cast(torch.float64), some_requests(temperature=0.6))
    for request, one in zip(some_requests(temperature=0.6), made, strict=True):
        ids = [*request.prompt_ids, *one.generation.ids]
        logp = (model(torch.tensor([ids]))[0] / 0.6).log_softmax(-1)
        for n, (id, value) in enumerate(
            zip(one.generation.ids, one.generation.logprobs, strict=True), len(request.prompt_ids)
        ):
            # The sampler keeps temperatures in float32.
            assert value == pytest.approx(logp[n - 1, id].item(), abs=1e-6)


def test_a_reply_does_not_depend_on_the_other_rows():
    model, mtp = a_model(), MTP(DENSE, 2).cast(torch.float64)
    requests = some_requests(temperature=1.0)
    together = speculate(model, mtp, requests, draft_tokens=3)
    for request, one in zip(requests, together, strict=True):
        (alone,) = speculate(model, mtp, [request], draft_tokens=3)
        assert alone.generation.ids == one.generation.ids
        assert (alone.rounds, alone.accepted) == (one.rounds, one.accepted)


def test_a_cached_draft_equals_one_that_reads_everything_again():
    """The drafter's cache after many rounds: its guesses are those of a new drafter."""
    model, mtp = a_model(), MTP(DENSE, 2).cast(torch.float64)

    class Compared(TorchDrafter):
        rounds = 0

        def propose(self, tails, sampler, uniform_Bk):
            made = super().propose(tails, sampler, uniform_Bk)
            whole = [
                replace(t, hidden_WH=model.hidden(torch.tensor([t.ids[:-1]]))[0], start=0)
                for t in tails
            ]
            again = TorchDrafter(model, mtp).propose(whole, sampler, uniform_Bk)
            assert torch.equal(made.id_Bk, again.id_Bk)
            torch.testing.assert_close(made.logits_BkV, again.logits_BkV, rtol=0, atol=1e-9)
            Compared.rounds += 1
            return made

    speculate(model, Compared(model, mtp), some_requests(), draft_tokens=3)
    assert Compared.rounds > 10


def test_stop_ids_and_lengths_end_rows_inside_a_round():
    model = a_model()
    requests = some_requests(temperature=0.0)
    plain = Engine(model).generate(requests)
    stop = plain[4].ids[3]
    requests = [replace(r, stop_ids=frozenset([stop])) for r in requests]
    plain = Engine(model).generate(requests)
    assert {one.finish_reason for one in plain} == {"stop", "length"}
    made = speculate(model, Perfect(model), requests, draft_tokens=4)
    assert [m.generation.ids for m in made] == [p.ids for p in plain]
    assert [m.generation.finish_reason for m in made] == [p.finish_reason for p in plain]


def test_a_row_may_fill_the_whole_context():
    model = a_model()
    request = GenRequest((1, 2, 3), CONTEXT - 3, temperature=0.0)
    (made,) = speculate(model, MTP(DENSE, 2).cast(torch.float64), [request], draft_tokens=3)
    assert made.generation.ids == Engine(model).generate([request])[0].ids
    assert len(made.generation.ids) == CONTEXT - 3


def test_what_drafts_cannot_serve_is_refused():
    model, mtp = a_model(), MTP(DENSE)
    for settings in ({"top_p": 0.9}, {"top_k": 3}, {"top_logprobs": 2}):
        with pytest.raises(ModelError, match="top_p"):
            speculate(model, mtp, [GenRequest((1,), 4, **settings)])
    with pytest.raises(ModelError, match="top_logprobs"):
        speculate(model, mtp, [GenRequest((1,), 4, top_logprobs=2)], rule="match")
    with pytest.raises(ModelError, match="draft_tokens is 0"):
        speculate(model, mtp, [GenRequest((1,), 4)], draft_tokens=0)
    with pytest.raises(ModelError, match="hidden_size"):
        speculate(model, MTP(replace(DENSE, hidden_size=64)), [GenRequest((1,), 4)])
    assert speculate(model, mtp, []) == []
    windows = replace(CONFIG, attn_type_list=(1, 2, 2), sliding_window=8)
    with pytest.raises(ModelError, match="rings forget"):
        speculate(Transformer(windows), mtp, [GenRequest((1,), 4)])


# ------------------------------------------------------------------------- the distribution

TINY = replace(
    CONFIG,
    vocab_size=5,
    hidden_size=32,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    num_local_experts=2,
    num_experts_per_tok=1,
    initializer_range=0.5,
    max_position_embeddings=16,
)
PROMPT, NEW, SAMPLES = (1, 4, 2), 3, 3000


@pytest.fixture(scope="module")
def policy() -> Transformer:
    return make_uneven(Transformer(TINY, seed=5), 6, 0.2).cast(torch.float64)


@torch.no_grad()
def a_draft(kind: str, count: int) -> MTP:
    """Modules as they are drawn, sure of themselves, or sure of the opposite of the model."""
    mtp = MTP(draft_config(TINY, experts=1, top_k=1), count, seed=9)
    if kind != "bad":
        for module in mtp.layers:
            module.norm.weight.fill_({"sure": 8.0, "adversarial": -8.0}[kind])
    return mtp.cast(torch.float64)


def joint(model: Transformer, temperature: float) -> torch.Tensor:
    """The exact probability of every reply of NEW tokens, by enumeration."""
    every = list(itertools.product(range(TINY.vocab_size), repeat=NEW))
    ids = torch.tensor([[*PROMPT, *reply] for reply in every])
    logp = (model(ids) / temperature).log_softmax(-1)
    at = torch.arange(len(PROMPT) - 1, len(PROMPT) - 1 + NEW)
    return logp[:, at].gather(2, ids[:, len(PROMPT) :, None])[:, :, 0].sum(1).exp()


def p_value(model, drafter, k, temperature=0.8, first_seed=0) -> float:
    requests = [
        GenRequest(PROMPT, NEW, temperature=temperature, seed=first_seed + i)
        for i in range(SAMPLES)
    ]
    made = speculate(model, drafter, requests, draft_tokens=k)
    place = TINY.vocab_size ** torch.arange(NEW - 1, -1, -1)
    ids = torch.tensor([one.generation.ids for one in made])
    counts = torch.bincount((ids * place).sum(1), minlength=TINY.vocab_size**NEW)
    expected = SAMPLES * joint(model, temperature)
    rare = expected < 5  # cells too small for the statistic count as one
    observed = torch.cat([counts[~rare].double(), counts[rare].sum()[None].double()])
    wanted = torch.cat([expected[~rare], expected[rare].sum()[None]])
    statistic = ((observed - wanted) ** 2 / wanted).sum().item()
    return float(chi2.sf(statistic, len(wanted) - 1))


@pytest.mark.parametrize(
    ("kind", "count", "k"),
    [("bad", 1, 1), ("bad", 2, 2), ("sure", 1, 2), ("adversarial", 1, 2), ("adversarial", 2, 1)],
)
def test_the_joint_distribution_of_a_reply_is_the_policys(policy, kind, count, k):
    assert p_value(policy, a_draft(kind, count), k) > 1e-3


def test_good_drafts_keep_the_distribution(policy):
    class Nearly(Perfect):
        """The policy's logits, a little off."""

        def propose(self, tails, sampler, uniform_Bk):
            alike = {tuple(t.ids): t for t in tails}
            off = torch.linspace(-0.3, 0.3, TINY.vocab_size).double()
            rows = [list(ids) for ids in alike]
            first = dict(zip(alike, self.model(torch.tensor(rows))[:, -1] + off, strict=True))
            logits_BV = torch.stack([first[tuple(t.ids)] for t in tails])
            id_B, _, _ = sampler.draw(logits_BV, uniform_Bk[:, 0], None)
            return Guesses(id_B[:, None], logits_BV[:, None])

    # One draft a round, and all rows in step: rows of one length are run as one batch.
    assert p_value(policy, Nearly(policy), 1) > 1e-3


@pytest.mark.parametrize("fault", ["accept all", "residual is the policy", "residual is the draft"])
def test_the_statistic_sees_a_wrong_rule(policy, fault, monkeypatch):
    right = speculative.accept

    def wrong(sampler, policy_BjV, draft_BkV, id_Bk, accept_Bk, final_Bj) -> Accepted:
        made = right(sampler, policy_BjV, draft_BkV, id_Bk, accept_Bk, final_Bj)
        k = id_Bk.shape[1]
        if fault == "accept all":
            count_B = torch.full_like(made.count_B, k)
            return replace(made, count_B=count_B)
        logits_BjV = policy_BjV
        if fault == "residual is the draft":
            logits_BjV = torch.cat([draft_BkV, policy_BjV[:, k:]], dim=1)
        at_B = torch.arange(len(made.count_B))
        drawn_B, _, _ = sampler.draw(
            logits_BjV[at_B, made.count_B], final_Bj[at_B, made.count_B], None
        )
        return replace(made, next_B=drawn_B)

    monkeypatch.setattr(speculative, "accept", wrong)
    assert p_value(policy, a_draft("sure", 1), 2) < 1e-6
