"""Rules that change gradients, or that are made of other rules."""

from ._chain import AccumGrad as AccumGrad
from ._chain import OptimiserChain as OptimiserChain
from ._gradients import ClipGrad as ClipGrad
from ._gradients import ClipNorm as ClipNorm
from ._gradients import SignDecay as SignDecay
from ._gradients import WeightDecay as WeightDecay
from ._groups import Groups as Groups
from ._wrappers import MixedPrecision as MixedPrecision
from ._wrappers import ReduceLROnPlateau as ReduceLROnPlateau
from ._wrappers import per_member as per_member
