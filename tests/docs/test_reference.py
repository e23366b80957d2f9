"""The reference: every public name is on a page, has a docstring, and has an example that the doctests run."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest
from docstrings import to_rest
from public_names import FOLDERS, SECTIONS, documentation, everything, in_sections, is_class, of_folder, own_members

import luxtorch as lt

PAGES = Path(__file__).parents[2] / "docs" / "api"
PUBLIC = everything()
CLASSES = [path for path, public in PUBLIC.items() if is_class(public.value)]
FUNCTIONS = [path for path, public in PUBLIC.items() if inspect.isroutine(public.value)]

# What has no example of its own: errors, which the examples of what raises them show; what nobody makes, because a
# function returns it, and has the example; and helpers for those who write layers and rules, which are one line each.
RETURNED = {
    "luxtorch.LayerModule": lt.to_torch,
    "luxtorch.Parts": lt.compact,
    "luxtorch.core.Description": lt.describe,
    "luxtorch.init.BindableInitializer": lt.init.initializer,
    "luxtorch.interop.LoadReport": lt.load_weights,
    "luxtorch.interop.Model": lt.from_torch,
    "luxtorch.interop.ModuleLayer": lt.from_torch,
    "luxtorch.jit.CacheInfo": lt.jit,
    "luxtorch.jit.CudaGraph": lt.jit,
    "luxtorch.jit.Jitted": lt.jit,
    "luxtorch.jit.Lowered": lt.jit,
    "luxtorch.optim.MinimizeResult": lt.optim.minimize,
    "luxtorch.optim.OptState": lt.optim.setup,
    "luxtorch.optim.RuleState": lt.optim.setup,
    "luxtorch.inspect.DebugModel": lt.debug_mode,
    "luxtorch.inspect.Impurity": lt.check_purity,
    "luxtorch.inspect.Observation": lt.debug_mode,
    "luxtorch.inspect.PurityReport": lt.check_purity,
    "luxtorch.inspect.Summary": lt.summary,
    "luxtorch.inspect.SummaryRow": lt.summary,
    "luxtorch.training.Progress": lt.training.progress,
}
HELPERS = {
    "luxtorch.core.Value",
    "luxtorch.core.count",
    "luxtorch.core.nested_dicts",
    "luxtorch.core.path_name",
    "luxtorch.core.register_node",
    "luxtorch.core.show_value",
    "luxtorch.core.subtree",
    "luxtorch.optim.Rule",
}


def has_example(value):
    return "Example:" in (value.__doc__ or "") and ">>>" in value.__doc__


def needs_example(path):
    value = PUBLIC[path].value
    is_error = inspect.isclass(value) and issubclass(value, Exception)
    return not is_error and path not in RETURNED and path not in HELPERS


@pytest.mark.parametrize("path", PUBLIC)
def test_every_name_has_a_docstring(path):
    summary = documentation(PUBLIC[path])[0]
    assert re.match(r"[A-Z`].*[.:,]?$", summary), f"{path} has no docstring"
    assert summary != (type(PUBLIC[path].value).__doc__ or "").split("\n")[0], f"{path} has only that of its type"


@pytest.mark.parametrize("path", [path for path in CLASSES + FUNCTIONS if needs_example(path)])
def test_every_name_has_an_example(path):
    assert has_example(PUBLIC[path].value), f"{path} has no Example"


@pytest.mark.parametrize("path", sorted({*RETURNED, *HELPERS} & set(PUBLIC)))
def test_no_exception_outlives_its_reason(path):
    assert not has_example(PUBLIC[path].value), f"{path} has an example now: take it off the list"


@pytest.mark.parametrize("path", RETURNED)
def test_what_is_returned_has_its_example_there(path):
    assert has_example(RETURNED[path])


@pytest.mark.parametrize("path", CLASSES)
def test_every_method_has_a_docstring(path):
    for name in own_members(PUBLIC[path].value):
        assert vars(PUBLIC[path].value)[name].__doc__, f"{path}.{name} has no docstring"


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_folder_has_a_page(folder):
    assert f".. reference:: {folder}\n" in (PAGES / f"{folder}.rst").read_text()
    assert f"\n   {folder}\n" in (PAGES / "index.rst").read_text()


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_page_has_every_name_of_its_folder_once(folder):
    shown = [public.path for names in in_sections(folder).values() for public in names]
    assert sorted(shown) == sorted(public.path for public in of_folder(folder).values())


@pytest.mark.parametrize("folder", SECTIONS)
def test_sections_name_files_that_are_there(folder):
    source = Path(lt.__file__).parent
    for file in " ".join(SECTIONS[folder].values()).split():
        found = [*(source / folder).rglob(f"_{file}.py"), *source.glob(f"_{file}.py")]
        assert found or (source / folder / file).is_dir(), file


def test_all_that_luxtorch_re_exports_is_public():
    trees = [ast.parse(Path(lt.__file__).with_name(file).read_text()) for file in ("__init__.py", "_late.py")]
    imported = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
    names = {alias.asname for node in imported for alias in node.names if alias.asname == alias.name}
    at_top = {path.removeprefix("luxtorch.") for path in PUBLIC if path.count(".") == 1}
    assert at_top == names - set(FOLDERS) - {"errors"} | {"jit"}  # a folder, and the function in it


def test_members_that_a_base_class_documents_are_not_repeated():
    assert "init" in own_members(lt.optim.Rule) or "init" in own_members(lt.optim.ListRule)
    assert "init" not in own_members(lt.optim.Adam)
    assert "init_weight" not in own_members(lt.Dense)  # a field, whose default is a function


def rest(text):
    """Convert a docstring, and show each run of empty lines as one."""
    return re.sub(r"\n(\s*\n)+", "\n\n", "\n".join(to_rest(text.splitlines()))).strip()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A shape (*batch, 2).", r"A shape (\*batch, 2)."),
        ("Two `x`s.", r"Two \ :lux:`x`\ s."),
        ("Source: Lux's `Chain`.", r"Source: Lux's \ :code:`Chain`\ ."),
        ("Args:\n    x: One\n        or two.", ":Args:\n\n    - \\ :lux:`x`\\ : One\n      or two."),
        ("Shape:\n    (batch, n) to\n        the same", ":Shape:\n    (batch, n) to\n    the same"),
        ("Example:\n    >>> 2 * 3\n    6", ".. rubric:: Example\n\n>>> 2 * 3\n6"),
        ("Example:\n    A `b`:\n\n    >>> a_ = 2 * 3", ".. rubric:: Example\n\nA \\ :lux:`b`\\ :\n\n>>> a_ = 2 * 3"),
    ],
)
def test_docstrings_become_restructured_text(text, expected):
    assert rest(text) == expected
