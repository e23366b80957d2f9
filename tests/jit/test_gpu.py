"""On a GPU: compiled kernels and CUDA graphs give the numbers of the processor."""

from __future__ import annotations

import pytest
import torch

import luxtorch as lt
from luxtorch import optim
from luxtorch.jit import CudaGraph, DonatedError, jit

from .conftest import train
from .test_equal import RULES

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

GRAPHS = {"triton.cudagraphs": True}


@pytest.mark.parametrize("tree", ["dict", "vector"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("how", ["eager", "replay", "donated"])
def test_every_rule_as_on_the_processor(make_state, batch, same, rule, tree, how):
    ts = make_state(rule=RULES[rule], tree=tree)
    there, there_batch = lt.to_device((ts, batch), "cuda")
    step = {"eager": train, "replay": jit(train, backend="replay")}.get(how, jit(train, donate="ts", backend="replay"))
    for _ in range(3):
        (got, there), (expected, ts) = step(there, there_batch), train(ts, batch)
        same(got.cpu(), expected, 1e-4)
    same(lt.to_device(there, "cpu"), ts, 1e-3)


@pytest.mark.parametrize("options", [{}, GRAPHS], ids=["kernels", "graph"])
@pytest.mark.parametrize("donate", [(), "ts"], ids=["kept", "donated"])
@pytest.mark.parametrize("tree", ["dict", "vector"])
def test_compiled_steps(make_state, batch, same, tree, donate, options):
    model = lt.Chain(lt.Dense(3, 16, torch.tanh), lt.BatchNorm(16), lt.Dense(16, 2))
    ts, there_batch = lt.to_device((make_state(model, optim.Adam(0.01), tree), batch), "cuda")
    other = torch.utils._pytree.tree_map(torch.clone, ts)
    jitted, first, losses = jit(train, donate=donate, options=options, backend="inductor"), ts, []
    for _ in range(4):
        (got, ts), (expected, other) = jitted(ts, there_batch), train(other, there_batch)
        losses.append((got, expected))  # none is overwritten by a later call
    for got, expected in losses:
        same(got, expected, 1e-4)
    same(ts, other, 1e-3)
    assert jitted.cache_info().misses == 1
    if donate:
        with pytest.raises(DonatedError):
            first.parameters["layer_1"]["weight"].sum()


def test_a_graph_keeps_its_results_apart():
    graph = CudaGraph(lambda inputs: [inputs[0] * 2, inputs[0].sum()])
    xs = [torch.full((3,), float(i), device="cuda") for i in range(4)]
    results = [graph([x]) for x in xs]
    for x, (twice, total) in zip(xs, results, strict=True):
        torch.testing.assert_close(twice, 2 * x)
        torch.testing.assert_close(total, x.sum())


def test_without_one_gpu_there_is_no_graph_but_a_warning(make_state, batch):
    ts = make_state()  # parameters on the processor
    with pytest.warns(RuntimeWarning, match="No CUDA graph"):
        jit(train, options=GRAPHS, backend="inductor")(ts, batch)
