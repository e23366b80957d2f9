"""The gradients of the samples of a batch, against a loop of torch.autograd."""

from __future__ import annotations

import pytest
import torch
import torch.utils._pytree as pytree
from torch import nn

import luxtorch as lt
from luxtorch.autodiff import per_sample_gradients
from luxtorch.core import DTypeError, InputError, Static
from luxtorch.random import fold_in

B = 5
every_chunk = pytest.mark.parametrize("chunk_size", [None, 1, 2, 5, 9])
every_tree = pytest.mark.parametrize("tree", [dict, lt.ComponentVector])

# Models of luxtorch with modules of torch that have the same parameters, and the shape of one sample.
MODELS = {
    "dense": (
        lambda: lt.Chain(lt.Dense(3, 8, torch.tanh), lt.Dense(8, 4)),
        lambda: nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4)),
        (3,),
    ),
    "convolution": (
        lambda: lt.Chain(lt.Conv((3, 3), 2, 4), lt.GroupNorm(4, 2), torch.relu, lt.FlattenLayer(), lt.Dense(16, 4)),
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 4)),
        (2, 4, 4),
    ),
}


def filled(ps, module):
    """Return parameters with the values of a module's, which come in the same order."""
    leaves, spec = pytree.tree_flatten(ps)
    values = [value.detach().clone().view(leaf.shape) for leaf, value in zip(leaves, module.parameters(), strict=True)]
    return pytree.tree_unflatten(values, spec)


def as_leaves(gradients, like):
    """Return the leaves of per-sample gradients, in the order of the parameters."""
    tree = gradients.to_dict() if isinstance(gradients, lt.ComponentVector) else gradients
    assert pytree.tree_structure(tree) == pytree.tree_structure(like)
    return pytree.tree_leaves(tree)


@every_chunk
@every_tree
@pytest.mark.parametrize("name", MODELS)
def test_against_a_loop_of_autograd(rng, name, tree, chunk_size):
    make, make_module, shape = MODELS[name]
    model, module = make(), make_module().double()
    ps, st = lt.setup(0, model)
    ps = filled(ps, module)
    x = torch.randn(B, *shape, generator=rng, dtype=torch.float64)
    target = torch.randint(4, (B,), generator=rng)

    def loss(ps, st, sample):
        x, target = sample
        y, st = model(x, ps, st)
        return nn.functional.cross_entropy(y, target), (st, y)

    got, (_, ys) = per_sample_gradients(loss, tree(ps), st, (x, target), has_aux=True, chunk_size=chunk_size)
    assert type(got) is tree
    for i in range(B):
        y = module(x[i : i + 1])
        expected = torch.autograd.grad(nn.functional.cross_entropy(y, target[i : i + 1]), list(module.parameters()))
        torch.testing.assert_close(ys[i], y.detach())
        for leaf, wanted in zip(as_leaves(got, ps), expected, strict=True):
            torch.testing.assert_close(leaf[i], wanted.view(leaf[i].shape))


@every_tree
def test_the_sum_is_the_gradient_of_the_sum(problem_parts, tree):
    model, ps, st, batch, loss = problem_parts
    st = lt.test_mode(st)
    got = per_sample_gradients(loss, tree(ps), st, batch)
    total = lt.gradient(lambda ps: loss(ps, st, batch) * B, tree(ps))
    torch.testing.assert_close(pytree.tree_map(lambda leaf: leaf.sum(0), got), total)


@pytest.fixture
def problem_parts(make_key):
    """A model with dropout, its trees, a batch and a loss, in float64."""
    model = lt.Chain(lt.Dense(3, 8, torch.tanh), lt.Dropout(0.5), lt.Dense(8, 2))
    ps, st = lt.f64(lt.setup(make_key(), model))
    batch = {"x": lt.random.normal(make_key(), (B, 3), dtype=torch.float64), "target": torch.arange(B) % 2}

    def loss(ps, st, sample):
        y, _ = model(sample["x"], ps, st)
        return nn.functional.cross_entropy(y, sample["target"])

    return model, ps, st, batch, loss


@every_chunk
@pytest.mark.parametrize("randomness", ["different", "same"])
def test_the_key_of_a_sample_is_folded_from_its_number(problem_parts, randomness, chunk_size):
    _, ps, st, batch, loss = problem_parts
    got = per_sample_gradients(loss, ps, st, batch, randomness=randomness, chunk_size=chunk_size)
    for i in range(B):
        rng = st["layer_2"]["rng"]
        own = {**st, "layer_2": {**st["layer_2"], "rng": fold_in(rng, i) if randomness == "different" else rng}}
        sample = pytree.tree_map(lambda leaf, i=i: leaf[i : i + 1], batch)
        expected = lt.gradient(lambda ps, own=own, sample=sample: loss(ps, own, sample), ps)
        torch.testing.assert_close(pytree.tree_map(lambda leaf, i=i: leaf[i], got), expected)


def test_equal_samples_differ_by_their_random_numbers_alone(problem_parts):
    _, ps, st, batch, loss = problem_parts
    batch = pytree.tree_map(lambda leaf: leaf[:1].expand(B, *leaf.shape[1:]), batch)
    different, same = (
        per_sample_gradients(loss, ps, st, batch, randomness=randomness)["layer_3"]["weight"]
        for randomness in ("different", "same")
    )
    assert len({tuple(leaf.flatten().tolist()) for leaf in different}) > 1
    torch.testing.assert_close(same, same[:1].expand_as(same))


def test_keys_of_many_models_are_folded_too(make_key):
    keys = lt.random.split(make_key(), 3)

    def loss(ps, st, x):
        return (ps * x).sum(), st["keys"]

    ones = torch.ones(B, 2)
    _, got = per_sample_gradients(loss, torch.ones(2), {"keys": keys}, ones, has_aux=True)
    assert got.shape == (B, 3, 2)
    for i in range(B):
        assert torch.equal(got[i], fold_in(keys, i))


@every_chunk
def test_aux_is_stacked_and_need_not_be_tensors(chunk_size):
    def loss(ps, st, x):
        return (ps * x).sum(), {"x": x, "name": "a", "static": Static(1), "st": st}

    x, st = torch.arange(2.0 * B).view(B, 2), {"count": torch.tensor(3), "training": Static(True)}
    got, aux = per_sample_gradients(loss, torch.ones(2), st, x, has_aux=True, chunk_size=chunk_size)
    assert torch.equal(got, x) and torch.equal(aux["x"], x[:, None])
    assert aux["name"] == "a" and aux["static"] == Static(1) and aux["st"]["training"] == Static(True)
    assert aux["st"]["count"].tolist() == [3] * B


@every_chunk
@pytest.mark.parametrize(("keep", "shape"), [(True, (1, 3)), (False, (3,))])
def test_a_sample_comes_with_or_without_a_batch_dimension(keep, shape, chunk_size):
    seen = []

    def loss(ps, st, x):
        seen.append(tuple(x.shape))
        return (ps * x).sum()

    x = torch.arange(3.0 * B).view(B, 3)
    got = per_sample_gradients(loss, torch.ones(3), {}, x, keep_batch_dim=keep, chunk_size=chunk_size)
    assert torch.equal(got, x) and set(seen) == {shape}


def total_of(tree):
    return sum(leaf.square().sum() for leaf in pytree.tree_leaves(tree))


TRANSFORMS = {
    "call": lambda f, ps: f(ps),
    "grad": lambda f, ps: torch.func.grad(lambda ps: total_of(f(ps)))(ps),
    "jvp": lambda f, ps: torch.func.jvp(f, (ps,), (ps,))[1],
    "vmap": lambda f, ps: torch.vmap(f)(pytree.tree_map(lambda leaf: torch.stack([leaf, 2 * leaf]), ps)),
}


@every_tree
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_it_goes_through_transforms(problem_parts, name, compiled, tree):
    _, ps, st, batch, loss = problem_parts
    transform = TRANSFORMS[name]

    def transformed(ps):
        return transform(lambda ps: per_sample_gradients(loss, ps, st, batch), ps)

    if compiled:
        transformed = torch.compile(transformed, fullgraph=True, backend="aot_eager")
    looped = transform(lambda ps: per_sample_gradients(loss, ps, st, batch, chunk_size=1), tree(ps))
    torch.testing.assert_close(pytree.tree_leaves(transformed(tree(ps))), pytree.tree_leaves(looped))


def test_nothing_is_changed_and_no_global_generator_is_read(problem_parts):
    _, ps, st, batch, loss = problem_parts
    before = pytree.tree_map(torch.clone, (ps, st, batch))
    state = torch.get_rng_state()
    per_sample_gradients(loss, ps, st, batch)
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip(pytree.tree_leaves((ps, st, batch)), pytree.tree_leaves(before), strict=True):
        assert torch.equal(a, b)


def test_clipped_gradients_have_the_norms_of_private_training(problem_parts):
    _, ps, st, batch, loss = problem_parts
    grads = per_sample_gradients(loss, lt.ComponentVector(ps), st, batch)
    norms, clip = grads.flat.norm(dim=1, keepdim=True), 0.1
    clipped = grads.flat * (clip / norms).clamp(max=1)
    assert bool((norms > clip).any())
    torch.testing.assert_close(clipped.norm(dim=1), norms[:, 0].clamp(max=clip))


def total(ps, st, x):
    return (ps * x).sum()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"batch": torch.ones(0, 3)}, InputError, "The batch must have samples"),
        ({"batch": torch.tensor(1.0)}, InputError, "The batch must have samples"),
        ({"batch": {}}, InputError, "must have a tensor"),
        ({"batch": (torch.ones(2, 3), torch.ones(4))}, InputError, "same number.*2 in '0'.*4 in '1'"),
        (
            {"batch": {"x": torch.ones(2, 3), "y": 1.0}},
            DTypeError,
            "'y' of the batch must be a tensor.*Close over",
        ),
        ({"ps": {"a": torch.arange(3)}}, DTypeError, "a.*must be a floating point tensor"),
        ({"loss": lambda ps, st, x: ps * x}, InputError, "must return a scalar"),
        ({"loss": lambda ps, st, x: (total(ps, st, x), st)}, InputError, "must return a scalar.*has_aux=True"),
        ({"has_aux": True}, InputError, "must return a pair"),
        ({"chunk_size": 0}, InputError, "chunk_size must be at least 1"),
        ({"randomness": "error"}, InputError, "'different' or 'same'.*'error'"),
    ],
)
def test_mistakes_are_explained(change, error, words):
    arguments = {"loss": total, "ps": torch.ones(3), "st": {}, "batch": torch.ones(2, 3), **change}
    with pytest.raises(error, match=f"(?s){words}"):
        per_sample_gradients(**arguments)


def test_batch_normalization_of_one_sample_says_so(make_key):
    model = lt.Chain(lt.Dense(3, 4), lt.BatchNorm(4))
    ps, st = lt.setup(make_key(), model)

    def loss(ps, st, x):
        return model(x, ps, st)[0].sum()

    with pytest.raises(InputError, match=r"model.layer_2 \(BatchNorm 4\)"):
        per_sample_gradients(loss, ps, st, torch.ones(5, 3))
    assert per_sample_gradients(loss, ps, lt.test_mode(st), torch.ones(5, 3))["layer_2"]["bias"].shape == (5, 4)


LABELS = torch.tensor([0, 2, 1, 1, 0])


def _with(function):
    def loss(ps, st, sample):
        x, label = sample
        return ((x * ps["w"]).sum(0) * function(label[0])).sum()

    return loss


@pytest.mark.parametrize("name", ["one_hot", "eye", "from the end", "scatter"])
def test_functions_of_labels_give_what_a_loop_gives(rng, name):
    function = {
        "one_hot": lambda label: torch.nn.functional.one_hot(label, 3),
        "eye": lambda label: torch.eye(3)[label],
        "from the end": lambda label: torch.eye(3)[label - 3],
        "scatter": lambda label: torch.zeros(3).scatter(0, label[None], 1.0),
    }[name]
    ps, batch = {"w": torch.ones(3)}, (torch.randn(5, 3, generator=rng), LABELS)
    got = lt.per_sample_gradients(_with(function), ps, {}, batch)
    torch.testing.assert_close(got, lt.per_sample_gradients(_with(function), ps, {}, batch, chunk_size=1))


NUMBERS = {
    "torch.Tensor.item": lambda label: label.item(),
    "torch.Tensor.__bool__": lambda label: 1.0 if label > 1 else 2.0,
    "one_hot without num_classes": lambda label: torch.nn.functional.one_hot(label).sum(),
    "torch.nonzero": lambda label: torch.nonzero(label).sum(),
    "torch.masked_select": lambda label: torch.masked_select(torch.ones(3), torch.arange(3) > label).sum(),
    "torch.functional.unique": lambda label: torch.unique(torch.stack([label, label])).sum(),
    "torch.Tensor.tolist": lambda label: label.tolist(),
    "torch.equal": lambda label: float(torch.equal(label, label)),
    "torch.Tensor.__getitem__": lambda label: torch.ones(3)[torch.arange(3) > label].sum(),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_what_asks_for_numbers_is_named(name):
    ps, batch = {"w": torch.ones(3)}, (torch.ones(5, 3), LABELS)
    with pytest.raises(lt.InputError, match=f"(?s)Under vmap.*got: *{name.replace('.', '[.]')}.*chunk_size=1"):
        lt.per_sample_gradients(_with(NUMBERS[name]), ps, {}, batch)
