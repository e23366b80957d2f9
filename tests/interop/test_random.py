"""The random functions of torch, called in the forward of a module: torch's results, from a key."""

from __future__ import annotations

import inspect
import math

import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad, vmap

import luxtorch.random as lr
from luxtorch.core import LuxtorchError
from luxtorch.interop._submodule import _MODAL
from luxtorch.interop.pure._keys import Keys
from luxtorch.interop.pure._mode import REPLACEMENTS, UNCHECKED, PureMode
from luxtorch.interop.pure._modules import _PURE

# Each takes x, numbers between 0 and 1 of shape (3, 4).
DRAWS = {
    "rand": lambda x: torch.rand(2, 3),
    "rand, tuple": lambda x: torch.rand((2, 3), dtype=torch.float64),
    "rand, size": lambda x: torch.rand(size=(2, 3), requires_grad=True),
    "rand, scalar": lambda x: torch.rand(()),
    "rand, half": lambda x: torch.rand(5, dtype=torch.bfloat16),
    "rand, complex": lambda x: torch.rand(5, dtype=torch.complex64),
    "rand, empty": lambda x: torch.rand(0, 3),
    "rand, generator": lambda x: torch.rand(5, generator=None, device="cpu"),
    "rand_like": lambda x: torch.rand_like(x),
    "rand_like, dtype": lambda x: torch.rand_like(x, dtype=torch.float64, memory_format=torch.contiguous_format),
    "randn": lambda x: torch.randn(2, 3),
    "randn, complex": lambda x: torch.randn((2, 3), dtype=torch.complex128),
    "randn_like": lambda x: torch.randn_like(x),
    "randint": lambda x: torch.randint(100, (9,)),
    "randint, low": lambda x: torch.randint(3, 900, (9,), dtype=torch.int32),
    "randint, named": lambda x: torch.randint(low=3, high=900, size=(9,)),
    "randint, wide": lambda x: torch.randint(-(2**62), 2**62, (9,)),
    "randint, float": lambda x: torch.randint(0, 1000, (9,), dtype=torch.float32),
    "randint_like": lambda x: torch.randint_like(x, 5000),
    "randint_like, low": lambda x: torch.randint_like(x, 5, 5000, dtype=torch.int64),
    "randperm": lambda x: torch.randperm(20),
    "randperm, dtype": lambda x: torch.randperm(20, dtype=torch.int32),
    "normal": lambda x: torch.normal(1.0, 2.0, (3,)),
    "normal, named": lambda x: torch.normal(mean=1.0, std=2.0, size=(3,), dtype=torch.float64),
    "normal, mean": lambda x: torch.normal(x),
    "normal, mean and number": lambda x: torch.normal(x, 2.0),
    "normal, std": lambda x: torch.normal(1.0, x),
    "normal, both": lambda x: torch.normal(x[:1], x[:, :1].double()),
    "bernoulli": lambda x: torch.bernoulli(x.expand(9, 3, 4)),
    "bernoulli, p": lambda x: torch.bernoulli(x.double(), 0.4),
    "bernoulli, method": lambda x: x.expand(9, 3, 4).bernoulli(),
    "bernoulli, integers": lambda x: torch.zeros(30, dtype=torch.int64).bernoulli(0.5),
    "multinomial": lambda x: torch.multinomial(x, 3),
    "multinomial, again": lambda x: torch.multinomial(x, 20, True),
    "multinomial, vector": lambda x: x[0].multinomial(9, replacement=True),
    "uniform_": lambda x: torch.empty(5).uniform_(),
    "uniform_, bounds": lambda x: torch.empty(5).uniform_(-3, 2),
    "uniform_, to": lambda x: x.new_empty(5).uniform_(to=4.0),
    "normal_": lambda x: torch.empty_like(x).normal_(1, 3),
    "normal_, complex": lambda x: torch.zeros(5, dtype=torch.complex64).normal_(std=2.0),
    "bernoulli_": lambda x: torch.zeros(30).bernoulli_(0.4),
    "bernoulli_, tensor": lambda x: torch.ones_like(x).bernoulli_(x),
    "bernoulli_, bool": lambda x: torch.empty(30, dtype=torch.bool).bernoulli_(),
    "exponential_": lambda x: torch.ones(5).exponential_(2.0),
    "geometric_": lambda x: torch.ones(50).geometric_(0.1),
    "geometric_, integers": lambda x: torch.ones(50, dtype=torch.int64).geometric_(0.1),
    "cauchy_": lambda x: x.new_zeros(5).cauchy_(1.0, 2.0),
    "log_normal_": lambda x: torch.zeros_like(x).log_normal_(),
    "random_": lambda x: torch.zeros(5, dtype=torch.int64).random_(),
    "random_, floats": lambda x: torch.zeros(5).random_(),
    "random_, to": lambda x: x.new_ones(9).random_(100),
    "random_, bounds": lambda x: torch.ones_like(x, dtype=torch.int32).random_(5, 500),
    "old constructor": lambda x: x.new(3, 4).uniform_(),
    "distribution": lambda x: torch.distributions.Normal(x, 1.0, validate_args=False).rsample(),
    "distribution, old": lambda x: torch.distributions.Laplace(x, 1.0, validate_args=False).rsample(),
    "categories": lambda x: torch.distributions.Categorical(x.expand(9, 3, 4), validate_args=False).sample(),
    "poisson": lambda x: torch.poisson(9 * x + 5),
    "poisson, method": lambda x: torch.distributions.Poisson(9 * x.double() + 5, validate_args=False).sample(),
    "gamma": lambda x: torch.distributions.Gamma(x + 0.5, 2.0, validate_args=False).rsample((2,)),
    "student": lambda x: torch.distributions.StudentT(x + 2.0, validate_args=False).sample(),
    "dirichlet": lambda x: torch._sample_dirichlet(x + 0.5),
    "dropout": lambda x: F.dropout(x),
    "dropout, in place": lambda x: F.dropout(x.clone(), 0.4, inplace=True),
    "dropout, torch": lambda x: torch.dropout(x, 0.4, True),
    "dropout_, torch": lambda x: torch.dropout_(x.clone(), 0.4, True),
    "dropout1d": lambda x: F.dropout1d(x.expand(20, 3, 4)),
    "dropout1d, one": lambda x: F.dropout1d(x.t().repeat(9, 1), inplace=True),
    "dropout2d": lambda x: F.dropout2d(x[:, :, None, None].expand(3, 4, 2, 2), 0.4),
    "dropout3d": lambda x: F.dropout3d(x.t().repeat(9, 1)[:, :, None, None]),
    "alpha_dropout": lambda x: F.alpha_dropout(x, 0.4, training=True),
    "alpha_dropout, in place": lambda x: F.alpha_dropout(x.clone(), 0.4, True, True),
    "feature_alpha_dropout": lambda x: F.feature_alpha_dropout(x[..., None].repeat(1, 9, 2), 0.4, training=True),
    "rrelu": lambda x: F.rrelu(x - 1, training=True),
    "rrelu, in place": lambda x: F.rrelu(x - 1, 0.2, 0.3, training=True, inplace=True),
    "gumbel_softmax": lambda x: F.gumbel_softmax(x),
    "gumbel_softmax, hard": lambda x: F.gumbel_softmax(x.repeat(9, 1), 0.5, hard=True),
    "fractional_max_pool2d": lambda x: F.fractional_max_pool2d(places(x, 16, 16), 2, (7, 9)),
    "fractional_max_pool2d, indices": lambda x: F.fractional_max_pool2d(
        places(x, 16, 16), 2, output_ratio=(0.4, 0.6), return_indices=True
    )[1],
    "fractional_max_pool3d": lambda x: F.fractional_max_pool3d(places(x, 9, 9, 9), 2, output_size=4),
    "init, uniform": lambda x: nn.init.uniform_(torch.empty(3, 4), -1, 2),
    "init, normal": lambda x: nn.init.normal_(torch.empty(3, 4), std=0.1),
    "init, kaiming": lambda x: nn.init.kaiming_uniform_(torch.empty(3, 4), a=math.sqrt(5)),
    "init, kaiming normal": lambda x: nn.init.kaiming_normal_(torch.empty(3, 4, 2)),
    "init, xavier": lambda x: nn.init.xavier_uniform_(torch.empty(3, 4)),
    "init, orthogonal": lambda x: nn.init.orthogonal_(torch.empty(3, 4)),
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5),
}
# Whether a Python `if` looks at what was drawn, which neither vmap nor a full graph allows.
LOOKS = {"init, truncated": lambda x: nn.init.trunc_normal_(torch.empty(3, 4), std=0.5)}


def places(x, *size):
    """Return values of which no two are equal, so that two draws of windows differ."""
    count = 2 * 3 * math.prod(size)
    return (torch.arange(count, dtype=x.dtype) * 7919 % count).view(2, 3, *size) + x.sum()


def drawn(draw, key, x):
    with PureMode(Keys(key)):
        return draw(x)


@pytest.fixture
def x(rng):
    return torch.rand(3, 4, generator=rng)


@pytest.fixture(autouse=True)
def still(request):
    """Check that no test moves the global generator, outside of what torch itself draws for comparison."""
    before = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), before)


def torchs(draw, *args):
    with torch.random.fork_rng(devices=[]):
        return draw(*args)


@pytest.mark.parametrize("name", DRAWS | LOOKS)
def test_the_tensor_is_of_the_kind_that_torch_makes(make_key, x, name):
    y, like = drawn((DRAWS | LOOKS)[name], make_key(), x), torchs((DRAWS | LOOKS)[name], x)
    assert (y.shape, y.dtype, y.device, y.requires_grad) == (like.shape, like.dtype, like.device, like.requires_grad)
    assert y.is_contiguous() == like.is_contiguous()


@pytest.mark.parametrize("name", DRAWS | LOOKS)
def test_a_key_decides(make_key, x, name):
    first, second = make_key(), make_key()
    draw = (DRAWS | LOOKS)[name]
    y = drawn(draw, first, x)
    assert torch.equal(drawn(draw, first, x), y)
    assert y.numel() == 0 or not torch.equal(drawn(lambda x: (draw(x), draw(x))[1], first, x), y)
    assert y.numel() < 2 or not torch.equal(drawn(draw, second, x), y)


@pytest.mark.parametrize("name", DRAWS)
def test_each_key_of_a_batch_draws_what_it_draws_alone(make_key, x, name):
    keys = lr.split(make_key(), 3)
    ys = vmap(lambda key, x: drawn(DRAWS[name], key, x).detach(), (0, None))(keys, x)
    for key, y in zip(keys, ys, strict=True):
        torch.testing.assert_close(drawn(DRAWS[name], key, x).detach(), y)


@pytest.mark.parametrize("name", DRAWS)
def test_all_samples_share_the_draws_of_one_key(make_key, x, name):
    key = make_key()
    ys = vmap(lambda key, x: drawn(DRAWS[name], key, x).detach(), (None, 0))(key, x.expand(2, 3, 4))
    alone = drawn(DRAWS[name], key, x).detach()
    torch.testing.assert_close(ys, alone.expand(2, *alone.shape))


@pytest.mark.slow
@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("batched", [False, True], ids=["one key", "vmap"])
def test_compiled_functions_draw_the_same(make_key, x, name, batched):
    def draw(key, x):
        return drawn(DRAWS[name], key, x).detach()

    key = make_key()
    if batched:
        draw, key = vmap(draw, (0, None)), lr.split(key, 3)
    compiled = torch.compile(draw, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(key, x), draw(key, x))


SAMPLES = 20_000
PARTS = torch.tensor([0.5, 1.5, 0.0, 2.0])
# A draw of many numbers, and the distribution that SciPy knows.
CONTINUOUS = {
    "rand": (lambda: torch.rand(SAMPLES), scipy.stats.uniform()),
    "randn": (lambda: torch.randn(SAMPLES, dtype=torch.float64), scipy.stats.norm()),
    "randn, complex": (lambda: torch.randn(SAMPLES, dtype=torch.complex64).imag, scipy.stats.norm(scale=0.5**0.5)),
    "normal": (lambda: torch.normal(1.0, 2.0, (SAMPLES,)), scipy.stats.norm(1, 2)),
    "normal, tensors": (lambda: torch.normal(torch.ones(SAMPLES), 3.0), scipy.stats.norm(1, 3)),
    "uniform_": (lambda: torch.zeros(SAMPLES).uniform_(-3, 2), scipy.stats.uniform(-3, 5)),
    "normal_": (lambda: torch.zeros(SAMPLES).normal_(1, 0.5), scipy.stats.norm(1, 0.5)),
    "exponential_": (lambda: torch.zeros(SAMPLES).exponential_(2.0), scipy.stats.expon(scale=0.5)),
    "cauchy_": (lambda: torch.zeros(SAMPLES).cauchy_(1.0, 2.0), scipy.stats.cauchy(1, 2)),
    "log_normal_": (lambda: torch.zeros(SAMPLES).log_normal_(0.5, 0.3), scipy.stats.lognorm(0.3, scale=math.exp(0.5))),
    "gamma": (
        lambda: torch.distributions.Gamma(torch.full((SAMPLES,), 0.7), 2.0).sample(),
        scipy.stats.gamma(0.7, 0, 0.5),
    ),
    "beta": (lambda: torch.distributions.Beta(torch.full((SAMPLES,), 0.7), 2.0).sample(), scipy.stats.beta(0.7, 2.0)),
    "rrelu": (lambda: F.rrelu(-torch.ones(SAMPLES), 0.1, 0.4, training=True), scipy.stats.uniform(-0.4, 0.3)),
    "random_": (
        lambda: torch.zeros(SAMPLES, dtype=torch.int64).random_().double() / 2.0**63,
        scipy.stats.uniform(),
    ),
    "randint, wide": (
        lambda: torch.randint(-(2**62), 2**62, (SAMPLES,)).double() / 2.0**62,
        scipy.stats.uniform(-1, 2),
    ),
    "kaiming": (lambda: nn.init.kaiming_uniform_(torch.empty(SAMPLES // 8, 8)).flatten(), None),
    "truncated": (
        lambda: nn.init.trunc_normal_(torch.empty(SAMPLES), 0.0, 1.0, -1.0, 2.0),
        scipy.stats.truncnorm(-1, 2),
    ),
}
CONTINUOUS["kaiming"] = (CONTINUOUS["kaiming"][0], scipy.stats.uniform(-((6 / 8) ** 0.5), 2 * (6 / 8) ** 0.5))
DISCRETE = {
    "randint": (lambda: torch.randint(2, 6, (SAMPLES,)) - 2, [0.25] * 4),
    "random_": (lambda: torch.zeros(SAMPLES).random_(4), [0.25] * 4),
    "bernoulli": (lambda: torch.bernoulli(torch.full((SAMPLES,), 0.3)), [0.7, 0.3]),
    "bernoulli_": (lambda: torch.zeros(SAMPLES).bernoulli_(0.3), [0.7, 0.3]),
    "geometric_": (
        lambda: torch.zeros(SAMPLES).geometric_(0.4).clamp(max=4) - 1,
        [0.4, 0.4 * 0.6, 0.4 * 0.36, 0.216],
    ),
    "poisson": (
        lambda: torch.poisson(torch.full((SAMPLES,), 1.5)).clamp(max=4),
        [*scipy.stats.poisson(1.5).pmf(range(4)), scipy.stats.poisson(1.5).sf(3)],
    ),
    "multinomial": (lambda: torch.multinomial(PARTS, SAMPLES, True), (PARTS / 4).tolist()),
    "multinomial, first": (lambda: PARTS.expand(SAMPLES, 4).multinomial(2)[:, 0], (PARTS / 4).tolist()),
    # P(second = j) is the sum over i of p_i p_j / (1 - p_i).
    "multinomial, second": (
        lambda: PARTS.expand(SAMPLES, 4).multinomial(2)[:, 1],
        [sum(p * q / (1 - p) for p in others) for q, others in ((1 / 8, (3 / 8, 1 / 2)), (3 / 8, (1 / 8, 1 / 2)))]
        + [0.0]
        + [sum(p * 0.5 / (1 - p) for p in (1 / 8, 3 / 8))],
    ),
    "gumbel_softmax": (
        lambda: F.gumbel_softmax(PARTS.log().expand(SAMPLES, 4), hard=True).argmax(-1),
        (PARTS / 4).tolist(),
    ),
    "dropout": (lambda: F.dropout(torch.ones(SAMPLES), 0.3) * 0.7, [0.3, 0.7]),
    "attention": (
        lambda: F.scaled_dot_product_attention(*(torch.ones(SAMPLES, 1, 1),) * 3, dropout_p=0.3).flatten() * 0.7,
        [0.3, 0.7],
    ),
    "randperm": (lambda: torch.stack([torch.randperm(3)[0] for _ in range(2000)]), [1 / 3] * 3),
}


@pytest.mark.parametrize("name", CONTINUOUS)
def test_numbers_are_distributed_as_scipy_says(make_key, name):
    draw, distribution = CONTINUOUS[name]
    numbers = drawn(lambda _: draw(), make_key(), None)
    assert scipy.stats.kstest(numbers.numpy(), distribution.cdf).pvalue > 1e-3


@pytest.mark.parametrize("name", DISCRETE)
def test_numbers_come_as_often_as_they_should(make_key, name):
    draw, shares = DISCRETE[name]
    numbers = drawn(lambda _: draw(), make_key(), None).round().long()
    counts = torch.bincount(numbers, minlength=len(shares)).tolist()
    assert sum(counts) == len(numbers) and len(counts) == len(shares)
    expected = [share * len(numbers) for share in shares if share]
    found = [count for count, share in zip(counts, shares, strict=True) if share]
    assert sum(found) == len(numbers)
    assert scipy.stats.chisquare(found, expected).pvalue > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", ["dropout", "alpha_dropout", "dropout2d", "feature_alpha_dropout"])
def test_dropouts_keep_the_moments_that_torchs_keep(make_key, rng, name, p, dtype):
    shape = (100, 50, 2, 2) if name == "dropout2d" or "feature" in name else (20_000,)
    x = torch.randn(shape, generator=rng).to(dtype)
    y = drawn(lambda x: getattr(F, name)(x, p, training=True), make_key(), x).double()
    like = torchs(lambda: getattr(F, name)(x, p, training=True)).double()
    assert abs(y.mean() - like.mean()) < 0.06 and abs(y.std() - like.std()) < 0.06
    if dtype != torch.bfloat16 and (
        "feature" in name or name == "dropout2d"
    ):  # all of a channel is dropped, or none of it
        dropped = (y != x.double()) if p == 0 else (y == y.flatten().mode().values)
        assert torch.equal(dropped.all((2, 3)), dropped.any((2, 3)))
    for training, inplace in ((False, False), (False, True)):
        assert torch.equal(drawn(lambda x: getattr(F, name)(x, p, training, inplace), make_key(), x), x)  # noqa: B023


def test_a_mask_is_part_of_the_derivative(make_key, x):
    key = make_key()
    y = drawn(lambda x: F.dropout(x, 0.4), key, x)
    slope = grad(lambda x: drawn(lambda x: F.dropout(x, 0.4), key, x).sum())(x)
    torch.testing.assert_close(slope * x, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_out_is_written(make_key, dtype):
    out = torch.zeros(7, dtype=dtype)
    y = drawn(lambda _: torch.rand(7, out=out), make_key(), None)
    assert y is out and 0 < out.min() < out.max() < 1
    y = drawn(lambda _: torch.randn(3, 2, out=torch.zeros(0)), make_key(), None)
    assert y.shape == (3, 2)


@pytest.mark.parametrize(
    "fill",
    [
        lambda number: torch.empty(5).uniform_(-number(3), number(3)),
        lambda number: torch.empty(5).normal_(number(3), number(2)),
        lambda number: torch.randint(number(0), number(9), (5,)),
    ],
    ids=["uniform_", "normal_", "randint"],
)
def test_tensors_without_dimensions_are_numbers(make_key, fill):
    key = make_key()
    assert torch.equal(drawn(lambda _: fill(torch.tensor), key, None), drawn(lambda _: fill(int), key, None))


def test_the_default_device_and_dtype_are_torchs(make_key):
    with torch.device("meta"):
        assert drawn(lambda _: torch.rand(3), make_key(), None).is_meta
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        assert drawn(lambda _: torch.rand(3), make_key(), None).dtype == torch.float64
    finally:
        torch.set_default_dtype(before)


OWN = {
    "rand": lambda g: torch.rand(5, generator=g),
    "normal": lambda g: torch.normal(0.0, torch.ones(5), generator=g),
    "uniform_": lambda g: torch.empty(5).uniform_(generator=g),
    "multinomial": lambda g: torch.ones(5).multinomial(3, generator=g),
    "init": lambda g: nn.init.kaiming_uniform_(torch.empty(3, 5), generator=g),
    "poisson": lambda g: torch.poisson(torch.ones(5), generator=g),
}


@pytest.mark.parametrize("name", OWN)
def test_a_generator_of_ones_own_is_used(make_key, rng, name):
    other = torch.Generator().set_state(rng.get_state())
    assert torch.equal(drawn(lambda _: OWN[name](rng), make_key(), None), OWN[name](other))


def test_what_has_no_key_is_refused_by_name(make_key):
    with pytest.raises(LuxtorchError, match="torch.binomial draws from torch's global generator"):
        drawn(lambda _: torch.binomial(torch.ones(2), torch.ones(2) / 2), make_key(), None)


@pytest.mark.parametrize("family", ["Gamma", "Beta", "Dirichlet"])
def test_samples_of_a_distribution_have_the_derivative_of_its_parameters(make_key, family):
    """A model with such a sample is trained through it: the mean of many is compared with that of the distribution."""

    def sample(parameter):
        if family == "Dirichlet":
            both = torch.stack([parameter, torch.full_like(parameter, 2.0)], -1)
            return torch.distributions.Dirichlet(both).rsample()[..., 0]
        return getattr(torch.distributions, family)(parameter, torch.full_like(parameter, 2.0)).rsample()

    parameter = torch.full((SAMPLES,), 1.5, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(drawn(sample, make_key(), parameter).sum(), parameter)
    # The mean is a / 2, or a / (a + 2).
    expected = 0.5 if family == "Gamma" else 2.0 / 3.5**2
    assert abs(slope.mean().item() - expected) < 4 * slope.std().item() / SAMPLES**0.5 + 1e-3


@pytest.mark.parametrize(
    "draw",
    [lambda: F.dropout(torch.ones(3), 1.5), lambda: torch.bernoulli(torch.ones(3), 2.0)],
    ids=["dropout", "coin"],
)
def test_no_probability_is_refused(make_key, draw):
    with pytest.raises(ValueError, match="probability"):
        drawn(lambda _: draw(), make_key(), None)


KNOWN = REPLACEMENTS.keys() | UNCHECKED.keys()
# Parts of kernels, of which modules know nothing; and functions that set up a generator.
INTERNAL = {"_fill_mem_eff_dropout_mask_", "_cudnn_init_dropout_state", "_cudnn_rnn", "_lstm_mps", "_fused_sdp_choice"}
INTERNAL |= {"_nested_tensor_softmax_with_shape", "_triton_scaled_dot_attention", "miopen_rnn", "lstm_mps_backward"}
INTERNAL |= {"rrelu_with_noise", "rrelu_with_noise_", "seed", "initial_seed", "manual_seed", "random"}


def test_no_random_function_of_torch_is_forgotten():
    names = set()
    for schema in torch._C._jit_get_all_schemas():
        space, name = schema.name.split("::")
        if space == "aten" and hasattr(torch.ops.aten, name):
            operator = getattr(getattr(torch.ops.aten, name), schema.overload_name or "default", None)
            tags = getattr(operator, "tags", ())
            if torch.Tag.nondeterministic_seeded in tags or "Generator" in str(schema):
                names.add(name)
    assert {"rand", "dropout", "uniform_", "normal", "lstm"} <= names
    for name in names - INTERNAL - {"Generator"}:
        for owner in (torch, Tensor, torch._C._nn):
            function = getattr(owner, name, None)
            kernel = name.startswith(("_scaled_dot", "_flash", "_efficient", "_cudnn_attention"))
            assert function is None or kernel or function in KNOWN, f"{name} draws by the global generator"


def names_of_replaced(function):
    """Name the replaced torch functions that a function calls."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    called = {name: getattr(F, name, getattr(torch, name, None)) for name in (code.co_names if code else ())}
    if code and "sparse_grad" not in repr(code.co_consts):  # else it is torch's own
        called.pop("gather", None)
    return [name for name, function in called.items() if callable(function) and function in KNOWN]


@pytest.mark.parametrize("name", [name for name, function in vars(F).items() if callable(function)])
def test_no_function_of_torch_hides_a_call_of_a_replaced_one(name):
    function = getattr(F, name)
    asks = "handle_torch_function" in getattr(getattr(function, "__code__", None), "co_names", ())
    # What asks whether a mode takes it over runs out of the mode's sight.
    assert name.startswith("_") or not asks or function in KNOWN or not names_of_replaced(function)


@pytest.mark.parametrize("name", nn.modules.__all__)
def test_every_module_of_torch_that_calls_a_replaced_function_is_pure_or_modal(name):
    module = getattr(nn, name)
    if issubclass(module, nn.Module) and not issubclass(module, (*_PURE, *_MODAL, nn.DataParallel)):
        assert not names_of_replaced(module.forward)
