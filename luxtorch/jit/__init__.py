"""Compiling pure functions: traced once for each kind of arguments, then called without guards."""

from ._donate import DonatedError as DonatedError
from ._jit import jit as jit
from ._jitted import CacheInfo as CacheInfo
from ._jitted import Jitted as Jitted
from ._jitted import Lowered as Lowered
from ._purity import TracingError as TracingError
from ._replay import CudaGraph as CudaGraph
