"""Looking inside a model: intermediate outputs, a summary of its layers, where NaN arises, whether it is pure."""

from luxtorch.core._statistics import Statistics as Statistics

from ._capture import capture as capture
from ._debug import DebugModel as DebugModel
from ._debug import NonFiniteError as NonFiniteError
from ._debug import Observation as Observation
from ._debug import debug_mode as debug_mode
from ._purity import Impurity as Impurity
from ._purity import PurityReport as PurityReport
from ._purity import check_purity as check_purity
from ._summary import Summary as Summary
from ._summary import SummaryRow as SummaryRow
from ._summary import summary as summary
