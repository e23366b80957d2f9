"""`ComponentVector`: parameters as one flat tensor with named components."""

from __future__ import annotations

from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, Sequence, ValuesView
from typing import Any, TypeAlias, final

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from luxtorch.core import InputError, KeyNameError, out_of_range, register_node, suggest
from luxtorch.core._describe import tree_html
from luxtorch.core._table import plain

from ._axes import Axes, check_name, intern, refuse_names, top
from ._functions import Named, call_with_names, handles, strip
from ._ravel import axes_and_leaves, check_flat, ravel
from ._views import Views, make

Component: TypeAlias = "Tensor | ComponentVector"


@final
class ComponentVector(Views):
    """Hold a tree of tensors as one flat tensor whose parts keep their names.

    A component is read as `cv.dense.weight`, `cv["dense"]["weight"]` or `cv["dense.weight"]`: a leaf is a view of the
    flat tensor with the leaf's shape, a group is a ComponentVector of its part. Any other index is one into the flat
    tensor, and a list of names selects components into a new vector. A model takes a ComponentVector wherever it
    takes a dict of parameters. So do `torch.func` and `torch.compile`: it is a pytree with one leaf, and a gradient
    with respect to a ComponentVector is a ComponentVector.

    Operators and torch functions that compute element by element keep the names; all other torch functions see the
    flat tensor and return plain tensors. A ComponentVector is immutable: `replace` returns a new one.

    Leading dimensions of the flat tensor are a batch, for instance of models; every component has them too.

    A function for torch.compile whose backward is called from outside is best given `cv.flat`, and names it inside by
    `from_flat`: of a vector made in the compiled function, all components come from one split.

    A component with the name of an attribute or method, such as `shape` or `to`, is read by `cv["shape"]` alone.

    Args:
        tree: A dict of tensors, nested or not. A list or tuple is a group with the names "0", "1", and so on. The
            numbers are copied in the order of the tree, and row by row within each tensor.
        batch_dims: How many leading dimensions of every leaf are batch dimensions.
        dtype: What to cast the leaves to; by default they need to have one dtype. Leaves may all be complex. Real and
            complex ones have a place in one vector where the complex ones come as `torch.view_as_real`.

    Shape:
        `flat` is `(*batch, size)`, and a component is `(*batch, *shape)`.

    Raises:
        InputError: If a name is not a string, is empty or has a dot, or if leaves differ in their batch.
        DTypeError: If a leaf is not a floating point or complex tensor, if leaves differ in dtype or device, or if a
            cast would drop imaginary parts.

    Example:
        >>> import torch, luxtorch as lt
        >>> ps = lt.ComponentVector({"dense": {"weight": torch.tensor([[1.0, 2.0]]), "bias": torch.tensor([3.0])}})
        >>> ps.flat, ps.dense.weight, ps["dense.bias"]
        (tensor([1., 2., 3.]), tensor([[1., 2.]]), tensor([3.]))
        >>> grads = torch.func.grad(lambda ps: (ps.dense.weight**2).sum() - ps.dense.bias.sum())(ps)
        >>> ps - 0.1 * grads
        ComponentVector of 3 elements (torch.float32, cpu)
          dense
            weight (1, 2): tensor([[0.8000, 1.6000]])
            bias (1,): tensor([3.1000])

    The idea is that of ComponentArrays.jl, which Lux builds on.
    """

    def __new__(cls, tree: Any, *, batch_dims: int = 0, dtype: torch.dtype | None = None) -> ComponentVector:
        axes, leaves = axes_and_leaves(tree, batch_dims)
        return named(ravel(leaves, batch_dims, dtype), axes)

    @staticmethod
    def from_flat(flat: Tensor, axes: Axes) -> ComponentVector:
        """Name the elements of a flat tensor, without copying it.

        Args:
            flat: A tensor whose last dimension has `axes.size` elements.
            axes: The names, for instance those of another ComponentVector.

        Raises:
            InputError: If the last dimension has another size.

        Example:
            >>> import torch, luxtorch as lt
            >>> layout = lt.axes({"a": torch.zeros(2, 2), "b": torch.zeros(())})
            >>> lt.ComponentVector.from_flat(torch.arange(5.0), layout).a
            tensor([[0., 1.],
                    [2., 3.]])
        """
        check_flat(flat, axes)
        return named(flat, axes)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            component = (self._in_trace(key) if is_dynamo_compiling() else self._kept()).get(key)
            return self._below(key) if component is None else component
        if isinstance(key, (list, tuple)) and key and all(isinstance(name, str) for name in key):
            return self._select(key)
        return self.flat[key]

    def __getattr__(self, name: str) -> Any:
        # Special methods that Python looks up are not misspelt components, and our error cannot be raised in a trace.
        if name.startswith("__") or (is_dynamo_compiling() and name not in self.axes):
            raise AttributeError(name)
        return self[name]

    def _below(self, name: str) -> Component:
        """Return the component with a dotted name."""
        check_name(self.axes, name)
        group, _, rest = name.partition(".")
        return self[group][rest]  # type: ignore[no-any-return]

    def _select(self, names: Sequence[str]) -> ComponentVector:
        """Return a new vector of some components of the top level, in the order of the names."""
        places = dict(top(self.axes))
        for name in names:
            if name not in places:
                check_name(self.axes, name)
                fix = "Select from its group, as in cv['dense'][['bias', 'weight']]."
                raise out_of_range("A selected component", name, f"at the top level: {', '.join(places)}", fix=fix)
        if len(set(names)) < len(names):
            raise InputError("A component may be selected only once.", got=", ".join(names))
        pieces = self.flat.split_with_sizes([place.size for place in places.values()], -1)
        by_name = dict(zip(places, pieces, strict=True))
        axes = intern(tuple((name, places[name].child) for name in names))
        return named(torch.cat([by_name[name] for name in names], -1), axes)

    def __iter__(self) -> Iterator[str]:
        return iter(self.axes.names)

    def __len__(self) -> int:
        return len(self.axes.names)

    def __contains__(self, name: object) -> bool:
        return name in self.axes

    def __bool__(self) -> bool:
        if self.dtype == torch.bool and self.numel() > 0:
            raise InputError(
                "A vector of bools has a truth value for each element, not one.",
                fix="Use torch.equal(a, b), torch.all(a == b) or torch.any(a == b).",
            )
        return len(self) > 0

    def keys(self) -> KeysView[str]:
        """Return the names of the top level."""
        return self.axes.keys()

    def values(self) -> ValuesView[Component]:
        """Return the components of the top level."""
        return self._named().values()

    def items(self) -> ItemsView[str, Component]:
        """Return the components of the top level with their names."""
        return self._named().items()

    def get(self, name: str, default: Any = None) -> Any:
        """Return a component, or `default` where there is none of that name."""
        return self[name] if name in self.axes else default

    # Conversions.

    def to_dict(self) -> dict[str, Any]:
        """Return the components as nested dicts of views.

        What was a list or a tuple in the tree comes back as a dict with the names "0", "1", and so on, and what was
        cast comes back with its new dtype.

        Example:
            >>> import torch, luxtorch as lt
            >>> lt.ComponentVector({"layers": [{"scale": torch.ones(())}, {}]}).to_dict()
            {'layers': {'0': {'scale': tensor(1.)}, '1': {}}}
        """
        return {
            name: component.to_dict() if isinstance(component, ComponentVector) else component
            for name, component in self._named().items()
        }

    def replace(self, components: Mapping[str, Any] | None = None, /, **more: Any) -> ComponentVector:
        """Return a new vector in which some components are replaced, or new ones appended.

        Args:
            components: Tensors or trees by name. A dotted name reaches into a group.
            **more: Tensors or trees by names of the top level.

        Raises:
            KeyNameError: If a dotted name leads into a group that is not there.

        Example:
            >>> import torch, luxtorch as lt
            >>> ps = lt.ComponentVector({"dense": {"weight": torch.zeros(1, 2), "bias": torch.zeros(1)}})
            >>> ps.replace({"dense.bias": torch.ones(2)}, scale=torch.ones(())).axes
            Axes(dense=Axes(weight=(1, 2), bias=(2,)), scale=())
        """
        tree = self.to_dict()
        for name, value in {**(components or {}), **more}.items():
            *groups, last = name.split(".")
            node = tree
            for group in groups:
                if not isinstance(node.get(group), dict):
                    raise KeyNameError(
                        f"There is no group '{group}' to put '{name}' in.",
                        expected=", ".join(f"'{known}'" for known, child in node.items() if isinstance(child, dict)),
                        fix=suggest(group, node) or f"Pass the group as a whole: {{'{group}': {{...}}}}.",
                    )
                node = node[group]
            node[last] = value
        return ComponentVector(tree, batch_dims=self.flat.dim() - 1)

    def to(self, *args: Any, **kwargs: Any) -> ComponentVector:
        """Return the vector in another dtype or on another device; the arguments are those of `torch.Tensor.to`."""
        return named(self.flat.to(*args, **kwargs), self.axes)

    def detach(self) -> ComponentVector:
        """Return the vector detached from the autograd graph; the memory is shared."""
        return named(self.flat.detach(), self.axes)

    def clone(self) -> ComponentVector:
        """Return a copy."""
        return named(self.flat.clone(), self.axes)

    def numel(self) -> int:
        """Return the number of elements, over the whole batch."""
        return self.flat.numel()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the flat tensor."""
        return self.flat.dtype

    @property
    def device(self) -> torch.device:
        """The device of the flat tensor."""
        return self.flat.device

    @property
    def shape(self) -> torch.Size:
        """The shape of the flat tensor."""
        return self.flat.shape

    @property
    def requires_grad(self) -> bool:
        """Whether autograd records what happens to the flat tensor."""
        return self.flat.requires_grad

    # Protocols of Python and torch.

    def _strip(self) -> Tensor:
        return self.flat

    def _rename(self, result: Any) -> Any:
        if not isinstance(result, Tensor):
            return result
        if self.axes.size == 1 and result.shape[-1] != 1:
            raise InputError(
                "The vector's only element was broadcast, so that its name fits no element of the result.",
                expected="a tensor whose last dimension is 1",
                got=f"a result of shape {tuple(result.shape)}",
                fix="Use cv.flat where the result is a plain tensor.",
            )
        return named(result, self.axes)

    def _check_names(self, other: Named) -> None:
        if not isinstance(other, ComponentVector):
            raise InputError(f"A ComponentVector and a {type(other).__name__} cannot be combined element by element.")
        if other.axes is not self.axes:
            refuse_names(self.axes, other.axes)

    def __matmul__(self, other: Any) -> Any:
        return torch.matmul(self, other)  # type: ignore[arg-type]

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Iterable[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return call_with_names(func, args, kwargs)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return self.flat.__array__(dtype)  # type: ignore[no-untyped-call]

    def __setattr__(self, name: str, value: Any) -> None:
        raise InputError(
            f"A ComponentVector is immutable: '{name}' cannot be set.",
            fix=f"Make a new one: cv = cv.replace({name}=...).",
        )

    def __delattr__(self, name: str) -> None:
        raise InputError(f"A ComponentVector is immutable: '{name}' cannot be deleted.")

    def __setitem__(self, key: Any, value: Any) -> None:
        raise InputError(
            "A ComponentVector is immutable: its components cannot be set.",
            fix=f"Make a new one: cv = cv.replace({{{key!r}: ...}}).",
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return named, (self.flat, self.axes)

    def __repr__(self) -> str:
        flat, axes = self.flat, self.axes
        if not self._is_whole():
            return f"ComponentVector({flat!r}, {axes!r})"
        batch = f", batch {tuple(flat.shape[:-1])}" if flat.dim() > 1 else ""
        head = f"ComponentVector of {axes.size} elements{batch} ({flat.dtype}, {flat.device})"
        return "\n".join([head, *_lines(flat, axes, "  ")])

    def _repr_html_(self) -> str:
        return tree_html(self) if self._is_whole() else plain(repr(self))

    def _is_whole(self) -> bool:
        """Tell whether the elements fit the names: tree libraries may put something else in their place."""
        return isinstance(self.flat, Tensor) and self.flat.shape[-1:] == (self.axes.size,)


# Larger leaves are printed as their shapes.
_MOST_ELEMENTS = 100


def _lines(flat: Tensor, axes: Axes, indent: str) -> Iterator[str]:
    for name in axes.names:
        child, part = axes[name], flat[..., axes.slice(name)]
        if isinstance(child, Axes):
            yield f"{indent}{name}" if len(child) else f"{indent}{name} (empty)"
            yield from _lines(part, child, indent + "  ")
        elif part.numel() > _MOST_ELEMENTS or part.is_meta:
            yield f"{indent}{name} {child}"
        else:
            head = f"{indent}{name} {child}: "
            yield head + str(part.detach().reshape(part.shape[:-1] + child)).replace("\n", "\n" + " " * len(head))


def named(flat: Any, axes: Axes) -> ComponentVector:
    """Return the vector of these elements and names, without checks."""
    return make(ComponentVector, flat, axes)


@handles("stack")
def _stack(func: Callable[..., Tensor], vectors: Sequence[Any], dim: int = 0) -> Any:
    """Stack vectors into a batch of vectors, unless the new dimension comes last."""
    stripped: list[Named] = []
    result = func(strip(vectors, stripped), dim)
    for other in stripped[1:]:
        stripped[0]._check_names(other)
    return result if dim in (-1, result.dim() - 1) else stripped[0]._rename(result)


Mapping.register(ComponentVector)
register_node(
    ComponentVector,
    lambda vector: ([vector.flat], vector.axes),
    lambda children, axes: named(next(iter(children)), axes),
    names=["flat"],
    single=(lambda vector: vector.flat, lambda flat, vector: named(flat, vector.axes)),
)
torch.serialization.add_safe_globals([named, Axes])
