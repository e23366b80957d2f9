"""All exceptions of luxtorch: `lt.errors`."""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from ._errors import DTypeError as DTypeError
from ._errors import InputError as InputError
from ._errors import KeyNameError as KeyNameError
from ._errors import LayerError as LayerError
from ._errors import LuxtorchError as LuxtorchError
from .debug import CheckError as CheckError
from .device import DeviceError as DeviceError
from .jit import DonatedError as DonatedError
from .jit import TracingError as TracingError
from .loops import ConvergenceError as ConvergenceError

if _TYPE_CHECKING:
    from .distributed import DistributedError as DistributedError
    from .inspect import NonFiniteError as NonFiniteError
    from .testing import LawError as LawError
    from .training import CheckpointError as CheckpointError

# To catch one of these must not load more than to raise it.
_LATE = {
    "CheckpointError": "training",
    "DistributedError": "distributed",
    "LawError": "testing",
    "NonFiniteError": "inspect",
}


def __getattr__(name: str) -> _Any:
    if name in _LATE:
        return getattr(_import_module(f"luxtorch.{_LATE[name]}"), name)
    raise AttributeError(f"module 'luxtorch.errors' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATE})
