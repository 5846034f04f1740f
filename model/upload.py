"""Arrays of the host on a device."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def upload(values: Tensor | np.ndarray[Any, Any], device: torch.device) -> Tensor:
    """The values there, in the order of the device's queue: the host does not wait for it, as it
    would for memory that may be paged out."""
    tensor = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
