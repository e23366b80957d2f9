"""What torch cannot do, and luxtorch refuses: each row in `docs/transforms.md` holds, and what it says instead works.

A row whose test fails has been mended by torch, or broken by luxtorch: change the page.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call, grad, hessian, jvp, vmap
from torch.utils.checkpoint import checkpoint

import luxtorch as lt
from luxtorch.jit import jit

PAGE = (Path(__file__).parents[2] / "docs" / "transforms.md").read_text()
ROWS = {}


def row(text):
    """Return a decorator for the test of the row that begins with a text; it gets a function that draws."""
    return lambda test: ROWS.setdefault(text, test)


def refused(f, *args):
    """Check that torch raises, and not a test of ours."""
    with pytest.raises((RuntimeError, NotImplementedError)) as caught:
        f(*args)
    assert not isinstance(caught.value, lt.LuxtorchError)


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def differ(a, b):
    assert not torch.allclose(a, b, rtol=1e-3, atol=1e-6)


def slope(f, x, v, h=1e-6):
    """Return the derivative of a function along a direction, by differences."""
    return (f(x + h * v) - f(x - h * v)) / (2 * h)


def along(f, x, v):
    return jvp(f, (x,), (v,))[1]


def differentiable(f, x, v):
    """Check forward mode, and the second derivative both ways, of a function to a number."""
    close(along(f, x, v), slope(f, x, v))
    close(along(grad(f), x, v), slope(grad(f), x, v), 1e-4)
    close(grad(lambda x: (grad(f)(x) * v).sum())(x), slope(grad(f), x, v), 1e-4)


@row("`F.ctc_loss` in forward mode, and its second derivative")
def ctc(draw):
    labels, sizes = torch.tensor([[1, 2]]), (torch.tensor([6]), torch.tensor([2]))
    x, v = draw(6, 1, 4), draw(6, 1, 4)

    def of_torch(x):
        return F.ctc_loss(x.log_softmax(-1), labels, *sizes)

    refused(along, of_torch, x, v)
    refused(grad(lambda x: grad(of_torch)(x).square().sum()), x)
    differentiable(lambda x: lt.CTCLoss()(x.log_softmax(-1), (labels, *sizes)), x, v)


@row("`F.scaled_dot_product_attention` in forward mode, and its second derivative")
def attention(draw):
    x, v = draw(1, 2, 4, 8), draw(1, 2, 4, 8)

    def loss(attend):
        return lambda x: attend(x, x, x).sin().sum()

    of_torch = loss(F.scaled_dot_product_attention)
    refused(along, of_torch, x, v)
    refused(grad(lambda x: grad(of_torch)(x).square().sum()), x)
    differentiable(loss(lt.scaled_dot_product_attention), x, v)


@row("`F.embedding_bag` in forward mode, and its second derivative")
def embedding_bag(draw):
    chosen, w, v = torch.tensor([[0, 1]]), draw(3, 2), draw(3, 2)

    def of_torch(w):
        return F.embedding_bag(chosen, w).sin().sum()

    refused(along, of_torch, w, v)
    refused(grad(lambda w: grad(of_torch)(w).square().sum()), w)
    bag = lt.Embedding(3, 2)
    differentiable(lambda w: bag(chosen, {"weight": w}, {})[0].mean(1).sin().sum(), w, v)


@row("`F.grid_sample`, `torch.cdist`, `F.multi_margin_loss`, and sparse products, in forward mode")
def without_forward_mode(draw):
    picture, places = draw(1, 1, 4, 4), draw(1, 3, 3, 2)
    for f, x in (
        (lambda x: F.grid_sample(x, places, align_corners=False).sum(), picture),
        (lambda x: torch.cdist(x, x + 1).sum(), draw(3, 2)),
        (lambda x: F.multi_margin_loss(x, torch.tensor([1])), draw(1, 3)),
        (lambda x: torch.sparse.mm(torch.eye(3, dtype=x.dtype).to_sparse(), x).sum(), draw(3, 3)),
    ):
        v = draw(*x.shape)
        refused(along, f, x, v)
        close((grad(f)(x) * v).sum(), slope(f, x, v))


@row("an LSTM or GRU of `torch.nn` under `vmap`, and in forward mode of float32")
def recurrent(draw):
    module = torch.nn.LSTM(3, 4, batch_first=True)
    x, ps = draw(2, 5, 3).float(), {name: leaf.detach() for name, leaf in module.named_parameters()}

    def of_torch(x):
        return functional_call(module, ps, (x,))[0]

    refused(vmap(of_torch), x[None])
    refused(along, of_torch, x, x)
    layer, ps_layer, st = lt.from_torch(module)

    def of_layer(x):
        return layer(x, ps_layer, st)[0][0]

    close(vmap(of_layer)(x[None])[0], of_torch(x))
    close(along(of_layer, x, x), slope(of_torch, x, x, h=1e-2), 1e-3)


@row("`.item()`, and an `if` on a tensor, under `vmap`")
def values(draw):
    x = draw(2, 3) - 0.5
    refused(vmap(lambda x: x * x.sum().item()), x)
    refused(vmap(lambda x: x if x.sum() > 0 else -x), x)
    expected = torch.stack([each if each.sum() > 0 else -each for each in x])
    close(vmap(lambda x: torch.where(x.sum() > 0, x, -x))(x), expected)
    close(vmap(lambda x: lt.cond(x.sum() > 0, lambda x: x, torch.neg, x))(x), expected)


@row("`nonzero`, `unique`, `x[mask]`, and `F.one_hot` without a number of classes, under `vmap`")
def shapes(draw):
    x, y = draw(2, 3), torch.tensor([[0, 1], [2, 1]])
    for f in (torch.nonzero, torch.unique, lambda x: x[x > 0.5].sum()):
        refused(vmap(f), x)
    refused(vmap(F.one_hot), y)
    expected = torch.stack([each[each > 0.5].sum() for each in x])
    close(vmap(lambda x: torch.where(x > 0.5, x, 0.0).sum())(x), expected)
    assert torch.equal(vmap(lambda y: F.one_hot(y, 3))(y), F.one_hot(y, 3))


@row("writing into a tensor that the function makes by `torch.zeros`, under `vmap`; `out=`")
def writes(draw):
    x = draw(2, 3)

    def write(made, x):
        made[0] = x[0]
        return made

    refused(vmap(lambda x: write(torch.zeros(3, dtype=x.dtype), x)), x)
    refused(vmap(lambda x: torch.mul(x, 2, out=torch.empty(3, dtype=x.dtype))), x)
    refused(grad(lambda x: torch.mul(x, 2, out=torch.empty(3, dtype=x.dtype)).sum()), x[0])
    close(vmap(lambda x: write(x.new_zeros(3), x))(x)[:, 0], x[:, 0])


@row("random numbers without a key, under `vmap`")
def random(draw):
    x = draw(2, 3)
    refused(vmap(lambda x: x + torch.rand(3)), x)
    refused(vmap(F.dropout), x)
    keys = lt.random.split(lt.random.key(0), 2)
    drawn = vmap(lambda key: lt.random.uniform(key, (3,)))(keys)
    close(drawn[1], lt.random.uniform(keys[1], (3,)))


@row("`torch.utils.checkpoint`, and hooks on saved tensors, under `torch.func.grad`")
def checkpoints(draw):
    x = draw(4, 3)
    refused(grad(lambda x: checkpoint(torch.sin, x, use_reentrant=False).sum()), x)
    layer = lt.Checkpointed(lt.Dense(3, 2))
    ps, st = lt.setup(0, layer)
    close(grad(lambda x: layer(x, ps, st)[0].sum())(x.float()), ps["weight"].sum(0).expand(4, 3))


class Sine(torch.autograd.Function):
    """One that says what torch.func needs to know, up to the first derivative in forward mode."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].cos()

    @staticmethod
    def jvp(ctx, t):
        return t * ctx.saved_tensors[0].cos()


class OldSine(Sine):
    """One as they were written before torch.func."""

    generate_vmap_rule = False
    jvp = torch.autograd.Function.jvp
    setup_context = torch.autograd.function._SingleLevelFunction.setup_context

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()


@row("an `autograd.Function` without `setup_context`, a rule for `vmap`, or a `jvp`")
def functions(draw):
    x, v = draw(3), draw(3)
    refused(grad(lambda x: OldSine.apply(x).sum()), x)
    refused(vmap(OldSine.apply), x)
    close(grad(lambda x: Sine.apply(x).sum())(x), x.cos())
    close(vmap(Sine.apply)(x), x.sin())
    close(along(Sine.apply, x, v), v * x.cos())


@row("`requires_grad_` and `torch.autograd.grad` of a function's own leaves, under a transform")
def tapes(draw):
    x = draw(3)

    def inner(x):
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(leaf.sin().sum(), leaf)[0].sum()

    refused(grad(inner), x)
    close(grad(lambda x: lt.gradient(lambda x: x.sin().sum(), x).sum())(x), -x.sin())


@row("nested tensors under any transform")
def nested(draw):
    rows = torch.nested.nested_tensor([draw(3, 4), draw(2, 4)], layout=torch.jagged)

    def loss(w):
        return (rows @ w).values().sum()

    for transformed in (grad(loss), lambda w: along(loss, w, w), lambda w: vmap(loss)(w[None])):
        with pytest.raises((RuntimeError, AttributeError, ValueError)):
            transformed(draw(4, 2))


@row("a function of `torch.compile(fullgraph=True)` under a transform")
def compiled(draw):
    def sine(x):
        return x.sin().sum()

    x = draw(3)
    run = torch.compile(sine, fullgraph=True, backend="aot_eager")
    refused(grad(run), x)
    close(torch.compile(grad(sine), fullgraph=True, backend="eager")(x), x.cos())
    close(grad(jit(sine, backend="replay"))(x), x.cos())


@row("`torch.special.gammainc` by its first argument, and `zeta` by its first")
def special(draw):
    one, two = draw(1).sum() + 1, draw(1).sum() + 2
    refused(grad(torch.special.gammainc), two, one)
    refused(grad(torch.special.zeta), two, one)


@row("Bessel functions of `torch.special`")
def bessel(draw):
    x = draw(1).sum() + 1
    f = torch.special.bessel_j0
    differ(grad(f)(x), slope(f, x, torch.ones_like(x)))


@row("eigenvectors and singular vectors where values are repeated")
def repeated(draw):
    one = torch.eye(3, dtype=torch.float64)
    for f in (lambda a: torch.linalg.eigh(a)[1], lambda a: torch.linalg.svd(a)[0]):
        assert grad(lambda a, f=f: f(a).abs().sum())(one).isnan().any()
    for f in (torch.linalg.eigvalsh, torch.linalg.svdvals):
        assert hessian(lambda a, f=f: f(a).square().sum())(one).isnan().any()
    close(grad(lambda a: torch.linalg.matrix_exp(a).trace())(one), torch.linalg.matrix_exp(one))


@row("`torch.where(x > 0, x.sqrt(), 0)` at zero")
def untaken(draw):
    x = torch.zeros(2)
    assert grad(lambda x: torch.where(x > 0, x.sqrt(), 0.0).sum())(x).isnan().all()
    safe = grad(lambda x: torch.where(x > 0, torch.where(x > 0, x, 1.0).sqrt(), 0.0).sum())
    assert torch.equal(safe(x), torch.zeros(2))


@row('`scatter_reduce` by "prod", and a `torch.library.custom_op`, in forward mode')
def silent_forward(draw):
    x, v, places = draw(3) + 1, draw(3), torch.tensor([0, 0, 1])

    def product(x):
        return x.new_ones(2).scatter_reduce(0, places, x, "prod").sum()

    differ(along(product, x, v), slope(product, x, v))
    close((grad(product)(x) * v).sum(), slope(product, x, v))

    cube = torch.library.custom_op(
        "luxtorch_limits::cube", lambda x: x**3, mutates_args=(), schema="(Tensor x) -> Tensor"
    )
    cube.register_fake(torch.empty_like)
    differ(along(cube, x, v), slope(cube, x, v))


@row("forward mode of forward mode through an `autograd.Function` with a `jvp`")
def nested_jvp(draw):
    x, v = draw(3), draw(3)
    differ(along(lambda x: along(Sine.apply, x, v), x, v), -v * v * x.sin())
    close(along(lambda x: grad(lambda x: Sine.apply(x).sum())(x), x, v), -v * x.sin())


@row("`F.layer_norm` and the like at second order, and `torch.linalg.solve` and the like, in forward mode")
def formulas(draw):
    x, v, a, u, b = draw(5), draw(5), draw(3, 3) + torch.eye(3), draw(3, 3), draw(3)

    def normalized(x):
        return F.layer_norm(x, (5,)).pow(3).sum()

    twice = slope(lambda x: slope(normalized, x, v, h=1e-4), x, v, h=1e-4)
    differ(along(lambda x: along(normalized, x, v), x, v), twice)
    layer = lt.LayerNorm(5)
    ps, st = lt.f64(lt.setup(0, layer))
    of_layer = along(lambda x: along(lambda x: layer(x, ps, st)[0].pow(3).sum(), x, v), x, v)
    close(of_layer, twice, 1e-3)

    def solved(a):
        return torch.linalg.solve(a, b).sum()

    expected = slope(grad(solved), a, u)
    differ(grad(lambda a: along(solved, a, u))(a), expected)
    close(lt.gradient(lambda a: lt.jacobian_vector_product(solved, a, u), a), expected)


@row("second and higher derivatives of `x ** p` by a tensor `p`, where `p` is 0, or 1 or 2 for higher ones")
def powers(draw):
    x, p = draw(1).sum() + 1, torch.zeros((), dtype=torch.float64)

    def mixed(power):
        return grad(lambda p: grad(lambda x: power(x, p))(x))(p)

    differ(mixed(torch.pow), 1 / x)
    close(mixed(lambda x, p: (p * x.log()).exp()), 1 / x)


def replayed(f):
    return jit(f, backend="replay")


REFUSED = {
    "second derivatives, by `backward`, of a call of `lt.jit`": lambda x: torch.autograd.grad(
        torch.autograd.grad(replayed(lambda x: x.sin().sum())(x.requires_grad_()), x, create_graph=True)[0].sum(), x
    ),
    "a loop until a condition holds, in reverse mode": lambda x: replayed(
        grad(lambda x: lt.while_loop(lambda x: x.sum() < 9, lambda x: 2 * x, x).sum())
    )(x),
    "`if` on a tensor in `lt.jit`": lambda x: replayed(lambda x: x if x.sum() > 0 else -x)(x),
    "draws from torch's global generator in `lt.jit`, and in a layer under `vmap`": lambda x: replayed(
        lambda x: x + torch.rand(3)
    )(x),
    "integer inputs, such as those of `lt.Embedding`, as what is differentiated": lambda x: lt.gradient(
        lambda i: i.sum(), torch.arange(3)
    ),
    "nested, sparse and quantized tensors as arguments of `lt.jit`": lambda x: replayed(lambda x: x.sum())(
        x.to_sparse()
    ),
    "writing into a parameter or state, in `lt.jit`": lambda x: replayed(lambda x: x.mul_(2))(x),
}


@pytest.mark.parametrize("heading, rows", [("What torch itself cannot do", ROWS), ("What luxtorch refuses", REFUSED)])
def test_the_rows_are_those_of_the_page(heading, rows):
    table = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    assert re.findall(r"^\| (?!what |---)(.*?) \|", table, re.M) == list(rows)


@pytest.mark.parametrize("text", REFUSED)
def test_it_is_refused(text, make_key):
    with pytest.raises((lt.LuxtorchError, RuntimeError)):
        REFUSED[text](lt.random.uniform(make_key(), (3,)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("text", ROWS)
def test_the_row_holds(make_key, text):
    key = make_key()

    def draw(*shape, drawn=[0]):  # noqa: B006  # a count of its own
        drawn[0] += 1
        return lt.random.uniform(lt.random.fold_in(key, drawn[0]), shape, dtype=torch.float64)

    ROWS[text](draw)
