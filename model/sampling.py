"""Drawing next tokens so that a request's sample depends on nothing but its own seed.

Shapes: B rows, V vocabulary, S steps. Each row's uniforms are drawn before generation starts and
turned into tokens by the inverse of the cumulative distribution, in vocabulary order.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampler:
    """Sampling settings of the rows of one batch; `temperature_B1` is 1 for greedy rows."""

    temperature_B1: Tensor
    greedy_B: Tensor
    top_p_B1: Tensor
    top_k_B1: Tensor
    any_greedy: bool
    all_greedy: bool
    any_filter: bool

    @classmethod
    def of(
        cls,
        temperatures: Sequence[float],
        top_ps: Sequence[float],
        top_ks: Sequence[int],
        vocab_size: int,
        device: torch.device,
    ) -> Sampler:
        """Temperature 0 is greedy; top_k 0 and top_p 1 are no limit."""
        greedy = [t == 0 for t in temperatures]
        # No limit on p is written as 2, which rounding in a cumulative sum cannot reach.
        return cls(
            torch.tensor([t or 1.0 for t in temperatures], device=device)[:, None],
            torch.tensor(greedy, device=device),
            torch.tensor([2.0 if p >= 1 else p for p in top_ps], device=device)[:, None],
            torch.tensor([k or vocab_size for k in top_ks], device=device)[:, None],
            any(greedy),
            all(greedy),
            any(p < 1 or k > 0 for p, k in zip(top_ps, top_ks, strict=True)),
        )

    def take(self, rows: Tensor) -> Sampler:
        """The settings of these rows only."""
        return Sampler(
            self.temperature_B1[rows],
            self.greedy_B[rows],
            self.top_p_B1[rows],
            self.top_k_B1[rows],
            self.any_greedy,
            self.all_greedy,
            self.any_filter,
        )

    def draw(
        self, logits_BV: Tensor, uniform_B: Tensor, allowed_BV: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids (B), their log-probs (B) under the softmax at the row's temperature, and those
        of all tokens (B, V).

        `uniform_B` are this step's numbers from `uniforms`. `allowed_BV`, top_k and top_p limit
        what is drawn; the log-prob is that of the full softmax, which is what a trainer's forward
        pass can compute again.
        """
        logp_BV = torch.log_softmax(logits_BV / self.temperature_B1, dim=-1)
        limited_BV = logp_BV
        if allowed_BV is not None:
            limited_BV = torch.log_softmax(logp_BV.masked_fill(~allowed_BV, -torch.inf), dim=-1)
        if self.all_greedy:
            id_B1 = limited_BV.argmax(-1, keepdim=True)
        else:
            id_B1 = self._invert(limited_BV.exp(), uniform_B)
        if self.any_greedy and not self.all_greedy:
            best_B1 = limited_BV.argmax(-1, keepdim=True)
            id_B1 = torch.where(self.greedy_B[:, None], best_B1, id_B1)
        return id_B1[:, 0], logp_BV.gather(1, id_B1)[:, 0], logp_BV

    def _invert(self, weight_BV: Tensor, uniform_B: Tensor) -> Tensor:
        if self.any_filter:
            weight_BV = self._filter(weight_BV)
        cumulative_BV = weight_BV.cumsum(-1, dtype=torch.float64)
        point_B1 = uniform_B[:, None] * cumulative_BV[:, -1:]
        return torch.searchsorted(cumulative_BV, point_B1, right=True)

    def _filter(self, weight_BV: Tensor) -> Tensor:
        """Zero all but the k most likely, then all but the smallest set of probability ≥ p."""
        sorted_BV, index_BV = weight_BV.sort(dim=-1, descending=True, stable=True)
        rank_V = torch.arange(weight_BV.shape[1], device=weight_BV.device)
        sorted_BV = sorted_BV.masked_fill(rank_V >= self.top_k_B1, 0.0)
        before_BV = sorted_BV.cumsum(-1) - sorted_BV
        sorted_BV = sorted_BV.masked_fill(
            before_BV >= self.top_p_B1 * sorted_BV.sum(-1, keepdim=True), 0.0
        )
        return torch.zeros_like(weight_BV).scatter_(1, index_BV, sorted_BV)


def uniforms(seed: int | None, steps: int) -> Tensor:
    """The numbers (S, float64) that a request draws its tokens with; None is a random seed.

    Those of fewer steps are the first of those of more.
    """
    # Kept a little below 1, so that its product with a total stays below the total when rounded
    # and the drawn token always has a positive probability.
    generator = torch.Generator().manual_seed(secrets.randbits(63) if seed is None else seed)
    return torch.rand(steps, dtype=torch.float64, generator=generator) * (1 - 2.0**-50)
