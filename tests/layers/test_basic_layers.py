"""Layers of shape, `Bilinear`, `GLU` and `PReLU`: the laws, and torch's numbers."""

from __future__ import annotations

import pytest
import torch

import luxtorch as lt
from luxtorch import GLU, Bilinear, Chain, InputError, PReLU, ReshapeLayer, ReverseSequence, SelectDim

FORMS = {
    "ReshapeLayer": (ReshapeLayer(2, 3), [(4, 6), (4, 3, 2)]),
    "ReshapeLayer of what is left": (ReshapeLayer(-1, 2), [(4, 6), (1, 3, 2)]),
    "SelectDim": (SelectDim(1, -1), [(4, 3), (2, 3, 2)]),
    "SelectDim of several": (SelectDim(-1, [2, 0, 2]), [(4, 3), (3,)]),
    "ReverseSequence": (ReverseSequence(), [(4, 3), (2, 3, 2), (3,)]),
    "ReverseSequence of a dimension": (ReverseSequence(-1), [(2, 3, 2)]),
    "Bilinear": (Bilinear(3, 4, 2, torch.tanh), [((5, 3), (5, 4)), ((3,), (4,)), ((2, 5, 3), (2, 5, 4))]),
    "Bilinear of one, without bias": (Bilinear(3, 3, 2, bias=False), [(5, 3)]),
    "GLU": (GLU(), [(3, 4), (2, 3, 2)]),
    "GLU of channels": (GLU(1), [(3, 4, 2)]),
    "PReLU": (PReLU(), [(4, 3), (3,)]),
    "PReLU of channels": (PReLU(3, 0.1), [(4, 3), (2, 3, 2, 2)]),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_law_holds(check_laws, name):
    check_laws(*FORMS[name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", FORMS)
def test_every_precision_is_kept(make_key, draw, name, dtype):
    layer, shapes = FORMS[name]
    ps, st = lt.setup(make_key(), layer)
    cast = {torch.float16: lt.f16, torch.bfloat16: lt.bf16, torch.float64: lt.f64}[dtype]
    y, _ = layer(draw(shapes[0], dtype), cast(ps), st)
    assert y.dtype == dtype and y.isfinite().all()


@pytest.mark.parametrize("size", [0, 1, 3])
@pytest.mark.parametrize("name", [name for name, (_, shapes) in FORMS.items() if len(shapes[0]) > 1])
def test_the_batch_may_be_empty_or_strided(make_key, draw, name, size):
    layer, shapes = FORMS[name]
    ps, st = lt.setup(make_key(), layer)
    x = draw(shapes[0])
    whole = layer(x, ps, st)[0]
    # Every other sample of a batch twice as long: the memory has gaps.
    part = lt.core.tree_map(lambda leaf: leaf.repeat_interleave(2, 0)[::2][:size], x)
    torch.testing.assert_close(layer(part, ps, st)[0], whole[:size])


@pytest.mark.parametrize("transform", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(), (5,), (2, 5), (0,)])
def test_bilinear_is_that_of_torch(draw, shape, bias, transform):
    reference = torch.nn.Bilinear(3, 4, 2, bias=bias)
    ps = {name: value.detach() for name, value in reference.named_parameters()}
    x = draw(((*shape, 3), (*shape, 4)))
    layer = Bilinear(3, 4, 2, torch.relu, bias=bias)
    y = torch.func.vjp(lambda x: layer(x, ps, {})[0], x)[0] if transform else layer(x, ps, {})[0]
    torch.testing.assert_close(y, reference(*x).relu())
    assert {name: leaf.shape for name, leaf in lt.setup(0, layer)[0].items()} == {n: p.shape for n, p in ps.items()}


def test_bilinear_takes_one_tensor_for_both(make_key, draw):
    ps, st = lt.setup(make_key(), Bilinear(3, 3, 2))
    x = draw((5, 3))
    assert torch.equal(Bilinear(3, 3, 2)(x, ps, st)[0], Bilinear(3, 3, 2)((x, x), ps, st)[0])


@pytest.mark.parametrize(
    ("shape", "pattern"),
    [
        (((5, 3), (4, 4)), "\\(5, 3\\).*\\(4, 4\\)"),
        (((5, 3), (4,)), "\\(5, 3\\).*\\(4,\\)"),
        (((5, 3), (5, 1)), "\\(5, 3\\).*\\(5, 1\\)"),
        (((5, 3), (5, 4), (5, 4)), "too many values to unpack"),
        ((5, 3), "\\(5, 3\\).*\\(5, 3\\)"),
    ],
)
def test_bilinear_names_what_it_takes(make_key, draw, shape, pattern):
    ps, st = lt.setup(make_key(), Bilinear(3, 4, 2))
    x = draw(shape)
    for call in (Bilinear(3, 4, 2), lambda x, ps, st: torch.func.vjp(lambda x: Bilinear(3, 4, 2)(x, ps, st)[0], x)):
        with pytest.raises(InputError, match=f"\\(..., 3\\) and \\(..., 4\\)[\\s\\S]*{pattern}"):
            call(x, ps, st)


@pytest.mark.parametrize("shape", [(3,), (2, 1), (2, 4)])
def test_prelu_has_a_parameter_for_each_channel(make_key, shape):
    ps, st = lt.setup(make_key(), PReLU(3))
    for call in (PReLU(3), lambda x, ps, st: torch.func.vjp(lambda x: PReLU(3)(x, ps, st)[0], x)):
        with pytest.raises(InputError, match="\\(batch, 3, ...\\)"):
            call(torch.ones(shape), ps, st)


@pytest.mark.parametrize(("dim", "shape"), [(-1, (3, 4)), (1, (3, 4, 2)), (0, (2, 3))])
def test_glu_is_that_of_torch(draw, dim, shape):
    x = draw(shape)
    assert torch.equal(GLU(dim)(x, {}, {})[0], torch.nn.GLU(dim)(x))


@pytest.mark.parametrize("transform", [False, True])
@pytest.mark.parametrize(("size", "shape"), [(1, (4, 3)), (1, ()), (3, (4, 3)), (3, (2, 3, 2)), (3, (0, 3))])
def test_prelu_is_that_of_torch_at_zero_too(make_key, draw, size, shape, transform):
    reference, layer = torch.nn.PReLU(size, 0.1), PReLU(size, 0.1)
    ps, _ = lt.setup(make_key(), layer)
    assert torch.equal(ps["weight"], reference.weight)
    x = draw(shape) if shape else torch.tensor(-1.0)
    x = torch.where(x.abs() < 0.3, 0.0, x).requires_grad_()
    expected = torch.autograd.grad(reference(x).sum(), (reference.weight, x))
    if transform:
        got = torch.func.grad(lambda w, x: layer(x, {"weight": w}, {})[0].sum(), argnums=(0, 1))(ps["weight"], x)
    else:
        weight = ps["weight"].requires_grad_()
        got = torch.autograd.grad(layer(x, {"weight": weight}, {})[0].sum(), (weight, x))
    torch.testing.assert_close(got, expected)


def test_a_reshape_keeps_the_batch():
    x = torch.arange(24.0).reshape(2, 12)
    assert torch.equal(ReshapeLayer(3, 4)(x, {}, {})[0], x.reshape(2, 3, 4))
    assert torch.equal(ReshapeLayer(2, -1)(x.reshape(2, 3, 4), {}, {})[0], x.reshape(2, 2, 6))
    assert ReshapeLayer(3, -1)(x[:0], {}, {})[0].shape == (0, 3, 4)


@pytest.mark.parametrize("x", [torch.ones(2, 5), torch.ones(0, 5), torch.ones(6), torch.tensor(1.0)])
def test_a_reshape_does_not_mix_samples(x):
    with pytest.raises(InputError, match="\\(batch, ...\\) whose samples fit the shape \\(2, 3\\)"):
        ReshapeLayer(2, 3)(x, {}, {})


@pytest.mark.parametrize(("dim", "index"), [(0, 1), (1, -1), (-1, 0)])
def test_selecting_one_is_a_view(dim, index):
    x = torch.arange(12.0).reshape(3, 4)
    y, _ = SelectDim(dim, index)(x, {}, {})
    assert torch.equal(y, x.select(dim, index)) and y.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


@pytest.mark.parametrize(("dim", "index"), [(0, [2, 0]), (1, (3,)), (-1, range(0, 4, 2)), (-2, [-1, 0, 0])])
def test_selecting_several_keeps_the_dimension(dim, index):
    x = torch.arange(12.0).reshape(3, 4)
    expected = x.index_select(dim, torch.tensor([i % x.shape[dim] for i in index]))
    assert torch.equal(SelectDim(dim, index)(x, {}, {})[0], expected)


@pytest.mark.parametrize(("dim", "shape", "flipped"), [(None, (2, 3, 4), 1), (None, (3,), 0), (-1, (2, 3, 4), 2)])
def test_reversing_is_along_time(draw, dim, shape, flipped):
    x = draw(shape)
    assert torch.equal(ReverseSequence(dim)(x, {}, {})[0], x.flip(flipped))


@pytest.mark.parametrize(
    ("layer", "x", "pattern"),
    [
        (SelectDim(1, 3), torch.ones(2, 3), "the index 3 in dimension 1"),
        (SelectDim(2, [0]), torch.ones(2, 3), "the index \\(0,\\) in dimension 2"),
        (ReverseSequence(1), torch.ones(3), "has the dimension 1"),
        (GLU(), torch.ones(3), "even along dimension -1"),
        (PReLU(3), torch.ones(2, 4), "\\(batch, 3, ...\\)"),
    ],
)
def test_an_input_that_does_not_fit_is_an_error_that_names_the_layer(layer, x, pattern):
    model = Chain(lt.NoOpLayer(), layer)
    ps, st = lt.setup(0, model)
    with pytest.raises(InputError, match=pattern) as error:
        model(x, ps, st)
    assert error.value.where.startswith("model.layer_2")


@pytest.mark.parametrize(
    ("build", "pattern"),
    [
        (lambda: ReshapeLayer(), "sizes of at least 1"),
        (lambda: ReshapeLayer(-1, -1), "once -1"),
        (lambda: ReshapeLayer(0, 3), "at least 1"),
        (lambda: ReshapeLayer((2, 3)), "sizes of at least 1"),
        (lambda: SelectDim(0, []), "index must be"),
        (lambda: SelectDim(0, [0.5]), "index must be"),
        (lambda: Bilinear(3, 0, 2), "in2_features must be at least 1"),
        (lambda: PReLU(0), "at least 1"),
    ],
)
def test_wrong_arguments_are_refused(build, pattern):
    with pytest.raises(InputError, match=pattern):
        build()


def test_arguments_are_shown():
    assert repr(Bilinear(3, 4, 2, torch.tanh, bias=False)).startswith("Bilinear(3 x 4 -> 2, tanh, bias=False)")
    assert repr(ReshapeLayer(3, -1)) == "ReshapeLayer(3, -1)"
    assert repr(SelectDim(1, [0, 2])) == "SelectDim(1, (0, 2))"
