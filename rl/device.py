"""Where to compute."""

from __future__ import annotations

import os

import torch

from rl.errors import ConfigError


def pick_device(name: str) -> torch.device:
    """`auto` = CUDA if there is one, else CPU; anything else is torch's own device name."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device {name!r} is unknown; use auto, cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {name!r}: no CUDA device here; use auto or cpu")
    return device


PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bfloat16 operations a second, by the vendor's data sheets (SXM)."""


def peak_flops(device: torch.device) -> float | None:
    """What a device could do at most; None where that is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


SMALL_HIDDEN = 512


def settle_threads(device: torch.device, hidden_size: int) -> int:
    """Threads for CPU matrix products; returns how many. OMP_NUM_THREADS, if set, is respected.

    A small model is as fast on one thread as on two (nano: 1.8 s for 24 scripts either way), and
    on a busy machine two threads that wait for each other thousands of times a step cost 20 times
    as much.
    """
    if device.type == "cpu" and hidden_size < SMALL_HIDDEN and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    return torch.get_num_threads()
