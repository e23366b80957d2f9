"""The table of layers and laws that stands in docs/laws.md: what the forms of all layers are checked for."""

from __future__ import annotations

import runpy
from collections import defaultdict
from pathlib import Path

import luxtorch as lt
from luxtorch.core import tree_leaves
from luxtorch.testing._laws import LAWS
from luxtorch.testing._subject import Subject

SHORT = {"component_vector": "vector", "vmap_inputs": "vmap x", "vmap_models": "vmap ps, st"}

# Where a form has nothing that a law could speak about.
NEEDS = {
    "gradient": lambda s: s.variables(),
    "forward": lambda s: s.variables(),
    "orders": lambda s: s.variables(),
    "vmap_models": lambda s: tree_leaves((s.ps, s.st)),
    "component_vector": lambda s: tree_leaves(s.ps),
}


def forms():
    """Yield each form that a test of this folder passes to the law checker."""
    for file in sorted(Path(__file__).parent.glob("test_*.py")):
        if "\nFORMS = {" in file.read_text():
            yield from runpy.run_path(str(file))["FORMS"].values()


def page(draw):
    """Return the table, for each layer and law the number of forms that are checked, and the exceptions."""
    counts, exceptions = defaultdict(lambda: dict.fromkeys(LAWS, 0)), {}
    for layer, inputs, *rest in forms():
        name, skipped = type(layer).__name__, rest[0] if rest else {}
        subject = Subject(layer, draw(inputs[0]), *lt.setup(0, layer), lt.random.key(0), lt.train_mode, "eager")
        for law in LAWS:
            counts[name][law] += law not in skipped and bool(NEEDS.get(law, lambda s: True)(subject))
        exceptions |= {(name, SHORT.get(law, law)): reason for law, reason in skipped.items()}
    yield "| layer | " + " | ".join(SHORT.get(law, law) for law in LAWS) + " |"
    yield "| --- |" + " ---: |" * len(LAWS)
    for name, row in sorted(counts.items()):
        yield f"| `{name}` | " + " | ".join(str(row[law] or "–") for law in LAWS) + " |"
    yield "\nExceptions, in some forms:\n"
    for (name, law), reason in sorted(exceptions.items()):
        yield f"- `{name}`, {law}: {reason}"


def test_the_table_of_laws_is_the_one_in_the_documentation(draw, in_docs):
    in_docs("laws.md", "\n".join(page(draw)))
