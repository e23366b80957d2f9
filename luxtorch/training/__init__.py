"""Training: an immutable state of a run, and the steps that take one to the next."""

from ._checkpoint import load_checkpoint as load_checkpoint
from ._checkpoint import save_checkpoint as save_checkpoint
from ._checkpoint_format import CheckpointError as CheckpointError
from ._checkpoint_manager import CheckpointManager as CheckpointManager
from ._csv_logger import CSVLogger as CSVLogger
from ._gradients import compute_gradients as compute_gradients
from ._metrics import Logger as Logger
from ._objective import Objective as Objective
from ._progress import Progress as Progress
from ._progress import progress as progress
from ._step import apply_gradients as apply_gradients
from ._step import single_train_step as single_train_step
from ._tensorboard_logger import TensorBoardLogger as TensorBoardLogger
from ._train_state import TrainState as TrainState
