"""Changing models that are set up: freezing, sharing, adapting, dividing and replacing parameters and layers."""

from luxtorch.core._renamed import moved as _moved

from ._cached import with_cache as with_cache
from ._ema import EMA as EMA
from ._frozen import Frozen as Frozen
from ._frozen import freeze as freeze
from ._frozen import unfreeze as unfreeze
from ._layer_map import get_layer as get_layer
from ._layer_map import layer_map as layer_map
from ._layer_map import remove_weight_norm as remove_weight_norm
from ._layer_map import replace_layer as replace_layer
from ._layer_map import weight_norm as weight_norm
from ._lora import LoRA as LoRA
from ._lora import lora as lora
from ._lora import merge_lora as merge_lora
from ._partition import combine as combine
from ._partition import partition as partition
from ._shared import Shared as Shared
from ._shared import share_parameters as share_parameters
from ._shared import unshare_parameters as unshare_parameters

__getattr__ = _moved(
    __name__,
    "DebugModel Impurity NonFiniteError Observation PurityReport Statistics Summary SummaryRow "
    "capture check_purity debug_mode summary",
    to="luxtorch.inspect",
)
