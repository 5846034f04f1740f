"""Rows that begin alike are computed once, and nothing about the numbers shows it."""

import itertools
import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model import shared_prefix
from model.config import ModelConfig
from model.scoring import score_tokens
from model.shared_prefix import find_groups, lay_out
from model.transformer import Transformer

CONFIG = ModelConfig(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    rotary_dim=4,
    num_local_experts=4,
    num_experts_per_tok=2,
    max_position_embeddings=64,
)

Rows = list[list[int]]


def padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    ids_BT = torch.full((len(rows), max(map(len, rows))), 49)
    for row, ids in zip(ids_BT, rows, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    return ids_BT, torch.tensor([len(ids) for ids in rows])


def forest(seed: int) -> Rows:
    """Rows of groups with prompts of their own, copies, loners, and very short ones, shuffled."""
    rng = random.Random(seed)

    def some(low: int, high: int) -> list[int]:
        return [rng.randrange(48) for _ in range(rng.randint(low, high))]

    rows: Rows = []
    for _ in range(rng.randint(1, 3)):
        prompt = some(1, 20)
        rows += [prompt + some(0, 12) for _ in range(rng.randint(1, 5))]
        rows.append(rows[-1][:])
    rows += [some(1, 20) for _ in range(rng.randint(0, 3))]
    rows.append([7])
    rng.shuffle(rows)
    return rows


def alone(model: Transformer, rows: Rows, temperature: float) -> Tensor:
    """The definition: every row by itself, every token from the plain forward pass; (B, T)."""
    logp_BT = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.float64)
    for b, row in enumerate(rows):
        logits_TV = model(torch.tensor([row]))[0] / temperature
        for t in range(1, len(row)):
            logp_BT[b, t] = logits_TV[t - 1].log_softmax(-1)[row[t]]
    return logp_BT


@pytest.mark.parametrize("seed", range(12))
def test_scores_and_gradients_equal_those_of_rows_alone(seed: int) -> None:
    rows = forest(seed)
    model = Transformer(CONFIG, seed=seed).cast(torch.float64)
    weight_BT = torch.rand(len(rows), max(map(len, rows)), dtype=torch.float64) - 0.5

    expected_BT = alone(model, rows, 0.7)
    (expected_BT * weight_BT).sum().backward()  # type: ignore[no-untyped-call]
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    ids_BT, lengths_B = padded(rows)
    assert find_groups(ids_BT, (lengths_B - 1).tolist()).saved > 0
    temperature_B = torch.full((len(rows),), 0.7, dtype=torch.float64)
    logp_BT = score_tokens(model, ids_BT, lengths_B, temperature=temperature_B).logp_BT
    (logp_BT * weight_BT).sum().backward()  # type: ignore[no-untyped-call]
    assert torch.allclose(logp_BT, expected_BT, rtol=0, atol=1e-12)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad, expected[name], rtol=0, atol=1e-12), name


def test_a_group_of_samples_costs_its_prompt_once() -> None:
    prompt = list(range(30))
    rows = [prompt + [40 + i] * 5 for i in range(8)]
    layout = lay_out(*padded(rows), CONFIG, tree=False)
    assert len(layout.row_M) == 30 + 8 * 4  # a row's last token predicts nothing


def test_rows_with_little_in_common_are_packed_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("shared")

    monkeypatch.setattr(shared_prefix, "SharedPrefixAttend", refuse)
    rows = [[1, *[b] * 20] for b in range(2, 6)]
    assert len(lay_out(*padded(rows), CONFIG, tree=False).row_M) == 4 * 20


def saved_by(partition: Sequence[Rows]) -> int:
    saved = 0
    for group in partition:
        same = list(
            itertools.takewhile(lambda column: len(set(column)) == 1, zip(*group, strict=False))
        )
        saved += len(same) * (len(group) - 1)
    return saved


def best_by_trial(rows: Rows) -> int:
    """Most tokens saved by any split of the sorted rows into neighbours."""
    rows = sorted(rows)
    return max(
        saved_by([rows[a:b] for a, b in itertools.pairwise((0, *cuts, len(rows)))])
        for count in range(len(rows))
        for cuts in itertools.combinations(range(1, len(rows)), count)
    )


@settings(max_examples=150)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=7))
def test_groups_save_as_much_as_any_and_share_what_they_say(rows: Rows) -> None:
    ids_BT, lengths_B = padded(rows)
    groups = find_groups(ids_BT, lengths_B.tolist())
    assert groups.saved == best_by_trial(rows)
    for g, prefix in enumerate(groups.prefix_G):
        members = [row for row, group in zip(rows, groups.group_B, strict=True) if group == g]
        assert len(members) > 1
        assert len({tuple(row[:prefix]) for row in members}) == 1
        assert min(map(len, members)) >= prefix > 0
