"""Derivatives of pure functions over any tree, under the names of Lux and Zygote."""

from ._gradient import gradient as gradient
from ._gradient import withgradient as withgradient
from ._jacobian import batched_jacobian as batched_jacobian
from ._jacobian import hessian as hessian
from ._jacobian import jacobian as jacobian
from ._jacobian import per_sample_gradients as per_sample_gradients
from ._linear import LinearOperator as LinearOperator
from ._products import GGNVec as GGNVec
from ._products import HesVec as HesVec
from ._products import JacVec as JacVec
from ._products import hessian_diagonal as hessian_diagonal
from ._products import hvp as hvp
from ._products import jacobian_vector_product as jacobian_vector_product
from ._products import linearize as linearize
from ._products import pullback as pullback
from ._products import pushforward as pushforward
from ._products import vector_jacobian_product as vector_jacobian_product
