"""Modules inside modules of torch.nn, perturbed, against hooks that retain the gradient."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import luxtorch as lt
from luxtorch.core import tree_leaves, tree_map
from luxtorch.interop import from_torch
from luxtorch.layers import Perturbed, intermediate_gradients

from .models import GPT, ResNet18, UNet, ViT


class Gated(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.inner, self.gate = nn.Linear(width, width), nn.Linear(width, width)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        y = self.drop(self.inner(x))
        y *= self.gate(x).sigmoid()  # in place, on the output of a module
        return y


def mixed():
    """Make a module that becomes a chain of layers of luxtorch and a module with a forward of its own."""
    return nn.Sequential(nn.Linear(3, 4), Gated(4), nn.Linear(4, 2))


def image(rng, size):
    return torch.randn(2, 3, size, size, generator=rng, dtype=torch.float64)


MODELS = {
    "resnet": (ResNet18, lambda rng: image(rng, 16), ["conv1", "layer1.0.bn2", "layer2.0.downsample", "layer4", "fc"]),
    "vit": (ViT, lambda rng: image(rng, 16), ["patch_embed", "encoder.layers.0", "encoder.layers.1.linear2", "head"]),
    "gpt": (GPT, lambda rng: torch.randint(17, (2, 8), generator=rng), ["transformer.wte", "transformer.h.0.attn"]),
}


def no_dropout(module):
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        if isinstance(part, nn.MultiheadAttention) or hasattr(part, "flash"):
            part.dropout = 0.0
    return module


def value(y):
    return (y[0] if isinstance(y, tuple) else y).square().sum()


@pytest.fixture(params=MODELS)
def model(request, rng):
    make, draw, paths = MODELS[request.param]
    return make().double(), draw(rng), paths


@pytest.mark.parametrize("tree", [dict, lt.ComponentVector])
@pytest.mark.parametrize("training", [True, False])
def test_against_hooks_that_retain_the_gradient(model, training, tree):
    module, x, paths = model
    no_dropout(module).train(training)
    layer, ps, st = from_torch(module)
    outputs, gradients = intermediate_gradients(value, Perturbed(layer, *paths), x, tree(ps), st)
    seen = {}
    for path in paths:

        def keep(_module, _args, y, path=path):
            y.retain_grad()
            seen[path] = y
            return y.clone()

        module.get_submodule(path).register_forward_hook(keep)
    value(module(x)).backward()
    for path in paths:
        torch.testing.assert_close(outputs[path], seen[path].detach(), rtol=1e-8, atol=1e-9)
        # Normalized over few values, the last layers make much of a rounding error.
        largest = float(seen[path].grad.abs().max())
        torch.testing.assert_close(gradients[path], seen[path].grad, rtol=1e-6, atol=1e-6 * largest)


def test_without_perturbations_it_is_the_model_and_the_module_is_left_alone(model):
    module, x, paths = model
    hooks = [len(part._forward_hooks) for part in module.modules()]
    layer, ps, st = from_torch(module)
    (y, inside), new = Perturbed(layer, *paths)((x, {}), ps, st)
    expected, expected_new = layer(x, ps, st)
    assert list(inside) == paths
    torch.testing.assert_close((y, tree_leaves(new)), (expected, tree_leaves(expected_new)))
    assert [len(part._forward_hooks) for part in module.modules()] == hooks
    torch.testing.assert_close(layer(x, ps, st)[0], expected, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
def test_every_law_holds(make_key, training):
    layer, _, st = from_torch(mixed().train(training))
    model = Perturbed(layer, "0", "1.inner", "1.drop", "2")
    x = lt.random.normal(make_key(), (5, 3)), {"1.inner": lt.random.normal(make_key(), (5, 4)), "2": torch.ones(2)}
    mode = lt.train_mode if training else lt.test_mode
    # A module is equal to itself alone, not to its pickled copy.
    lt.testing.check_layer(model, x, rng=make_key(), modes=[mode], skip=["value"])


def test_what_is_written_over_later_is_returned_as_it_was(make_key):
    layer, ps, st = from_torch(Gated(4))
    x = lt.random.normal(make_key(), (5, 4))
    (_, inside), _ = Perturbed(layer, "inner", "drop")((x, {}), ps, lt.test_mode(st))
    expected = x @ ps["inner"]["weight"].T + ps["inner"]["bias"]
    torch.testing.assert_close(inside["inner"], expected)
    torch.testing.assert_close(inside["drop"], expected)


def test_a_map_of_where_a_class_is_seen_for_many_models_at_once(rng):
    """Grad-CAM of an ensemble, against one model after another."""
    modules = [ResNet18(width=4).double().eval() for _ in range(3)]
    layer, _, _ = from_torch(modules[0])
    models = [from_torch(module)[1:] for module in modules]
    inside, x = Perturbed(layer, "layer3"), image(rng, 16)

    def seen(ps, st):
        outputs, gradients = intermediate_gradients(lambda y: y[:, 3].sum(), inside, x, ps, st)
        weights = gradients["layer3"].mean((2, 3), keepdim=True)
        return torch.relu((weights * outputs["layer3"]).sum(1))

    many = tree_map(lambda *leaves: torch.stack(leaves), *models)
    torch.testing.assert_close(torch.vmap(seen)(*many), torch.stack([seen(*each) for each in models]))


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = self.second = nn.Linear(3, 3)

    def forward(self, x):
        return self.second(self.first(x))


def test_a_module_in_two_places_is_found_in_the_first():
    shared, ps, st = from_torch(Shared())
    (y, inside), _ = Perturbed(shared, "first")((torch.ones(3), {"first": torch.ones(3)}), ps, st)
    assert torch.equal(y, inside["first"])
    with pytest.raises(lt.KeyNameError, match="no module 'second'"):
        Perturbed(shared, "second")


def test_a_call_that_fails_leaves_nothing_behind():
    layer, ps, st = from_torch(Gated(4))
    model = Perturbed(layer, "inner")
    with pytest.raises(lt.LuxtorchError, match=r"model.inner"):
        model((torch.ones(5, 3), {"inner": torch.ones(4)}), ps, st)
    (y, _), _ = model((torch.ones(5, 4), {}), ps, st)
    assert torch.equal(y, layer(torch.ones(5, 4), ps, st)[0])


def test_a_path_that_leads_nowhere_says_what_there_is():
    layer = from_torch(UNet()).layer
    with pytest.raises(lt.KeyNameError, match="(?s)the path 'dwn': There is no module 'dwn'"):
        Perturbed(layer, "dwn")
    chain = from_torch(mixed()).layer
    with pytest.raises(lt.KeyNameError, match="(?s)the path '1.iner'.*inner, gate, drop.*Did you mean 'inner'"):
        Perturbed(chain, "1.iner")
