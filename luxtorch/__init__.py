"""luxtorch: models as pure functions of explicit parameters and states, for PyTorch.

The usual door is `import luxtorch as lt`. Initializers, optimizers, random draws and the law checker are behind their
own: `lt.init`, `lt.optim`, `lt.random`, `lt.testing`.
"""

from . import init as init
from . import optim as optim
from . import random as random
from . import testing as testing
from .autodiff import HesVec as HesVec
from .autodiff import JacVec as JacVec
from .autodiff import batched_jacobian as batched_jacobian
from .autodiff import gradient as gradient
from .autodiff import hessian as hessian
from .autodiff import hvp as hvp
from .autodiff import jacobian as jacobian
from .autodiff import jacobian_vector_product as jacobian_vector_product
from .autodiff import pullback as pullback
from .autodiff import pushforward as pushforward
from .autodiff import vector_jacobian_product as vector_jacobian_product
from .autodiff import withgradient as withgradient
from .components import ComponentMatrix as ComponentMatrix
from .components import ComponentVector as ComponentVector
from .components import axes as axes
from .components import label_to_index as label_to_index
from .components import labels as labels
from .core import ContainerLayer as ContainerLayer
from .core import DTypeError as DTypeError
from .core import InputError as InputError
from .core import KeyNameError as KeyNameError
from .core import Layer as Layer
from .core import LayerError as LayerError
from .core import LuxtorchError as LuxtorchError
from .core import Static as Static
from .core import WrapperLayer as WrapperLayer
from .core import apply as apply
from .core import initial_parameters as initial_parameters
from .core import initial_states as initial_states
from .core import output_shape as output_shape
from .core import parameter_length as parameter_length
from .core import setup as setup
from .core import state_length as state_length
from .core import stateless_apply as stateless_apply
from .core import test_mode as test_mode
from .core import train_mode as train_mode
from .core import update_state as update_state
from .device import Device as Device
from .device import DeviceError as DeviceError
from .device import bf16 as bf16
from .device import cpu_device as cpu_device
from .device import f16 as f16
from .device import f32 as f32
from .device import f64 as f64
from .device import get_device as get_device
from .device import gpu_device as gpu_device
from .device import to_device as to_device
from .layers import BatchNorm as BatchNorm
from .layers import Chain as Chain
from .layers import Dense as Dense
from .layers import Dropout as Dropout
from .layers import FlattenLayer as FlattenLayer
from .layers import NoOpLayer as NoOpLayer
from .layers import Parallel as Parallel
from .layers import Scale as Scale
from .layers import SkipConnection as SkipConnection
from .layers import WrappedFunction as WrappedFunction
from .random import replicate as replicate
