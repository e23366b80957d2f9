"""luxtorch: models as pure functions of explicit parameters and states, for PyTorch.

The usual door is `import luxtorch as lt`: layers, losses and what every script needs are `lt.<name>`. All else is in a
module, such as `lt.optim`, `lt.training`, `lt.init`, `lt.random` or `lt.testing`; all exceptions are in `lt.errors`.
"""

from importlib import import_module as _import_module
from importlib.metadata import version as _version
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from . import autodiff as autodiff
from . import components as components
from . import core as core
from . import debug as debug
from . import device as device
from . import init as init
from . import layers as layers
from . import loops as loops
from . import losses as losses
from . import random as random
from .autodiff import GGNVec as GGNVec
from .autodiff import HesVec as HesVec
from .autodiff import JacVec as JacVec
from .autodiff import batched_jacobian as batched_jacobian
from .autodiff import gradient as gradient
from .autodiff import hessian as hessian
from .autodiff import hessian_diagonal as hessian_diagonal
from .autodiff import hvp as hvp
from .autodiff import jacobian as jacobian
from .autodiff import jacobian_vector_product as jacobian_vector_product
from .autodiff import linearize as linearize
from .autodiff import per_sample_gradients as per_sample_gradients
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
from .core import StatefulLayer as StatefulLayer
from .core import Static as Static
from .core import WrapperLayer as WrapperLayer
from .core import apply as apply
from .core import describe as describe
from .core import flatten_names as flatten_names
from .core import initial_parameters as initial_parameters
from .core import initial_states as initial_states
from .core import output_shape as output_shape
from .core import parameter_length as parameter_length
from .core import setup as setup
from .core import stack as stack
from .core import state_length as state_length
from .core import stateless_apply as stateless_apply
from .core import test_mode as test_mode
from .core import train_mode as train_mode
from .core import unflatten_names as unflatten_names
from .core import unstack as unstack
from .core import update_state as update_state
from .device import Device as Device
from .device import DeviceError as DeviceError
from .device import DeviceIterator as DeviceIterator
from .device import bf16 as bf16
from .device import cpu_device as cpu_device
from .device import f16 as f16
from .device import f32 as f32
from .device import f64 as f64
from .device import get_device as get_device
from .device import gpu_device as gpu_device
from .device import to_device as to_device
from .jit import jit as jit
from .jit import load_jitted as load_jitted
from .layers import GLU as GLU
from .layers import AdaptiveLPPool as AdaptiveLPPool
from .layers import AdaptiveMaxPool as AdaptiveMaxPool
from .layers import AdaptiveMeanPool as AdaptiveMeanPool
from .layers import AlphaDropout as AlphaDropout
from .layers import AlternatePrecision as AlternatePrecision
from .layers import BatchNorm as BatchNorm
from .layers import BidirectionalRNN as BidirectionalRNN
from .layers import Bilinear as Bilinear
from .layers import BranchLayer as BranchLayer
from .layers import Cell as Cell
from .layers import Chain as Chain
from .layers import Checkpointed as Checkpointed
from .layers import Conv as Conv
from .layers import ConvTranspose as ConvTranspose
from .layers import Dense as Dense
from .layers import Dropout as Dropout
from .layers import Embedding as Embedding
from .layers import Ensemble as Ensemble
from .layers import FeatureDropout as FeatureDropout
from .layers import FlattenLayer as FlattenLayer
from .layers import GlobalLPPool as GlobalLPPool
from .layers import GlobalMaxPool as GlobalMaxPool
from .layers import GlobalMeanPool as GlobalMeanPool
from .layers import GroupNorm as GroupNorm
from .layers import GRUCell as GRUCell
from .layers import InstanceNorm as InstanceNorm
from .layers import LayerNorm as LayerNorm
from .layers import LPPool as LPPool
from .layers import LSTMCell as LSTMCell
from .layers import Maxout as Maxout
from .layers import MaxPool as MaxPool
from .layers import MeanPool as MeanPool
from .layers import MultiHeadAttention as MultiHeadAttention
from .layers import NoOpLayer as NoOpLayer
from .layers import Pad as Pad
from .layers import PairwiseFusion as PairwiseFusion
from .layers import Parallel as Parallel
from .layers import Parts as Parts
from .layers import Perturbed as Perturbed
from .layers import PixelShuffle as PixelShuffle
from .layers import PixelUnshuffle as PixelUnshuffle
from .layers import Positions as Positions
from .layers import PReLU as PReLU
from .layers import Recurrence as Recurrence
from .layers import RepeatedLayer as RepeatedLayer
from .layers import ReshapeLayer as ReshapeLayer
from .layers import ReverseSequence as ReverseSequence
from .layers import RMSNorm as RMSNorm
from .layers import RNNCell as RNNCell
from .layers import RotaryPositionalEmbedding as RotaryPositionalEmbedding
from .layers import Scale as Scale
from .layers import ScannedChain as ScannedChain
from .layers import SelectDim as SelectDim
from .layers import SinusoidalPositionalEmbedding as SinusoidalPositionalEmbedding
from .layers import SkipConnection as SkipConnection
from .layers import SpectralNorm as SpectralNorm
from .layers import StackedCell as StackedCell
from .layers import StatefulRecurrentCell as StatefulRecurrentCell
from .layers import TransformerDecoder as TransformerDecoder
from .layers import TransformerDecoderLayer as TransformerDecoderLayer
from .layers import TransformerEncoder as TransformerEncoder
from .layers import TransformerEncoderLayer as TransformerEncoderLayer
from .layers import Upsample as Upsample
from .layers import VariationalHiddenDropout as VariationalHiddenDropout
from .layers import WeightNorm as WeightNorm
from .layers import WrappedFunction as WrappedFunction
from .layers import apply_rotary_embedding as apply_rotary_embedding
from .layers import compact as compact
from .layers import compute_rotary_embedding_params as compute_rotary_embedding_params
from .layers import init_fn as init_fn
from .layers import intermediate_gradients as intermediate_gradients
from .layers import non_trainable as non_trainable
from .layers import scaled_dot_product_attention as scaled_dot_product_attention
from .loops import associative_scan as associative_scan
from .loops import cond as cond
from .loops import custom_root as custom_root
from .loops import fixed_point as fixed_point
from .loops import fori_loop as fori_loop
from .loops import map as map
from .loops import scan as scan
from .loops import switch as switch
from .loops import while_loop as while_loop
from .losses import Aggregation as Aggregation
from .losses import BinaryCrossEntropyLoss as BinaryCrossEntropyLoss
from .losses import BinaryFocalLoss as BinaryFocalLoss
from .losses import CosineEmbeddingLoss as CosineEmbeddingLoss
from .losses import CrossEntropyLoss as CrossEntropyLoss
from .losses import CTCLoss as CTCLoss
from .losses import DiceCoeffLoss as DiceCoeffLoss
from .losses import FocalLoss as FocalLoss
from .losses import GenericLossFunction as GenericLossFunction
from .losses import HingeLoss as HingeLoss
from .losses import HuberLoss as HuberLoss
from .losses import KLDivergenceLoss as KLDivergenceLoss
from .losses import L1Loss as L1Loss
from .losses import L2Loss as L2Loss
from .losses import Loss as Loss
from .losses import MAELoss as MAELoss
from .losses import MSELoss as MSELoss
from .losses import MSLELoss as MSLELoss
from .losses import NLLLoss as NLLLoss
from .losses import PoissonLoss as PoissonLoss
from .losses import SiameseContrastiveLoss as SiameseContrastiveLoss
from .losses import SmoothL1Loss as SmoothL1Loss
from .losses import SquaredHingeLoss as SquaredHingeLoss
from .losses import TripletMarginLoss as TripletMarginLoss
from .random import replicate as replicate

__version__: str

if _TYPE_CHECKING:
    from . import distributed as distributed
    from . import errors as errors
    from . import inspect as inspect
    from . import interop as interop
    from . import optim as optim
    from . import surgery as surgery
    from . import testing as testing
    from . import training as training
    from ._late import *  # noqa: F403  # the names stand there alone

# Optimizers load torchopt, half of what importing luxtorch would cost, and not every program takes modules of torch.nn
# in, changes models, or checks laws: these come when they are first asked for.
_LATE_MODULES = frozenset(["distributed", "errors", "inspect", "interop", "optim", "surgery", "testing", "training"])


def __getattr__(name: str) -> _Any:
    if name == "__version__":
        return _version("luxtorch")
    if name in _LATE_MODULES:
        return _import_module(f".{name}", __name__)
    if not name.startswith("_") and hasattr(late := _import_module("._late", __name__), name):
        return getattr(late, name)
    raise AttributeError(f"module 'luxtorch' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), "__version__", *_LATE_MODULES, *vars(_import_module("._late", __name__))})
