"""The product of a loss's Hessian and a vector; the vector is that of the parameters themselves."""

import jax

from .functions import of_losses

_FORWARD = of_losses(lambda f, ps, x, y: jax.jvp(lambda ps: jax.grad(f)(ps, x, y), (ps,), (ps,))[1], jax.jit)
_REVERSE = of_losses(lambda f, ps, x, y: jax.vjp(lambda ps: jax.grad(f)(ps, x, y), ps)[1](ps)[0], jax.jit)
CANDIDATES = {
    **{f"{name}, jvp of grad": build for name, build in _FORWARD.items()},
    **{f"{name}, vjp of grad": build for name, build in _REVERSE.items()},
}
