"""Loops and implicit functions that every transform takes."""

from ._associative import associative_scan as associative_scan
from ._implicit import custom_root as custom_root
from ._implicit import fixed_point as fixed_point
from ._solvers import ConvergenceError as ConvergenceError
