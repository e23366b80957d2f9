"""One flat tensor with names: vectors, matrices, and the axes that name their elements."""

from ._axes import Axes as Axes
from ._matrix import ComponentMatrix as ComponentMatrix
from ._matrix import axes as axes
from ._matrix import label_to_index as label_to_index
from ._matrix import labels as labels
from ._vector import ComponentVector as ComponentVector
