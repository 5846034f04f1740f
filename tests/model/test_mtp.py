"""Multi-token prediction: modules, loss, schedule, growth, and the loss of draft heads."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from small_model import CONFIG, VOCAB, make_uneven

from model.attention import CausalAttend
from model.draft_loss import draft_loss, top_k_kl
from model.errors import ModelError
from model.mtp import (
    MTP,
    MTPSchedule,
    Shared,
    begin_like,
    draft_config,
    grow,
    mtp_loss,
    settled,
)
from model.transformer import Transformer

DENSE = draft_config(CONFIG, experts=1, top_k=1, width=24)


def a_model() -> Transformer:
    return make_uneven(Transformer(CONFIG, seed=1), 2, 0.3).cast(torch.float64)


@torch.no_grad()
def modules(config=DENSE, count=1, seed=3) -> MTP:
    mtp = MTP(config, count, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for weight in mtp.parameters():
        if weight.dim() == 1:
            weight.uniform_(0.5, 1.5, generator=generator)
    return mtp.cast(torch.float64)


def naive_depths(model, mtp, ids):
    """h^i_t of one row by the definition, without batches or padding: lists over depths."""
    h = model.hidden(torch.tensor([ids]))[0]
    out = []
    for i, module in enumerate(mtp.layers, 1):
        rows = len(ids) - i
        if rows < 1:
            break
        joined = []
        for t in range(rows):
            e = model.embed_tokens[ids[t + i]]
            e = e / (e.pow(2).mean() + CONFIG.rms_norm_eps).sqrt() * module.enorm.weight
            p = h[t] / (h[t].pow(2).mean() + CONFIG.rms_norm_eps).sqrt() * module.hnorm.weight
            joined.append(module.eh_proj @ torch.cat([e, p]))
        cos, sin = model.rotary[:, :rows].double().unsqueeze(2)
        h = module.block(torch.stack(joined), cos, sin, CausalAttend(mtp.config, 1, rows))
        out.append(h)
    return out


def naive_loss(model, mtp, rows):
    sums, counts = [0.0] * mtp.count, [0] * mtp.count
    for ids in rows:
        for i, h in enumerate(naive_depths(model, mtp, ids), 1):
            for t in range(len(ids) - i - 1):
                normed = F.rms_norm(
                    h[t], (CONFIG.hidden_size,), mtp.layers[i - 1].norm.weight, CONFIG.rms_norm_eps
                )
                logp = (model.lm_head @ normed).log_softmax(0)
                sums[i - 1] -= logp[ids[t + i + 1]]
                counts[i - 1] += 1
    return sum(s / n if n else 0.0 for s, n in zip(sums, counts, strict=True)) / mtp.count


ROWS = [[3, 9, 1, 7, 22, 60, 5, 5, 41], [8, 2, 30, 30, 4], [11, 50], [6, 17, 33]]


def padded(rows):
    width = max(map(len, rows))
    # Right padding is not token 0, so that whatever looks at it is seen.
    ids = torch.tensor([row + [55] * (width - len(row)) for row in rows])
    return ids, torch.tensor([len(row) for row in rows])


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("config", [DENSE, CONFIG], ids=["dense", "experts"])
def test_the_loss_is_the_definition(count, config):
    model, mtp = a_model(), modules(config, count)
    ids, lengths = padded(ROWS)
    loss = mtp_loss(model, mtp, model.hidden(ids), ids, lengths)
    expected = naive_loss(model, mtp, ROWS)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-10)
    ours = torch.autograd.grad(loss, [*model.parameters(), *mtp.parameters()], allow_unused=True)
    theirs = torch.autograd.grad(
        expected, [*model.parameters(), *mtp.parameters()], allow_unused=True
    )
    for a, b in zip(ours, theirs, strict=True):
        if a is None or b is None:
            assert (a is None or not a.any()) and (b is None or not b.any())
        else:
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_a_detached_loss_reaches_the_modules_only():
    model, mtp = a_model(), modules()
    ids, lengths = padded(ROWS)
    mtp_loss(model, mtp, model.hidden(ids), ids, lengths, detached=True).backward()
    assert all(weight.grad is None for weight in model.parameters())
    assert all(weight.grad is not None for weight in mtp.parameters())
    mtp_loss(model, mtp, model.hidden(ids), ids, lengths).backward()
    assert model.embed_tokens.grad.any() and model.layers[0].self_attn.o_proj.grad.any()


def test_modules_of_a_model_with_windows_see_everything():
    windows = replace(CONFIG, attn_type_list=(2, 2, 1), sliding_window=2)
    assert MTP(windows).config.attn_type_list == () and MTP(windows).config.sliding_window is None
    model = Transformer(windows, seed=1).cast(torch.float64)
    mtp = modules(draft_config(windows, experts=1, top_k=1, width=24))
    ids, lengths = padded(ROWS)
    loss = mtp_loss(model, mtp, model.hidden(ids), ids, lengths)
    torch.testing.assert_close(loss, naive_loss(model, mtp, ROWS), rtol=0, atol=1e-10)


def test_rows_too_short_for_any_target_cost_nothing():
    model, mtp = a_model(), modules(count=2)
    ids, lengths = padded([[4, 5]])
    assert mtp_loss(model, mtp, model.hidden(ids), ids, lengths) == 0


def test_modules_of_another_model_are_refused():
    other = MTP(replace(DENSE, hidden_size=64))
    ids, lengths = padded(ROWS)
    model = a_model()
    with pytest.raises(ModelError, match="hidden_size is 64"):
        mtp_loss(model, other, model.hidden(ids), ids, lengths)
    with pytest.raises(ModelError, match="0 modules"):
        MTP(DENSE, 0)


def test_weight_and_freezing_follow_from_the_step_alone():
    plan = MTPSchedule(steps=100, decay_steps=20, grown_at=80, frozen_steps=5)
    assert [plan.weight(s) for s in (0, 79)] == [0.3, 0.3]
    assert plan.weight(89) == pytest.approx(0.2)
    assert plan.weight(99) == plan.weight(500) == pytest.approx(0.1)
    assert [s for s in range(100) if plan.frozen(s)] == [80, 81, 82, 83, 84]
    assert MTPSchedule(steps=10).weight(9) == 0.3 and not MTPSchedule(steps=10).frozen(0)


def test_a_loss_settles_when_it_stops_falling():
    falling = [10 * 0.9**i for i in range(40)]
    assert not settled(falling[:39]) and not settled(falling)
    assert settled([*falling, *[falling[-1]] * 40])


def test_modules_grow_by_copies_of_the_first():
    mtp = modules(DENSE)
    grown = grow(mtp, 3)
    assert grown.count == 3
    for module in grown.layers:
        for name, tensor in module.state_dict().items():
            assert torch.equal(tensor, mtp.layers[0].state_dict()[name])
    grown.layers[1].eh_proj.data.zero_()  # copies share nothing
    assert grown.layers[2].eh_proj.any() and mtp.layers[0].eh_proj.any()


@pytest.mark.parametrize("layer", [0, -1])
def test_modules_grow_by_copies_of_a_main_layer(layer):
    model, mtp = a_model(), modules(CONFIG)
    grown = grow(mtp, 3, model=model, layer=layer)
    for name, tensor in model.layers[layer].state_dict().items():
        assert torch.equal(
            grown.layers[0].block.state_dict()[name], mtp.layers[0].block.state_dict()[name]
        )
        for module in grown.layers[1:]:
            assert torch.equal(module.block.state_dict()[name], tensor)
    assert torch.equal(grown.layers[2].eh_proj, mtp.layers[0].eh_proj)


def test_what_cannot_grow_says_so():
    with pytest.raises(ModelError, match="cannot grow to 1"):
        grow(modules(), 1)
    with pytest.raises(ModelError, match="another shape"):
        grow(modules(DENSE), 2, model=a_model())
    with pytest.raises(ModelError, match="3 layers, not 7"):
        grow(modules(CONFIG), 2, model=a_model(), layer=7)


def test_a_narrow_module_takes_a_layers_attention():
    model, mtp = a_model(), modules(DENSE)
    begin_like(mtp.layers[0], model)
    own = mtp.layers[0].block
    assert torch.equal(own.self_attn.qkv_proj, model.layers[-1].self_attn.qkv_proj)
    assert torch.equal(own.input_layernorm.weight, model.layers[-1].input_layernorm.weight)


# ------------------------------------------------------------------------------ draft heads


def logits(seed, rows=5, vocab=VOCAB):
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(rows, vocab, generator=generator, dtype=torch.float64)


def test_top_k_kl_is_the_kl_of_k_tokens_and_a_bucket():
    policy, draft = logits(0), logits(1)
    p, q = policy.softmax(-1), draft.softmax(-1)
    for k in (1, 4, VOCAB - 1, VOCAB, 1000):
        expected = []
        for r in range(len(p)):
            best = p[r].argsort(descending=True)[: min(k, VOCAB)]
            parts = [(p[r, v], q[r, v]) for v in best]
            if len(best) < VOCAB:
                parts.append((1 - p[r, best].sum(), 1 - q[r, best].sum()))
            expected.append(sum(a * (a / b).log() for a, b in parts))
        torch.testing.assert_close(top_k_kl(policy, draft, k), torch.stack(expected))
    whole = (p * (p / q).log()).sum(-1)
    torch.testing.assert_close(top_k_kl(policy, draft, VOCAB), whole)
    assert (top_k_kl(policy, draft, 8) <= whole).all()  # merging tokens never adds
    torch.testing.assert_close(top_k_kl(policy, policy + 7, 8), torch.zeros(5).double())


def test_a_policy_that_is_sure_leaves_a_finite_loss():
    policy = torch.zeros(1, VOCAB)
    policy[0, 3] = 200.0
    draft = torch.zeros(1, VOCAB, requires_grad=True)
    found = top_k_kl(policy, draft, 4)
    found.sum().backward()
    assert found.item() == pytest.approx(torch.tensor(VOCAB).log().item(), rel=1e-5)
    assert draft.grad.isfinite().all()


def test_no_gradient_reaches_the_policy():
    model, mtp = a_model(), modules(count=2)
    ids, lengths = padded(ROWS)
    found = draft_loss(model, mtp, ids, torch.tensor([2, 1, 1, 1]), lengths, depths=3)
    found.loss.backward()
    assert all(weight.grad is None for weight in model.parameters())
    for name, weight in mtp.named_parameters():
        assert weight.grad is not None and weight.grad.any(), name


def naive_chain(model, mtp, ids, t, depths):
    """Logits of each depth at column t: what a cache would hold, entry by entry."""
    module, (last, eps) = mtp.layers[0], (len(ids), CONFIG.rms_norm_eps)
    h = model.hidden(torch.tensor([ids]))[0]
    D, heads, kv = CONFIG.head_dim, CONFIG.num_attention_heads, CONFIG.num_key_value_heads
    cache, out = [], []

    def one(previous, token, position):
        block = module.block
        e, p = module.enorm(model.embed_tokens[token]), module.hnorm(previous)
        x = module.eh_proj @ torch.cat([e, p])
        cos, sin = model.rotary[:, position].double().view(2, 1, 1, -1)
        seen = {}

        def attend(layer, q, k, v):
            cache.append((k[0], v[0]))
            keys, values = (torch.stack(list(z)) for z in zip(*cache, strict=True))
            mixed = []
            for n in range(heads):
                g = n // (heads // kv)
                weight = (keys[:, g] @ q[0, n] / D**0.5).softmax(0)
                mixed.append(weight @ values[:, g])
            seen["q"] = q
            return torch.cat(mixed)[None]

        return block(x[None], cos, sin, attend)[0]

    for c in range(t + 1):
        state = one(h[c], ids[c + 1], c)
    for d in range(1, depths + 1):
        normed = F.rms_norm(state, state.shape, module.norm.weight, eps)
        out.append(model.lm_head @ normed)
        if d < depths and t + d + 1 < last:
            state = one(state, ids[t + d + 1], t + d)
    return out


def test_later_depths_see_what_a_chain_of_drafts_sees():
    model, mtp = a_model(), modules()
    ids = ROWS[0]
    policy = model(torch.tensor([ids]))[0]
    batch, lengths = padded(ROWS)
    first = 3
    kls = [[], [], []]
    for t in range(first - 1, len(ids) - 1):
        for d, draft in enumerate(naive_chain(model, mtp, ids, t, 3), 1):
            if t + d < len(ids) - 1:
                p, q = policy[t + d].log_softmax(-1), draft.log_softmax(-1)
                kls[d - 1].append((p.exp() * (p - q)).sum())
    only = torch.tensor([first, 99, 99, 99])  # the other rows have no reply
    found = draft_loss(model, mtp, batch, only, lengths, depths=3, top_k=VOCAB)
    expected = torch.stack([torch.stack(kl).mean() for kl in kls])
    torch.testing.assert_close(found.kl, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(found.loss, expected.mean(), rtol=0, atol=1e-10)


def test_the_first_depths_of_a_draft_are_the_modules():
    model, mtp = a_model(), modules(count=2)
    ids = ROWS[0]
    found = draft_loss(
        model, mtp, torch.tensor([ids]), torch.tensor([1]), torch.tensor([len(ids)]),
        depths=2, top_k=VOCAB,
    )  # fmt: skip
    policy = model(torch.tensor([ids]))[0].log_softmax(-1)
    shared = Shared.of(model)
    for i, h in enumerate(naive_depths(model, mtp, ids), 1):
        h = h[: len(ids) - i - 1]
        draft = mtp.layers[i - 1].logits(shared, h).log_softmax(-1)
        p = policy[i : len(ids) - 1]
        expected = (p.exp() * (p - draft)).sum(-1).mean()
        torch.testing.assert_close(found.kl[i - 1], expected, rtol=0, atol=1e-10)
        both = torch.minimum(p.exp(), draft.exp()).sum(-1).mean()
        torch.testing.assert_close(found.overlap[i - 1], both, rtol=0, atol=1e-10)
