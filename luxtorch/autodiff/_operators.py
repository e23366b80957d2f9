"""Jacobians and Hessians as matrix-free linear operators: `JacVec` and `HesVec`."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial, reduce
from typing import Any, TypeVar

import torch
from torch import Tensor

from luxtorch.core import LuxtorchError, tree_flatten, tree_leaves, tree_unflatten, wrong_shape, wrong_type

from ._arguments import Mode, check_inputs, check_mode
from ._gradient import gradient
from ._products import jacobian_vector_product, pullback, record
from ._torch_func import Tree

V = TypeVar("V")
"""A flat vector: a tensor or a NumPy array."""


class _Space:
    """Convert between trees of one structure and flat vectors.

    Args:
        like: The tree.

    Attributes:
        size: The number of elements.
        dtype: The dtype of a flat vector: what the dtypes of the leaves promote to.
        device: The device of the first leaf.
        is_flat: Whether the tree is a flat vector itself.
    """

    def __init__(self, like: Tree) -> None:
        leaves, self._spec = tree_flatten(like)
        self._leaves: list[Tensor] = leaves
        self._sizes = [leaf.numel() for leaf in leaves]
        self.size = sum(self._sizes)
        self.dtype = reduce(torch.promote_types, [leaf.dtype for leaf in leaves]) if leaves else torch.float32
        self.device = leaves[0].device if leaves else torch.device("cpu")
        self.is_flat = isinstance(like, Tensor) and like.dim() == 1

    def ravel(self, tree: Tree) -> Tensor:
        """Return the elements of a tree as one flat vector."""
        if not self._leaves:
            return torch.zeros(0)
        return torch.cat([leaf.reshape(-1).to(self.device) for leaf in tree_leaves(tree)])

    def unravel(self, vector: Tensor) -> Tree:
        """Return the tree of a flat vector."""
        parts = zip(torch.split(vector, self._sizes), self._leaves, strict=True)
        return tree_unflatten([part.reshape(leaf.shape).to(leaf) for part, leaf in parts], self._spec)


class LinearOperator(ABC):
    """Multiply trees, or flat vectors of their elements, by a matrix that is never built.

    `A @ u` takes a tree like the input to a tree like the output, and a flat vector to a flat vector.
    `matvec` and `rmatvec` are for flat vectors alone, torch's or NumPy's, as SciPy's solvers call them.
    """

    _inputs: _Space
    _outputs: _Space

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
            return torch.empty(0, dtype=dtype).numpy().dtype
        except TypeError as error:
            expected = "float16, float32 or float64, which NumPy has"
            raise wrong_type("The dtype", dtype, expected, fix="Convert the tree with f32(x).") from error

    @property
    def T(self) -> LinearOperator:
        """The transposed operator."""
        return _Transposed(self)

    def __matmul__(self, u: Tree) -> Tree:
        return self(u)

    def __call__(self, u: Tree) -> Tree:
        """Multiply a tree or a flat vector: `A(u)` is `A @ u`, and can be compiled where torch does not know `@`."""
        if isinstance(u, Tensor) and u.dim() == 1 and not self._inputs.is_flat:
            return self.matvec(u)
        return self._apply(u)

    def matvec(self, v: V) -> V:
        """Multiply a flat vector: a tensor gives a tensor, a NumPy array gives a NumPy array."""
        return _flat(self._apply, v, self._inputs, self._outputs)  # type: ignore[no-any-return]

    def rmatvec(self, v: V) -> V:
        """Multiply a flat vector by the transposed operator."""
        return _flat(self._apply_transposed, v, self._outputs, self._inputs)  # type: ignore[no-any-return]

    def as_linear_operator(self) -> Any:
        """Return this as a `scipy.sparse.linalg.LinearOperator`.

        Raises:
            LuxtorchError: SciPy is not installed.
        """
        try:
            scipy_linalg = importlib.import_module("scipy.sparse.linalg")
        except ImportError as error:
            raise LuxtorchError(
                "SciPy is not installed.", expected="scipy, for as_linear_operator", fix="Run `pip install scipy`."
            ) from error
        return scipy_linalg.aslinearoperator(self)

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


class JacVec(LinearOperator):
    """The Jacobian of a function at a point, as a linear operator.

    A product runs forward mode; one with `J.T` runs the backward pass of the graph that was recorded when the operator
    was made.

    Args:
        f: A function of one tree that returns a tree of floating point tensors.
        x: A tree of floating point tensors.

    Attributes:
        value: What `f(x)` is.

    Raises:
        DTypeError: A leaf of `x` or of `f(x)` is not a real floating point tensor.

    Example:
        >>> import torch
        >>> import luxtorch as lt
        >>> J = lt.JacVec(lambda x: torch.stack([x[0] * x[1], x.sum(), x[2]]), torch.tensor([2.0, 3.0, 4.0]))
        >>> J @ torch.tensor([1.0, 0.0, 0.0]), J.T @ torch.tensor([1.0, 0.0, 0.0])
        (tensor([3., 1., 0.]), tensor([3., 2., 0.]))
        >>> J.as_linear_operator().shape
        (3, 3)

    Source:
        `JacVec` of SparseDiffTools.jl and SciMLOperators.jl.
    """

    def __init__(self, f: Callable[[Tree], Tree], x: Tree) -> None:
        check_inputs((x,), real=True)
        self._f = f
        self._x = x
        self.value, self._back = pullback(f, x)
        self._inputs, self._outputs = _Space(x), _Space(self.value)

    def _apply(self, u: Tree) -> Tree:
        return jacobian_vector_product(self._f, self._x, u)

    def _apply_transposed(self, u: Tree) -> Tree:
        return _usable(self._back, self._f, self._x)(u)


class HesVec(LinearOperator):
    """The Hessian of a scalar function at a point, as a linear operator. It is symmetric: `H.T` is `H`.

    Args:
        f: A function of one tree that returns a scalar.
        x: A tree of real floating point tensors.
        mode: How the gradient is differentiated. `"reverse"` records the gradient's graph once, when the operator is
            made, so that a product costs one backward pass and nothing else; `"forward"` keeps nothing, and runs
            forward over reverse for each product.

    Attributes:
        gradient: The gradient of `f` at `x`.

    Raises:
        InputError: `f` does not return a scalar.
        DTypeError: A leaf of `x` is not a real floating point tensor.

    Example:
        >>> import torch
        >>> import luxtorch as lt
        >>> H = lt.HesVec(lambda p: (p["a"] ** 2).sum() * p["b"], {"a": torch.ones(2), "b": torch.tensor(3.0)})
        >>> H @ {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor(0.0)}
        {'a': tensor([6., 0.]), 'b': tensor(2.)}
        >>> H @ torch.tensor([1.0, 0.0, 0.0])
        tensor([6., 0., 2.])

    Source:
        `HesVec` of SparseDiffTools.jl.
    """

    def __init__(self, f: Callable[[Tree], Tree], x: Tree, *, mode: Mode = "reverse") -> None:
        check_mode(mode)
        check_inputs((x,), real=True)
        self._x = x
        self._slope: Callable[[Tree], Tree] = partial(gradient, f)
        self._back: Callable[[Tree], Tree] | None = None
        if mode == "reverse":
            self.gradient, self._back = record(self._slope, (x,), has_aux=False, like="x")
        else:
            self.gradient = self._slope(x)
        self._inputs = self._outputs = _Space(x)

    def _apply(self, u: Tree) -> Tree:
        if self._back is None:
            return jacobian_vector_product(self._slope, self._x, u)
        return _usable(self._back, self._slope, self._x)(u)

    _apply_transposed = _apply

    @property
    def T(self) -> HesVec:
        return self


def _usable(back: Callable[[Tree], Tree], f: Callable[[Tree], Tree], x: Tree) -> Callable[[Tree], Tree]:
    # torch.compile cannot trace the backward pass of a graph that was recorded outside.
    return pullback(f, x)[1] if torch.compiler.is_compiling() else back


def _flat(product: Callable[[Tree], Tree], v: Any, source: _Space, target: _Space) -> Any:
    if isinstance(v, Tensor):
        if v.shape != (source.size,):
            fix = "Pass one element for each element of the tree, in the tree's order."
            raise wrong_shape("The flat vector", v, (source.size,), fix=fix)
        return target.ravel(product(source.unravel(v)))
    vector = torch.tensor(v, dtype=source.dtype, device=source.device).reshape(-1)
    return _flat(product, vector, source, target).detach().cpu().numpy()
