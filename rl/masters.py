"""AdamW over float32 masters of weights that compute in bfloat16 (mixed precision).

A bfloat16 weight of 1 moves by no step below 2⁻⁸; an RL update moves it by about 1e-5. So the
optimiser keeps float32 masters and moments, gradients are added up in float32, and the model's
weights are the masters rounded. Weights that are float32 in the model are their own masters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rl.config import OptimSection


class MasterAdamW:
    """One optimiser step over `parameters`; `masters[i]` is the exact value of `parameters[i]`."""

    def __init__(self, parameters: Sequence[nn.Parameter], optim: OptimSection) -> None:
        self.parameters = list(parameters)
        self.masters: list[Tensor] = [
            p if p.dtype != torch.bfloat16 else p.detach().float() for p in self.parameters
        ]
        self._short = [
            (p, m) for p, m in zip(self.parameters, self.masters, strict=True) if p is not m
        ]
        for parameter, master in self._short:
            parameter.register_post_accumulate_grad_hook(_Widen(master))  # type: ignore[no-untyped-call]
        matrices = [m for m in self.masters if m.dim() >= 2]
        vectors = [m for m in self.masters if m.dim() < 2]
        fused = bool(self.masters) and self.masters[0].is_cuda
        self._adam = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": optim.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=optim.lr,
            betas=optim.betas,
            eps=optim.eps,
            fused=fused,
            foreach=not fused,
        )
        self._clip = optim.grad_clip

    def clip(self) -> Tensor:
        """Scale the gradients down to the norm `grad_clip`; returns the norm before, 0-dim."""
        return nn.utils.clip_grad_norm_(self.masters, self._clip)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Move the masters, then the model's weights."""
        for group in self._adam.param_groups:
            group["lr"] = lr
        self._adam.step()
        if self._short:
            torch._foreach_copy_([p.data for p, _ in self._short], [m for _, m in self._short])

    def forget(self) -> None:
        """Drop the gradients."""
        for tensor in (*self.masters, *self.parameters):
            tensor.grad = None

    @torch.no_grad()
    def restore(self, index: int, master: Tensor, moments: dict[str, Tensor] | None) -> None:
        """Put back a master and, where there was a step before, its moments and `step`."""
        self.masters[index].copy_(master)
        self.parameters[index].copy_(self.masters[index])
        if moments is not None:
            device = self.masters[index].device
            state = {name: moments[name].to(device) for name in ("exp_avg", "exp_avg_sq")}
            state["step"] = moments["step"].to(device) if self._on_device else moments["step"]
            self._adam.state[self.masters[index]] = state

    def moments(self, index: int) -> dict[str, Tensor] | None:
        """`step`, `exp_avg` and `exp_avg_sq` of a weight; None before the first step."""
        return self._adam.state.get(self.masters[index]) or None

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The optimiser's groups: matrices, which may decay, and vectors, which do not."""
        return self._adam.param_groups

    @property
    def _on_device(self) -> bool:
        return bool(self._adam.defaults["fused"])  # the fused step counts on the device


class _Widen:
    """Adds a parameter's gradient to its master's as soon as it is whole, and frees it."""

    def __init__(self, master: Tensor) -> None:
        self._master = master

    @torch.no_grad()
    def __call__(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        if self._master.grad is None:
            self._master.grad = parameter.grad.float()
        else:
            self._master.grad += parameter.grad
        parameter.grad = None
