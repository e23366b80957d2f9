"""Training on several processes: averaged gradients, sharded data, sharded parameters, and their checkpoints."""

from ._average import DistributedRule as DistributedRule
from ._average import average_gradients as average_gradients
from ._average import average_states as average_states
from ._checkpoint import load_checkpoint as load_checkpoint
from ._checkpoint import save_checkpoint as save_checkpoint
from ._data import shard_data as shard_data
from ._sharded import Gathered as Gathered
from ._sharded import gather_parameters as gather_parameters
from ._sharded import scatter_gradients as scatter_gradients
from ._sharded import shard_parameters as shard_parameters
from ._synchronize import fold_in_rank as fold_in_rank
from ._synchronize import synchronize as synchronize
from ._world import DistributedError as DistributedError
from ._world import initialize as initialize
from ._world import initialized as initialized
from ._world import local_rank as local_rank
from ._world import rank as rank
from ._world import shutdown as shutdown
from ._world import world_size as world_size
