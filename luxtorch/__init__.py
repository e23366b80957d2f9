"""luxtorch: models as pure functions of explicit parameters and states, for PyTorch."""

from . import init as init
from . import random as random
from . import testing as testing
from .core import *  # noqa
from .layers import *  # noqa
