"""Native guesses and their judging against the torch ones."""

from dataclasses import replace

import pytest
import torch
from small_model import CONFIG, VOCAB, make_uneven

from model.generate import Engine, GenRequest
from model.mtp import MTP, draft_config
from model.native.build import NativeUnavailableError
from model.native.draft import NativeDrafter
from model.native.step import NativeModel
from model.sampling import Sampler
from model.speculative import Guesses, Tail, TorchDrafter, accept, speculate
from model.transformer import Transformer

CPU = torch.device("cpu")
DENSE = draft_config(CONFIG, experts=1, top_k=1, width=24)
FEW = draft_config(CONFIG, experts=3, top_k=2, width=12)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return make_uneven(Transformer(CONFIG, seed=1), 2, 0.3)


@pytest.fixture(scope="module")
def native(model) -> NativeModel:
    return NativeModel(model)


@torch.no_grad()
def modules(config, seed=3) -> MTP:
    mtp = MTP(config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for weight in mtp.parameters():
        if weight.dim() == 1:
            weight.uniform_(0.5, 1.5, generator=generator)
    mtp.layers[0].block.block_sparse_moe.e_score_correction_bias.uniform_(
        -0.2, 0.2, generator=generator
    )
    return mtp


def a_sampler(batch: int) -> Sampler:
    heats = [0.0 if b % 3 == 0 else 0.5 + 0.2 * b for b in range(batch)]
    return Sampler.of(heats, [1.0] * batch, [0] * batch, VOCAB, CPU)


@pytest.mark.parametrize("config", [DENSE, FEW], ids=["dense", "experts"])
@torch.inference_mode()
def test_guesses_are_those_of_torch(model, native, config):
    mtp = modules(config)
    ours, theirs = NativeDrafter(native, mtp), TorchDrafter(model, mtp)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, VOCAB, (n,), generator=generator).tolist() for n in (9, 30, 17, 8)]
    first, start = [0, 4, 0, 2], [0, 4, 0, 2]
    for cut in (4, 3, 0):  # three rounds, each over the columns since the last
        tails = []
        for r, ids in enumerate(rows):
            known = ids[: len(ids) - cut] if cut else ids
            hidden = model.hidden(torch.tensor([known[:-1]]))[0]
            if start[r] < len(hidden):
                tails.append(Tail(known, hidden[start[r] :], start[r], first[r]))
                start[r] = len(hidden)
            else:
                tails.append(Tail(known, hidden[-1:], len(hidden) - 1, first[r]))
        uniform = torch.rand(len(rows), 3, dtype=torch.float64, generator=generator)
        a = ours.propose(tails, a_sampler(len(rows)), uniform)
        b = theirs.propose(tails, a_sampler(len(rows)), uniform)
        assert torch.equal(a.id_Bk, b.id_Bk)
        torch.testing.assert_close(a.logits_BkV, b.logits_BkV, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_a_long_first_tail_is_read_in_parts(model, native):
    long = replace(CONFIG, max_position_embeddings=1024)
    model = make_uneven(Transformer(long, seed=1), 2, 0.3)
    mtp = modules(replace(DENSE, max_position_embeddings=1024))
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, VOCAB, (n,), generator=generator).tolist() for n in (700, 2, 300)]
    tails = [Tail(ids, model.hidden(torch.tensor([ids[:-1]]))[0], 0) for ids in rows]
    uniform = torch.rand(3, 2, dtype=torch.float64, generator=generator)
    a = NativeDrafter(NativeModel(model), mtp).propose(tails, a_sampler(3), uniform)
    b = TorchDrafter(model, mtp).propose(tails, a_sampler(3), uniform)
    assert torch.equal(a.id_Bk, b.id_Bk)
    torch.testing.assert_close(a.logits_BkV, b.logits_BkV, rtol=1e-4, atol=1e-4)


def test_a_drafter_serves_one_batch_after_another():
    """Long rows, then many short ones: its cache has grown both ways."""
    long = replace(CONFIG, max_position_embeddings=512)
    model = make_uneven(Transformer(long, seed=1), 2, 0.3)
    native = NativeModel(model)
    drafter = NativeDrafter(native, modules(replace(DENSE, max_position_embeddings=512)))
    for count, length in ((1, 200), (9, 5), (2, 300), (17, 9)):
        requests = [GenRequest((1, 2, 3 + i), length, seed=i) for i in range(count)]
        made = speculate(model, drafter, requests, rule="match", checker=native)
        plain = Engine(model).generate(requests)
        assert [one.generation.ids for one in made] == [one.ids for one in plain]


@pytest.mark.parametrize("k", [0, 1, 3])
def test_judging_is_that_of_torch(native, k):
    drafter, batch, generator = NativeDrafter(native, modules(DENSE)), 300, torch.Generator()
    generator.manual_seed(k)
    policy = 2 * torch.randn(batch, k + 1, VOCAB, generator=generator)
    draft = policy[:, :k] + torch.randn(batch, k, VOCAB, generator=generator)
    draft[: batch // 3] = policy[: batch // 3, :k]  # nothing is left over where these fail
    sampler = a_sampler(batch)
    uniform = torch.rand(3, batch, k + 1, dtype=torch.float64, generator=generator)
    ids = [sampler.draw(draft[:, i], uniform[0, :, i], None)[0] for i in range(k)]
    guesses = Guesses(torch.stack(ids, 1) if k else torch.empty(batch, 0, dtype=torch.long), draft)
    a = drafter.judge(sampler, policy.view(-1, VOCAB), guesses, uniform[1, :, :k], uniform[2])
    b = accept(sampler, policy, draft, guesses.id_Bk, uniform[1, :, :k], uniform[2])
    assert torch.equal(a.count_B, b.count_B)
    assert torch.equal(a.next_B, b.next_B)
    assert k == 0 or set(a.count_B.tolist()) == set(range(k + 1))
    said = torch.arange(k + 1) <= a.count_B[:, None]
    torch.testing.assert_close(a.logp_Bj[said], b.logp_Bj[said], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", ["reject", "match"])
def test_native_replies_are_those_of_plain_native_decoding(model, native, rule):
    """Bit for bit: a token's numbers do not depend on the other tokens of a call."""
    generator = torch.Generator().manual_seed(0)
    requests = [
        GenRequest(
            tuple(torch.randint(0, VOCAB, (3 + 2 * i,), generator=generator).tolist()),
            40 + i,
            temperature=0.0 if rule == "reject" else 0.9,
            seed=i,
        )
        for i in range(4)
    ]
    drafter = NativeDrafter(native, modules(DENSE))
    for k in (1, 3):
        made = speculate(model, drafter, requests, draft_tokens=k, rule=rule, checker=native)
        plain = Engine(model).generate(requests)
        for ours, theirs in zip(made, plain, strict=True):
            assert ours.generation.ids == theirs.ids


def test_new_weights_are_followed(model):
    own = make_uneven(Transformer(CONFIG, seed=1), 2, 0.3)
    mtp, native = modules(DENSE), NativeModel(own)
    drafter = NativeDrafter(native, mtp)
    with torch.no_grad():
        own.lm_head.mul_(-1.5)
        mtp.layers[0].eh_proj.mul_(0.5)
    native.update(own)
    drafter.update()
    ids = [5, 9, 2, 44]
    tail = Tail(ids, own.hidden(torch.tensor([ids[:-1]]))[0].detach(), 0)
    uniform = torch.full((1, 2), 0.4, dtype=torch.float64)
    with torch.inference_mode():
        a = drafter.propose([tail], a_sampler(1), uniform)
        b = TorchDrafter(own, mtp).propose([tail], a_sampler(1), uniform)
    torch.testing.assert_close(a.logits_BkV, b.logits_BkV, rtol=1e-4, atol=1e-4)


def test_what_it_cannot_run_says_so(native):
    with pytest.raises(NativeUnavailableError, match="2 MTP modules"):
        NativeDrafter(native, MTP(DENSE, 2))
    with pytest.raises(NativeUnavailableError, match="not float32"):
        NativeDrafter(native, MTP(DENSE).cast(torch.float64))
