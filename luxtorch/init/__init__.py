"""Initializers: functions of a key and a shape that give the first values of a parameter."""

from ._distributions import constant as constant
from ._distributions import identity_init as identity_init
from ._distributions import normal as normal
from ._distributions import ones as ones
from ._distributions import orthogonal as orthogonal
from ._distributions import sparse_init as sparse_init
from ._distributions import truncated_normal as truncated_normal
from ._distributions import uniform as uniform
from ._distributions import zeros as zeros
from ._initializer import BindableInitializer as BindableInitializer
from ._initializer import BoundInitializer as BoundInitializer
from ._initializer import Initializer as Initializer
from ._initializer import initializer as initializer
from ._variance_scaling import calculate_gain as calculate_gain
from ._variance_scaling import glorot_normal as glorot_normal
from ._variance_scaling import glorot_uniform as glorot_uniform
from ._variance_scaling import kaiming_normal as kaiming_normal
from ._variance_scaling import kaiming_uniform as kaiming_uniform
