"""Loops, branches and maps that compile to one operator each, under every transform."""

from ._branches import cond as cond
from ._branches import switch as switch
from ._map import map as map
from ._scan import scan as scan
from ._while import fori_loop as fori_loop
from ._while import while_loop as while_loop
