"""Optimizers: rules that are pure functions of parameters, gradients and an explicit state."""

from ._adam import Adam as Adam
from ._adamw import AdamW as AdamW
from ._adjust import adjust as adjust
from ._descent import Descent as Descent
from ._freeze import freeze as freeze
from ._freeze import thaw as thaw
from ._leafwise import LeafwiseRule as LeafwiseRule
from ._leafwise import RuleState as RuleState
from ._momentum import Momentum as Momentum
from ._nesterov import Nesterov as Nesterov
from ._opt_state import OptState as OptState
from ._rule import Rule as Rule
from ._setup import setup as setup
from ._update import update as update
