"""Layers, a family a file."""

from ._activations import ACTIVATIONS as ACTIVATIONS
from ._basic import FlattenLayer as FlattenLayer
from ._basic import NoOpLayer as NoOpLayer
from ._basic import WrappedFunction as WrappedFunction
from ._batchnorm import BatchNorm as BatchNorm
from ._chain import Chain as Chain
from ._dropout import Dropout as Dropout
from ._linear import Dense as Dense
from ._linear import Scale as Scale
from ._parallel import Parallel as Parallel
from ._parallel import SkipConnection as SkipConnection
