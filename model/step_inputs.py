"""What a decode step needs of its rows beside the model, made once and good until rows come or go.

Everything lies on the device: a step sends nothing there and reads only its tokens back.

Shapes: B rows, S steps ahead.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model.generate import Row, sampler_of

AHEAD = 32  # steps whose numbers to draw with are sent at once


class StepInputs:
    """Sampling settings, columns and numbers of rows that hold `lengths` columns each.

    `numbers` are each row's from `sampling.uniforms`. `column_B` is where the next tokens go.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        lengths: Sequence[int],
        numbers: Sequence[Sequence[float]],
        vocab_size: int,
        device: torch.device,
    ) -> None:
        self.sampler = sampler_of(rows, vocab_size, device)
        self.constrained = any(row.request.constraint is not None for row in rows)
        self.tops = max(row.request.top_logprobs for row in rows)
        self.column_B = torch.tensor(lengths, device=device)
        self._rows, self._numbers, self._device = rows, numbers, device
        self._ahead: list[Tensor] = []

    def uniform_B(self) -> Tensor:
        """The numbers of this step; call it once a step."""
        if not self._ahead:
            numbers_BS = [
                numbers[len(row.ids) : len(row.ids) + AHEAD]
                for row, numbers in zip(self._rows, self._numbers, strict=True)
            ]
            # A row has left before it needs a number that it does not have.
            padded = [[*found, *[0.0] * (AHEAD - len(found))] for found in numbers_BS]
            sent_BS = torch.tensor(padded, dtype=torch.float64, device=self._device)
            self._ahead = list(sent_BS.t().contiguous().unbind())[::-1]
        return self._ahead.pop()
