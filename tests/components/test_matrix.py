"""`ComponentMatrix`: blocks by names, and products that carry the names of the outer sides on."""

from __future__ import annotations

import copy
import io
import operator
import pickle

import pytest
import torch
import torch.utils._pytree as pytree
from torch.func import grad, hessian, vmap

from luxtorch.components import ComponentMatrix, ComponentVector, axes
from luxtorch.core import DTypeError, InputError, KeyNameError


@pytest.fixture
def out():
    """Names of rows, other than those of the columns."""
    return axes({"mean": torch.zeros(2), "log": {"var": torch.zeros(2, 1)}})


@pytest.fixture
def M(cv, out, rng):
    return ComponentMatrix(torch.randn(4, 13, generator=rng), out, cv.axes)


@pytest.fixture
def H(cv, rng):
    data = torch.randn(13, 13, generator=rng)
    return ComponentMatrix(data @ data.T + torch.eye(13), cv.axes, cv.axes)


def assert_matrix(result, data, row_axes, col_axes):
    assert type(result) is ComponentMatrix
    assert result.row_axes is row_axes and result.col_axes is col_axes
    torch.testing.assert_close(result.data, data)


def assert_vector(result, flat, axes):
    assert type(result) is ComponentVector
    assert result.axes is axes
    torch.testing.assert_close(result.flat, flat)


def assert_plain(result, data):
    assert type(result) is torch.Tensor
    torch.testing.assert_close(result, data)


class TestBlocks:
    @pytest.mark.parametrize(
        ("key", "rows", "columns"),
        [
            (("mean", "layer_1.weight"), slice(0, 2), slice(0, 6)),
            (("log", "layer_1"), slice(2, 4), slice(0, 9)),
            (("log.var", "scale"), slice(2, 4), slice(12, 13)),
            (("mean", "relu"), slice(0, 2), slice(9, 9)),
        ],
    )
    def test_two_names_give_a_plain_block(self, M, key, rows, columns):
        block = M[key]
        assert_plain(block, M.data[rows, columns])
        assert block.untyped_storage().data_ptr() == M.data.untyped_storage().data_ptr()

    def test_a_colon_keeps_a_side(self, M, cv, out):
        assert_matrix(M["mean", :], M.data[:2], None, cv.axes)
        assert_matrix(M["log", :], M.data[2:], out["log"], cv.axes)
        assert_matrix(M[:, "layer_1"], M.data[:, :9], out, cv.axes["layer_1"])
        assert_matrix(M[:, "scale"], M.data[:, 12:], out, None)
        assert_matrix(M[:, "layer_2"]["log", :], M.data[2:, 9:12], out["log"], cv.axes["layer_2"])
        assert M[:, :] is M

    def test_of_a_batch(self, M, cv, out):
        batch = ComponentMatrix(torch.stack([M.data, 2 * M.data]), out, cv.axes)
        assert_plain(batch["mean", "layer_1"], batch.data[:, :2, :9])
        assert_matrix(batch.T, batch.data.mT, cv.axes, out)

    @pytest.mark.parametrize("index", [0, (0, 3), (slice(1, 3), slice(2, 5)), torch.tensor([1]), (..., 0), None])
    def test_other_indices_are_those_of_the_data(self, M, index):
        assert_plain(M[index], M.data[index])

    def test_a_side_without_names(self, M, cv):
        half = ComponentMatrix(M.data, None, cv.axes)
        assert_matrix(half[:, "layer_1"], M.data[:, :9], None, cv.axes["layer_1"])
        with pytest.raises(InputError, match="The rows of this matrix have no names"):
            half["mean", :]

    def test_refused_keys(self, M):
        with pytest.raises(InputError, match=r"must be a pair, of rows and columns(.|\n)*H\['mean', :\]"):
            M["mean"]
        with pytest.raises(InputError, match="must be a pair of names"):
            M["mean", 3]
        with pytest.raises(InputError, match="must be a pair of names"):
            M["mean", "layer_1", "x"]
        with pytest.raises(KeyNameError, match="Did you mean 'scale'"):
            M["mean", "skale"]


class TestProducts:
    @pytest.mark.parametrize("multiply", [operator.matmul, torch.matmul])
    def test_with_vectors(self, M, H, cv, out, multiply):
        left = ComponentVector.from_flat(torch.arange(4.0), out)
        assert_vector(multiply(M, cv), M.data @ cv.flat, out)
        assert_vector(multiply(left, M), left.flat @ M.data, cv.axes)
        assert_vector(multiply(M, cv.flat), M.data @ cv.flat, out)
        assert_vector(multiply(left.flat, M), left.flat @ M.data, cv.axes)
        assert_vector(torch.mv(M, cv), M.data @ cv.flat, out)
        assert_vector(torch.mv(M, cv.flat), M.data @ cv.flat, out)
        assert_plain(cv @ H @ cv, cv.flat @ H.data @ cv.flat)

    def test_with_batches_of_vectors(self, M, cv, out):
        batch = torch.stack([cv, 2 * cv, 3 * cv])
        assert_vector(M @ batch, batch.flat @ M.data.T, out)
        assert_vector(torch.stack([M @ cv, M @ cv]) @ M, torch.stack([M.data @ cv.flat] * 2) @ M.data, cv.axes)

    def test_with_matrices(self, M, H, cv, out):
        other = torch.ones(13, 5)
        assert_matrix(M @ H, M.data @ H.data, out, cv.axes)
        assert_matrix(M @ M.T, M.data @ M.data.T, out, out)
        assert_matrix(M @ other, M.data @ other, out, None)
        assert_matrix(torch.ones(3, 4) @ M, torch.ones(3, 4) @ M.data, None, cv.axes)
        assert_plain(other.T @ M.T @ torch.ones(4, 2), other.T @ M.data.T @ torch.ones(4, 2))
        assert_matrix(torch.mm(M, H), M.data @ H.data, out, cv.axes)

    def test_a_side_without_names_fits_any(self, M, cv, out):
        half = ComponentMatrix(M.data, out, None)
        assert_vector(half @ cv, M.data @ cv.flat, out)
        assert_plain(ComponentMatrix(M.data, None, cv.axes) @ cv, M.data @ cv.flat)

    def test_inner_names_have_to_agree(self, M, H, cv):
        other = cv[["scale", "layer_1", "relu", "layer_2"]]
        for product in (lambda: M @ other, lambda: H @ torch.outer(other, cv), lambda: torch.linalg.solve(H, other)):
            with pytest.raises(InputError, match="must have the same names and shapes"):
                product()

    def test_outer(self, cv, out):
        left = ComponentVector.from_flat(torch.arange(4.0), out)
        assert_matrix(torch.outer(left, cv), torch.outer(left.flat, cv.flat), out, cv.axes)
        assert_matrix(torch.outer(torch.ones(3), cv), torch.outer(torch.ones(3), cv.flat), None, cv.axes)
        assert torch.equal(torch.outer(left, cv)["mean", "scale"], torch.outer(left.mean, cv.scale[None]))

    def test_inverse_and_solve(self, M, H, cv, out):
        square = M[:, "layer_1.weight"] @ torch.eye(6)[:, :4]
        assert_matrix(torch.linalg.inv(square), torch.linalg.inv(square.data), None, out)
        assert_matrix(torch.linalg.pinv(M), torch.linalg.pinv(M.data), cv.axes, out)
        assert_vector(torch.linalg.solve(H, cv), torch.linalg.solve(H.data, cv.flat), cv.axes)
        assert_vector(torch.linalg.solve(H, cv.flat), torch.linalg.solve(H.data, cv.flat), cv.axes)
        assert_matrix(torch.linalg.solve(H, M.T), torch.linalg.solve(H.data, M.data.T), cv.axes, out)
        assert_vector(torch.linalg.inv(H) @ cv, torch.linalg.inv(H.data) @ cv.flat, cv.axes)


class TestElementwise:
    def test_names_of_both_sides_are_kept(self, H, cv):
        for result, data in (
            (H + 0.1 * torch.eye(13), H.data + 0.1 * torch.eye(13)),
            (2 - H, 2 - H.data),
            (-H * H, -H.data * H.data),
            (torch.exp(H), torch.exp(H.data)),
            (torch.ones(13) * H, H.data),
        ):
            assert_matrix(result, data, cv.axes, cv.axes)
        assert (H > 0).dtype == torch.bool

    def test_all_else_is_plain(self, H):
        assert_plain(torch.linalg.eigvalsh(H), torch.linalg.eigvalsh(H.data))
        assert_plain(torch.diagonal(H), torch.diagonal(H.data))
        assert_plain(torch.sum(H, 0), H.data.sum(0))

    def test_names_have_to_agree(self, M, H, cv):
        with pytest.raises(InputError, match="must have the same names and shapes"):
            H + torch.outer(cv[["scale", "layer_1", "relu", "layer_2"]], cv)
        with pytest.raises(InputError, match="must have names on the same sides"):
            H + ComponentMatrix(H.data, cv.axes, None)
        with pytest.raises(InputError, match="a ComponentVector cannot be combined"):
            H + cv
        with pytest.raises(InputError, match="A side of the matrix was broadcast"):
            ComponentMatrix(torch.ones(4, 1), None, axes({"a": torch.zeros(1)})) * torch.ones(4, 3)


class TestMaking:
    @pytest.mark.parametrize(
        ("shape", "expected"), [((13, 12), r"\(..., 13, any\)"), ((13,), "any"), ((5, 13), "13, any")]
    )
    def test_shapes_that_do_not_fit(self, cv, shape, expected):
        with pytest.raises(InputError, match="matrix has the wrong shape") as caught:
            ComponentMatrix(torch.zeros(shape), cv.axes if shape[0] != 13 or shape == (13,) else None, cv.axes)
        assert str(shape) in str(caught.value)

    def test_no_tensor(self, cv):
        with pytest.raises(DTypeError, match="must be a tensor"):
            ComponentMatrix([[1.0]])

    def test_from_jacobian(self, cv, x, loss):
        H = ComponentMatrix.from_jacobian(hessian(loss)(cv, x))
        assert H.row_axes is H.col_axes is cv.axes
        torch.testing.assert_close(H.data, H.data.T)
        torch.testing.assert_close(
            H.data, hessian(lambda flat: loss(ComponentVector.from_flat(flat, cv.axes), x))(cv.flat)
        )
        g = torch.func.jacrev(lambda ps: torch.stack([loss(ps, x), ps.scale]))(cv)
        assert_matrix(ComponentMatrix.from_jacobian(g), g.flat, None, cv.axes)
        g = torch.func.jacfwd(lambda x: torch.func.grad(loss)(cv, x))(x)
        assert_matrix(ComponentMatrix.from_jacobian(g), g.flat, cv.axes, None)
        with pytest.raises(DTypeError, match="must be a ComponentVector"):
            ComponentMatrix.from_jacobian(torch.eye(3))
        with pytest.raises(InputError, match="wrong shape"):
            ComponentMatrix.from_jacobian(cv)

    def test_a_node_of_trees(self, M, cv, out):
        leaves, spec = pytree.tree_flatten(M)
        assert len(leaves) == 1 and leaves[0] is M.data
        assert pytree.tree_unflatten([None], spec).row_axes is out
        assert_matrix(pytree.tree_map(lambda data: 2 * data, M), 2 * M.data, out, cv.axes)
        assert_matrix(
            vmap(lambda v: torch.outer(v, v))(torch.stack([cv, cv])),
            torch.stack([torch.outer(cv, cv).data] * 2),
            cv.axes,
            cv.axes,
        )
        assert_matrix(
            grad(lambda M: (M["mean", "scale"] ** 2).sum())(M),
            grad(lambda m: (m[:2, 12:] ** 2).sum())(M.data),
            out,
            cv.axes,
        )

    @pytest.mark.parametrize("clone", [lambda M: pickle.loads(pickle.dumps(M)), copy.copy, copy.deepcopy])
    def test_copies(self, M, cv, out, clone):
        assert_matrix(clone(M), M.data, out, cv.axes)

    def test_save_and_load(self, M, cv, out):
        file = io.BytesIO()
        torch.save(M, file)
        file.seek(0)
        assert_matrix(torch.load(file, weights_only=True), M.data, out, cv.axes)

    def test_conversions(self, M, cv, out):
        assert_matrix(M.to(torch.float64), M.data.double(), out, cv.axes)
        assert M.dtype == torch.float32 and M.device.type == "cpu" and M.shape == (4, 13)
        flagged = ComponentMatrix(M.data.clone().requires_grad_(), out, cv.axes)
        assert not flagged.detach().data.requires_grad
        with pytest.raises(InputError, match="'data' cannot be set"):
            M.data = None

    def test_repr(self):
        layout = axes({"a": torch.zeros(1), "b": {"c": torch.zeros(1)}})
        assert repr(ComponentMatrix(torch.eye(2), layout, None)).splitlines() == [
            "ComponentMatrix of shape (2, 2) (torch.float32, cpu)",
            "  rows: a, b",
            "  columns: no names",
            "  tensor([[1., 0.],",
            "          [0., 1.]])",
        ]
        assert "None" in repr(pytree.tree_map(lambda data: None, ComponentMatrix(torch.eye(2))))
