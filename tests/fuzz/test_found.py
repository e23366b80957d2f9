"""What random models have found, one named test each."""

from __future__ import annotations

import pytest
import torch

import luxtorch as lt


@pytest.mark.parametrize(
    "layer", [lt.SinusoidalPositionalEmbedding(4), lt.StatefulRecurrentCell(lt.GRUCell(3, 2), batch_size=4)]
)
def test_a_layer_is_set_up_inside_a_gradient(layer):
    # torch.tensor with a device fails there.
    def f(one):
        return one, lt.setup(0, layer)

    _, inside = torch.func.grad(f, has_aux=True)(torch.ones(()))
    torch.testing.assert_close(lt.core.tree_leaves(inside), lt.core.tree_leaves(lt.setup(0, layer)), rtol=0.0, atol=0.0)


def test_a_single_number_in_double_precision_compiles_to_the_same_numbers(make_key):
    # It is a Python number to torch.compile, which traces twice: once with its value, once for any value.
    layer = lt.WeightNorm(lt.Dense(3, 2), dim=None)
    ps, st = lt.f64(lt.setup(make_key(), layer))
    assert ps["normalized"]["weight_g"].shape == ()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        x = lt.random.normal(make_key(), (4, 3), dtype=torch.float64)
        ps = lt.core.tree_map(lambda leaf: leaf * 1.5, ps)
        torch.testing.assert_close(compiled(x, ps, st), layer(x, ps, st))
