"""Every module of torch.nn in many forms: from_torch computes what the module computes."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from luxtorch.core import flatten_names, tree_leaves
from luxtorch.interop import from_torch
from luxtorch.interop._inputs import arguments
from luxtorch.testing._subject import is_real

from .forms import FORMS, READ

NO_FORM = {
    "Buffer": "a tensor",
    "Container": "the base of old containers, without a forward",
    "DataParallel": "a wrapper that from_torch refuses",
    "LinearCrossEntropyOptions": "options",
    "Module": "the base of all, without a forward",
    "ModuleDict": "a container without a forward",
    "ModuleList": "a container without a forward",
    "NLLLoss2d": "the deprecated name of NLLLoss",
    "Parameter": "a tensor",
    "ParameterDict": "a container without a forward",
    "ParameterList": "a container without a forward",
    "RNNBase": "the base of RNN, GRU and LSTM",
    "RNNCellBase": "the base of their cells, without a forward",
    "UninitializedBuffer": "a tensor",
    "UninitializedParameter": "a tensor",
}
"""Why some classes of torch.nn have no form."""


def test_every_class_of_torch_nn_has_a_form():
    classes = {name for name in dir(nn) if inspect.isclass(getattr(nn, name))}
    assert classes - {form.call.name for form in FORMS} == NO_FORM.keys() & classes


@pytest.mark.filterwarnings("ignore:.*(empty|zero-element|Initializing|support size|nested_tensor|oneDNN):UserWarning")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("form", FORMS, ids=repr)
def test_outputs_gradients_and_buffers_are_the_modules_own(make_key, form, training):
    if training in form.random:
        pytest.skip("its random numbers are others")
    key = make_key()
    for dtype in (torch.float32, torch.float64):
        check_against_module(form, training, dtype, key)


def check_against_module(form, training, dtype, key):
    module = form.module(key, dtype).train(training)
    before, reference = copy.deepcopy(module), copy.deepcopy(module)
    layer, ps, st = from_torch(module)
    assert list(flatten_names(ps)) == [name for name, _ in module.named_parameters()]
    assert_same(flatten_names(ps), dict(module.named_parameters()))
    for which in range(len(form.inputs)):
        x = form.draw(which, key, dtype)
        copied = copy.deepcopy(x)
        (y, st, *gradients), expected = of_layer(layer, x, ps, st, form.options), of_module(reference, x, form.options)
        if form.skip == READ:  # torch's derivative by the mask, which comes last, is zero
            gradients[0].pop()
            expected[1].pop()
        assert_same((y, *gradients), expected)
        assert_same(
            {name: flatten_names(st)[name] for name, _ in reference.named_buffers()}, dict(reference.named_buffers())
        )
        assert_same(x, copied, exact=True)
    assert_untouched(module, before)


def of_layer(layer, x, ps, st, options):
    """Return output and new states of a layer, and its gradients by the input and by the parameters."""
    x, ps = differentiable(x), differentiable(ps)
    args, kwargs = arguments(x)
    from luxtorch.interop import Inputs

    y, st = layer(Inputs(*args, **kwargs, **options) if options else x, ps, st)
    return y, st, gradients_of(y, x), gradients_of(y, flatten_names(ps))


def of_module(module, x, options):
    """Return the same of a module."""
    x = differentiable(x)
    args, kwargs = arguments(pytree.tree_map_only(Tensor, lambda leaf: leaf.clone(), x))  # it may work in place
    y = module(*args, **kwargs, **options)
    return y, gradients_of(y, x), gradients_of(y, dict(module.named_parameters()))


def differentiable(tree):
    return pytree.tree_map(lambda leaf: leaf.detach().requires_grad_() if is_real(leaf) else leaf, tree)


def gradients_of(y, tree):
    """Return the gradients by the real tensors in a tree of a number in which every real output has a weight."""
    leaves = [leaf for leaf in tree_leaves(tree) if is_real(leaf)]
    outputs = [leaf for leaf in tree_leaves(y) if is_real(leaf) and leaf.requires_grad]
    if not leaves or not outputs:
        return [torch.zeros_like(leaf) for leaf in leaves]
    total = sum((leaf * torch.cos(torch.arange(leaf.numel())).reshape(leaf.shape).to(leaf)).sum() for leaf in outputs)
    return list(torch.autograd.grad(total, leaves, allow_unused=True, retain_graph=True, materialize_grads=True))


def assert_same(got, expected, exact=False):
    assert pytree.tree_structure(got) == pytree.tree_structure(expected)
    for a, b in zip(tree_leaves(got), tree_leaves(expected), strict=True):
        if not isinstance(b, Tensor):
            assert a == b
        elif exact or not is_real(b):
            assert torch.equal(a, b)
        else:
            tolerance = 1e-4 if b.dtype == torch.float32 else 1e-8  # hardsigmoid has a single 1 / 6
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


def assert_untouched(module, before):
    assert_same(dict(module.state_dict()), dict(before.state_dict()), exact=True)
    assert [type(part) for part in module.modules()] == [type(part) for part in before.modules()]
    assert [part.training for part in module.modules()] == [part.training for part in before.modules()]
    assert all(p.requires_grad and p.is_leaf and p.grad is None for p in module.parameters())
