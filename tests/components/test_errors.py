"""Every refusal names the leaf and the way out."""

from __future__ import annotations

import pytest
import torch

from luxtorch.components import ComponentVector, axes
from luxtorch.core import DTypeError, InputError, KeyNameError, Static


def floats(*shape):
    return torch.zeros(shape)


def jagged():
    return torch.nested.nested_tensor([floats(2), floats(3)], layout=torch.jagged)


class DTensor(torch.Tensor):
    """Have the name of torch's sharded tensor."""


@pytest.mark.parametrize(
    ("tree", "error", "problem", "rest"),
    [
        ({"a": {"b": 1.0}}, DTypeError, "The leaf 'a.b' must be a tensor.", ["1.0", "keep it in the states"]),
        ({"a": None}, DTypeError, "The leaf 'a' must be a tensor.", ["None"]),
        ({"a": {"training": Static(True)}}, DTypeError, "The leaf 'a.training' must be a tensor.", ["Static(True)"]),
        ({"a": [floats(1), "x"]}, DTypeError, "The leaf 'a.1' must be a tensor.", ["'x'"]),
        (
            {"a": {"n": torch.tensor([1])}},
            DTypeError,
            "The leaf 'a.n' must be a floating point",
            ["torch.int64", "dtype="],
        ),
        (
            {"a": torch.tensor([True])},
            DTypeError,
            "The leaf 'a' must be a floating point",
            ["torch.bool"],
        ),
        (
            {"a": {"b": floats(1)}, "c": floats(1).double(), "d": floats(1).double()},
            DTypeError,
            "must share one dtype",
            ["'a.b' has torch.float32, 'c' has torch.float64", "Cast the tree first, or pass dtype="],
        ),
        (
            {"a": floats(1), "b": {"c": floats(1).to("meta")}},
            DTypeError,
            "share one device",
            ["'a' has cpu, 'b.c' has meta", "Move the whole tree"],
        ),
        (
            {"a": {"b.c": floats(1)}},
            InputError,
            "The name of a component must be a string",
            ["a: ", "without dots", "'b.c'", "Rename"],
        ),
        ({"a": {"": floats(1)}}, InputError, "The name of a component must be", ["not empty"]),
        ({1: floats(1)}, InputError, "The name of a component must be a string", ["Use the string '1'"]),
        (
            {"a": {"b": torch.eye(2).to_sparse()}},
            DTypeError,
            "The leaf 'a.b' must be a dense",
            ["torch.sparse_coo", "to_d"],
        ),
        ({"a": {"b": jagged()}}, DTypeError, "The leaf 'a.b' must be a dense tensor.", ["a nested tensor"]),
        (
            {"a": {"b": DTensor()}},
            DTypeError,
            "The leaf 'a.b' must not be sharded",
            ["a DTensor", "shard_parameters(lt.Comp"],
        ),
        ({"a": {"b": torch.nn.Parameter(DTensor())}}, DTypeError, "The leaf 'a.b' must not be sharded", ["a DTensor"]),
        (floats(2), DTypeError, "The tree must be a dict", ["tensor of shape", "{'weight': tensor}"]),
        (3, DTypeError, "The tree must be a dict", ["int"]),
    ],
)
def test_trees_that_are_refused(tree, error, problem, rest):
    with pytest.raises(error) as caught:
        ComponentVector(tree)
    assert problem in str(caught.value)
    for text in rest:
        assert text in str(caught.value)


def test_replacing_a_component_by_a_shard(cv):
    with pytest.raises(DTypeError, match="The leaf 'scale' must not be sharded"):
        cv.replace(scale=DTensor())


@pytest.mark.slow
def test_shards_of_torch(tmp_path):
    from torch import distributed
    from torch.distributed.tensor import Shard, distribute_tensor

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
        sharded = distribute_tensor(torch.arange(4.0), mesh, [Shard(0)])
        for leaf in (sharded, torch.nn.Parameter(sharded)):
            with pytest.raises(DTypeError, match="The leaf 'a' must not be sharded"):
                ComponentVector({"a": leaf, "b": torch.ones(2)})
        assert axes({"a": sharded}).size == 4
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("kind", [torch.nn.Parameter, torch.nn.Buffer])
def test_parameters_and_buffers_are_tensors(kind):
    cv = ComponentVector({"a": {"b": kind(torch.ones(2))}, "c": torch.ones(1)})
    assert type(cv.flat) is torch.Tensor and type(cv["a.b"]) is torch.Tensor
    torch.testing.assert_close(torch.func.grad(lambda cv: (cv["a.b"] ** 2).sum())(cv).flat, torch.tensor([2.0, 2, 0]))


@pytest.mark.parametrize("flat", [floats(3), floats(), floats(13, 3)])
def test_from_flat_checks_the_size(cv, flat):
    with pytest.raises(InputError, match="flat tensor has the wrong shape") as caught:
        ComponentVector.from_flat(flat, cv.axes)
    assert "(..., 13)" in str(caught.value) and str(tuple(flat.shape)) in str(caught.value)


def test_from_flat_wants_a_tensor(cv):
    with pytest.raises(DTypeError, match="must be a tensor") as caught:
        ComponentVector.from_flat([1.0] * 13, cv.axes)
    assert "list" in str(caught.value)


@pytest.mark.parametrize("read", [lambda cv: cv["layer_9"], lambda cv: cv.layer_9, lambda cv: cv["layer_1"]["wieght"]])
def test_unknown_names(cv, read):
    with pytest.raises(KeyNameError, match="There is no component") as caught:
        read(cv)
    assert isinstance(caught.value, AttributeError) and isinstance(caught.value, KeyError)
    assert "Did you mean '" in str(caught.value)


def test_names_below_a_leaf_or_a_group(cv):
    for name in ("layer_1.weight.x", "layer_1.", ".layer_1", "layer_2.weight", ""):
        with pytest.raises(KeyNameError):
            cv[name]


def test_hasattr(cv):
    assert hasattr(cv, "layer_1") and not hasattr(cv, "layer_9") and not hasattr(cv, "__fspath__")
    assert getattr(cv, "layer_9", 7) == 7


def test_selections_that_are_refused(cv):
    with pytest.raises(InputError, match="selected only once"):
        cv[["scale", "scale"]]
    with pytest.raises(InputError, match="must be at the top level(.|\n)*'layer_1.bias'"):
        cv[["layer_1.bias"]]
    with pytest.raises(KeyNameError, match="Did you mean 'scale'"):
        cv[["scala"]]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda cv: setattr(cv, "scale", 1), r"'scale' cannot be set.(.|\n)*cv.replace\(scale=...\)"),
        (lambda cv: setattr(cv.layer_1, "weight", 1), r"cv.replace\(weight=...\)"),
        (lambda cv: setattr(cv, "flat", 1), "'flat' cannot be set"),
        (lambda cv: delattr(cv, "axes"), "'axes' cannot be deleted"),
        (lambda cv: cv.__setitem__("scale", 1), r"cv.replace\({'scale': ...}\)"),
    ],
)
def test_nothing_can_be_set(cv, change, problem):
    before = cv.flat.clone()
    with pytest.raises(InputError, match=problem):
        change(cv)
    assert torch.equal(cv.flat, before) and cv.axes.size == 13


def test_a_comparison_has_no_single_truth(cv):
    with pytest.raises(InputError, match="a truth value for each element"):
        bool(cv == cv)


def test_axes_of_what_has_no_names():
    with pytest.raises(DTypeError, match="The tree must be a dict"):
        axes(floats(2))
