"""The contract: what a layer is, and what every other folder needs to speak about layers and their trees."""

from luxtorch._errors import DTypeError as DTypeError
from luxtorch._errors import InputError as InputError
from luxtorch._errors import KeyNameError as KeyNameError
from luxtorch._errors import LayerError as LayerError
from luxtorch._errors import LuxtorchError as LuxtorchError
from luxtorch._errors import suggest as suggest

from ._container import ContainerLayer as ContainerLayer
from ._container import WrapperLayer as WrapperLayer
from ._layer import Layer as Layer
from ._layer import Parameters as Parameters
from ._layer import States as States
from ._layer import show_value as show_value
from ._mode import TRAINING as TRAINING
from ._mode import test_mode as test_mode
from ._mode import train_mode as train_mode
from ._mode import update_state as update_state
from ._setup import apply as apply
from ._setup import initial_parameters as initial_parameters
from ._setup import initial_states as initial_states
from ._setup import output_shape as output_shape
from ._setup import parameter_length as parameter_length
from ._setup import setup as setup
from ._setup import state_length as state_length
from ._setup import stateless_apply as stateless_apply
from ._stateful import StatefulLayer as StatefulLayer
from ._static import Static as Static
from ._tree import count as count
from ._tree import named_leaves as named_leaves
from ._tree import path_name as path_name
from ._tree import register_node as register_node
from ._tree import subtree as subtree
from ._tree import tree_leaves as tree_leaves
from ._tree import tree_map as tree_map
from ._value import Value as Value
