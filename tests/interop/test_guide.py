"""The guide from torch.nn: its blocks run, and what stands side by side agrees."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import luxtorch as lt
from luxtorch.core import named_leaves

GUIDE = Path(__file__).parents[2] / "docs" / "from_torch.md"


def sections():
    """Return the code blocks of each section by its title, those before the first one under an empty title."""
    parts = re.split(r"^## (.*)$", GUIDE.read_text(), flags=re.M)
    code = [re.findall(r"^```python\n(.*?)^```", part, flags=re.M | re.S) for part in parts[::2]]
    return dict(zip(["", *parts[1::2]], code, strict=True))


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def same_numbers(ours, theirs):
    """Compare a tree of ours with the parameters of a module, or with their gradients."""
    for (_, a), b in zip(named_leaves(ours), theirs, strict=True):
        close(a, b.detach())


def dropped_differently(v):
    y = v["layer"](v["x"], v["ps"], lt.update_state(v["st"], "rng", lt.random.key(0)))[0]
    assert torch.equal(y, v["first_lt"])
    assert not torch.equal(v["first_lt"], v["second_lt"])
    assert not torch.equal(v["first"], v["second"])


def only_the_head_moves(v):
    moved = [
        name for name, leaf in named_leaves(v["ps_new"]) if not torch.equal(leaf, dict(named_leaves(v["ps"]))[name])
    ]
    trained = [name for name, p in v["net"].named_parameters() if p.requires_grad]
    assert moved == trained == ["4.weight", "4.bias"]


def starts_without_effect(v):
    net, x = v["net"].eval(), v["x"]
    close(v["layer"](x, v["with_lora"](v["lora"]), lt.test_mode(v["st"]))[0], v["module"].eval()(x))
    close(net(x), v["module"](x))
    assert v["gradient"]["b"].abs().max() > 0


def comes_back(v):
    layer, ps, _ = lt.from_torch(v["trained"])
    assert layer == v["layer"]
    assert all(map(torch.equal, *(torch.utils._pytree.tree_leaves(tree) for tree in (ps, v["ts"].parameters))))


CHECKS = {
    "1. A training loop": lambda v: same_numbers(v["ts"].parameters, v["module"].parameters()),
    "2. Batch normalization": lambda v: close(v["prediction_lt"], v["prediction"]),
    "3. Dropout": dropped_differently,
    "4. An ensemble": lambda v: close(v["outputs_lt"], v["outputs"]),
    "5. Gradients of each sample": lambda v: close(v["per_sample_lt"].flat, v["per_sample"]),
    "6. MAML": lambda v: same_numbers(v["meta_gradient"], [p.grad for p in v["net"].parameters()]),
    "7. A frozen backbone": only_the_head_moves,
    "8. LoRA": starts_without_effect,
    "9. Averages of the parameters": lambda v: same_numbers(v["ema"], v["average"].module.parameters()),
    "10. L-BFGS": lambda v: same_numbers(v["cv"].to_dict(), v["net"].parameters()),
}


# Where the numbers of a dropout are compared, it drops nothing: torch's masks are not ours.
WITHOUT_DROPOUT = ("1. A training loop", "2. Batch normalization")


def run(*titles):
    """Run sections after the beginning, and return the names that they define."""
    scope = {}
    for title in ("", *titles):
        for block in sections()[title]:
            if titles[0] in WITHOUT_DROPOUT:
                block = block.replace("nn.Dropout(0.1)", "nn.Dropout(0.0)")
            exec(compile(block, f"{GUIDE.name}, {title}", "exec"), scope)
    return scope


@pytest.mark.parametrize("title", CHECKS)
def test_both_blocks_agree(title):
    assert len(sections()[title]) == 2
    CHECKS[title](run(title))


ALONE = {"And back", "Other methods than forward"}


def test_other_methods():
    assert run("Other methods than forward")["code"].shape == (3, 2)


def test_and_back():
    comes_back(run("1. A training loop", "And back"))


def test_every_section_with_code_is_run():
    assert {title for title, blocks in sections().items() if blocks} == {"", *CHECKS, *ALONE}
