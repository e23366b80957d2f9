"""A key without numbers, for finding out names and shapes."""

import torch

NOWHERE = torch.empty(2, dtype=torch.uint64, device="meta")
"""A key on the meta device: what is drawn from it has a name, a shape and a dtype, and costs nothing."""
