"""A submodule with the places of its tensors, to swap parameters, states and mode for the time of a call."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from luxtorch._torch import Dropouts, NormsWithStatistics
from luxtorch.core import TRAINING, InputError, LuxtorchError, Parameters, States, Static, described, wrong_shape
from luxtorch.core._call_errors import wrong_names

from ._branch import Branch
from ._reach import OF_A_MODULE, left_by_calls, package

# The modules of torch.nn that read their mode, draw random numbers, or call functions that PureMode replaces.
_MODAL = (
    NormsWithStatistics,
    Dropouts,
    nn.RNNBase,
    nn.RReLU,
    nn.MultiheadAttention,
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
    nn.FractionalMaxPool2d,
    nn.FractionalMaxPool3d,
)


class Placeholder:
    """Take the place of a tensor of a module outside of calls; using it raises an error.

    Attributes:
        like: A tensor on the meta device of the same shape and dtype.
        parameter: Whether the tensor is an `nn.Parameter`.
        trainable: Whether the tensor requires a gradient.
    """

    def __init__(self, value: Tensor) -> None:
        self.like = torch.empty_like(value, device="meta", requires_grad=False)
        self.parameter = isinstance(value, nn.Parameter)
        self.trainable = value.requires_grad

    @property
    def tensor(self) -> Tensor:
        """The meta tensor in its place, for torch.compile."""
        return nn.Parameter(self.like, requires_grad=False) if self.parameter else self.like

    @classmethod
    def __torch_function__(cls, *_: Any) -> Any:
        raise InputError(
            "A tensor of a converted module must be used inside the call of its layer, or by what that call returned.",
            fix="Return what is needed from the forward.",
        )

    def __repr__(self) -> str:
        return f"Placeholder({self.like.dtype}, {tuple(self.like.shape)})"


class Submodule:
    """Swap tensors into a submodule, and into those below it.

    A tensor is listed under the first of its names in the `state_dict`; as an attribute, only if it has none there.

    Attributes:
        module: The module.
        path: The names that lead to it.
        children: The submodules below, by name. A module with two names is a child under the first alone.
        parameters: By name, tensors that have the shapes and dtypes.
        states: The same for buffers, integer parameters, and tensors that are attributes of the module.
        modal: Whether its output may depend on the mode, or on random numbers.
        training: The mode that the module was in.
        written: Whether it may write into its input.
        stores: By the name of each tensor, the dict that holds it between calls.
        originals: By name, what the dict held at first.
        stateful: Whether there are states here or below.
        busy: Whether there is anything to undo after a call.
        swapped: The parameters that were swapped in, in the order of their names.
        own_dict: Whether the parameters of a call are in a dict of their own, which is dropped after the call.
        trainable: The names of the parameters that require a gradient in the module.
        traced: Whether it is for torch.compile, which does not see that `_parameters` is another dict.
        as_parameters: Whether code may ask whether what is swapped in is an `nn.Parameter`.
    """

    def __init__(
        self, module: nn.Module, path: tuple[str, ...], seen: set[int], registered: frozenset[int] | None = None
    ) -> None:
        if registered is None:
            registered = frozenset(id(value) for part in module.modules() for value in _registered(part))
        self.module = module
        self.path = path
        self.parameters: dict[str, Tensor] = {}
        self.states: dict[str, Tensor] = {}
        self.children: dict[str, Submodule] = {}
        self.training = module.training
        own = _has_code(module)
        self.modal = own and type(module).forward is not nn.Module.forward or isinstance(module, _MODAL)
        if isinstance(module, Branch):
            self.modal = module._modal
        self._copied = own
        self.written = own or bool(getattr(module, "inplace", False))
        self.stores: dict[str, dict[str, Any]] = {}
        self.originals: dict[str, Any] = {}
        for name, store, value in tensors_of(module):
            if store is module.__dict__ and id(value) in registered:
                continue  # a second name of a tensor of the state_dict
            if id(value) in seen:
                continue
            seen.add(id(value))
            self.stores[name], self.originals[name] = store, value
            like = value.like if isinstance(value, Placeholder) else value
            differentiable = like.is_floating_point() or like.is_complex()
            (self.parameters if store is module._parameters and differentiable else self.states)[name] = like
        self._plain = frozenset(name for name, store in self.stores.items() if store is module.__dict__)
        self._of_parameters = frozenset(name for name, store in self.stores.items() if store is module._parameters)
        self._store: dict[str, Any] = module._parameters
        # Attributes to reset after torch.compile, which does not see other changes of a forward.
        self._nones = (
            [name for name, value in vars(module).items() if value is None and name not in OF_A_MODULE] if own else []
        )
        for name, child in module._modules.items():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                self.children[name] = Submodule(child, (*path, name), seen, registered)
        self.stateful: bool = bool(self.states) or any(child.stateful for child in self.children.values())
        self._shapes = {name: like.shape for name, like in self.parameters.items()}
        self.swapped: list[Any] = []
        self.busy = bool(self.originals) or self.modal or bool(self._nones)
        self.own_dict = bool(self._of_parameters)
        self.trainable = [name for name in self.parameters if getattr(self.originals[name], "trainable", False)]
        self.as_parameters = self.traced = False
        self._names_of_ps = frozenset((*self.parameters, *self.children))
        self._names_of_st = frozenset((*self.states, *self.children, *((TRAINING,) if self.modal else ())))

    def __iter__(self) -> Iterator[Submodule]:
        yield self
        for child in self.children.values():
            yield from child

    def tree(self, kind: str, leaf: Callable[[Submodule, str], Any] | None = None) -> dict[str, Any]:
        """Return the "parameters" or "states" here and below, nested by name.

        With `leaf`, each is replaced by what that returns for a submodule and the name of a tensor in it.
        """
        likes: dict[str, Tensor] = getattr(self, kind)
        own: dict[str, Any] = dict(likes) if leaf is None else {name: leaf(self, name) for name in likes}
        if kind == "states" and self.modal:
            own[TRAINING] = Static(self.training)
        return {**own, **{name: child.tree(kind, leaf) for name, child in self.children.items()}}

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the tensors in this submodule."""
        return (*self.parameters, *self.states)

    def like(self, name: str) -> Tensor:
        """Return the tensor that has the shape and dtype of the one with this name."""
        return self.parameters[name] if name in self.parameters else self.states[name]

    def value(self, name: str) -> Any:
        """Return the current value of this name."""
        if name in self._plain:
            return getattr(self.module, name, None)
        return (self.module._parameters if name in self._of_parameters else self.stores[name]).get(name)

    def _put(self, name: str, value: Any) -> None:
        if name in self._plain:  # torch.compile does not know that attributes are in a dict
            setattr(self.module, name, value)
        else:
            own: dict[str, Any] = self.module._parameters
            (own if name in self._of_parameters else self.stores[name])[name] = value

    def swap_in(self, ps: Parameters, st: States) -> None:
        """Put parameters and states into the modules."""
        if ps.keys() != self._names_of_ps or st.keys() != self._names_of_st:
            raise self._wrong_names(ps, st)
        own: dict[str, Any]
        if self.own_dict:
            vars(self.module)["_parameters"] = own = self._store.copy()
        else:
            own = self.module._parameters
        # Reading all components of a ComponentVector at once is cheaper; in a trace, reading each is.
        given = ps if type(ps) is dict or self.traced else dict(ps.items())
        if self._shapes:
            self.swapped = swapped = []
            for name, shape in self._shapes.items():
                value = given[name]
                if value.shape != shape:
                    raise self._wrong_shape("parameter", name, value)
                own[name] = value
                swapped.append(value)
            if self.as_parameters:
                for value in swapped:
                    value._is_param = True  # isinstance(value, nn.Parameter) is true during the call
        for name, like in self.states.items():
            value = st[name]
            if value.shape != like.shape:
                raise self._wrong_shape("state", name, value)
            # Code other than torch's may write into it.
            self._put(name, value.clone() if self._copied else value)
        if self.modal:
            self._set_mode(st[TRAINING].value)
        for name, child in self.children.items():
            child.swap_in(given[name], st[name])

    def read_states(self, st: States) -> dict[str, Any]:
        """Return the states after a call, detached; `st` are those before it."""
        if not self.stateful:
            return st  # type: ignore[return-value]
        new = dict(st)
        for name, like in self.states.items():
            value = self.value(name)
            if not isinstance(value, Tensor) or value.shape != like.shape:
                raise self._changed(name, like, value)
            new[name] = value.detach()
        for name, child in self.children.items():
            if child.stateful:
                new[name] = child.read_states(st[name])
        return new

    def check_parameters(self) -> None:
        """Raise if a call has replaced a parameter."""
        own: dict[str, Any] = self.module._parameters
        if not all(map(operator.is_, map(own.get, self._shapes), self.swapped)):
            name = next(
                name for name, value in zip(self._shapes, self.swapped, strict=True) if own.get(name) is not value
            )
            raise self.located(writes_parameter(name))

    def swap_out(self) -> None:
        """Put the placeholders and the mode back."""
        if self.modal:
            self._set_mode(self.training)
        if self.as_parameters:
            for value in self.swapped:
                vars(value).pop("_is_param", None)
        self.swapped = []
        if self.own_dict:
            vars(self.module)["_parameters"] = self._store
        for name in self.states if self.own_dict else self.originals:
            if not (self.own_dict and name in self._of_parameters):
                self._put(name, self.originals[name])
        if self.traced:
            for name in self._nones:
                if getattr(self.module, name, None) is not None:
                    setattr(self.module, name, None)

    def _set_mode(self, training: bool) -> None:
        if self.module.training != training:  # setting an attribute of a module is slow
            self.module.training = training

    def _wrong_names(self, ps: Parameters, st: States) -> LuxtorchError:
        for tree, names, what in ((ps, self._names_of_ps, "parameter"), (st, self._names_of_st, "state")):
            error = wrong_names(tree, names, what, "Use the trees that from_torch returned for this module.")
            if error is not None:
                return self.located(error)
        raise AssertionError

    def _wrong_shape(self, what: str, name: str, value: Tensor) -> LuxtorchError:
        fix = "Use the trees that from_torch returned for this module; for a batch of models, call torch.vmap."
        return self.located(wrong_shape(f"The {what} '{name}'", value, tuple(self.like(name).shape), fix=fix))

    def _changed(self, name: str, like: Tensor, value: Any) -> LuxtorchError:
        return self.located(
            InputError(
                f"The module's forward must keep the shape of its buffer '{name}'.",
                expected=f"a tensor of shape {tuple(like.shape)}",
                got=described(value),
                fix="Give the buffer its final shape before from_torch, for instance by one call of the module.",
            )
        )

    def located(self, error: LuxtorchError) -> LuxtorchError:
        """Return an error with the path of this submodule."""
        error.inside = self.path
        return error


def writes_parameter(name: str) -> InputError:
    """Return the error for a forward that changes a parameter."""
    return InputError(
        f"The module's forward must not change its parameter '{name}'.",
        fix="Where a first call sets it from data, call the module once before from_torch. Put a constraint on the "
        "parameters after each step of the optimizer, or parametrize the weight.",
    )


def has_hooks(module: nn.Module) -> bool:
    """Return whether a module has hooks, which only its own `__call__` runs."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _has_code(module: nn.Module) -> bool:
    """Return whether a call of a module runs code other than that of torch's modules."""
    if not type(module).__module__.startswith("torch.nn.modules.") or "forward" in vars(module):
        return True
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return bool(module._backward_hooks or module._backward_pre_hooks) or any(
        package(hook) != "luxtorch" for hook in hooks
    )


def _registered(module: nn.Module) -> Iterator[Any]:
    return (value for store in (module._parameters, module._buffers) for value in store.values() if value is not None)


def tensors_of(module: nn.Module) -> Iterator[tuple[str, dict[str, Any], Any]]:
    """Yield the tensors that a module itself holds: each name, the dict that holds it, and the tensor.

    Attributes that earlier calls have left behind are not among them.
    """
    for store in (module._parameters, module._buffers, module.__dict__):
        for name, value in store.items():
            if isinstance(value, Tensor | Placeholder) and not (
                store is module.__dict__ and name in left_by_calls(module)
            ):
                yield name, store, value
