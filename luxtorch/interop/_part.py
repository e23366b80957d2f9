"""One of the modules that a module is made of, with the places of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from luxtorch.core import TRAINING, InputError, LuxtorchError, Parameters, States, Static
from luxtorch.core._locate import wrong_names

from ._branch import Branch

# The modules of torch.nn that ask for their mode, or for random numbers, or for functions that the pure mode replaces.
_MODAL = (
    nn.modules.batchnorm._NormBase,
    nn.modules.dropout._DropoutNd,
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

_OF_TORCH = frozenset(vars(nn.Module()))
"""The attributes that every module has."""


class Part:
    """Hand tensors to one of the modules that a skeleton is made of, and to those below it.

    Attributes:
        module: The module.
        path: The names that lead to it.
        children: The parts below, by name. A module that stands in two places is a part in the first alone.
        parameters: By name, tensors on the meta device that show shapes and dtypes.
        states: The same for buffers, and for tensors that are plain attributes of the module.
        modal: Whether what it computes may depend on the mode, or on random numbers.
        training: The mode that the module was in.
        written: Whether it may write into its input.
    """

    def __init__(self, module: nn.Module, path: tuple[str, ...], seen: dict[int, Any]) -> None:
        self.module = module
        self.path = path
        self.parameters: dict[str, Tensor] = {}
        self.states: dict[str, Tensor] = {}
        self.children: dict[str, Part] = {}
        self.training = module.training
        own = not type(module).__module__.startswith("torch.nn.modules.") or bool(module._forward_pre_hooks)
        self.modal = own and type(module).forward is not nn.Module.forward or isinstance(module, _MODAL)
        if isinstance(module, Branch):
            self.modal = module._modal
        self._copied = own
        self.written = own or bool(getattr(module, "inplace", False))
        self._stores: dict[str, dict[str, Any]] = {}
        self._tied: list[tuple[str, dict[str, Any], str]] = []
        for name, store, value in tensors_of(module):
            self._stores[name] = store
            if id(value) in seen:
                self._tied.append((name, *seen[id(value)]))
                continue
            seen[id(value)] = store, name
            (self.parameters if store is module._parameters else self.states)[name] = value
        self._plain = frozenset(name for name, store in self._stores.items() if store is module.__dict__)
        # What else a forward may leave behind on the module, to be put back after a call.
        self._attributes = {k: v for k, v in vars(module).items() if k not in _OF_TORCH | self._plain} if own else {}
        for name, child in module._modules.items():
            if child is not None and id(child) not in seen:
                seen[id(child)] = None
                self.children[name] = Part(child, (*path, name), seen)
        self._shapes = {name: like.shape for name, like in self.parameters.items()}
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
        return getattr(self.module, name, None) if name in self._plain else self._stores[name].get(name)

    def _put(self, name: str, value: Any) -> None:
        if name in self._plain:  # the compiler does not know that an attribute stands in a dict
            setattr(self.module, name, value)
        else:
            self._stores[name][name] = value

    def _restore(self) -> None:
        """Put back what the forward has changed on the module besides its tensors."""
        if torch.compiler.is_compiling():
            for name, value in self._attributes.items():
                if value is None and getattr(self.module, name, None) is not None:
                    setattr(self.module, name, None)
            return
        now = vars(self.module)
        for name in [name for name in now if name not in self._attributes]:
            if name not in _OF_TORCH and name not in self._plain:
                del now[name]
        now.update(self._attributes)

    def lend(self, ps: Parameters, st: States) -> None:
        """Put parameters and states into the modules."""
        if ps.keys() != self._names_of_ps or st.keys() != self._names_of_st:
            raise self._wrong_names(ps, st)
        own = self.module._parameters
        for name, shape in self._shapes.items():
            value = ps[name]
            if value.shape != shape:
                raise self._wrong_shape("parameter", name, value)
            own[name] = value
        for name, like in self.states.items():
            value = st[name]
            if value.shape != like.shape:
                raise self._wrong_shape("state", name, value)
            # Code that is not torch's may write into it.
            self._put(name, value.clone() if self._copied else value)
        if self.modal:
            self._set_mode(st[TRAINING].value)
        for name, child in self.children.items():
            child.lend(ps[name], st[name])
        for name, store, source in self._tied:
            self._put(name, store[source])

    def take(self, st: States) -> dict[str, Any]:
        """Return the states after a call, detached; `st` are those before it."""
        new = dict(st)
        for name, like in self.states.items():
            value = self.value(name)
            if not isinstance(value, Tensor) or value.shape != like.shape:
                raise self._changed(name, like, value)
            new[name] = value.detach()
        for name, child in self.children.items():
            new[name] = child.take(st[name])
        return new

    def clear(self) -> None:
        """Take the tensors away again, and set the mode back."""
        self._set_mode(self.training)
        self.module._parameters.update(self.parameters)  # type: ignore[arg-type]
        for name, like in self.states.items():
            self._put(name, like)
        if self._copied:
            self._restore()
        for name, store, source in self._tied:
            self._put(name, store[source])
        for child in self.children.values():
            child.clear()

    def _set_mode(self, training: bool) -> None:
        if self.module.training != training:  # to set an attribute of a module is slow
            self.module.training = training

    def _wrong_names(self, ps: Parameters, st: States) -> LuxtorchError:
        for tree, names, what in ((ps, self._names_of_ps, "parameter"), (st, self._names_of_st, "state")):
            error = wrong_names(tree, names, what, "Use the trees that from_torch returned for this module.")
            if error is not None:
                return self._located(error)
        raise AssertionError

    def _wrong_shape(self, what: str, name: str, value: Tensor) -> LuxtorchError:
        return self._located(
            InputError(
                f"The {what} '{name}' does not have the module's shape.",
                expected=str(tuple(self.like(name).shape)),
                got=str(tuple(value.shape)),
                fix="Use the trees that from_torch returned for this module; for a batch of models, call torch.vmap.",
            )
        )

    def _changed(self, name: str, like: Tensor, value: Any) -> LuxtorchError:
        got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        return self._located(
            InputError(
                f"The module's forward replaced its buffer '{name}' by something of another kind.",
                expected=f"a tensor of shape {tuple(like.shape)}: a state keeps its structure",
                got=got,
                fix="Give the buffer its final shape before from_torch, for instance by one call of the module.",
            )
        )

    def _located(self, error: LuxtorchError) -> LuxtorchError:
        error.inside = self.path
        return error


def tensors_of(module: nn.Module) -> Iterator[tuple[str, dict[str, Any], Tensor]]:
    """Yield the tensors that a module itself holds: each name, the dict in which it stands, and the tensor."""
    for store in (module._parameters, module._buffers, module.__dict__):
        for name, value in store.items():
            if isinstance(value, Tensor):
                yield name, store, value
