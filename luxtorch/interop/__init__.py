"""Conversion between torch.nn modules and layers: from_torch, to_torch, export, load_weights."""

from ._from_torch import Model as Model
from ._from_torch import from_torch as from_torch
from ._inputs import Inputs as Inputs
from ._module_layer import ModuleLayer as ModuleLayer
from ._to_torch import LayerModule as LayerModule
from ._to_torch import export as export
from ._to_torch import to_torch as to_torch
from ._weights import LoadReport as LoadReport
from ._weights import load_weights as load_weights
