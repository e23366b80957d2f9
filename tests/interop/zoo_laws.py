"""What a layer made of a module must do, and how torch itself would do the same."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, jvp, vmap

import luxtorch as lt
from luxtorch.core import flatten_names, tree_leaves, tree_map

from .zoo import Case


def is_real(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def number(y: Any) -> Tensor:
    """Return one number in which every real output has a weight."""
    leaves = [leaf for leaf in tree_leaves(y) if is_real(leaf)]
    weights = [torch.cos(torch.arange(leaf.numel(), dtype=torch.float64)).reshape(leaf.shape) for leaf in leaves]
    return sum((leaf * weight).sum() for leaf, weight in zip(leaves, weights, strict=True))


@dataclass
class Subject:
    """A module with inputs, and the layer that is made of it."""

    case: Case
    module: nn.Module
    x: lt.Inputs

    def __post_init__(self) -> None:
        self.layer, self.ps, self.st = lt.from_torch(self.module)

    # The number that all derivatives are of: by the layer, by the module, and by the module as torch's own function.

    def loss(self, ps: Any, st: Any = None, x: Any = None) -> Tensor:
        return number(self.layer(self.x if x is None else x, ps, self.st if st is None else st)[0])

    def call(self, module: nn.Module, x: Any = None) -> Any:
        inputs = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, x or self.x)
        return module(*inputs.args, **inputs.kwargs)

    def own_loss(self, values: dict[str, Tensor], x: Any = None) -> Tensor:
        x = self.x if x is None else x
        buffers = {name: value.clone() for name, value in self.module.named_buffers()}
        frozen = {k: v.detach() for k, v in self.module.named_parameters() if not v.requires_grad}
        return number(functional_call(self.module, {**buffers, **frozen, **values}, x.args, x.kwargs))

    @cached_property
    def values(self) -> dict[str, Tensor]:
        """The trainable parameters of the module by name."""
        return {k: v.detach().clone() for k, v in self.module.named_parameters() if v.requires_grad}

    def backward(self, module: nn.Module, x: Any = None) -> dict[str, Tensor]:
        """Return the gradients that the module's own tape gives."""
        module.zero_grad()
        number(self.call(module, x)).backward()
        return {
            name: torch.zeros_like(value) if value.grad is None else value.grad.clone()
            for name, value in module.named_parameters()
            if value.requires_grad
        }

    # Several models, and several samples.

    @staticmethod
    def both(tree: Any) -> Any:
        """Return two sets of parameters, stacked."""
        return tree_map(lambda leaf: torch.stack([leaf, 0.9 * leaf]), tree)

    @cached_property
    def arguments(self) -> tuple[list[Tensor], Callable[[Any], Any]]:
        """The tensors of the input that may vary, and what makes an input of such: the edges of a graph stay."""
        leaves, structure = pytree.tree_flatten(self.x)
        varied = [
            i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and (self.case.batched or is_real(leaf))
        ]

        def made(values: Any) -> Any:
            new = [*leaves]
            for i, value in zip(varied, values, strict=True):
                new[i] = value
            return pytree.tree_unflatten(new, structure)

        return [leaves[i] for i in varied], made

    @cached_property
    def samples(self) -> tuple[list[Tensor], Callable[[Any], Any]]:
        """The samples, and what makes an input of one sample; of graphs there is one, to which half of it is added."""
        leaves, made = self.arguments
        if self.case.batched:
            return leaves, lambda values: made([value[None] for value in values])
        return [torch.stack([leaf, 0.5 * leaf]) for leaf in leaves], made

    def close(self, got: Any, wanted: Any) -> None:
        got, wanted = (
            flatten_names(t) if isinstance(t, dict) else dict(enumerate(tree_leaves(t))) for t in (got, wanted)
        )
        assert got.keys() == wanted.keys()
        for name, value in wanted.items():
            if not (is_real(value) or isinstance(value, Tensor) and value.is_complex()):
                assert not isinstance(value, Tensor) or torch.equal(got[name], value), name
                continue
            finite = value[value.isfinite()]
            scale = float(finite.abs().max()) if finite.numel() else 0.0
            tolerance = self.case.tolerance
            torch.testing.assert_close(
                got[name],
                value,
                rtol=tolerance,
                atol=tolerance * max(scale, 1e-3),
                equal_nan=True,
                msg=lambda text, name=name: f"{name}: {text}",
            )


# The laws. Each is of a subject in eval mode.


def output(s: Subject) -> None:
    y, new = s.layer(s.x, s.ps, s.st)
    s.close([*tensors(y)], [*tensors(s.call(s.module))])
    assert flatten_names(new).keys() == flatten_names(s.st).keys()


def tensors(y: Any) -> list[Tensor]:
    return [leaf.detach() for leaf in tree_leaves(y) if isinstance(leaf, Tensor)]


def by_tape(s: Subject, st: Any = None, x: Any = None) -> dict[str, Tensor]:
    """Return the gradients of the layer that autograd's tape gives."""
    leaves = tree_map(lambda leaf: leaf.detach().clone().requires_grad_(), s.ps)
    s.loss(leaves, st, x).backward()
    return {k: torch.zeros_like(v) if v.grad is None else v.grad for k, v in flatten_names(leaves).items()}


def tape(s: Subject) -> None:
    s.close(by_tape(s), s.backward(s.module))


def reverse(s: Subject) -> None:
    s.close(grad(s.loss)(s.ps), s.backward(s.module))


def own_reverse(s: Subject) -> None:
    s.close(grad(s.own_loss)(s.values), s.backward(s.module))


def tangents(tree: Any) -> Any:
    return tree_map(lambda leaf: torch.sin(torch.arange(leaf.numel()).reshape(leaf.shape)).to(leaf), tree)


def along(slopes: Any, tangent: Any) -> Tensor:
    slopes, tangent = flatten_names(slopes), flatten_names(tangent)
    return sum((slopes[name].conj() * tangent[name]).real.sum() for name in tangent)


def forward(s: Subject) -> None:
    tangent = tangents(s.ps)
    s.close([jvp(s.loss, (s.ps,), (tangent,))[1]], [along(s.backward(s.module), tangent)])


def own_forward(s: Subject) -> None:
    tangent = tangents(s.values)
    s.close([jvp(s.own_loss, (s.values,), (tangent,))[1]], [along(s.backward(s.module), tangent)])


def models(s: Subject, loss: Any = None, ps: Any = None) -> None:
    loss, ps = loss or s.loss, s.ps if ps is None else ps
    slopes, values = vmap(grad_and_value(loss))(s.both(ps))
    for i, factor in enumerate((1, 0.9)):
        module = copy.deepcopy(s.module)
        with torch.no_grad():
            for value in module.parameters():
                if value.requires_grad:
                    value.mul_(factor)
        s.close([values[i]], [number(s.call(module)).detach()])
        s.close(tree_map(lambda leaf, i=i: leaf[i], slopes), s.backward(module))


def own_models(s: Subject) -> None:
    models(s, s.own_loss, s.values)


def samples(s: Subject, loss: Any = None, ps: Any = None) -> None:
    ps = s.ps if ps is None else ps
    loss = loss or (lambda ps, x: s.loss(ps, None, x))
    stacked, made = s.samples
    slopes = vmap(lambda *sample: grad(loss)(ps, made(sample)))(*stacked)
    for i in range(len(stacked[0])):
        one = made(tuple(leaf[i] for leaf in stacked))
        # Not the module's own: that of a BatchNorm in eval mode is wrong for one sample whose gradient is transposed.
        s.close(tree_map(lambda leaf, i=i: leaf[i], slopes), by_tape(s, None, one))


def own_samples(s: Subject) -> None:
    samples(s, s.own_loss, s.values)


def step_of(loss: Any) -> Any:
    def step(ps: Any, leaves: list[Tensor]) -> Any:
        slopes, value = grad_and_value(loss)(ps, leaves)
        return tree_map(lambda leaf, slope: leaf - 0.01 * slope, ps, slopes), value

    return step


def jit(s: Subject) -> None:
    leaves, made = s.arguments
    step = step_of(lambda ps, leaves: s.loss(ps, None, made(leaves)))
    jitted = lt.jit(step, backend="replay")
    for ps in (s.ps, tree_map(lambda leaf: 0.9 * leaf, s.ps)):
        s.close(jitted(ps, leaves), step(ps, leaves))


def own_jit(s: Subject) -> None:
    leaves, made = s.arguments
    step = step_of(lambda values, leaves: s.own_loss(values, made(leaves)))
    torch.compile(step, fullgraph=True, backend="eager")(s.values, leaves)


def saved(module: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of the state_dict; neuraloperator puts other things into it as well."""
    return {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}


def history(s: Subject) -> None:
    before = {name: value.clone() for name, value in saved(s.module).items()}
    other = tree_map(lambda leaf: 0.9 * leaf, s.ps)
    first, second, again = (tensors(s.layer(s.x, ps, s.st)[0]) for ps in (s.ps, other, s.ps))
    fresh = lt.from_torch(s.module)
    for one, three, alone in zip(first, again, tensors(fresh.layer(s.x, s.ps, fresh.st)[0]), strict=True):
        assert torch.equal(one, three) and torch.equal(one, alone) or bool(one.isnan().any())
    alone = tensors(fresh.layer(s.x, other, fresh.st)[0])
    assert all(torch.equal(a, b) for a, b in zip(second, alone, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for name, value in saved(s.module).items():
        assert torch.equal(value, before[name]), name


def names(s: Subject) -> None:
    back = lt.to_torch(s.layer, s.ps, s.st)
    s.close([*tensors(s.call(back))], [*tensors(s.call(s.module))])
    assert saved(back).keys() == saved(s.module).keys()
    other = copy.deepcopy(s.module)
    with torch.no_grad():
        for value in other.parameters():
            value.zero_()
    other.load_state_dict(back.state_dict(), strict=True)
    for name, value in saved(s.module).items():
        assert torch.equal(saved(other)[name], value), name
    zero = tree_map(torch.zeros_like, s.ps)
    loaded = lt.load_weights(saved(s.module), zero, s.st)
    for name, value in flatten_names(s.ps).items():
        assert torch.equal(flatten_names(loaded.ps)[name], value), name


def setup(s: Subject) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        ps, st = lt.setup(1, s.layer)
    for new, old in ((ps, s.ps), (st, s.st)):
        new, old = flatten_names(new), flatten_names(old)
        assert new.keys() == old.keys()
        for name, value in old.items():
            if isinstance(value, Tensor):
                assert (new[name].shape, new[name].dtype) == (value.shape, value.dtype), name
    s.layer(s.x, ps, lt.test_mode(st))


def train(s: Subject) -> None:
    module = copy.deepcopy(s.module).train()
    st = lt.train_mode(s.st)
    before = torch.get_rng_state()
    (y, new), (again, _) = s.layer(s.x, s.ps, st), s.layer(s.x, s.ps, st)
    assert torch.equal(torch.get_rng_state(), before)
    assert flatten_names(new).keys() == flatten_names(st).keys()
    assert all(map(torch.equal, tensors(y), tensors(again)))
    slopes = grad(s.loss)(s.ps, st)
    s.close(slopes, by_tape(s, st))
    theirs = tensors(s.call(copy.deepcopy(module)))
    if differs(theirs, lambda i: tensors(s.call(copy.deepcopy(module)))):
        assert differs(
            tensors(y), lambda i: tensors(s.layer(s.x, s.ps, lt.update_state(st, "rng", lt.random.key(i)))[0])
        )
        return
    s.close(tensors(y), theirs)
    s.close(slopes, s.backward(copy.deepcopy(module)))
    s.call(module)
    states = flatten_names(new)
    s.close({name: states[name] for name, _ in module.named_buffers()}, dict(module.named_buffers()))


def differs(first: list[Tensor], draw: Callable[[int], list[Tensor]]) -> bool:
    """Say whether there are random numbers: some drop little, so that many calls are like the first."""
    return any(not all(map(torch.equal, first, draw(i))) for i in range(30))


LAWS: dict[str, tuple[Callable[[Subject], None], Callable[[Subject], None] | None]] = {
    "output": (output, None),
    "tape": (tape, None),
    "grad": (reverse, own_reverse),
    "jvp": (forward, own_forward),
    "models": (models, own_models),
    "samples": (samples, own_samples),
    "jit": (jit, own_jit),
    "history": (history, None),
    "names": (names, None),
    "setup": (setup, None),
    "train": (train, own_reverse),
}
"""By name: what is checked of the layer, and the same with `torch.func.functional_call`."""


def subject_of(case: Case) -> Subject:
    """Build an architecture in float64, in eval mode; no value is what a module starts with."""
    module = case.build().double().eval()
    module._apply(lambda leaf: leaf.to(torch.complex128) if leaf.is_complex() else leaf)
    with torch.no_grad():
        for value in module.parameters():
            if value.is_floating_point():
                value.add_(0.05 * torch.randn_like(value))
        for name, value in module.named_buffers():
            if name.endswith("running_mean"):
                value.add_(0.1 * torch.randn_like(value))
            elif name.endswith("running_var"):
                value.mul_(1 + 0.2 * torch.rand_like(value))
    return Subject(case, module, case.inputs())
