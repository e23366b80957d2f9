"""Every initializer: the form, the transforms, the dtypes and the devices that all of them share."""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Callable
from copy import deepcopy

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import luxtorch.init as init
import luxtorch.random as lr
from luxtorch.core import DTypeError, InputError

Keys = Callable[[], Tensor]

RANDOM = {
    "glorot_uniform": init.glorot_uniform,
    "glorot_normal": init.glorot_normal,
    "kaiming_uniform": init.kaiming_uniform,
    "kaiming_normal": init.kaiming_normal,
    "truncated_normal": init.truncated_normal,
    "uniform": init.uniform,
    "normal": init.normal,
    "orthogonal": init.orthogonal,
    "sparse_init": init.sparse_init(sparsity=0.5, std=1.0),
}
FIXED = {
    "identity_init": init.identity_init,
    "zeros": init.zeros,
    "ones": init.ones,
    "constant": init.constant(value=0.5),
}
ALL = {**RANDOM, **FIXED}
NEEDS_MATRIX = {"orthogonal", "sparse_init"}
NO_SCALAR = {*NEEDS_MATRIX, "identity_init"}

random_ones = pytest.mark.parametrize("name", RANDOM)
every = pytest.mark.parametrize("name", ALL)


@random_ones
def test_same_key_same_values_and_other_key_other_values(name: str, make_key: Keys) -> None:
    first, second = make_key(), make_key()
    draw = ALL[name](first, (6, 5))
    assert torch.equal(draw, ALL[name](first, (6, 5)))
    assert not torch.equal(draw, ALL[name](second, (6, 5)))


@every
def test_global_generator_and_key_stay_untouched(name: str, make_key: Keys) -> None:
    key = make_key()
    before, copy = torch.get_rng_state(), key.clone()
    ALL[name](key, (6, 5))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(key, copy)


@every
def test_vmap_over_keys_is_a_loop(name: str, make_key: Keys) -> None:
    keys = lr.split(make_key(), 3)
    members = torch.vmap(lambda key: ALL[name](key, (4, 6)))(keys)
    torch.testing.assert_close(members, torch.stack([ALL[name](key, (4, 6)) for key in keys]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
@every
def test_fullgraph_compile_changes_nothing(name: str, dtype: torch.dtype, make_key: Keys) -> None:
    if name == "truncated_normal" and dtype.is_complex:
        pytest.skip("real only")
    torch.compiler.reset()
    key = make_key()
    compiled = torch.compile(lambda key: ALL[name](key, (4, 6), dtype=dtype), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(key), ALL[name](key, (4, 6), dtype=dtype))


@pytest.mark.parametrize("name", ["glorot_uniform", "orthogonal", "sparse_init"])
def test_fullgraph_compile_of_an_ensemble(name: str, make_key: Keys) -> None:
    torch.compiler.reset()
    keys = lr.split(make_key(), 3)
    ensemble = torch.vmap(lambda key: ALL[name](key, (4, 6)))
    compiled = torch.compile(ensemble, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(keys), ensemble(keys))


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (4, 3, 5), (4, 3, 2, 5), (0, 3), (3, 0), (0, 0), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("place", ["cpu", "meta"])
@every
def test_shape_and_device_on_real_and_meta_keys(name: str, place: str, shape: tuple[int, ...], make_key: Keys) -> None:
    if name == "sparse_init" and len(shape) != 2:
        pytest.skip("matrices only")
    key = make_key()
    for draw in (ALL[name](key.to(place), shape), ALL[name](key, shape, device=place)):
        assert draw.shape == shape
        assert draw.device.type == place
        assert draw.dtype == torch.get_default_dtype()


@every
def test_device_follows_the_key(name: str, device: torch.device, make_key: Keys) -> None:
    assert ALL[name](make_key().to(device), (3, 4)).device == device
    assert ALL[name](make_key(), (3, 4), device=device).device == device


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128], ids=str
)
@every
def test_dtypes(name: str, dtype: torch.dtype, make_key: Keys) -> None:
    if name == "truncated_normal" and dtype.is_complex:
        with pytest.raises(DTypeError, match="no order"):
            ALL[name](make_key(), (4, 6), dtype=dtype)
        return
    draw = ALL[name](make_key(), (4, 6), dtype=dtype)
    assert draw.dtype == dtype
    assert draw.isfinite().all()
    if name in RANDOM and dtype.is_complex:
        assert draw.real.abs().max() > 0
        assert draw.imag.abs().max() > 0


@random_ones
def test_integers_are_not_drawn(name: str, make_key: Keys) -> None:
    with pytest.raises(DTypeError):
        ALL[name](make_key(), (4, 6), dtype=torch.int64)


@pytest.mark.parametrize("name", ["zeros", "ones"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool], ids=str)
def test_constants_of_integers(name: str, dtype: torch.dtype, make_key: Keys) -> None:
    assert torch.equal(ALL[name](make_key(), (3,), dtype=dtype), getattr(torch, name)(3, dtype=dtype))


@every
def test_default_dtype_is_torchs(name: str, make_key: Keys) -> None:
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert ALL[name](make_key(), (3, 4)).dtype == torch.float64
    finally:
        torch.set_default_dtype(default)


@pytest.mark.parametrize("shape", [(), (5,)], ids=str)
@every
def test_scalars_and_vectors(name: str, shape: tuple[int, ...], make_key: Keys) -> None:
    if name in NEEDS_MATRIX or (name in NO_SCALAR and not shape):
        with pytest.raises(InputError, match="dimension"):
            ALL[name](make_key(), shape)
    else:
        assert ALL[name](make_key(), shape).shape == shape


@every
def test_an_integer_is_a_shape(name: str, make_key: Keys) -> None:
    if name not in NEEDS_MATRIX:
        assert ALL[name](make_key(), 3).shape == (3,)


@every
def test_initializers_are_values(name: str, make_key: Keys) -> None:
    bound = ALL[name](dtype=torch.float64, device="cpu")
    twin = ALL[name](device=torch.device("cpu"))(dtype=torch.float64)
    assert bound == twin
    assert hash(bound) == hash(twin)
    assert bound != ALL[name]
    key = make_key()
    for value in (ALL[name], bound):
        for copy in (pickle.loads(pickle.dumps(value)), deepcopy(value)):
            assert copy == value
            assert hash(copy) == hash(value)
            assert torch.equal(copy(key, (3, 4)), value(key, (3, 4)))
    assert bound(key, (3, 4)).dtype == torch.float64
    assert bound(key, (3, 4), dtype=None, device=None).dtype == torch.float64
    assert bound(key, (3, 4), dtype=torch.float32).dtype == torch.float32


def test_what_is_bound_is_what_is_passed(make_key: Keys) -> None:
    key = make_key()
    bound = init.truncated_normal(low=-1.0)(std=2.0)
    assert torch.equal(bound(key, (9,)), init.truncated_normal(key, (9,), low=-1.0, std=2.0))
    assert torch.equal(bound(key, (9,), low=-0.5), init.truncated_normal(key, (9,), low=-0.5, std=2.0))


def test_binding_a_default_binds_nothing() -> None:
    assert init.glorot_uniform() is init.glorot_uniform
    assert init.glorot_uniform(gain=2.0)(gain=1.0) is init.glorot_uniform


@settings(deadline=None, max_examples=30)
@given(std=st.floats(0.1, 3.0), mean=st.integers(-3, 3))
def test_order_of_binding_does_not_matter(std: float, mean: int) -> None:
    bound = init.normal(std=std, mean=mean)
    assert bound == init.normal(mean=float(mean))(std=std)
    assert hash(bound) == hash(init.normal(mean=float(mean))(std=std))
    assert pickle.loads(pickle.dumps(bound)) == bound


def test_repr_reads_as_the_call() -> None:
    assert repr(init.kaiming_uniform(mode="fan_out", gain=1.0)) == "kaiming_uniform(gain=1.0, mode='fan_out')"


def test_signature_shows_the_options() -> None:
    assert list(inspect.signature(init.glorot_uniform).parameters) == ["key", "shape", "gain", "dtype", "device"]


@every
def test_unknown_option_is_an_error_at_once(name: str) -> None:
    with pytest.raises(InputError, match="has no option 'dtpye'") as error:
        ALL[name](dtpye=torch.float64)
    assert "Did you mean 'dtype'?" in str(error.value)


@pytest.mark.parametrize("value", [torch.tensor(1.0), [1.0]], ids=["tensor", "list"])
def test_an_option_is_a_plain_value(value: object) -> None:
    with pytest.raises(DTypeError, match="must be a plain value"):
        init.glorot_uniform(gain=value)


@pytest.mark.parametrize(
    ("args", "kind", "text"),
    [
        ((0, (3, 4)), DTypeError, "lt.random.key\\(0\\)"),
        (((3, 4),), DTypeError, "lt.random.key\\(0\\)"),
        ((None, (3, 4)), InputError, "needs a key"),
        ((torch.zeros(2), (3, 4)), DTypeError, "a uint64 tensor of shape \\(2,\\).\n.*a torch.float32 tensor"),
        ((torch.zeros(3, dtype=torch.uint64), (3, 4)), DTypeError, "tensor of shape \\(3,\\)"),
        ((torch.zeros(5, 2, dtype=torch.uint64), (3, 4)), DTypeError, "torch.vmap"),
        ((torch.zeros(2, dtype=torch.uint64),), InputError, "needs a shape"),
        ((torch.zeros(2, dtype=torch.uint64), (3, -4)), InputError, "Each size in shape must be at least 0"),
    ],
)
@every
def test_wrong_keys_and_shapes(name: str, args: tuple[object, ...], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        ALL[name](*args)


@pytest.mark.parametrize(("function", "option"), [(init.sparse_init, "sparsity"), (init.constant, "value")])
def test_a_required_option_is_asked_for(function: init.BindableInitializer, option: str, make_key: Keys) -> None:
    with pytest.raises(InputError, match=f"needs the option {option}"):
        function(make_key(), (3, 4))


@init.initializer
def halves(key: Tensor, shape: tuple[int, ...], dtype: torch.dtype, *, times: int = 1) -> Tensor:
    """Fill with halves."""
    return torch.full(shape, 0.5 * times, dtype=dtype, device=key.device)


def test_third_parties_write_their_own(make_key: Keys) -> None:
    bound = halves(times=3)
    assert pickle.loads(pickle.dumps(bound)) == bound
    assert torch.equal(bound(make_key(), (2,)), torch.tensor([1.5, 1.5]))
    assert halves.__doc__ == "Fill with halves."
