"""A checkpoint of four ranks is loaded by two, by one, and by four again."""

from __future__ import annotations

import json

import pytest
import torch

import luxtorch as lt
from luxtorch import distributed, optim, training

from .work import MODEL, begin, problem, resumed, saved
from .world import run

WAYS = ("sharded vector", "sharded dict", "averaged vector")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    return folder, run(saved, 4, folder)


def check(results, originals):
    for result in results:
        for way in WAYS:
            (loaded, after), (before, later) = result[way], originals[0][way]
            assert loaded.keys() == before.keys() and int(loaded["step"]) == 3
            for name, value in before.items():
                assert torch.equal(loaded[name], value), name
            torch.testing.assert_close(after, later, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_other_ranks_go_on_with_the_same_values(ranks, written):
    folder, originals = written
    check(run(resumed, ranks, folder), originals)


def test_a_single_process_goes_on_with_the_same_values(written):
    folder, originals = written
    check([resumed(folder)], originals)


def test_a_sharded_checkpoint_is_read_by_torch(written):
    """The format is torch's: its own converter puts the shards together."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    folder, originals = written
    dcp_to_torch_save(folder / "sharded vector", folder / "whole.pt")
    whole = torch.load(folder / "whole.pt", weights_only=True)
    expected = originals[0]["sharded vector"][0]
    assert whole.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(whole[name], value), name


def test_each_rank_writes_its_own_part(written):
    folder, _ = written
    sizes = {path.name: path.stat().st_size for path in (folder / "sharded vector").glob("*.distcp")}
    assert len(sizes) == 4


def test_all_dtypes_and_forms_come_back(tmp_path, make_key):
    tree = {
        "key": make_key(),
        "half": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3).T,
        "flag": torch.tensor([True, False]),
        "complex": torch.tensor([1 + 2j]),
        "empty": torch.zeros(0, 3),
        "one": torch.tensor(2.5, dtype=torch.float64),
        "trained": torch.ones(2, requires_grad=True),
        "vector": lt.ComponentVector({"a": torch.ones(2), "b": torch.zeros(1, 2)}),
    }
    distributed.save_checkpoint(tmp_path / "step", tree)
    like = lt.core.tree_map(lambda leaf: torch.zeros_like(leaf).requires_grad_(leaf.requires_grad), tree)
    loaded = distributed.load_checkpoint(tmp_path / "step", like)
    assert loaded["vector"].axes == tree["vector"].axes
    for (name, found), (_, value) in zip(lt.core.named_leaves(loaded), lt.core.named_leaves(tree), strict=True):
        assert torch.equal(found, value) and found.dtype == value.dtype, name
        assert found.requires_grad == value.requires_grad
    assert not any(leaf.any() for leaf in lt.core.tree_leaves(like))  # what says the structure is not written to


def test_the_structure_may_be_on_the_meta_device(tmp_path):
    distributed.save_checkpoint(tmp_path / "step", {"weight": torch.arange(3.0)})
    loaded = distributed.load_checkpoint(tmp_path / "step", {"weight": torch.empty(3, device="meta")})
    assert torch.equal(loaded["weight"], torch.arange(3.0))


def test_a_checkpoint_is_replaced_as_a_whole(tmp_path):
    for value in (1.0, 2.0):
        distributed.save_checkpoint(tmp_path / "step", {"weight": torch.full((2,), value)})
    loaded = distributed.load_checkpoint(str(tmp_path / "step"), {"weight": torch.zeros(2)})
    assert torch.equal(loaded["weight"], torch.full((2,), 2.0))
    assert [path.name for path in tmp_path.iterdir()] == ["step"]


def test_an_unfinished_checkpoint_does_not_count(tmp_path, monkeypatch):
    distributed.save_checkpoint(tmp_path / "step", {"weight": torch.ones(2)})

    def fail(*args, **kwargs):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr("luxtorch.distributed._checkpoint.save", fail)
        with pytest.raises(distributed.DistributedError, match=r"cannot be written[\s\S]*no space left"):
            distributed.save_checkpoint(tmp_path / "step", {"weight": torch.zeros(2)})
    loaded = distributed.load_checkpoint(tmp_path / "step", {"weight": torch.zeros(2)})
    assert torch.equal(loaded["weight"], torch.ones(2))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "luxtorch.json").write_text("{"), "cannot be read"),
        (lambda folder: (folder / "luxtorch.json").write_text(json.dumps({"format": 99})), "newer luxtorch"),
        (lambda folder: (folder / ".metadata").unlink(), "cannot be read"),
        (lambda folder: next(folder.glob("*.distcp")).unlink(), "cannot be read"),
        (lambda folder: next(folder.glob("*.distcp")).write_bytes(b"nonsense"), "cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_an_error(damage, said, tmp_path):
    tree = {"weight": torch.ones(2)}
    distributed.save_checkpoint(tmp_path / "step", tree)
    damage(tmp_path / "step")
    with pytest.raises(distributed.DistributedError, match=said):
        distributed.load_checkpoint(tmp_path / "step", tree)


def test_an_optimizer_that_is_frozen_elsewhere_does_not_fit(tmp_path):
    ts, _ = begin("averaged dict", "adamw")
    distributed.save_checkpoint(tmp_path / "step", ts)
    other = training.TrainState(MODEL, *problem()[:2], optim.Descent(0.1))
    with pytest.raises(lt.KeyNameError, match="must have the names"):
        distributed.load_checkpoint(tmp_path / "step", other)
