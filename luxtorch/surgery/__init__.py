"""Taking models apart: replacing, freezing, sharing, adapting, looking inside, finding faults."""

from luxtorch.core._values import Statistics as Statistics

from ._capture import capture as capture
from ._debug import DebugModel as DebugModel
from ._debug import debug_mode as debug_mode
from ._debug_error import NonFiniteError as NonFiniteError
from ._debug_error import Observation as Observation
from ._ema import EMA as EMA
from ._frozen import Frozen as Frozen
from ._frozen import freeze as freeze
from ._frozen import unfreeze as unfreeze
from ._layer_map import layer_map as layer_map
from ._lora import LoRA as LoRA
from ._lora import lora as lora
from ._lora import merge_lora as merge_lora
from ._partition import combine as combine
from ._partition import partition as partition
from ._purity_check import Impurity as Impurity
from ._purity_check import PurityReport as PurityReport
from ._purity_check import check_purity as check_purity
from ._replace_layer import get_layer as get_layer
from ._replace_layer import replace_layer as replace_layer
from ._shared import Shared as Shared
from ._shared import share_parameters as share_parameters
from ._shared import unshare_parameters as unshare_parameters
from ._summary import summary as summary
from ._summary_table import Summary as Summary
from ._summary_table import SummaryRow as SummaryRow
from ._weight_norm import remove_weight_norm as remove_weight_norm
from ._weight_norm import weight_norm as weight_norm
