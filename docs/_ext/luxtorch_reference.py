"""What the site adds to Sphinx: pages of public names, links from names in backquotes, and no local paths."""

from __future__ import annotations

import builtins
import inspect
import os
import re
from collections import Counter
from functools import cached_property
from typing import Any

from docstrings import to_rest
from docutils import nodes
from public_names import ROOT, Public, everything, in_sections
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.docutils import SphinxDirective, SphinxRole

PUBLIC = everything()
LAST = Counter(path.rsplit(".", 1)[-1] for path in PUBLIC)
# By the last part alone where only one name ends so, and where it is spelt as no argument is.
UNIQUE = {name: path for path in PUBLIC if (name := path.rsplit(".", 1)[-1])[0].isupper() and LAST[name] == 1}

METHODS = (property, cached_property, classmethod, staticmethod)


class Reference(SphinxDirective):
    """Document all public names of one folder, section by section, each with a table of its names on top."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Write the page as reStructuredText, and parse it."""
        lines = [""]
        for heading, names in in_sections(self.arguments[0]).items():
            if heading:
                lines += [heading, "-" * len(heading), ""]
            lines += [".. list-table::", "   :widths: 30 70", "   :class: names", ""]
            for public in names:
                name = public.path.removeprefix("luxtorch.")
                summary = to_rest([documentation(public)[0]])[0]
                lines += [f"   * - :py:obj:`{name} <{public.path}>`", f"     - {summary}"]
            lines.append("")
            for public in names:
                lines += entry(public)
        return self.parse_text_to_nodes("\n".join(lines), allow_section_headings=True)


def documentation(public: Public) -> list[str]:
    """Return the docstring of a name; of one that is no class or function, the string below its assignment."""
    name = public.path.rsplit(".", 1)[-1]
    if inspect.isclass(public.value) or inspect.isroutine(public.value):
        lines = inspect.cleandoc(public.value.__doc__).splitlines()
        return lines if public.value.__module__.startswith("luxtorch") else [*lines[:1], "", "A function of torch."]
    found = ModuleAnalyzer.for_module(public.home).find_attr_docs().get(("", name))
    return [line for line in found or [public.value.__doc__] if line]


def entry(public: Public) -> list[str]:
    """Return the directive that documents a name."""
    if inspect.isclass(public.value):
        members = own_members(public.value)
        return [f".. autoclass:: {public.path}", *([f"   :members: {', '.join(members)}"] if members else []), ""]
    kind, signature = "data", ""
    if inspect.isroutine(public.value):
        if public.value.__module__.startswith("luxtorch") and not hasattr(public.value, "__signature__"):
            return [f".. autofunction:: {public.path}", ""]
        kind, signature = "function", str(inspect.signature(public.value))  # autodoc loses the first argument
    text = [f"   {line}" for line in to_rest(documentation(public))]
    return [f".. py:{kind}:: {public.path}{signature.replace(chr(39), '')}", "", *text, ""]


def own_members(cls: type) -> list[str]:
    """Return the public methods and properties of a class that are documented, but where it is in a base class."""
    bases = [base for base in cls.__mro__[1:] if base.__module__.startswith("luxtorch")]
    return [
        name
        for name, value in vars(cls).items()
        if not name.startswith("_")
        and (isinstance(value, METHODS) or getattr(value, "__qualname__", "") == f"{cls.__qualname__}.{name}")
        and value.__doc__
        and not any(name in vars(base) for base in bases)
    ]


class Code(SphinxRole):
    """Text in single backquotes: code, and a link where it is the name of something public."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        """Return the code, and if it is a name a reference around it."""
        code = nodes.literal(self.rawtext, self.text, classes=["code"])
        path = target(self.text)
        if path is None:
            return [code], []
        reference = addnodes.pending_xref("", code, refdomain="py", reftype="obj", reftarget=path, refexplicit=True)
        return [reference], []


def target(text: str) -> str | None:
    """Return the public path that a piece of code names, such as `lt.setup(0, model)`, `optim.Adam` or `Dense`."""
    found = re.match(r"((?:luxtorch|lt)\.)?([A-Za-z_][\w.]*)(?=\(|$)", text)
    if found is None:
        return None
    path = f"luxtorch.{found[2]}"
    named_in_full = found[1] or "." in found[2] or found[2][0].isupper()
    return path if named_in_full and path in PUBLIC else UNIQUE.get(found[2])


def convert(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Convert a docstring in place, as autodoc wants it."""
    lines[:] = to_rest(lines)


def link_types(app: Sphinx, env: Any, node: addnodes.pending_xref, contnode: nodes.Element) -> nodes.Node | None:
    """Resolve the types in signatures, which name the private file that a class is in."""
    path = UNIQUE.get(node.get("reftarget", "").rsplit(".", 1)[-1])
    if node.get("refdomain") != "py" or path is None or path == node["reftarget"]:
        return None
    domain = env.domains["py"]
    return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", path, node, contnode)


def mend_paths(app: Sphinx, docname: str, source: list[str]) -> None:
    """Say `examples/output/x.png` where an example printed a whole path; of files outside of the site say the name."""
    source[0] = source[0].replace(f"{ROOT.parent}/", "")
    source[0] = re.sub(r"\[[^\]]*\]\(\.\./([\w./]+)\)", r"`\1`", source[0])


class TutorialOrder:
    """Sort the tutorials: those to begin with first, those that are not named here after them, by name."""

    FIRST = ("basics", "polynomial_fitting", "digits", "lbfgs", "ensemble_digits", "neural_ode", "pinn_heat")

    def __init__(self, src_dir: str) -> None:
        pass

    def __call__(self, filename: str) -> tuple[int, str]:
        """Return what to sort a file by."""
        name = filename.removesuffix(".py")
        return self.FIRST.index(name) if name in self.FIRST else len(self.FIRST), name


def name_file(gallery_conf: dict[str, Any], fname: str) -> None:
    """Let the next example find its folder by `__file__`, which sphinx-gallery does not define."""
    builtins.__file__ = os.path.abspath(fname)  # type: ignore[attr-defined]


def setup(app: Sphinx) -> dict[str, Any]:
    """Register all of it."""
    app.add_directive("reference", Reference)
    app.add_role("lux", Code())
    app.connect("autodoc-process-docstring", convert)
    app.connect("missing-reference", link_types)
    app.connect("source-read", mend_paths)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
