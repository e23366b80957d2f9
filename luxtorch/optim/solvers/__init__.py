"""Solvers: L-BFGS with a line search, and SciPy's optimizers."""

from ._lbfgs import LBFGS as LBFGS
from ._minimize import minimize as minimize
from ._scipy import scipy_least_squares as scipy_least_squares
from ._scipy import scipy_minimize as scipy_minimize
from ._search import MinimizeResult as MinimizeResult
