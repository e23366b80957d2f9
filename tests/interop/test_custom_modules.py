"""Modules with a forward of their own: whatever code they are, they become functions."""

from __future__ import annotations

import copy
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad, jvp, vmap
from torch.utils._pytree import register_dataclass

import luxtorch as lt
import luxtorch.random as lr
from luxtorch.core import InputError, KeyNameError, LuxtorchError, Static, flatten_names, tree_leaves, tree_map
from luxtorch.interop import Inputs, from_torch


@dataclass
class Output:
    logits: Tensor
    hidden: list[Tensor]


register_dataclass(Output)


class Branches(nn.Module):
    """Take inputs by position and by keyword, and go one way or another."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x, y=None, *, negate=False, times=1):
        for _ in range(times):
            x = self.first(x).tanh()
        if y is not None:
            x = x + self.second(y["inside"])
        return -x if negate else x


class Structured(nn.Module):
    """Return a dataclass, with a dict inside a tuple."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleList([nn.Linear(3, 3)]), nn.ModuleList([nn.Linear(3, 2), nn.Tanh()])])

    def forward(self, x):
        hidden = []
        for group in self.layers:
            for layer in group:
                x = layer(x)
                hidden.append(x)
        return Output(x, hidden), {"sum": (x.sum(),), "count": len(hidden), "none": None}


class Tied(nn.Module):
    """Share one weight between two modules, and call one module twice."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.mix = nn.Linear(3, 3)
        self.again = self.mix
        self.out = nn.Linear(3, 5, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x):
        return self.out(self.again(self.mix(self.embed(x)).tanh()))


class Counting(nn.Module):
    """Write buffers in place and anew; keep a tensor as a plain attribute, and one that no checkpoint has."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("seen", torch.zeros(3), persistent=False)
        self.register_buffer("nothing", None)
        self.last = torch.zeros(3)
        self.scale = nn.Parameter(torch.ones(3))
        self.cache = None

    def forward(self, x):
        self.count += 1
        self.mean.mul_(0.9).add_(0.1 * x.mean(0))
        self.seen = torch.maximum(self.seen, x.amax(0))
        self.last.copy_(x[-1])
        self.cache = x * self.scale
        return self.cache - self.mean


class Block(nn.Module):
    """Normalize, drop and add, in train mode."""

    def __init__(self, width=8):
        super().__init__()
        self.conv = nn.Conv1d(width, width, 3, padding=1)
        self.norm = nn.BatchNorm1d(width)
        self.drop = nn.Dropout(0.3)

    def forward(self, x):
        return x + self.drop(F.relu(self.norm(self.conv(x)), inplace=True))


class Noisy(nn.Module):
    """Draw in the forward."""

    def __init__(self):
        super().__init__()
        self.encode, self.decode = nn.Linear(3, 4), nn.Linear(2, 3)

    def forward(self, x):
        mean, log_std = self.encode(x).chunk(2, -1)
        if self.training:
            mean = mean + torch.randn_like(mean) * log_std.exp()
        return self.decode(mean), F.dropout(x, 0.5, self.training)


def example(rng, *shape):
    return torch.randn(shape, generator=rng)


def inputs_of(rng):
    return {
        "keywords": (Branches(), Inputs(example(rng, 2, 3), y={"inside": example(rng, 2, 3)}, negate=True, times=2)),
        "defaults": (Branches(), example(rng, 2, 3)),
        "structures": (Structured(), example(rng, 2, 3)),
        "tied": (Tied(), torch.tensor([[1, 2], [0, 4]])),
        "buffers": (Counting(), example(rng, 4, 3)),
        "lists": (nn.ModuleDict({"a": Block(), "b": nn.ModuleList([Block()])})["b"][0].eval(), example(rng, 2, 8, 5)),
        "noise, eval": (Noisy().eval(), example(rng, 2, 3)),
    }


NAMES = ["keywords", "defaults", "structures", "tied", "buffers", "lists", "noise, eval"]


def total(tree):
    return sum(leaf.sin().sum() for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, Tensor))


@pytest.mark.parametrize("name", NAMES)
def test_outputs_gradients_and_buffers_are_the_modules(rng, name):
    module, x = inputs_of(rng)[name]
    layer, ps, st = from_torch(module)
    before = copy.deepcopy((ps, {k: v for k, v in st.items()}))
    args, kwargs = (x.args, x.kwargs) if isinstance(x, Inputs) else ((x,), {})
    for _ in range(2):
        y, new = layer(x, ps, st)
        expected = module(*args, **kwargs)
        torch.testing.assert_close(y, expected) if not isinstance(y, tuple) else None
        assert type(y) is type(expected)
        torch.testing.assert_close(total(y), total(expected))
        torch.testing.assert_close(
            {k: v for k, v in flatten_names(new).items() if k in dict(module.named_buffers())},
            dict(module.named_buffers()),
        )
        slopes = flatten_names(grad(lambda ps: total(layer(x, ps, st)[0]))(ps))  # noqa: B023
        module.zero_grad()
        total(expected).backward()
        wanted = {k: torch.zeros_like(v) if v.grad is None else v.grad for k, v in module.named_parameters()}
        torch.testing.assert_close(slopes, wanted)
        assert list(flatten_names(ps)) == [k for k, _ in module.named_parameters()]
        st = new
    torch.testing.assert_close(before[0], ps, rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_transforms(rng, name):
    module, x = inputs_of(rng)[name]
    layer, ps, st = from_torch(module)

    def loss(ps, st):
        y, st = layer(x, ps, st)
        return total(y), st

    models = tree_map(lambda leaf: torch.stack([leaf, leaf / 2]), ps)
    states = tree_map(lambda leaf: torch.stack([leaf, leaf]) if isinstance(leaf, Tensor) else leaf, st)
    slopes, new = vmap(grad(loss, has_aux=True))(models, states)
    alone, after = grad(loss, has_aux=True)(tree_map(lambda leaf: leaf / 2, ps), st)
    torch.testing.assert_close(tree_map(lambda leaf: leaf[1], slopes), alone)
    torch.testing.assert_close(
        {k: v[1] for k, v in flatten_names(new).items() if isinstance(v, Tensor)},
        {k: v for k, v in flatten_names(after).items() if isinstance(v, Tensor)},
    )
    _, slope = jvp(lambda ps: loss(ps, st)[0], (ps,), (tree_map(torch.ones_like, ps),))
    whole = grad(lambda ps: loss(ps, st)[0])(ps)
    torch.testing.assert_close(slope, sum(leaf.sum() for leaf in flatten_names(whole).values()))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_compiled(rng, name):
    module, x = inputs_of(rng)[name]
    layer, ps, st = from_torch(module)

    def step(ps, st):
        return grad(lambda ps: (lambda y, st: (total(y), st))(*layer(x, ps, st)), has_aux=True)(ps)

    torch.testing.assert_close(torch.compile(step, fullgraph=True, backend="aot_eager")(ps, st)[0], step(ps, st)[0])


def test_the_module_and_the_global_generator_stay_as_they_are(rng):
    module = nn.ModuleList([Noisy(), Block()])
    before, generator = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    for part, x in zip(module, (example(rng, 2, 3), example(rng, 2, 8, 5)), strict=True):
        layer, ps, st = from_torch(part)
        layer(x, ps, st)
        lt.setup(0, layer)
        assert all(
            value.data_ptr() != other.data_ptr() for value in part.parameters() for other in flatten_names(ps).values()
        )
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize(("module", "shape"), [(Noisy(), (2, 3)), (Block(), (2, 8, 5))], ids=["noise", "block"])
def test_train_mode_draws_by_the_key_for_each_model(make_key, rng, module, shape):
    layer, ps, st = from_torch(module)
    x, keys = example(rng, *shape), lr.split(make_key(), 3)

    def loss(ps, key):
        return total(layer(x, ps, {**st, "rng": key})[0])

    slopes = vmap(grad(loss), (None, 0))(ps, keys)
    for i, key in enumerate(keys):
        torch.testing.assert_close(tree_map(lambda leaf: leaf[i], slopes), grad(loss)(ps, key))  # noqa: B023
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ps, keys[1]), loss(ps, keys[1]))


def test_threads_may_call_one_layer_at_once(rng):
    layer, ps, st = from_torch(Block().eval())
    x = example(rng, 2, 8, 5)
    trees = [tree_map(lambda leaf: leaf * scale, ps) for scale in range(8)]  # noqa: B023
    expected = [layer(x, tree, st)[0] for tree in trees]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: layer(x, trees[i % 8], st)[0], range(200)))
    for i, y in enumerate(found):
        assert torch.equal(y, expected[i % 8])


def test_a_call_within_a_call(rng):
    layer, ps, st = from_torch(Branches())

    class Twice(nn.Module):
        def forward(self, x):
            return layer(layer(x, ps, st)[0], ps, st)[0]

    outer, none, mode = from_torch(Twice())
    x = example(rng, 2, 3)
    assert torch.equal(outer(x, none, mode)[0], Twice()(x))


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["copy", "pickle"]
)
def test_copies_compute_the_same(rng, make_key, copied):
    layer, ps, st = from_torch(Block())
    x = example(rng, 2, 8, 5)
    with torch.no_grad():
        layer(x, ps, st)
    other = copied(layer)
    torch.testing.assert_close(tree_leaves(other(x, ps, st)), tree_leaves(layer(x, ps, st)))
    key = make_key()
    torch.testing.assert_close(tree_leaves(lt.setup(key, other)), tree_leaves(lt.setup(key, layer)))


def test_what_a_forward_keeps_is_forgotten(rng):
    layer, ps, st = from_torch(Counting())
    layer(example(rng, 4, 3), ps, st)
    module = layer.skeleton.acquire().module
    assert not isinstance(module.mean, Tensor) and not isinstance(module.last, Tensor)


class Remembering(nn.Module):
    """Compute once and keep the result, as attributes that were there and that were not."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.cache = None

    def forward(self, x):
        if self.cache is None:
            self.cache = x * self.scale
        if not hasattr(self, "other"):
            self.other = 2 * x
        return self.cache + self.other


def test_what_a_call_remembers_does_not_reach_the_next(rng):
    layer, ps, st = from_torch(Remembering())
    first, second = example(rng, 4, 3), example(rng, 4, 3)
    layer(first, ps, st)
    torch.testing.assert_close(layer(second, ps, st)[0], Remembering()(second).detach())


@dataclass
class Wrong:
    tree: str
    path: tuple[str, ...]
    change: object
    error: type[LuxtorchError]
    text: str


WRONG = {
    "missing": Wrong("ps", ("b", "0", "conv"), lambda t: {"weight": t["weight"]}, KeyNameError, "bias"),
    "misspelt": Wrong(
        "ps", ("b", "0", "conv"), lambda t: {"weigth": t["weight"], "bias": t["bias"]}, KeyNameError, "Did you mean"
    ),
    "extra": Wrong("st", ("b", "0", "norm"), lambda t: {**t, "more": t["running_mean"]}, KeyNameError, "more"),
    "shape": Wrong("ps", ("b", "0", "conv"), lambda t: {**t, "bias": torch.zeros(3)}, InputError, r"\(8,\)"),
    "state": Wrong("st", ("b", "0", "norm"), lambda t: {**t, "running_var": torch.ones(3)}, InputError, r"\(8,\)"),
    "dtype": Wrong(
        "ps", ("b", "0", "conv"), lambda t: tree_map(lambda leaf: leaf.double(), t), LuxtorchError, "dtype|type"
    ),
}


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.b = nn.ModuleList([Block()])

    def forward(self, x):
        return self.b[0](x)


def changed(tree, path, change):
    if not path:
        return change(tree)
    return {**tree, path[0]: changed(tree[path[0]], path[1:], change)}


@pytest.mark.parametrize("name", WRONG)
def test_errors_name_the_module_inside(rng, name):
    layer, ps, st = from_torch(Nested())
    wrong = WRONG[name]
    trees = {"ps": ps, "st": st}
    trees[wrong.tree] = changed(trees[wrong.tree], wrong.path, wrong.change)
    with pytest.raises(wrong.error, match=wrong.text) as caught:
        layer(example(rng, 2, 8, 5), trees["ps"], trees["st"])
    assert ".".join(wrong.path) in str(caught.value)
    layer(example(rng, 2, 8, 5), ps, st)  # the next call is not disturbed


def test_an_input_that_does_not_fit_is_reported_with_the_place(rng):
    layer, ps, st = from_torch(Nested())
    with pytest.raises(LuxtorchError, match="b.0.conv"):
        layer(example(rng, 2, 5, 5), ps, st)


def test_a_buffer_of_another_shape_is_refused():
    class Growing(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(0))

        def forward(self, x):
            self.seen = torch.cat([self.seen, x])
            return x

    layer, ps, st = from_torch(Growing())
    with pytest.raises(InputError, match="'seen'"):
        layer(torch.ones(3), ps, st)


NORMS = {
    "weight norm": (lambda m: nn.utils.parametrizations.weight_norm(m), "eval"),
    "weight norm of all": (lambda m: nn.utils.parametrizations.weight_norm(m, dim=None), "eval"),
    "spectral norm": (lambda m: nn.utils.parametrizations.spectral_norm(m, n_power_iterations=2), "train"),
    "orthogonal": (lambda m: nn.utils.parametrizations.orthogonal(m), "train"),
    "orthogonal, cayley": (lambda m: nn.utils.parametrizations.orthogonal(m, orthogonal_map="cayley"), "train"),
    "old weight norm": (lambda m: nn.utils.weight_norm(m), "train"),
    "old spectral norm": (lambda m: nn.utils.spectral_norm(m), "train"),
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", NORMS)
def test_parametrized_modules(rng, name, training):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the old ones are deprecated
        module = NORMS[name][0](nn.Linear(4, 3).double()).train(training)
    layer, ps, st = from_torch(module)
    x = example(rng, 2, 4).double()
    given = copy.deepcopy(flatten_names(st))
    y, new = layer(x, ps, st)
    for key, value in flatten_names(st).items():
        assert value is given[key] or isinstance(value, Static) or torch.equal(value, given[key])

    def loss(ps):
        return layer(x, ps, st)[0].sin().sum()

    slopes = grad(loss)(ps)
    expected = module(x)
    torch.testing.assert_close(y, expected.detach())
    buffers = dict(module.named_buffers())
    torch.testing.assert_close({k: v for k, v in flatten_names(new).items() if k in buffers}, buffers)
    expected.sin().sum().backward()
    torch.testing.assert_close(flatten_names(slopes), {k: v.grad for k, v in module.named_parameters()})
    _, slope = jvp(loss, (ps,), (tree_map(torch.ones_like, ps),))
    torch.testing.assert_close(slope, sum(leaf.sum() for leaf in flatten_names(slopes).values()))
    models = tree_map(lambda leaf: torch.stack([leaf, leaf / 2]), ps)
    states = tree_map(lambda leaf: torch.stack([leaf, leaf]) if isinstance(leaf, Tensor) else leaf, st)
    ys, _ = vmap(lambda ps, st: layer(x, ps, st))(models, states)
    torch.testing.assert_close(ys[1], layer(x, tree_map(lambda leaf: leaf / 2, ps), st)[0])


@pytest.mark.parametrize("norm_type", [1.0, 2.0])
@pytest.mark.parametrize("bag", [None, "sum", "mean", "max"])
def test_a_largest_norm_leaves_the_weight_alone(rng, bag, norm_type):
    options = {"max_norm": 1.0, "norm_type": norm_type, "padding_idx": 1, "dtype": torch.float64}
    module = nn.Embedding(6, 3, **options) if bag is None else nn.EmbeddingBag(6, 3, mode=bag, **options)
    layer, ps, st = from_torch(module)
    before = ps["weight"].clone()
    x = torch.tensor([[0, 2, 1], [5, 5, 3]])
    y, _ = layer(x, ps, st)
    slope = grad(lambda ps: layer(x, ps, st)[0].sin().sum())(ps)["weight"]
    _, change = jvp(lambda ps: layer(x, ps, st)[0].sin().sum(), (ps,), (tree_map(torch.ones_like, ps),))
    assert torch.equal(ps["weight"], before)
    expected = module(x)
    torch.testing.assert_close(y, expected.detach())
    expected.sin().sum().backward()
    torch.testing.assert_close(slope, module.weight.grad)
    torch.testing.assert_close(change, slope.sum())


@pytest.mark.parametrize("include_last_offset", [False, True])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding_idx", [None, -2])
def test_bags_of_different_sizes(rng, mode, include_last_offset, padding_idx):
    module = nn.EmbeddingBag(
        6, 3, mode=mode, include_last_offset=include_last_offset, padding_idx=padding_idx, dtype=torch.float64
    )
    layer, ps, st = from_torch(module)
    weights = {"per_sample_weights": example(rng, 5).double()} if mode == "sum" else {}
    x = Inputs(torch.tensor([0, 2, 4, 5, 3]), torch.tensor([0, 0, 3, 5][: 3 + include_last_offset]), **weights)
    expected = module(*x.args, **x.kwargs)
    (y,), _ = jvp(lambda ps: (layer(x, ps, st)[0],), (ps,), (ps,))
    torch.testing.assert_close(y, expected.detach())
    expected.sin().sum().backward()
    torch.testing.assert_close(grad(lambda ps: layer(x, ps, st)[0].sin().sum())(ps)["weight"], module.weight.grad)


class Fresh(nn.Module):
    """Make parameters with and without `reset_parameters`."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(64, 4, add_bias_kv=True)
        self.conv, self.norm = nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32)
        self.embed, self.rnn = nn.Embedding(50, 64, padding_idx=0), nn.LSTM(64, 64)
        self.prelu = nn.PReLU()
        self.position = nn.Parameter(torch.linspace(0, 1, 5))
        self.register_buffer("mask", torch.ones(3, 3).tril())

    def forward(self, x):
        return x


def test_new_values_are_drawn_as_torch_draws_them(make_key, rng):
    module = Fresh()
    with torch.no_grad():
        module.norm.running_mean.add_(1)
    layer, _, st = from_torch(module)
    key = make_key()
    before = torch.get_rng_state()
    with pytest.warns(UserWarning, match="'position'"):
        ps, new = lt.setup(key, layer)
        torch.testing.assert_close(tree_leaves(lt.setup(key, layer)), tree_leaves((ps, new)), rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(rng.get_state())
        like = Fresh()
    for name, wanted in like.named_parameters():
        value = flatten_names(ps)[name]
        assert value.shape == wanted.shape and value.dtype == wanted.dtype
        if wanted.numel() > 500:
            torch.testing.assert_close(value.std(), wanted.std(), rtol=0.2, atol=0.0)
            torch.testing.assert_close(value.abs().max(), wanted.abs().max(), rtol=0.4, atol=0.0)
            assert not torch.equal(value, dict(module.named_parameters())[name])
    assert torch.equal(ps["position"], module.position)
    assert not ps["embed"]["weight"][0].any() and torch.equal(ps["prelu"]["weight"], torch.tensor([0.25]))
    assert torch.equal(new["mask"], module.mask) and not new["norm"]["running_mean"].any()
    assert new.keys() == st.keys()
    with pytest.warns(UserWarning, match="'position'"):
        many = vmap(lambda key: layer.initial_parameters(key))(lr.split(key, 2))
        torch.testing.assert_close(tree_map(lambda leaf: leaf[1], many), layer.initial_parameters(lr.split(key, 2)[1]))
    assert not torch.equal(many["conv"]["weight"][0], many["conv"]["weight"][1])


def test_what_looks_at_values_while_it_is_reset(make_key):
    class Looking(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(200))
            self.other = nn.Parameter(torch.full((3,), 7.0))
            self.reset_parameters()

        def reset_parameters(self):
            nn.init.trunc_normal_(self.weight)
            if self.weight.mean().item() > 10:
                self.other.data.zero_()

        def forward(self, x):
            return x

    layer, _, _ = from_torch(Looking())
    ps, _ = lt.setup(make_key(), layer)
    assert 0.5 < ps["weight"].std() < 1.5 and torch.equal(ps["other"], torch.full((3,), 7.0))


SYSTEMS = {
    "solve": lambda a, b: torch.linalg.solve(a, b),
    "solve, named": lambda a, b: torch.linalg.solve(A=a, B=b, left=True),
    "solve_ex": lambda a, b: torch.linalg.solve_ex(a, b)[0],
    "tensorsolve": lambda a, b: torch.linalg.tensorsolve(a, b[:, 0]),
    "det": lambda a, b: torch.det(a),
    "slogdet": lambda a, b: a.slogdet()[1],
    "logdet": lambda a, b: (a @ a.mT).logdet(),
    "cdist": lambda a, b: torch.cdist(a, b.mT),
}


class Solving(nn.Module):
    """Linear algebra of what it is called with, and a weight."""

    def __init__(self, name):
        super().__init__()
        self.weight, self.name = nn.Parameter(3 * torch.eye(3, dtype=torch.float64)), name

    def forward(self, x):
        return SYSTEMS[self.name](self.weight + x, x[:, :2])


@pytest.mark.parametrize("name", SYSTEMS)
def test_linear_algebra_in_a_module_has_right_derivatives_in_every_nesting(make_key, name):
    layer, ps, _ = from_torch(Solving(name))
    st = layer.initial_states(make_key())
    x = lt.random.normal(make_key(), (3, 3), dtype=torch.float64)
    lt.testing.check_derivatives(lambda x, ps: layer(x, ps, st)[0], x, ps, rng=make_key())
