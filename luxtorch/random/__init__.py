"""Random numbers from explicit keys, as in JAX: no global generator is read or advanced."""

from ._distributions import beta as beta
from ._distributions import categorical as categorical
from ._distributions import choice as choice
from ._distributions import dirichlet as dirichlet
from ._distributions import exponential as exponential
from ._distributions import gamma as gamma
from ._distributions import gumbel as gumbel
from ._distributions import multivariate_normal as multivariate_normal
from ._distributions import orthogonal as orthogonal
from ._distributions import poisson as poisson
from ._draws import bernoulli as bernoulli
from ._draws import normal as normal
from ._draws import permutation as permutation
from ._draws import randint as randint
from ._draws import truncated_normal as truncated_normal
from ._draws import uniform as uniform
from ._key import Rng as Rng
from ._key import as_key as as_key
from ._key import fold_in as fold_in
from ._key import key as key
from ._key import replicate as replicate
from ._key import split as split
from ._key import where as where
