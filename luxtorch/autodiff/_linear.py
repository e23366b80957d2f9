"""`LinearOperator`: matrices on trees that are never built, their algebra, their diagonals, and SciPy's solvers."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import reduce
from numbers import Real
from typing import Any, TypeVar

import torch
from torch import Tensor

from luxtorch import random
from luxtorch._torch import outside_transforms
from luxtorch._transforms import recorders, traced, unwrapped, vectorized
from luxtorch.core import (
    InputError,
    LuxtorchError,
    out_of_range,
    suggest,
    tree_flatten,
    tree_leaves,
    tree_map,
    tree_unflatten,
    wrong_shape,
    wrong_type,
)
from luxtorch.core._sharded import beside
from luxtorch.random._key import checked

from ._arguments import check_chunk_size, check_like
from ._torch_func import Tree
from ._vmap import one_hot, stack, total

V = TypeVar("V")
"""A flat vector: a tensor or a NumPy array."""

_SOLVERS = ("bicg", "bicgstab", "cg", "cgs", "gcrotmk", "gmres", "lgmres", "minres", "qmr", "tfqmr")


class Space:
    """Convert between trees of one structure and flat vectors.

    Args:
        like: The tree.

    Attributes:
        like: The tree.
        leaves: Its leaves.
        size: The number of elements.
        dtype: The dtype of a flat vector: what the dtypes of the leaves promote to.
        device: The device of the first leaf.
    """

    def __init__(self, like: Tree) -> None:
        self.like = like
        leaves, self._spec = tree_flatten(like)
        self.leaves: list[Tensor] = leaves
        self._sizes = [leaf.numel() for leaf in leaves]
        self.size = sum(self._sizes)
        self.dtype = reduce(torch.promote_types, [leaf.dtype for leaf in leaves]) if leaves else torch.float32
        self.device = leaves[0].device if leaves else torch.device("cpu")

    def takes_flat(self, u: object) -> bool:
        """Tell whether something is a flat vector in place of a tree."""
        return isinstance(u, Tensor) and u.dim() == 1 and not (isinstance(self.like, Tensor) and self.like.dim() == 1)

    def check_flat(self, v: Tensor) -> Tensor:
        """Return a flat vector, or raise if it has another size."""
        if v.shape != (self.size,):
            fix = "Pass one element for each element of the tree, in the tree's order."
            raise wrong_shape("The flat vector", v, (self.size,), fix=fix)
        return v

    def ravel(self, tree: Tree) -> Tensor:
        """Return the elements of a tree as one flat vector."""
        if not self.leaves:
            return torch.zeros(0)
        return torch.cat([leaf.reshape(-1).to(self.device) for leaf in tree_leaves(tree)])

    def unravel(self, vector: Tensor) -> Tree:
        """Return the tree of a flat vector."""
        parts = zip(torch.split(vector, self._sizes), self.leaves, strict=True)
        return tree_unflatten([part.reshape(leaf.shape).to(leaf) for part, leaf in parts], self._spec)

    def unit(self, index: Tensor) -> Tree:
        """Return the basis vector of an index, which may carry a vmap."""
        return tree_unflatten(one_hot(index, self.leaves), self._spec)

    def is_same(self, other: Space) -> bool:
        """Tell whether the trees of another space are those of this one."""
        kinds = ([(leaf.shape, leaf.dtype) for leaf in space.leaves] for space in (self, other))
        return self._spec == other._spec and next(kinds) == next(kinds)


class LinearOperator(ABC):
    """Multiply trees, or flat vectors of their elements, by a matrix that is never built.

    `A @ u` takes a tree like the input to a tree like the output, and a flat vector to a flat vector.
    `matvec` and `rmatvec` are for flat vectors alone, torch's or NumPy's, as SciPy's solvers call them.
    Operators are added, subtracted, and multiplied by numbers and by each other: `A @ B` is B first, and then A.
    A number that is added to a square operator stands for that many times the identity: `H + damping`.

    Example:
        >>> import torch
        >>> import luxtorch as lt
        >>> H = lt.HesVec(lambda x: (x**4).sum() / 12, torch.tensor([1.0, 2.0]))
        >>> damped = 2 * H + 0.5
        >>> isinstance(damped, lt.autodiff.LinearOperator), damped @ torch.ones(2)
        (True, tensor([2.5000, 8.5000]))

    Source:
        `scipy.sparse.linalg.LinearOperator`, but that it takes trees; SciMLOperators.jl.
    """

    # NumPy's numbers leave `number * operator` to the operator.
    __array_ufunc__ = None

    _inputs: Space
    _outputs: Space

    @abstractmethod
    def _apply(self, u: Tree) -> Tree:
        """Multiply a tree."""

    @abstractmethod
    def _apply_transposed(self, u: Tree) -> Tree:
        """Multiply a tree by the transposed operator."""

    @property
    def shape(self) -> tuple[int, int]:
        """The number of outputs and of inputs."""
        return self._outputs.size, self._inputs.size

    @property
    def dtype(self) -> Any:
        """The NumPy dtype of the flat vectors, as SciPy's protocol asks."""
        dtype = torch.promote_types(self._inputs.dtype, self._outputs.dtype)
        try:
            return _array(torch.empty(0, dtype=dtype)).dtype
        except TypeError as error:
            expected = "float16, float32 or float64, which NumPy has"
            raise wrong_type("The dtype", dtype, expected, fix="Convert the tree with f32(x).") from error

    @property
    def T(self) -> LinearOperator:
        """The transposed operator."""
        return _Transposed(self)

    def __matmul__(self, u: Tree) -> Any:
        return _Product(self, u) if isinstance(u, LinearOperator) else self(u)

    def __add__(self, other: LinearOperator | float | Tensor) -> LinearOperator:
        if _is_number(other):
            self._check_square("plus a number")
            other = _Scaled(_Identity(self._inputs), other)
        return _Sum(self, other) if isinstance(other, LinearOperator) else NotImplemented

    __radd__ = __add__

    def __sub__(self, other: LinearOperator | float | Tensor) -> LinearOperator:
        return self + -other if isinstance(other, LinearOperator) or _is_number(other) else NotImplemented

    def __rsub__(self, other: float | Tensor) -> LinearOperator:
        return -self + other

    def __mul__(self, number: float | Tensor) -> LinearOperator:
        return _Scaled(self, number) if _is_number(number) else NotImplemented

    __rmul__ = __mul__

    def __neg__(self) -> LinearOperator:
        return self * -1

    def __call__(self, u: Tree) -> Tree:
        """Multiply a tree or a flat vector: `A(u)` is `A @ u`, and can be compiled where torch does not know `@`."""
        return self.matvec(u) if self._inputs.takes_flat(u) else self._apply(u)

    def matvec(self, v: V) -> V:
        """Multiply a flat vector: a tensor gives a tensor, a NumPy array gives a NumPy array."""
        return _flat(self._apply, v, self._inputs, self._outputs)  # type: ignore[no-any-return]

    def rmatvec(self, v: V) -> V:
        """Multiply a flat vector by the transposed operator."""
        return _flat(self._apply_transposed, v, self._outputs, self._inputs)  # type: ignore[no-any-return]

    def diagonal(self, *, key: Tensor | None = None, samples: int | None = None, chunk_size: int | None = None) -> Tree:
        """Compute the diagonal of a square operator, exactly or by Hutchinson's estimate.

        Exactly it takes a product for each element; of a `GGNVec` with fewer outputs than parameters, two transposed
        products for each output. The estimate is the mean of `u * (A @ u)` over vectors u of random signs. Its error
        falls with the root of their number, and comes from the elements beside the diagonal: if there are none, one
        sample is exact.

        Args:
            key: The key that the signs are drawn from.
            samples: How many vectors of signs there are; by default the diagonal is exact.
            chunk_size: How many products `vmap` takes at once; all by default, and with 1 without `vmap`.

        Returns:
            A tree like the input.

        Raises:
            InputError: The operator is not square, or there are samples without a key or a key without samples.

        Example:
            >>> import torch
            >>> import luxtorch as lt
            >>> H = lt.HesVec(lambda p: (p["a"] ** 3).sum() * p["b"], {"a": torch.ones(2), "b": torch.tensor(2.0)})
            >>> H.diagonal()
            {'a': tensor([12., 12.]), 'b': tensor(0.)}
            >>> H.diagonal(key=lt.random.key(0), samples=1)["a"].shape
            torch.Size([2])

        Source:
            Bekas, Kokiopoulou and Saad, "An estimator for the diagonal of a matrix", 2007.
        """
        check_chunk_size(chunk_size)
        self._check_square("with a diagonal")
        if samples is None:
            if key is not None:
                raise InputError("A key is for samples.", fix="Pass samples= as well, or leave out the key.")
            return self._diagonal(chunk_size)
        if type(samples) is not int or samples < 1:
            raise out_of_range("samples", samples, "a positive integer", fix="Leave it out for the exact diagonal.")
        if key is None:
            raise InputError("Samples need a key.", fix="Pass key=lt.random.key(0), or another.")
        root, count = checked(key), len(self._inputs.leaves)
        if count == 0:
            return self._inputs.like

        def sample(number: Tensor) -> Tree:
            own = random.fold_in(root, number)
            return hutchinson(self._apply, self._inputs.like, [random.fold_in(own, i) for i in range(count)])

        return tree_map(lambda leaf: leaf / samples, total(sample, samples, root.device, chunk_size))

    def _diagonal(self, chunk_size: int | None) -> Tree:
        """Return the exact diagonal."""
        space = self._inputs

        def element(index: Tensor) -> list[Tensor]:
            unit = space.unit(index)
            # What is not on the diagonal is left out, so that a NaN there stays there.
            chosen = tree_map(lambda one, column: torch.where(one != 0, column, 0).sum(), unit, self._apply(unit))
            return [sum(leaf.to(space.device, space.dtype) for leaf in tree_leaves(chosen))]

        like = torch.zeros((), dtype=space.dtype, device=space.device)
        return space.unravel(stack(element, space.size, [like], chunk_size)[0])

    def solve(self, b: Tree, *, method: str = "cg", x0: Tree | None = None, **options: Any) -> tuple[Tree, int]:
        """Solve `A @ x = b` for a square operator by one of SciPy's iterative solvers.

        SciPy computes on the CPU, and is neither compiled nor differentiated. `lt.custom_root` has the derivatives of a
        solution; `solve` may be called in the solver that it takes, as the last example does.

        Args:
            b: A tree like the output, or a flat vector.
            method: The name of a solver of `scipy.sparse.linalg`. `"cg"` is for positive definite operators,
                `"minres"` for symmetric ones, `"gmres"` and the others for any.
            x0: Where to begin: a tree like the input, or a flat vector; zeros by default.
            **options: What else the solver takes, such as `rtol`, `maxiter`, or a preconditioner `M`.

        Returns:
            `(x, info)`: a tree like the input, or a flat vector for a flat vector; and 0 if SciPy has converged, or
            else the number of steps after which it has given up, which is what `maxiter` may be for.

        Raises:
            LuxtorchError: SciPy is not installed.
            InputError: The operator is not square, `b` does not look like the output, `b` or the operator is
                differentiated, or it is called inside of vmap, a compiler or inference mode.

        Example:
            >>> import torch
            >>> import luxtorch as lt
            >>> ps = {"a": torch.tensor([2.0, 1.0]), "b": torch.tensor(1.0)}
            >>> H = lt.HesVec(lambda ps: (ps["a"] ** 2).sum() + ps["a"].sum() * ps["b"], ps)
            >>> step, info = (H + 1).solve({"a": torch.tensor([4.0, 4.0]), "b": torch.tensor(3.0)})
            >>> info, {name: leaf.round(decimals=3) for name, leaf in step.items()}
            (0, {'a': tensor([1., 1.]), 'b': tensor(1.)})

            The derivative of a solution by the damping:

            >>> H, b = lt.HesVec(lambda x: (x**2).sum(), torch.ones(2)), torch.tensor([6.0, 3.0])
            >>> def solver(f, x):
            ...     return x - lt.JacVec(f, x).solve(f(x))[0]
            >>> def damped(d):
            ...     return lt.custom_root(lambda x, d: (H + d) @ x - b, torch.zeros(2), solver, d)
            >>> torch.func.jacrev(damped)(torch.tensor(1.0))
            tensor([-0.6667, -0.3333])
        """
        linalg = _scipy_linalg("solve")
        if method not in _SOLVERS:
            expected = "one of " + ", ".join(_SOLVERS)
            raise out_of_range("method", method, expected, fix=suggest(str(method), _SOLVERS))
        self._check_square("to solve with")
        if traced() or vectorized() or torch.is_inference_mode_enabled():
            raise InputError("solve does not run inside of vmap, a compiler or inference mode.", fix="Call it outside.")
        right, start = self._vector(b), None if x0 is None else _array(self._vector(x0))
        # A product tells whether what the operator was made of is differentiated.
        if any(recorders(found) != (0, False) for found in (right, self.matvec(torch.zeros_like(right)))):
            raise InputError(
                "solve is not differentiated.", fix="Call it under torch.no_grad(), or in the solver of lt.custom_root."
            )
        x, info = getattr(linalg, method)(linalg.aslinearoperator(self), _array(right), x0=start, **options)
        found = torch.from_numpy(x).to(right)
        return found if self._inputs.takes_flat(b) else self._inputs.unravel(found), info

    def _vector(self, tree: Tree) -> Tensor:
        """Return a tree like the input, or a flat vector, as a flat vector, or raise if it is neither."""
        if self._inputs.takes_flat(tree):
            return self._inputs.check_flat(tree).to(self._inputs.dtype)
        check_like(tree, self._inputs.like, "x")
        return self._inputs.ravel(tree)

    def as_linear_operator(self) -> Any:
        """Return this as a `scipy.sparse.linalg.LinearOperator`.

        Raises:
            LuxtorchError: SciPy is not installed.
        """
        return _scipy_linalg("as_linear_operator").aslinearoperator(self)

    def _check_square(self, what: str) -> None:
        if not self._inputs.is_same(self._outputs):
            raise InputError(
                f"An operator {what} must be square.",
                expected="outputs like the inputs",
                got=repr(self),
                fix="Take A.T @ A, for instance.",
            )

    def __repr__(self) -> str:
        rows, columns = self.shape
        return f"{type(self).__name__.lstrip('_')}({rows} x {columns})"


class _Transposed(LinearOperator):
    def __init__(self, operator: LinearOperator) -> None:
        self._operator = operator
        self._inputs, self._outputs = operator._outputs, operator._inputs

    def _apply(self, u: Tree) -> Tree:
        return self._operator._apply_transposed(u)

    def _apply_transposed(self, u: Tree) -> Tree:
        return self._operator._apply(u)

    @property
    def T(self) -> LinearOperator:
        return self._operator


class _Identity(LinearOperator):
    def __init__(self, space: Space) -> None:
        self._inputs = self._outputs = space

    def _apply(self, u: Tree) -> Tree:
        check_like(u, self._inputs.like, "x")
        return u

    _apply_transposed = _apply

    def _diagonal(self, chunk_size: int | None) -> Tree:
        return tree_map(torch.ones_like, self._inputs.like)


class _Scaled(LinearOperator):
    def __init__(self, operator: LinearOperator, number: Any) -> None:
        self._operator, self._number = operator, number if isinstance(number, Tensor) else float(number)
        self._inputs, self._outputs = operator._inputs, operator._outputs

    def _scale(self, tree: Tree) -> Tree:
        return tree_map(lambda leaf: (leaf * self._number).to(leaf.dtype), tree)

    def _apply(self, u: Tree) -> Tree:
        return self._scale(self._operator._apply(u))

    def _apply_transposed(self, u: Tree) -> Tree:
        return self._scale(self._operator._apply_transposed(u))

    def _diagonal(self, chunk_size: int | None) -> Tree:
        return self._scale(self._operator._diagonal(chunk_size))


class _Sum(LinearOperator):
    def __init__(self, first: LinearOperator, second: LinearOperator) -> None:
        _check_same("add", first, second, (first._inputs, second._inputs), (first._outputs, second._outputs))
        self._terms = first, second
        self._inputs, self._outputs = first._inputs, first._outputs

    def _apply(self, u: Tree) -> Tree:
        return tree_map(torch.add, *[term._apply(u) for term in self._terms])

    def _apply_transposed(self, u: Tree) -> Tree:
        return tree_map(torch.add, *[term._apply_transposed(u) for term in self._terms])

    def _diagonal(self, chunk_size: int | None) -> Tree:
        return tree_map(torch.add, *[term._diagonal(chunk_size) for term in self._terms])


class _Product(LinearOperator):
    def __init__(self, left: LinearOperator, right: LinearOperator) -> None:
        _check_same("multiply", left, right, (left._inputs, right._outputs))
        self._left, self._right = left, right
        self._inputs, self._outputs = right._inputs, left._outputs

    def _apply(self, u: Tree) -> Tree:
        return self._left._apply(self._right._apply(u))

    def _apply_transposed(self, u: Tree) -> Tree:
        return self._right._apply_transposed(self._left._apply_transposed(u))


def hutchinson(product: Callable[[Tree], Tree], x: Tree, keys: Sequence[Tensor]) -> Tree:
    """Return an estimate of the diagonal of a matrix: random signs times the product of the matrix with them.

    Args:
        product: Takes a tree like `x` to the product of the matrix with it.
        x: A tree.
        keys: A key for each leaf of it.
    """
    leaves, spec = tree_flatten(x)
    drawn = [random.bernoulli(key, 0.5, tuple(leaf.shape)) for key, leaf in zip(keys, leaves, strict=True)]
    signs = [beside(sign.to(leaf.device, leaf.dtype), leaf) * 2 - 1 for sign, leaf in zip(drawn, leaves, strict=True)]
    u = tree_unflatten(signs, spec)
    return tree_map(torch.mul, u, product(u))


def _is_number(value: object) -> bool:
    if isinstance(value, Tensor):
        return value.dim() == 0 and not value.is_complex()
    return isinstance(value, Real) and not isinstance(value, bool)


def _check_same(verb: str, first: LinearOperator, second: LinearOperator, *pairs: tuple[Space, Space]) -> None:
    if not all(a.is_same(b) for a, b in pairs):
        raise InputError(
            f"The operators do not fit: to {verb} them, their trees must have the same structure, shapes and dtypes.",
            got=f"{first!r} and {second!r}",
        )


def _flat(product: Callable[[Tree], Tree], v: Any, source: Space, target: Space) -> Any:
    if isinstance(v, Tensor):
        return target.ravel(product(source.unravel(source.check_flat(v))))
    vector = torch.tensor(v, dtype=source.dtype, device=source.device).reshape(-1)
    return _array(_flat(product, vector, source, target))


def _array(vector: Tensor) -> Any:
    array: Any = vector.detach().cpu()
    if vectorized() or recorders(vector)[0]:
        return array.numpy()  # which torch refuses
    with outside_transforms():
        return unwrapped(array).numpy()


def _scipy_linalg(user: str) -> Any:
    try:
        return importlib.import_module("scipy.sparse.linalg")
    except ImportError as error:
        raise LuxtorchError(
            "SciPy is not installed.", expected=f"scipy, for {user}", fix="Run `pip install scipy`."
        ) from error
