"""A layer as a `torch.nn.Module`: whatever torch does with modules works, and gives the numbers of the layer."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.utils import clip_grad_norm_, parametrizations, prune

import luxtorch as lt
from luxtorch import optim
from luxtorch.core import named_leaves, tree_map
from luxtorch.interop import Inputs, LayerModule, from_torch, to_torch

MLP = lt.Chain(lt.Dense(3, 4, torch.tanh), lt.BatchNorm(4), lt.Dropout(0.3), lt.Dense(4, 2))
PLAIN = lt.Chain(lt.Dense(3, 4, torch.tanh), lt.LayerNorm((4,)), lt.Dense(4, 2))


class Pair(lt.ContainerLayer):
    """Take two inputs, one by keyword; its field `layer` must not meet an attribute of the module."""

    layer: lt.Dense

    def __call__(self, x, ps, st):
        y, st_layer = self.layer(x.args[0], ps["layer"], st["layer"])
        return {"sum": y + x.kwargs["other"], "y": y}, {"layer": st_layer}


class Custom(nn.Module):
    """Hold a module of luxtorch among those of torch."""

    def __init__(self, inner):
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.inner = inner

    def forward(self, x):
        return self.inner(self.first(x)).relu()


def batch(*shape):
    return lambda normal: normal(*shape)


MODELS = {
    "mlp": (MLP, batch(8, 3)),
    "plain": (PLAIN, batch(8, 3)),
    "batchnorm": (lt.BatchNorm(3), batch(8, 3)),
    "convolution": (
        lt.Chain(lt.Conv((3, 3), 2, 4, torch.relu), lt.BatchNorm(4), lt.GlobalMeanPool(), lt.FlattenLayer()),
        batch(4, 2, 6, 6),
    ),
    "lstm": (lt.Chain(lt.Recurrence(lt.LSTMCell(3, 5)), lt.Dense(5, 2)), batch(2, 6, 3)),
    "carry": (lt.StatefulRecurrentCell(lt.LSTMCell(3, 5), batch_size=2), batch(2, 3)),
    "kept mask": (lt.Chain(lt.Dense(3, 4), lt.VariationalHiddenDropout(0.5)), batch(8, 3)),
    "spectral norm": (lt.SpectralNorm(lt.Dense(3, 4)), batch(8, 3)),
    "transformer": (lt.TransformerEncoderLayer(8, 2, 16, dropout=0.2), batch(2, 5, 8)),
    "two inputs": (Pair(lt.Dense(3, 4)), lambda normal: Inputs(normal(8, 3), other=normal(8, 4))),
    "nothing": (lt.NoOpLayer(), batch(8, 3)),
    "module": (
        from_torch(Custom(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)))).layer,
        batch(8, 3),
    ),
}


@pytest.fixture
def normal(rng):
    return lambda *shape: torch.randn(*shape, generator=rng)


@pytest.fixture(params=MODELS)
def model(request, make_key, normal):
    layer, make = MODELS[request.param]
    key = make_key()
    if request.param == "module":
        _, ps, st = from_torch(Custom(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))), key)
    else:
        ps, st = lt.setup(key, layer)
    return layer, ps, st, make(normal)


@pytest.fixture
def mlp(make_key):
    return MLP, *lt.setup(make_key(), MLP)


def call(module, x):
    return module(*x.args, **x.kwargs) if isinstance(x, Inputs) else module(x)


def same(a, b, **tolerance):
    leaves, spec = torch.utils._pytree.tree_flatten(a)
    others, other_spec = torch.utils._pytree.tree_flatten(b)
    assert spec == other_spec
    for leaf, other in zip(leaves, others, strict=True):
        if isinstance(leaf, torch.Tensor):
            torch.testing.assert_close(leaf, other, **(tolerance or {"rtol": 0, "atol": 0}))
        else:
            assert leaf == other


def loss(y):
    return sum(leaf.square().sum() for leaf in torch.utils._pytree.tree_leaves(y))


def with_gradients(ps):
    return tree_map(lambda leaf: leaf.detach().clone().requires_grad_(), ps)


# The numbers, and the names.


@pytest.mark.parametrize("mode", ["train", "test"])
def test_calls_give_outputs_states_and_gradients_of_the_layer(model, mode):
    layer, ps, st, x = model
    st = getattr(lt, f"{mode}_mode")(st)
    module, ps = to_torch(layer, ps, st), with_gradients(ps)
    for _ in range(3):
        y, st = layer(x, ps, st)
        result = call(module, x)
        same(result, y)
        same(from_torch(module)[2], st)
        if named_leaves(ps):
            wanted = torch.autograd.grad(loss(y), [leaf for _, leaf in named_leaves(ps)])
            same(list(torch.autograd.grad(loss(result), list(module.parameters()))), list(wanted))


def test_the_names_are_those_of_the_trees(model):
    layer, ps, st, _ = model
    module = to_torch(layer, ps, st)
    parameters, states = dict(named_leaves(ps)), dict(named_leaves(st))
    assert [name for name, _ in module.named_parameters()] == list(parameters)
    assert {name for name, _ in module.named_buffers()} == set(states)
    for name, value in module.state_dict().items():
        wanted = {**parameters, **states}[name]
        assert torch.equal(value.to(wanted.dtype), wanted)
        assert value.data_ptr() != wanted.data_ptr() or not value.numel()


def test_the_layer_comes_back_with_the_values_that_the_module_has(model):
    layer, ps, st, x = model
    module = to_torch(layer, ps, st)
    same(tuple(from_torch(module)), (layer, ps, st))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 1
    call(module, x)
    back = from_torch(module)
    assert back.layer == layer
    same(back.ps, tree_map(lambda leaf: leaf + 1, ps))
    same(back.st, layer(x, back.ps, st)[1])
    for (_, value), parameter in zip(named_leaves(back.ps), module.parameters(), strict=True):
        assert value.data_ptr() != parameter.data_ptr()
        assert not value.requires_grad


def test_a_vector_is_as_good_as_a_dict(mlp):
    layer, ps, st = mlp
    module = to_torch(layer, lt.ComponentVector(ps), st)
    same(from_torch(module).ps, ps)


def test_arguments_are_left_as_they_are(model):
    layer, ps, st, x = model
    before = copy.deepcopy((ps, st))
    module = to_torch(layer, ps, st)
    if list(module.parameters()):
        loss(call(module, x)).backward()
        torch.optim.SGD(module.parameters(), 0.1).step()
    same((ps, st), before)


# The mode.


def test_train_and_eval_set_the_mode_of_the_layers(mlp, normal):
    layer, ps, st = mlp
    module, x = to_torch(layer, ps, st), normal(8, 3)
    assert module.training
    assert torch.equal(module.eval()(x), layer(x, ps, lt.test_mode(st))[0])
    same(from_torch(module)[2], lt.test_mode(st))
    same(from_torch(module.train())[2], st)
    module = to_torch(layer, ps, lt.test_mode(st))
    assert not any(part.training for part in module.modules())


def test_a_part_may_have_a_mode_of_its_own(mlp, normal):
    layer, ps, st = mlp
    module, x = to_torch(layer, ps, st), normal(8, 3)
    module.layer_2.eval()
    frozen = {**st, "layer_2": lt.test_mode(st["layer_2"])}
    assert torch.equal(module(x), layer(x, ps, frozen)[0])
    assert torch.equal(module.layer_2.running_mean, st["layer_2"]["running_mean"])
    same(from_torch(to_torch(layer, ps, frozen))[2], frozen)


def test_a_switch_that_a_call_turns_stays_turned(make_key, normal):
    layer = lt.VariationalHiddenDropout(0.5)
    ps, st = lt.setup(make_key(), layer)
    st = layer(normal(50), ps, st)[1]
    module = to_torch(layer, ps, lt.update_state(st, "update_mask", lt.Static(True)))
    ones = torch.ones(50)
    assert torch.equal(module(ones), module(ones))


def test_buffers_are_written_where_they_are(mlp, normal):
    module = to_torch(*mlp)
    before = {name: (buffer, buffer.clone()) for name, buffer in module.named_buffers()}
    module(normal(8, 3))
    for name, buffer in module.named_buffers():
        assert buffer is before[name][0] and not torch.equal(buffer, before[name][1])


# What torch does with modules.


def test_state_dicts_are_saved_and_loaded(model, make_key):
    layer, ps, st, x = model
    module = to_torch(layer, ps, st)
    zeros = tree_map(lambda leaf: leaf if leaf.dtype == torch.uint64 else torch.zeros_like(leaf), st)  # keys stay out
    other = to_torch(layer, tree_map(torch.zeros_like, ps), zeros)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    assert not any(other.load_state_dict(torch.load(file, weights_only=True)))
    same(call(other, x), call(module, x))
    if module.state_dict():
        with pytest.raises(RuntimeError, match="Missing key"):
            other.load_state_dict(dict(list(module.state_dict().items())[1:]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_casts_leave_keys_alone(mlp, dtype, normal):
    layer, ps, st = mlp
    module = to_torch(layer, ps, st).to(dtype)
    assert torch.equal(from_torch(module)[2]["layer_3"]["rng"], st["layer_3"]["rng"])
    cast = lt.cpu_device(dtype=dtype)
    y, _ = layer(normal(8, 3).to(dtype), cast(ps), cast(st))
    assert y.dtype == dtype
    assert module(torch.ones(8, 3, dtype=dtype)).dtype == dtype


def test_it_goes_to_other_devices(mlp, device):
    module = to_torch(*mlp).to(device)
    assert module(torch.ones(8, 3, device=device)).device == device
    assert {value.device for value in module.state_dict().values()} == {device}
    assert {value.device.type for value in module.to("meta").state_dict().values()} == {"meta"}


def test_frozen_parts_have_no_gradients(mlp, normal):
    module = to_torch(*mlp)
    module.layer_1.requires_grad_(False)
    loss(module(normal(8, 3))).backward()
    with_gradient = {name for name, value in module.named_parameters() if value.grad is not None}
    assert with_gradient == {"layer_2.weight", "layer_2.bias", "layer_4.weight", "layer_4.bias"}


RULES = {
    "SGD": (lambda ps: torch.optim.SGD(ps, 0.1), optim.Descent(0.1)),
    "Momentum": (lambda ps: torch.optim.SGD(ps, 0.1, momentum=0.9), None),
    "Adam": (lambda ps: torch.optim.Adam(ps, 0.05), optim.Adam(0.05)),
    "LBFGS": (lambda ps: torch.optim.LBFGS(ps, 0.1, max_iter=4), None),
}


@pytest.mark.parametrize("name", RULES)
def test_training_by_torch_gives_what_training_by_luxtorch_gives(name, mlp, normal):
    make, rule = RULES[name]
    layer, ps, st = mlp[0], lt.f64(mlp[1]), lt.f64(mlp[2])
    module, x = to_torch(layer, ps, st), normal(8, 3).double()
    leaves = with_gradients(ps)  # without a rule of luxtorch: torch's, on the leaves
    optimizer, other = make(module.parameters()), make([leaf for _, leaf in named_leaves(leaves)])
    opt_state = rule and optim.setup(rule, ps)

    def closure():
        optimizer.zero_grad()
        value = loss(module(x))
        value.backward()
        return value

    def other_closure():
        nonlocal st
        other.zero_grad()
        y, st = layer(x, leaves, st)
        loss(y).backward()
        return loss(y)

    for _ in range(5):
        optimizer.step(closure)
        if rule:
            grads, st = grad(lambda ps: (lambda y, st: (loss(y), st))(*layer(x, ps, st)), has_aux=True)(ps)  # noqa: B023
            opt_state, ps = optim.update(opt_state, ps, grads)
        else:
            other.step(other_closure)
    back = from_torch(module)
    same(back.ps, ps if rule else tree_map(torch.Tensor.detach, leaves), rtol=1e-9, atol=1e-10)
    same(back.st, st, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module)), lambda module: saved_and_loaded(module)],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_copies_are_independent(duplicate, mlp, normal):
    module, x = to_torch(*mlp), normal(8, 3)
    module(x)
    other = duplicate(module)
    assert type(other) is LayerModule
    same(tuple(from_torch(other)), tuple(from_torch(module)))
    before = copy.deepcopy(module.state_dict())
    other(x)
    same(module.state_dict(), before)
    assert torch.equal(duplicate(module)(x), module(x))


def saved_and_loaded(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_gradients_reach_through_several_calls(make_key, normal):
    layer = lt.StatefulRecurrentCell(lt.LSTMCell(3, 5), batch_size=2)
    ps, st = lt.setup(make_key(), layer)
    module, ps, total, wanted = to_torch(layer, ps, st), with_gradients(ps), 0, 0
    for x in normal(4, 2, 3):
        total = total + loss(module(x))
        y, st = layer(x, ps, st)
        wanted = wanted + loss(y)
    total.backward()
    wanted.backward()
    same([p.grad for p in module.parameters()], [leaf.grad for _, leaf in named_leaves(ps)])


@pytest.mark.slow
@pytest.mark.parametrize("mode", [True, False])
def test_it_compiles(model, mode):
    layer, ps, st, x = model
    module = to_torch(layer, ps, st).train(mode)
    other = copy.deepcopy(module)
    compiled = torch.compile(lambda x: call(module, x), fullgraph=True, backend="aot_eager")
    for _ in range(2):
        same(compiled(x), call(other, x), rtol=1e-4, atol=1e-5)
        same(from_torch(module)[2], from_torch(other)[2], rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore::torch.jit.TracerWarning")
def test_it_is_traced_in_test_mode(mlp, normal):
    module = to_torch(*mlp).eval()
    traced, x = torch.jit.trace(module, normal(8, 3)), normal(5, 3)
    assert set(traced.state_dict()) == {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
    torch.testing.assert_close(traced(x), module(x))


def test_it_stands_in_a_sequential(mlp, normal):
    layer, ps, st = mlp
    module, x = nn.Sequential(nn.Linear(3, 3), to_torch(layer, ps, st)), normal(8, 3)
    assert "1.layer_2.running_mean" in module.state_dict()
    again, new_ps, new_st = from_torch(module)
    assert again.children()["1"] == layer
    assert torch.equal(again(x, new_ps, new_st)[0], module(x))


def test_functional_call_with_transforms(mlp, normal):
    layer, ps, _ = mlp
    modules = [to_torch(layer, ps, lt.setup(seed, layer)[1]) for seed in range(3)]
    x, (ps, buffers) = normal(8, 3), stack_module_state(modules)
    ps = {name: value.detach() for name, value in ps.items()}

    def objective(ps, buffers):
        buffers = dict(buffers)
        return loss(functional_call(modules[0], (ps, buffers), (x,))), buffers

    grads, new = vmap(grad(objective, has_aux=True))(ps, {name: value.clone() for name, value in buffers.items()})
    for i, module in enumerate(modules):
        loss(module(x)).backward()
        for name, parameter in module.named_parameters():
            torch.testing.assert_close(grads[name][i], parameter.grad)
        for name, buffer in module.named_buffers():
            torch.testing.assert_close(new[name][i], buffer)


def test_gradients_are_clipped(mlp, normal):
    module = to_torch(*mlp)
    loss(module(normal(8, 3))).backward()
    clip_grad_norm_(module.parameters(), 0.5)
    norm = torch.stack([parameter.grad.norm() for parameter in module.parameters()]).norm()
    torch.testing.assert_close(norm, torch.tensor(0.5))


def test_parametrizations_and_pruning_are_seen(mlp, normal):
    layer, ps, st = mlp
    module, x = to_torch(layer, ps, lt.test_mode(st)), normal(8, 3)
    parametrizations.weight_norm(module.layer_1)
    torch.testing.assert_close(module(x), layer(x, ps, lt.test_mode(st))[0])
    prune.l1_unstructured(module.layer_4, "weight", amount=0.5)
    assert (module.layer_4.weight == 0).sum() == 4
    pruned = {**ps, "layer_4": {**ps["layer_4"], "weight": module.layer_4.weight.detach()}}
    torch.testing.assert_close(module(x), layer(x, pruned, lt.test_mode(st))[0])
    # What was added is code of its own, and is kept.
    again, new_ps, new_st = from_torch(module)
    torch.testing.assert_close(again(x, new_ps, new_st)[0], module(x))


# Out and in again.


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)),
        lambda: Custom(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.3))),
        lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        lambda: nn.LSTM(3, 5, num_layers=2, bidirectional=True),
        lambda: nn.Sequential(nn.Linear(3, 3), to_torch(MLP, *lt.setup(3, MLP))),
        lambda: Custom(to_torch(MLP, *lt.setup(4, MLP))),
    ],
)
def test_round_trips_keep_every_bit(make):
    model = from_torch(make(), 7)
    module = to_torch(*model)
    assert set(dict(named_leaves(model.ps))) == {name for name, _ in module.named_parameters()}
    same(tuple(from_torch(module)), tuple(model))
    same(tuple(from_torch(to_torch(*from_torch(module)))), tuple(model))


def test_a_hook_is_kept(mlp, normal):
    module, x = to_torch(*mlp).eval(), normal(8, 3)
    module.register_forward_hook(lambda module, args, y: 2 * y)
    layer, ps, st = from_torch(module)
    torch.testing.assert_close(layer(x, ps, st)[0], module(x))
    assert not torch.equal(mlp[0](x, mlp[1], lt.test_mode(mlp[2]))[0], module(x))


def test_inside_a_module_it_is_lawful(make_key, normal):
    module = Custom(to_torch(MLP, *lt.setup(make_key(), MLP)))
    module.inner.layer_2.eval()
    before = copy.deepcopy(module.state_dict())
    layer, ps, st = from_torch(module, make_key())
    x = normal(5, 8, 3)
    assert not st["inner"]["layer_2"]["training"] and st["inner"]["layer_3"]["training"]
    st = lt.train_mode(st)
    module.train()

    def objective(ps, st, x):
        y, st = layer(x, ps, st)
        return loss(y), st

    derivative = grad(objective, has_aux=True)
    many = tree_map(lambda leaf: torch.stack([leaf] * 5), (ps, st))
    over_samples = vmap(derivative, (None, None, 0))(ps, st, x)
    over_models = vmap(derivative)(*many, x)
    loop = [derivative(ps, st, one) for one in x]
    wanted = tree_map(lambda *leaves: torch.stack(leaves), *loop)
    for got in (over_samples, over_models):
        same(got, wanted, rtol=1e-4, atol=1e-5)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    same(compiled(x[0], ps, st), layer(x[0], ps, st), rtol=1e-4, atol=1e-5)
    same(module.state_dict(), before)  # nothing of all that was kept on the module
    loss(module(x[0])).backward()
    same(loop[0][0]["first"]["weight"], module.first.weight.grad, rtol=1e-4, atol=1e-5)


# Errors.


@pytest.mark.parametrize("name", ["forward", "train", "type", "training", "half", "parameters", "_modules"])
@pytest.mark.parametrize("depth", [0, 1])
def test_names_that_a_module_needs_are_errors(name, depth):
    layer = lt.Chain(**{name: lt.Dense(2, 2)})
    layer = lt.Chain(outer=layer) if depth else layer
    ps, st = lt.setup(0, layer)
    with pytest.raises(lt.InputError, match=f"(?s)name of a parameter, buffer or submodule.*'{name}'") as caught:
        to_torch(layer, ps, st)
    assert caught.value.where == ("model.outer" if depth else "model")


@pytest.mark.parametrize("ps, st", [({"a.b": torch.ones(1)}, {}), ({"": torch.ones(1)}, {})])
def test_names_that_are_no_names_are_errors(ps, st):
    with pytest.raises(lt.InputError, match="name of a parameter"):
        to_torch(lt.NoOpLayer(), ps, st)


def test_one_name_for_a_parameter_and_a_state_is_an_error():
    with pytest.raises(lt.InputError, match="(?s)name of a parameter.*'a'"):
        to_torch(lt.NoOpLayer(), {"a": torch.ones(1)}, {"a": torch.ones(1)})


@pytest.mark.parametrize("ps, st", [({"layer_1": {"a": 1.0}}, {}), ({}, {"layer_1": {"a": 1.0}}), ({"a": [1]}, {})])
def test_leaves_that_are_no_tensors_are_errors(ps, st):
    with pytest.raises(lt.DTypeError, match="must be a tensor"):
        to_torch(lt.NoOpLayer(), ps, st)


def test_what_is_no_layer_is_an_error():
    with pytest.raises(lt.InputError, match="layer must be a layer"):
        to_torch(nn.Linear(2, 2), {}, {})


def test_errors_of_a_call_name_the_layer(mlp):
    with pytest.raises(lt.InputError, match=r"model.layer_1 \(Dense"):
        to_torch(*mlp)(torch.ones(8, 5))


def test_it_shows_the_layer(mlp):
    assert repr(to_torch(*mlp)) == f"LayerModule of {mlp[0]!r}"


# Other programs.


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
@pytest.mark.parametrize("processes", [1, 2])
def test_data_parallel_training_is_training_on_the_whole_batch(processes, tmp_path):
    script = Path(__file__).with_name("data_parallel_run.py")
    command = [sys.executable, "-W", "ignore", str(script), str(processes), str(tmp_path)]
    subprocess.run(command, check=True, timeout=300)
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(processes)]
    same(results, [results[0]] * processes)
    same(results[0]["plain"], results[0]["alone"], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_lightning_trains_it(mlp, normal, tmp_path):
    lightning = pytest.importorskip("lightning")

    class Lit(lightning.LightningModule):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def training_step(self, batch, index):
            x, y = batch
            return (self.module(x) - y).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    data = torch.utils.data.TensorDataset(normal(16, 3), normal(16, 2))
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = lightning.Trainer(max_epochs=2, default_root_dir=tmp_path, enable_model_summary=False, **options)
    module, other = to_torch(*mlp), to_torch(*mlp)
    trainer.fit(Lit(module), torch.utils.data.DataLoader(data, batch_size=8))
    optimizer = torch.optim.SGD(other.parameters(), 0.1)
    for _ in range(2):
        for x, y in torch.utils.data.DataLoader(data, batch_size=8):
            optimizer.zero_grad()
            (other(x) - y).square().mean().backward()
            optimizer.step()
    same(module.state_dict(), other.state_dict())
