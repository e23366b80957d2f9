"""How many collectives a step takes, as torch's profiler counts them."""

from __future__ import annotations

import pytest

from .work import WAYS, counted
from .world import run

GATHER, SCATTER, REDUCE = "allgather_into_tensor_coalesced_", "reduce_scatter_tensor_coalesced_", "allreduce_"

# A dict of four leaves is gathered leaf by leaf; checkpointed layers are gathered again for the backward pass; the
# gradients of copies of shards are reduced over the copies, too.
EXPECTED = {
    "averaged vector": {REDUCE: 1},
    "averaged dict": {REDUCE: 1},
    "rule, vector": {REDUCE: 1},
    "rule, dict": {REDUCE: 1},
    "sharded vector": {GATHER: 1, SCATTER: 1},
    "sharded dict": {GATHER: 4, SCATTER: 4},
    "scattered": {GATHER: 1, SCATTER: 1},
    "sharded copies": {GATHER: 1, SCATTER: 1},
    "sharded layers": {GATHER: 4, SCATTER: 2},
}


@pytest.fixture(scope="module")
def counts(tmp_path_factory):
    return run(counted, 2, tmp_path_factory.mktemp("counts"))


@pytest.mark.parametrize("way", WAYS)
def test_a_step_takes_as_few_collectives_as_it_can(way, counts):
    for count in counts:
        assert count[way] == {f"c10d::{name}": number for name, number in EXPECTED[way].items()}
