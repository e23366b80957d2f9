"""What is said where a collective fails."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from luxtorch.core import LuxtorchError


class DistributedError(LuxtorchError, RuntimeError):
    """Report that processes failed to work together: one has died, does not answer, or does something else."""


@contextmanager
def collective(what: str) -> Iterator[None]:
    """Explain an error of torch.distributed in what is done inside.

    Args:
        what: The collective, such as "all-reduce".
    """
    try:
        yield
    except LuxtorchError:
        raise
    except RuntimeError as error:
        # What the transport reports has a place in C++ in front, and advice and a stack trace behind.
        message = re.sub(r"^\[[^]]*\] ", "", str(error).strip()).splitlines() or [""]
        raise DistributedError(
            f"The {what} of all ranks failed.",
            expected="every rank to take part, with tensors of the same shapes and dtypes",
            got=f"{type(error).__name__}: {message[0].partition('. ')[0]:.300}",
            fix="Look for the first error of the other ranks: one has died, is too slow for the time-out of "
            "distributed.initialize, or does another thing. Restart from a checkpoint.",
        ) from error
