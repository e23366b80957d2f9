"""The comparison with other libraries: each cell of the table in `docs/comparison.md` is what its probe has found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.peers.probing import FEATURES

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
JAX = ROOT / ".venv-jax" / "bin" / "python"
# The columns in their order: which file probes it, by which interpreter, and what it has to import.
COLUMNS = {
    "luxtorch": ("with_luxtorch.py", sys.executable, "luxtorch"),
    "torch.func, torchopt": ("with_torch_func.py", sys.executable, "torchopt"),
    "tensordict, torchopt": ("with_tensordict.py", sys.executable, "tensordict"),
    "Equinox, Optax": ("with_equinox.py", str(JAX), "equinox, optax"),
    "Flax Linen, Optax": ("with_flax.py", str(JAX), "flax, optax"),
}


PAGES = [ROOT / "docs" / "comparison.md", ROOT / "README.md"]


def table(path: Path) -> dict[str, list[str]]:
    """Return the rows of a page's comparison, by their first cells."""
    lines = path.read_text().splitlines()
    start = lines.index(f"| | {' | '.join(COLUMNS)} |") + 2
    end = next(i for i in range(start, len(lines)) if not lines[i].startswith("|"))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start:end]]
    return {row[0]: row[1:] for row in rows}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_every_feature_has_a_row_and_every_row_a_probe(path):
    found = table(path)
    assert list(found) == list(FEATURES.values())
    assert all(len(row) == len(COLUMNS) and set(row) <= {"yes", "–"} for row in found.values())


@pytest.mark.slow
@pytest.mark.parametrize("column", COLUMNS)
def test_every_cell_is_what_its_probe_found(column):
    file, python, imports = COLUMNS[column]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    if not Path(python).exists() or subprocess.run([python, "-c", f"import {imports}"], env=environment).returncode:
        pytest.skip(f"{imports} cannot be imported by {python}")
    run = subprocess.run([python, str(HERE / file)], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout.splitlines()[-1])
    place = list(COLUMNS).index(column)
    for path in PAGES:
        shown = {name: table(path)[text][place] for name, text in FEATURES.items()}
        assert shown == {name: "–" if why else "yes" for name, why in found.items()}, (path.name, found)
