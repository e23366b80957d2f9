"""Layers against torch.nn: the same numbers and the same statistics."""

from __future__ import annotations

import pytest
import torch

import luxtorch as lt
from luxtorch import BatchNorm, Dense, Dropout


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(4, 3), (3,), (2, 4, 3), (0, 3)])
def test_dense_is_linear(make_key, bias, shape):
    reference = torch.nn.Linear(3, 2, bias=bias)
    ps = {name: value.detach() for name, value in reference.named_parameters()}
    x = lt.random.normal(make_key(), shape)
    assert torch.equal(Dense(3, 2, bias=bias)(x, ps, {})[0], reference(x))
    assert torch.equal(Dense(3, 2, torch.relu, bias=bias)(x, ps, {})[0], reference(x).relu())


@pytest.mark.parametrize("path", ["fused", "decomposed", "vmapped", "compiled"])
@pytest.mark.parametrize("momentum", [0.1, 0.9, None])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 5), (4, 3, 5, 2), (2, 3, 2, 2, 2)])
def test_batch_norm_is_that_of_torch_over_many_steps(make_key, path, momentum, affine, shape):
    kind = {2: torch.nn.BatchNorm1d, 3: torch.nn.BatchNorm1d, 4: torch.nn.BatchNorm2d, 5: torch.nn.BatchNorm3d}[
        len(shape)
    ]
    reference = kind(3, momentum=momentum, affine=affine)
    layer = BatchNorm(3, momentum=momentum, affine=affine)
    ps, st = lt.setup(make_key(), layer)
    if affine:
        ps = {"weight": torch.tensor([0.5, 1.0, 2.0]), "bias": torch.tensor([-1.0, 0.0, 3.0])}
        reference.load_state_dict(ps, strict=False)
    run = {
        "fused": layer,
        "decomposed": lambda x, ps, st: torch.func.vjp(lambda x: layer(x, ps, st), x, has_aux=True)[::2],
        "vmapped": lambda x, ps, st: first(torch.vmap(layer)(x[None], batched(ps), batched(st))),
        "compiled": torch.compile(lambda x, ps, st: layer(x, ps, st), fullgraph=True, backend="aot_eager"),
    }[path]
    for step in range(8):
        x = 3 * lt.random.normal(lt.random.fold_in(make_key(), step), shape) + 1
        y, st = run(x, ps, st)
        torch.testing.assert_close(y, reference(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(st["running_mean"], reference.running_mean)
    torch.testing.assert_close(st["running_var"], reference.running_var)
    torch.testing.assert_close(layer(x, ps, lt.test_mode(st))[0], reference.eval()(x), rtol=1e-4, atol=1e-5)


def batched(tree):
    return torch.utils._pytree.tree_map(lambda leaf: leaf[None], tree)


def first(tree):
    return torch.utils._pytree.tree_map(lambda leaf: leaf[0], tree)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_batch_norm_keeps_the_dtype_on_both_paths(make_key, dtype):
    layer = BatchNorm(3)
    ps, st = lt.setup(make_key(), layer)
    if dtype == torch.float64:
        ps, st = lt.f64(ps), lt.f64(st)
    x = lt.random.normal(make_key(), (16, 3), dtype=dtype)
    fused, new = layer(x, ps, st)
    decomposed, _, new_decomposed = torch.func.vjp(lambda x: layer(x, ps, st), x, has_aux=True)
    assert fused.dtype == decomposed.dtype == dtype
    torch.testing.assert_close(fused, decomposed)
    torch.testing.assert_close(new["running_var"], new_decomposed["running_var"])


def test_batch_norm_takes_parameters_of_a_lower_precision_than_its_statistics(make_key):
    layer = BatchNorm(3)
    ps, st = lt.setup(make_key(), layer)
    x = lt.random.normal(make_key(), (16, 3), dtype=torch.bfloat16)
    y, new = layer(x, lt.bf16(ps), st)
    expected, expected_new = layer(x, ps, st)
    assert y.dtype == torch.bfloat16 and new["running_var"].dtype == torch.float32
    torch.testing.assert_close(y, expected)
    assert torch.equal(new["running_var"], expected_new["running_var"])


def test_batch_norm_without_statistics_uses_the_batch_in_both_modes(make_key):
    layer, reference = BatchNorm(3, track_running_stats=False), torch.nn.BatchNorm1d(3, track_running_stats=False)
    ps, st = lt.setup(make_key(), layer)
    x = lt.random.normal(make_key(), (6, 3))
    for state in (st, lt.test_mode(st)):
        torch.testing.assert_close(layer(x, ps, state)[0], reference.eval()(x), rtol=1e-4, atol=1e-5)


def test_batch_norm_refuses_a_feature_without_variance(make_key):
    ps, st = lt.setup(make_key(), BatchNorm(3))
    with pytest.raises(lt.InputError, match="more than one value[\\s\\S]*test_mode"):
        BatchNorm(3)(torch.ones(1, 3), ps, st)
    assert BatchNorm(3)(torch.ones(1, 3), ps, lt.test_mode(st))[0].shape == (1, 3)
    with pytest.raises(lt.InputError, match="\\(batch, 3, ...\\)[\\s\\S]*second"):
        BatchNorm(3)(torch.ones(2, 5, 3), ps, st)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_dropout_drops_and_scales(make_key, p):
    ps, st = lt.setup(make_key(), Dropout(p))
    y, new = Dropout(p)(torch.ones(20_000), ps, st)
    assert abs(float((y == 0).float().mean()) - p) < 0.02
    assert (y[y != 0] == 1 / (1 - p if p < 1 else 1)).all()
    assert (st == {}) == (p == 0)
    again, _ = Dropout(p)(torch.ones(20_000), ps, st)
    assert torch.equal(y, again)
    if 0 < p < 1:
        assert not torch.equal(Dropout(p)(torch.ones(20_000), ps, new)[0], y)
    assert torch.equal(Dropout(p)(torch.ones(5), ps, lt.test_mode(st))[0], torch.ones(5))


def test_dropout_drops_infinities_and_nans_too(make_key):
    ps, st = lt.setup(make_key(), Dropout(1.0))
    assert Dropout(1.0)(torch.tensor([torch.inf, torch.nan]), ps, st)[0].tolist() == [0, 0]


@pytest.mark.parametrize(("dims", "shape"), [(0, (50, 1)), ((0, 2), (50, 1, 7)), (-1, (1, 50))])
def test_dropout_varies_along_dims_alone(make_key, dims, shape):
    ps, st = lt.setup(make_key(), Dropout(0.5, dims))
    full = tuple(50 if size == 1 else size for size in shape)
    y, _ = Dropout(0.5, dims)(torch.ones(full), ps, st)
    for dim, size in enumerate(shape):
        if size == 1:
            assert torch.equal(y, y.narrow(dim, 0, 1).expand(full))
    assert len(y.unique()) == 2


@pytest.mark.parametrize("p", [-0.1, 1.1])
def test_dropout_takes_a_probability(p):
    with pytest.raises(lt.InputError, match="between 0 and 1"):
        Dropout(p)
