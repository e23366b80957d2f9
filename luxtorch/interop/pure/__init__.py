"""Torch functions and modules that are not pure, or that a transform lacks, and what takes their places."""

from . import _causal_mask as _causal_mask
from ._keys import Keys as Keys
from ._mode import PureMode as PureMode
from ._modules import Pure as Pure
from ._modules import make_pure as make_pure
from ._modules import make_traceable as make_traceable
