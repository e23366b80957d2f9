"""ComponentVector in torch.compile(fullgraph=True): everything traces, once, and nothing leaks out of the trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch.func import grad, hessian, jacrev, jvp, vjp, vmap

from luxtorch.components import ComponentMatrix, ComponentVector


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


class Graphs:
    """A backend that runs graphs as they are, and keeps them to be looked at."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        self.graphs.append(graph)
        return graph.forward

    def compile(self, function):
        return torch.compile(function, fullgraph=True, backend=self)

    def count(self, operation: str) -> int:
        return sum(operation in str(node.target) for graph in self.graphs for node in graph.graph.nodes)

    def outputs(self) -> list[int]:
        return [len(node.args[0]) for graph in self.graphs for node in graph.graph.nodes if node.op == "output"]


@pytest.fixture
def graphs():
    return Graphs()


def assert_close(result, expected):
    leaves, spec = pytree.tree_flatten(result)
    expected_leaves, expected_spec = pytree.tree_flatten(expected)
    assert spec == expected_spec
    torch.testing.assert_close(leaves, expected_leaves)


WHOLE = {
    "forward": lambda f, cv, x: f(cv, x),
    "grad": lambda f, cv, x: grad(f)(cv, x),
    "grad with aux": lambda f, cv, x: grad(lambda ps: (f(ps, x), ps), has_aux=True)(cv),
    "step": lambda f, cv, x: cv - 0.1 * grad(f)(cv, x),
    "jvp": lambda f, cv, x: jvp(lambda ps: f(ps, x), (cv,), (cv,)),
    "vjp": lambda f, cv, x: vjp(lambda ps: f(ps, x), cv)[1](torch.ones(())),
    "hessian": lambda f, cv, x: hessian(f)(cv, x),
    "jacobian": lambda f, cv, x: jacrev(lambda ps: ps.layer_1.weight @ x)(cv),
    "models": lambda f, cv, x: vmap(grad(f), (0, None))(torch.stack([cv, 2 * cv]), x),
    "inner derivative": lambda f, cv, x: grad(lambda ps: grad(lambda x: f(ps, x))(x).sum() + f(ps, x))(cv),
    "inner jvp": lambda f, cv, x: grad(lambda ps: jvp(lambda x: f(ps, x), (x,), (x,))[1] + f(ps, x))(cv),
    "through an update": lambda f, cv, x: grad(lambda ps: f(ps - 0.1 * grad(f)(ps, x), x))(cv),
}
PARTS = {
    "made inside": lambda cv: ComponentVector({"a": cv.flat, "b": {"c": cv.scale, "d": [cv.layer_1.bias]}}),
    "from flat": lambda cv: ComponentVector.from_flat(2 * cv.flat, cv.axes).layer_1.weight,
    "arithmetic": lambda cv: (2 * cv - cv / 3 + torch.ones(13) * abs(cv)) ** 2,
    "comparison": lambda cv: torch.where(cv > 0, cv, torch.zeros_like(cv)),
    "function": lambda cv: torch.special.erf(torch.sqrt(torch.abs(cv))),
    "reduction": lambda cv: torch.linalg.vector_norm(cv) + torch.sum(cv) + torch.dot(cv, cv),
    "stack": lambda cv: torch.stack([cv, 2 * cv])["layer_1.weight"],
    "select": lambda cv: cv[["scale", "layer_1"]],
    "replace": lambda cv: cv.replace({"layer_1.bias": torch.ones(2)}, new=cv.scale),
    "to dict": lambda cv: cv.to_dict(),
    "mapping": lambda cv: [dict(cv.layer_1), {**cv["layer_2"]}, list(cv.values()), [cv[name] for name in cv]],
    "questions": lambda cv: cv.flat * (1 + ("scale" in cv) + len(cv) + hasattr(cv, "nothing")),
    "indices": lambda cv: cv[1:3] + cv[0],
    "group": lambda cv: cv["layer_1"],
    "flat group": lambda cv: cv["layer_1"].flat,
    "tree map": lambda cv: pytree.tree_map(lambda flat: 2 * flat, cv),
    "outer": lambda cv: torch.outer(cv, cv) + torch.eye(13),
    "block": lambda cv: torch.outer(cv, cv)["layer_1", "scale"],
    "product": lambda cv: torch.matmul(torch.outer(cv, cv).T, cv),
}


@pytest.mark.slow
@pytest.mark.parametrize("function", WHOLE.values(), ids=WHOLE)
def test_functions_of_a_model(cv, x, loss, function):
    compiled = torch.compile(lambda cv, x: function(loss, cv, x), fullgraph=True, backend="aot_eager")
    assert_close(compiled(cv, x), function(loss, cv, x))


@pytest.mark.parametrize("function", PARTS.values(), ids=PARTS)
def test_parts_of_the_interface(cv, graphs, function):
    assert_close(graphs.compile(function)(cv), function(cv))


@pytest.mark.parametrize(
    "prepare",
    [
        lambda cv: cv + 0,
        lambda cv: read(cv + 0),
        lambda cv: ComponentVector({"ps": cv})["ps"],
        lambda cv: read(ComponentVector({"ps": cv})["ps"]),
        lambda cv: torch.stack([cv, 2 * cv]),
        lambda cv: ComponentVector({"ps": torch.stack([cv, cv])}, batch_dims=1)["ps"],
    ],
)
def test_arguments_and_closures_of_every_kind(cv, x, graphs, prepare):
    ps = prepare(cv)
    expected = prepare(cv).layer_1.weight.sum()
    assert_close(graphs.compile(lambda ps: ps.layer_1.weight.sum())(ps), expected)
    assert_close(graphs.compile(lambda x: ps["layer_1"].weight.sum() + 0 * x.sum())(x), expected)


def read(cv):
    cv.layer_1.weight  # noqa: B018
    return cv


@pytest.mark.skipif(torch.__version__ < "2.14", reason="torch 2.13 traces torch.matmul alone, not @ of our own objects")
def test_the_operator_of_products(cv, graphs):
    function = lambda cv: torch.outer(cv, cv) @ cv + cv @ cv  # noqa: E731
    assert_close(graphs.compile(function)(cv), function(cv))


class TestOneSplit:
    """All views come from one split where a backward follows, also inside a graph."""

    @pytest.mark.parametrize("name", ["grad", "step", "hessian", "models", "inner derivative"])
    def test_in_transforms(self, cv, x, loss, graphs, name):
        graphs.compile(lambda cv, x: WHOLE[name](loss, cv, x))(cv, x)
        assert graphs.count("split_with_sizes") == 1

    def test_through_an_update(self, cv, x, loss, graphs):
        graphs.compile(lambda cv, x: WHOLE["through an update"](loss, cv, x))(cv, x)
        assert graphs.count("split_with_sizes") == 2  # of the parameters, and of the updated ones

    def test_of_a_flat_tensor_named_inside(self, cv, x, loss, graphs):
        flat = cv.flat.clone().requires_grad_()
        graphs.compile(lambda flat: loss(ComponentVector.from_flat(flat, cv.axes), x))(flat).backward()
        assert graphs.count("split_with_sizes") == 1
        torch.testing.assert_close(flat.grad, grad(loss)(cv, x).flat)

    def test_reading_alone_takes_only_what_is_read(self, cv, graphs):
        graphs.compile(lambda cv: cv.layer_1.weight + cv["scale"])(cv)
        assert graphs.count("split_with_sizes") == 0
        assert graphs.count("narrow") == 3  # that of the group, which nothing uses, does not reach a compiler


class TestNoRecompilation:
    def test_of_a_training_loop(self, cv, x, loss, graphs):
        step = graphs.compile(lambda cv, x: cv - 0.1 * grad(loss)(cv, x))
        ps = expected = cv
        for _ in range(4):
            ps = step(ps, x)
            expected = expected - 0.1 * grad(loss)(expected, x)
        assert len(graphs.graphs) == 1 and graphs.outputs() == [1]
        assert_close(ps, expected)

    def test_of_reading_what_was_read_before(self, cv, x, loss, graphs):
        """A graph neither keeps views on vectors from outside, nor looks whether they have any."""
        evaluate = graphs.compile(loss)
        step = torch.compile(lambda cv, x: cv - 0.1 * grad(loss)(cv, x), fullgraph=True, backend="eager")
        named = torch.compile(
            lambda flat: ComponentVector.from_flat(2 * flat, cv.axes), fullgraph=True, backend="eager"
        )
        for ps in (
            cv,
            read(cv),
            2 * cv,
            step(cv, x),
            read(step(cv, x)),
            named(cv.flat),
            pytree.tree_map(torch.sin, cv),
        ):
            for _ in range(2):
                assert_close(evaluate(ps, x), loss(ps.to_dict(), x))
        assert len(graphs.graphs) == 1 and graphs.outputs() == [1]

    def test_other_axes_compile_again(self, cv, graphs):
        double = graphs.compile(lambda cv: 2 * cv.scale)
        other = cv[["scale", "layer_1"]]
        for ps in (cv, other, cv, other):
            assert_close(double(ps), 2 * ps.scale)
        assert len(graphs.graphs) == 2

    def test_of_equal_axes_made_anew(self, tree, graphs):
        double = graphs.compile(lambda cv: 2 * cv)
        for _ in range(3):
            double(ComponentVector(tree))
        assert len(graphs.graphs) == 1


def test_what_leaves_a_graph_works_outside(cv, x, loss, graphs):
    made = graphs.compile(lambda cv: {"double": read(2 * cv), "group": cv.layer_1, "grads": grad(loss)(cv, x)})(cv)
    assert made["double"].axes is cv.axes and made["group"].axes is cv.layer_1.axes
    torch.testing.assert_close(made["double"].layer_1.weight, 2 * cv.layer_1.weight)
    torch.testing.assert_close(made["group"].weight, cv.layer_1.weight)
    torch.testing.assert_close(made["group"].flat, cv.layer_1.flat)
    torch.testing.assert_close(grad(loss)(made["double"], x).flat, grad(loss)(2 * cv, x).flat)
    torch.testing.assert_close(grad(loss)(made["grads"], x).flat, grad(loss)(grad(loss)(cv, x), x).flat)


def test_sizes_that_change(graphs):
    """A batch may change its size without a new name for every size; a vector made inside may change its axes."""

    def made(a):
        return ComponentVector({"a": a, "b": a[0]}).a.sum()

    def summed(cv):
        return cv["a"].sum(-1)

    for n in (3, 4, 5):
        a = torch.ones(n, 2)
        assert_close(graphs.compile(made)(a), made(a))
        batch = ComponentVector({"a": torch.ones(n, 2, 2)}, batch_dims=1)
        assert_close(graphs.compile(summed)(batch), summed(batch))


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        (lambda cv: cv["layer_9"] + 1, "There is no component 'layer_9'"),
        (lambda cv: cv["layer_1.wight"] + 1, "Did you mean 'layer_1.weight'"),
        (lambda cv: cv + cv[["layer_1"]], r"'layer_2.inner.weight', \(3,\) against missing"),
        (lambda cv: torch.dot(cv, cv[["layer_1"]]), "must have the same names"),
    ],
)
def test_errors_come_through_a_trace(cv, graphs, function, problem):
    with pytest.raises(Exception, match=problem):
        graphs.compile(function)(cv)


def test_matrices_as_arguments(cv, graphs):
    H = torch.outer(cv, cv)
    function = lambda H, cv: (torch.matmul(H, cv), H["layer_1", "scale"], 2 * H)  # noqa: E731
    assert_close(graphs.compile(function)(H, cv), function(H, cv))
    named = graphs.compile(lambda data: ComponentMatrix(data, cv.axes, None))(torch.ones(13, 2))
    assert named.row_axes is cv.axes and named.col_axes is None
