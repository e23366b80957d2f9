"""Making, reading and converting a ComponentVector."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Mapping

import pytest
import torch

from luxtorch.components import ComponentVector
from luxtorch.core import KeyNameError


def shares(a, b):
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


READS = {
    "attributes": lambda cv: (cv.layer_1.weight, cv.layer_2.inner.weight, cv.scale),
    "brackets": lambda cv: (cv["layer_1"]["weight"], cv["layer_2"]["inner"]["weight"], cv["scale"]),
    "dots": lambda cv: (cv["layer_1.weight"], cv["layer_2.inner.weight"], cv["scale"]),
    "mixed": lambda cv: (cv.layer_1["weight"], cv["layer_2.inner"].weight, cv.get("scale")),
    "mapping": lambda cv: (dict(cv.layer_1)["weight"], {**cv["layer_2.inner"]}["weight"], dict(cv.items())["scale"]),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_components_are_views(cv, tree, read):
    expected = tree["layer_1"]["weight"], tree["layer_2"]["inner"]["weight"], tree["scale"]
    for component, leaf in zip(read(cv), expected, strict=True):
        assert component.shape == leaf.shape
        assert torch.equal(component, leaf)
        assert shares(component, cv.flat)


def test_making_one_copies_and_naming_one_does_not(cv, tree):
    assert not shares(cv.flat, tree["layer_1"]["weight"])
    single = {"a": torch.ones(2)}
    assert not shares(ComponentVector(single).flat, single["a"])
    assert ComponentVector.from_flat(cv.flat, cv.axes).flat is cv.flat
    assert shares(cv["layer_1"].flat, cv.flat)


def test_a_group_is_a_vector(cv, tree):
    group = cv["layer_1"]
    assert isinstance(group, ComponentVector)
    assert torch.equal(group.flat, cv.flat[:9])
    assert group.axes is ComponentVector(tree["layer_1"]).axes
    assert torch.equal((2 * group).bias, 2 * tree["layer_1"]["bias"])
    assert torch.equal(cv["layer_2"]["inner"].flat, cv.flat[9:12])
    assert torch.equal(ComponentVector.from_flat(group.flat, group.axes).weight, tree["layer_1"]["weight"])


def test_reading_twice_gives_the_same_objects(cv):
    assert cv["layer_1"] is cv["layer_1"] is cv.layer_1
    assert cv["layer_2.inner"] is cv["layer_2"]["inner"]
    assert cv.layer_1.weight is cv["layer_1.weight"]


def test_an_empty_group_is_an_empty_mapping(cv):
    relu = cv["relu"]
    assert len(relu) == 0 and not relu and dict(relu) == {} and relu.to_dict() == {}
    assert relu.flat.shape == (0,)
    assert (2 * relu).axes is relu.axes


@pytest.mark.parametrize("tree", [{}, {"a": {}}, {"a": torch.zeros(0, 3)}])
def test_a_vector_without_elements(tree):
    cv = ComponentVector(tree)
    assert cv.flat.shape == (0,) and cv.numel() == 0
    assert cv.axes.names == tuple(tree)
    assert (cv + 1).axes is cv.axes
    assert ComponentVector(tree, dtype=torch.float64).dtype == torch.float64


def test_the_mapping_protocol(cv, tree):
    assert isinstance(cv, Mapping)
    assert len(cv) == 4
    assert list(cv) == list(cv.keys()) == list(tree)
    assert cv.keys() == tree.keys()
    assert cv.keys() == frozenset(tree)
    assert [name for name, _ in cv.items()] == list(tree)
    assert all(a is b for a, b in zip(cv.values(), (cv[name] for name in cv), strict=True))
    assert "layer_1" in cv and "layer_1.weight" in cv and "weight" not in cv and 3 not in cv
    assert cv.get("nothing") is None and cv.get("nothing", 5) == 5
    assert dict(cv).keys() == {**cv}.keys() == tree.keys()
    assert bool(cv) and not ComponentVector({})


@pytest.mark.parametrize("index", [3, -1, slice(1, 5), slice(None), torch.tensor([2, 0]), [2, 0], None, ..., ()])
def test_other_indices_are_those_of_the_flat_tensor(cv, index):
    result = cv[index]
    assert type(result) is torch.Tensor
    assert torch.equal(result, cv.flat[index])


@pytest.mark.parametrize("names", [["scale", "layer_1"], ("layer_2", "relu"), ["relu"], ["layer_1"]])
def test_selecting_components(cv, names):
    chosen = cv[names]
    assert list(chosen) == list(names)
    for name in names:
        a, b = chosen[name], cv[name]
        assert torch.equal(getattr(a, "flat", a), getattr(b, "flat", b))
        assert getattr(a, "axes", None) is getattr(b, "axes", None)
    assert not shares(chosen.flat, cv.flat)


def test_selecting_from_a_batch(cv):
    batch = torch.stack([cv, 2 * cv])
    chosen = batch[["scale", "layer_1"]]
    assert chosen.shape == (2, 10)
    assert torch.equal(chosen.layer_1.weight, batch.layer_1.weight)


def test_names_of_attributes_are_read_by_brackets():
    names = ["flat", "axes", "keys", "to", "shape", "_data", "__len__"]
    cv = ComponentVector({name: torch.full((2,), float(i)) for i, name in enumerate(names)})
    for i, name in enumerate(names):
        assert torch.equal(cv[name], torch.full((2,), float(i)))
    assert cv.flat.shape == (14,) and cv.shape == (14,) and len(cv) == 7
    assert (cv + 1)["flat"].tolist() == [1, 1]


class TestBatch:
    def test_components_have_the_batch_in_front(self, cv):
        batch = torch.stack([cv, 2 * cv, 3 * cv])
        assert batch.shape == (3, 13) and batch.numel() == 39
        assert batch.axes is cv.axes
        assert batch.layer_1.weight.shape == (3, 3, 2) and batch.scale.shape == (3,) and batch.relu.shape == (3, 0)
        assert torch.equal(batch.layer_2.inner.weight[1], 2 * cv.layer_2.inner.weight)
        assert batch["layer_1"].flat.shape == (3, 9)
        assert shares(batch.layer_1.weight, batch.flat)

    def test_from_a_tree(self, cv):
        batch = torch.stack([cv, 2 * cv])
        again = ComponentVector(batch.to_dict(), batch_dims=1)
        assert again.axes is cv.axes and torch.equal(again.flat, batch.flat)

    def test_of_any_memory_layout(self, cv):
        batch = torch.stack([cv, 2 * cv])
        for flat in (batch.flat.T.contiguous().T, cv.flat.expand(2, -1), batch.flat[:, None].expand(2, 4, 13)):
            named = ComponentVector.from_flat(flat, cv.axes)
            assert torch.equal(named.layer_1.weight, flat[..., :6].reshape(*flat.shape[:-1], 3, 2))

    def test_batches_have_to_agree(self):
        with pytest.raises(ValueError, match=r"'a' has \(2,\), 'b' has \(3,\)"):
            ComponentVector({"a": torch.zeros(2, 3), "b": torch.zeros(3, 3)}, batch_dims=1)
        with pytest.raises(ValueError, match="'g.b' has the wrong shape"):
            ComponentVector({"a": torch.zeros(2, 3), "g": {"b": torch.zeros(())}}, batch_dims=1)


class TestReplace:
    def test_updates_and_appends(self, cv):
        new = cv.replace({"layer_1.bias": torch.ones(5), "layer_2.inner.extra": torch.zeros(1)}, scale=torch.ones(2, 2))
        assert list(new) == list(cv)
        assert new.axes["layer_1.bias"] == (5,) and new.axes["layer_2.inner.extra"] == (1,)
        assert torch.equal(new.scale, torch.ones(2, 2))
        assert torch.equal(new.layer_1.weight, cv.layer_1.weight)
        assert list(cv.replace(new=torch.ones(1)))[-1] == "new"
        assert "layer_2.inner.extra" not in cv

    def test_a_group_as_a_whole(self, cv):
        new = cv.replace(layer_1={"kernel": torch.ones(2)}, layer_2=cv.layer_1)
        assert list(new.layer_1) == ["kernel"]
        assert torch.equal(new.layer_2.weight, cv.layer_1.weight)

    def test_of_a_batch(self, cv):
        new = torch.stack([cv, cv]).replace(scale=torch.ones(2, 4))
        assert new.axes["scale"] == (4,) and new.shape == (2, 16)

    def test_is_differentiable(self, cv):
        scale = torch.ones((), requires_grad=True)
        (cv.replace(scale=scale).scale * 3).backward()
        assert scale.grad == 3

    @pytest.mark.parametrize("name", ["leyer_1.bias", "scale.bias", "layer_1.weight.x"])
    def test_into_what_is_no_group(self, cv, name):
        with pytest.raises(KeyNameError, match="There is no group"):
            cv.replace({name: torch.ones(1)})

    def test_suggests_the_group(self, cv):
        with pytest.raises(KeyNameError, match="Did you mean 'layer_1'"):
            cv.replace({"leyer_1.bias": torch.ones(1)})


class TestConversions:
    def test_to(self, cv, device):
        double = cv.to(torch.float64)
        assert double.dtype == double.layer_1.weight.dtype == torch.float64
        assert double.axes is cv.axes and torch.equal(double.flat, cv.flat.double())
        moved = cv.to(device)
        assert moved.device.type == device.type and moved.axes is cv.axes

    def test_detach_and_clone(self, cv):
        flat = cv.flat.clone().requires_grad_()
        named = ComponentVector.from_flat(flat, cv.axes)
        assert named.requires_grad and not named.detach().requires_grad
        assert shares(named.detach().flat, flat) and not shares(named.clone().flat, flat)
        assert named.clone().requires_grad and named.layer_1.weight.requires_grad

    def test_forced_dtype(self):
        cv = ComponentVector({"a": torch.ones(2, dtype=torch.int64), "b": torch.ones(1).half()}, dtype=torch.float64)
        assert cv.dtype == torch.float64 and cv.flat.tolist() == [1, 1, 1]

    def test_complex(self):
        cv = ComponentVector({"a": torch.tensor([1 + 1j])})
        assert cv.dtype == torch.complex64 and abs(cv).dtype == torch.float32

    def test_meta(self, tree):
        cv = ComponentVector(torch.utils._pytree.tree_map(lambda leaf: leaf.to("meta"), tree))
        assert cv.layer_1.weight.is_meta and "weight (3, 2)" in repr(cv)

    def test_numpy(self, cv):
        np = pytest.importorskip("numpy")
        assert np.array_equal(np.asarray(cv), cv.flat.numpy())
        assert np.asarray(cv, dtype=np.float64).dtype == np.float64
        assert (np.float32(2) * cv).axes is cv.axes
        with pytest.raises(TypeError):
            np.exp(cv)

    @pytest.mark.parametrize("clone", [lambda cv: pickle.loads(pickle.dumps(cv)), copy.copy, copy.deepcopy])
    def test_copies_start_without_views(self, cv, clone):
        cv.layer_1.weight  # noqa: B018
        new = clone(cv)
        assert new.axes is cv.axes and torch.equal(new.flat, cv.flat)
        assert new._components is None and cv._components is not None
        assert torch.equal(new.layer_1.weight, cv.layer_1.weight)

    def test_save_and_load(self, cv):
        file = io.BytesIO()
        torch.save({"ps": cv}, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)["ps"]
        assert loaded.axes is cv.axes and torch.equal(loaded.flat, cv.flat)


class TestRepr:
    def test_numbers_of_small_leaves(self):
        cv = ComponentVector(
            {"dense": {"weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}, "relu": {}, "s": torch.tensor(5.0)}
        )
        assert repr(cv).splitlines() == [
            "ComponentVector of 5 elements (torch.float32, cpu)",
            "  dense",
            "    weight (2, 2): tensor([[1., 2.],",
            "                           [3., 4.]])",
            "  relu (empty)",
            "  s (): tensor(5.)",
        ]

    def test_shapes_of_large_leaves_and_batches(self):
        cv = ComponentVector({"w": torch.zeros(2, 30, 30)}, batch_dims=1)
        assert repr(cv) == "ComponentVector of 900 elements, batch (2,) (torch.float32, cpu)\n  w (30, 30)"

    def test_of_what_a_tree_library_puts_in(self, cv):
        placeholder = torch.utils._pytree.tree_map(lambda leaf: "x", cv)
        assert repr(placeholder) == f"ComponentVector('x', {cv.axes!r})"
