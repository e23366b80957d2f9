"""What layers of several families need."""

from __future__ import annotations

import torch
from torch import Tensor

HALVES = (torch.float16, torch.bfloat16)


def widened(x: Tensor) -> Tensor:
    """Return an input of half precision in single precision on the CPU, for kernels that know no half there."""
    return x.float() if x.dtype in HALVES and x.device.type == "cpu" else x
