"""`jit`: trace and compile pure functions once per signature of their arguments."""

from ._donate import DonatedError as DonatedError
from ._export import LoadedJitted as LoadedJitted
from ._export import load_jitted as load_jitted
from ._jit import jit as jit
from ._jitted import CacheInfo as CacheInfo
from ._jitted import Jitted as Jitted
from ._jitted import Lowered as Lowered
from ._purity import TracingError as TracingError
from ._replay import CudaGraph as CudaGraph
