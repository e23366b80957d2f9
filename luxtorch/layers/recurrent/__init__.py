"""Recurrent cells, the layers that run them over sequences, and the kernels behind them."""

from ._base import Cell as Cell
from ._cells import GRUCell as GRUCell
from ._cells import LSTMCell as LSTMCell
from ._cells import RNNCell as RNNCell
from ._recurrence import BidirectionalRNN as BidirectionalRNN
from ._recurrence import Recurrence as Recurrence
from ._recurrence import StackedCell as StackedCell
from ._recurrence import StatefulRecurrentCell as StatefulRecurrentCell
