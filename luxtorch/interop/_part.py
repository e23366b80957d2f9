"""One of the modules that a module is made of, with the places of its tensors."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from luxtorch._torch import Dropouts, NormsWithStatistics
from luxtorch.core import TRAINING, InputError, LuxtorchError, Parameters, States, Static
from luxtorch.core._locate import wrong_names

from ._branch import Branch
from ._reach import OF_A_MODULE, left_by_calls, package

# The modules of torch.nn that ask for their mode, or for random numbers, or for functions that the pure mode replaces.
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
    """Stand for a tensor of a module while no call has lent one; whoever uses it learns so.

    Attributes:
        like: A tensor on the meta device that shows shape and dtype.
        parameter: Whether it stands for an `nn.Parameter`.
        trainable: Whether it stands for a parameter that requires a gradient.
    """

    def __init__(self, value: Tensor) -> None:
        self.like = torch.empty_like(value, device="meta", requires_grad=False)
        self.parameter = isinstance(value, nn.Parameter)
        self.trainable = value.requires_grad

    @property
    def tensor(self) -> Tensor:
        """What stands for the tensor where a compiler wants one."""
        return nn.Parameter(self.like, requires_grad=False) if self.parameter else self.like

    @classmethod
    def __torch_function__(cls, *_: Any) -> Any:
        raise InputError(
            "A tensor of a converted module was used when no call had lent it one.",
            expected="its use inside the call of the layer, or by what that call returned",
            fix="Return what is needed from the forward.",
        )

    def __repr__(self) -> str:
        return f"Placeholder({self.like.dtype}, {tuple(self.like.shape)})"


class Part:
    """Hand tensors to one of the modules that a module is made of, and to those below it.

    A tensor stands at the first of its names in the `state_dict`; as an attribute, only if it has none there.

    Attributes:
        module: The module.
        path: The names that lead to it.
        children: The parts below, by name. A module that stands in two places is a part in the first alone.
        parameters: By name, tensors that show shapes and dtypes.
        states: The same for buffers, for parameters of integers, and for tensors that are attributes of the module.
        modal: Whether what it computes may depend on the mode, or on random numbers.
        training: The mode that the module was in.
        written: Whether it may write into its input.
        stores: By the name of each tensor, the dict in which it stands between calls.
        stood: By name, what stood there when the part was made.
        stateful: Whether there are states here or below.
        busy: Whether there is anything to take away after a call.
        lent: The parameters that it was lent, in the order of their names.
        apart: Whether parameters are lent in a dict of their own, which is dropped after the call.
        trainable: The names of the parameters that require a gradient in the module.
        traced: Whether a compiler runs the module, which does not see that another dict is put in.
        as_parameters: Whether code asks of what is lent whether it is an `nn.Parameter`.
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
        self.children: dict[str, Part] = {}
        self.training = module.training
        own = _has_code(module)
        self.modal = own and type(module).forward is not nn.Module.forward or isinstance(module, _MODAL)
        if isinstance(module, Branch):
            self.modal = module._modal
        self._copied = own
        self.written = own or bool(getattr(module, "inplace", False))
        self.stores: dict[str, dict[str, Any]] = {}
        self.stood: dict[str, Any] = {}
        for name, store, value in tensors_of(module):
            if store is module.__dict__ and id(value) in registered:
                continue  # a second name of what has a name in the state_dict
            if id(value) in seen:
                continue
            seen.add(id(value))
            self.stores[name], self.stood[name] = store, value
            like = value.like if isinstance(value, Placeholder) else value
            smooth = like.is_floating_point() or like.is_complex()
            (self.parameters if store is module._parameters and smooth else self.states)[name] = like
        self._plain = frozenset(name for name, store in self.stores.items() if store is module.__dict__)
        self._of_parameters = frozenset(name for name, store in self.stores.items() if store is module._parameters)
        self._store: dict[str, Any] = module._parameters
        # What a compiler is to put back; it does not see what else a forward leaves behind.
        self._nones = (
            [name for name, value in vars(module).items() if value is None and name not in OF_A_MODULE] if own else []
        )
        for name, child in module._modules.items():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                self.children[name] = Part(child, (*path, name), seen, registered)
        self.stateful: bool = bool(self.states) or any(child.stateful for child in self.children.values())
        self._shapes = {name: like.shape for name, like in self.parameters.items()}
        self.lent: list[Any] = []
        self.busy = bool(self.stood) or self.modal or bool(self._nones)
        self.apart = bool(self._of_parameters)
        self.trainable = [name for name in self.parameters if getattr(self.stood[name], "trainable", False)]
        self.as_parameters = self.traced = False
        self._names_of_ps = frozenset((*self.parameters, *self.children))
        self._names_of_st = frozenset((*self.states, *self.children, *((TRAINING,) if self.modal else ())))

    def __iter__(self) -> Iterator[Part]:
        yield self
        for child in self.children.values():
            yield from child

    def tree(self, kind: str, leaf: Callable[[Part, str], Any] | None = None) -> dict[str, Any]:
        """Return the tensors that stand here and below, nested by name: "parameters" or "states".

        With `leaf`, return instead of each what it makes of a part and the name of a tensor there.
        """
        likes: dict[str, Tensor] = getattr(self, kind)
        own: dict[str, Any] = dict(likes) if leaf is None else {name: leaf(self, name) for name in likes}
        if kind == "states" and self.modal:
            own[TRAINING] = Static(self.training)
        return {**own, **{name: child.tree(kind, leaf) for name, child in self.children.items()}}

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the tensors that stand here."""
        return (*self.parameters, *self.states)

    def like(self, name: str) -> Tensor:
        """Return the tensor that stood here when the part was made."""
        return self.parameters[name] if name in self.parameters else self.states[name]

    def value(self, name: str) -> Any:
        """Return what stands here now."""
        if name in self._plain:
            return getattr(self.module, name, None)
        return (self.module._parameters if name in self._of_parameters else self.stores[name]).get(name)

    def _put(self, name: str, value: Any) -> None:
        if name in self._plain:  # the compiler does not know that an attribute stands in a dict
            setattr(self.module, name, value)
        else:
            own: dict[str, Any] = self.module._parameters
            (own if name in self._of_parameters else self.stores[name])[name] = value

    def lend(self, ps: Parameters, st: States) -> None:
        """Put parameters and states into the modules."""
        if ps.keys() != self._names_of_ps or st.keys() != self._names_of_st:
            raise self._wrong_names(ps, st)
        own: dict[str, Any]
        if self.apart:
            vars(self.module)["_parameters"] = own = self._store.copy()
        else:
            own = self.module._parameters
        # To ask a ComponentVector for all at once costs less; in a trace, for each.
        given = ps if type(ps) is dict or self.traced else dict(ps.items())
        if self._shapes:
            self.lent = lent = []
            for name, shape in self._shapes.items():
                value = given[name]
                if value.shape != shape:
                    raise self._wrong_shape("parameter", name, value)
                own[name] = value
                lent.append(value)
            if self.as_parameters:
                for value in lent:
                    value._is_param = True  # for the time of the call, it is an nn.Parameter to whoever asks
        for name, like in self.states.items():
            value = st[name]
            if value.shape != like.shape:
                raise self._wrong_shape("state", name, value)
            # Code that is not torch's may write into it.
            self._put(name, value.clone() if self._copied else value)
        if self.modal:
            self._set_mode(st[TRAINING].value)
        for name, child in self.children.items():
            child.lend(given[name], st[name])

    def take(self, st: States) -> dict[str, Any]:
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
                new[name] = child.take(st[name])
        return new

    def check_parameters(self) -> None:
        """Refuse a call that has put another tensor in the place of a parameter."""
        own: dict[str, Any] = self.module._parameters
        if not all(map(operator.is_, map(own.get, self._shapes), self.lent)):
            name = next(name for name, value in zip(self._shapes, self.lent, strict=True) if own.get(name) is not value)
            raise self.located(writes_parameter(name))

    def clear(self) -> None:
        """Take the tensors away again, and set the mode back."""
        if self.modal:
            self._set_mode(self.training)
        if self.as_parameters:
            for value in self.lent:
                vars(value).pop("_is_param", None)
        self.lent = []
        if self.apart:
            vars(self.module)["_parameters"] = self._store
        for name in self.states if self.apart else self.stood:
            if not (self.apart and name in self._of_parameters):
                self._put(name, self.stood[name])
        if self.traced:
            for name in self._nones:
                if getattr(self.module, name, None) is not None:
                    setattr(self.module, name, None)

    def _set_mode(self, training: bool) -> None:
        if self.module.training != training:  # to set an attribute of a module is slow
            self.module.training = training

    def _wrong_names(self, ps: Parameters, st: States) -> LuxtorchError:
        for tree, names, what in ((ps, self._names_of_ps, "parameter"), (st, self._names_of_st, "state")):
            error = wrong_names(tree, names, what, "Use the trees that from_torch returned for this module.")
            if error is not None:
                return self.located(error)
        raise AssertionError

    def _wrong_shape(self, what: str, name: str, value: Tensor) -> LuxtorchError:
        return self.located(
            InputError(
                f"The {what} '{name}' does not have the module's shape.",
                expected=str(tuple(self.like(name).shape)),
                got=str(tuple(value.shape)),
                fix="Use the trees that from_torch returned for this module; for a batch of models, call torch.vmap.",
            )
        )

    def _changed(self, name: str, like: Tensor, value: Any) -> LuxtorchError:
        got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        return self.located(
            InputError(
                f"The module's forward replaced its buffer '{name}' by something of another kind.",
                expected=f"a tensor of shape {tuple(like.shape)}: a state keeps its structure",
                got=got,
                fix="Give the buffer its final shape before from_torch, for instance by one call of the module.",
            )
        )

    def located(self, error: LuxtorchError) -> LuxtorchError:
        error.inside = self.path
        return error


def writes_parameter(name: str) -> InputError:
    """Return the error of a forward that changes a parameter."""
    return InputError(
        f"The module's forward changes its parameter '{name}'.",
        expected="a forward that leaves the parameters alone: what a call is given stays as it is",
        fix="Where a first call sets it from data, call the module once before from_torch. Put a constraint on the "
        "parameters after each step of the optimizer, or parametrize the weight.",
    )


def hooked(module: nn.Module) -> bool:
    """Say whether a module has hooks, which only its own call runs."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _has_code(module: nn.Module) -> bool:
    """Say whether a call of a module runs code that is not that of torch's modules."""
    if not type(module).__module__.startswith("torch.nn.modules.") or "forward" in vars(module):
        return True
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return bool(module._backward_hooks or module._backward_pre_hooks) or any(
        package(hook) != "luxtorch" for hook in hooks
    )


def _registered(module: nn.Module) -> Iterator[Any]:
    return (value for store in (module._parameters, module._buffers) for value in store.values() if value is not None)


def tensors_of(module: nn.Module) -> Iterator[tuple[str, dict[str, Any], Any]]:
    """Yield the tensors that a module itself holds: each name, the dict in which it stands, and the tensor.

    What its calls leave behind as an attribute is not among them.
    """
    for store in (module._parameters, module._buffers, module.__dict__):
        for name, value in store.items():
            if isinstance(value, Tensor | Placeholder) and not (
                store is module.__dict__ and name in left_by_calls(module)
            ):
                yield name, store, value
