"""Private names of torch: they stand in few modules, and torch has each of them."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import luxtorch
from luxtorch.random._philox import has_kernels

ROOT = Path(luxtorch.__file__).parent

HOME = "_torch.py"

LIVE_BY_THE_INSIDES = {
    "autodiff/_torch_func.py": "functorch levels",
    "core/_tree.py": "torch.utils._pytree",
    "interop/pure/_causal_mask.py": "what torch's transformers ask about a mask, replaced there",
    "jit/": "tracing, Inductor, guards",
    "loops/_closure.py": "tracing, operators of a graph",
    "layers/recurrent/_kernels.py": "kernels of recurrent layers",
    "optim/": "torch._foreach_*, tracing",
    "random/_philox.py": "kernels of random numbers",
}
"""Where private names stand besides, and which."""


def private_names(path: Path) -> Iterator[str]:
    """Yield the private names of torch in a file, such as `torch._C._functorch.get_unwrapped`, by its syntax tree."""
    tree = ast.parse(path.read_text())
    known: dict[str, str] = {}
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                root = alias.name.partition(".")[0]
                known[alias.asname or root] = alias.name if alias.asname else root
                found.add(alias.name)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "torch":
            for alias in node.names:
                known[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                found.add(f"{node.module}.{alias.name}")
    for node in ast.walk(tree):
        chain, inner = [], node
        while isinstance(inner, ast.Attribute):
            chain.append(inner.attr)
            inner = inner.value
        if chain and isinstance(inner, ast.Name) and known.get(inner.id, "").startswith("torch"):
            found.add(".".join([known[inner.id], *reversed(chain)]))
    longest = {name for name in found if not any(other.startswith(f"{name}.") for other in found)}
    for name in sorted(longest):
        parts = name.split(".")
        if parts[0] == "torch" and any(part[0] == "_" and not part.startswith("__") for part in parts):
            yield name


USES = [(str(path.relative_to(ROOT)), name) for path in sorted(ROOT.rglob("*.py")) for name in private_names(path)]


def resolved(name: str) -> object:
    """Return what a dotted name stands for."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:length]))
        except ImportError:
            continue
        for part in parts[length:]:
            value = getattr(value, part)
        return value
    raise AttributeError(name)


def test_private_names_of_torch_stand_in_few_modules():
    elsewhere = [(path, name) for path, name in USES if path != HOME and not path.startswith((*LIVE_BY_THE_INSIDES,))]
    assert not elsewhere, f"Give them a name in luxtorch/{HOME}: {elsewhere}"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted({name for _, name in USES}))
def test_torch_has_each_private_name(name):
    if name.startswith("torch.ops.aten._philox_") and not has_kernels("cpu"):
        pytest.skip("it came with torch 2.14, and is asked for before it is used")
    resolved(name)
