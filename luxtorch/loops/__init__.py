"""Loops, branches, prefixes and implicit functions, under every transform."""

from ._associative import associative_scan as associative_scan
from ._conditions import cond as cond
from ._conditions import fori_loop as fori_loop
from ._conditions import switch as switch
from ._conditions import while_loop as while_loop
from ._implicit import custom_root as custom_root
from ._implicit import fixed_point as fixed_point
from ._map import map as map
from ._scan import scan as scan
from ._solvers import ConvergenceError as ConvergenceError
