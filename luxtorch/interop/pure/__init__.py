"""Pure replacements of torch functions and modules, which draw from keys and work under all of torch.func."""

from . import _causal_mask as _causal_mask
from ._keys import Keys as Keys
from ._mode import PureMode as PureMode
from ._modules import Pure as Pure
from ._modules import make_pure as make_pure
from ._modules import make_traceable as make_traceable
