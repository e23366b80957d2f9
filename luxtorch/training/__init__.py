"""Training: an immutable state of a run, and the steps that take one to the next."""

from ._checkpoint import CheckpointManager as CheckpointManager
from ._checkpoint import load_checkpoint as load_checkpoint
from ._checkpoint import save_checkpoint as save_checkpoint
from ._checkpoint_format import CheckpointError as CheckpointError
from ._gradients import Objective as Objective
from ._gradients import compute_gradients as compute_gradients
from ._loggers import CSVLogger as CSVLogger
from ._loggers import Logger as Logger
from ._loggers import Progress as Progress
from ._loggers import TensorBoardLogger as TensorBoardLogger
from ._loggers import progress as progress
from ._private import poisson_batch as poisson_batch
from ._private import private_gradients as private_gradients
from ._step import apply_gradients as apply_gradients
from ._step import single_train_step as single_train_step
from ._train_state import TrainState as TrainState
