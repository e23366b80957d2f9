"""What the site adds to Sphinx: pages of public names, links from names in backquotes, and no local paths."""

from __future__ import annotations

import builtins
import inspect
import re
from collections import Counter
from pathlib import Path
from typing import Any

from docstrings import to_rest
from docutils import nodes
from public_names import Public, documentation, everything, in_sections, is_class, own_members
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform
from sphinx.util.docutils import SphinxDirective, SphinxRole
from sphinx.util.inspect import signature as signature_of
from sphinx.util.inspect import stringify_signature

PUBLIC = everything()
LAST = Counter(path.rsplit(".", 1)[-1] for path in PUBLIC)
# By the last part alone where only one name ends so, and where it is spelt as no argument is.
UNIQUE = {name: path for path in PUBLIC if (name := path.rsplit(".", 1)[-1])[0].isupper() and LAST[name] == 1}

# Files outside of the site, and the pages that include them.
INCLUDED = {"../benchmarks/README.md": "benchmarks.md", "../benchmarks/report.md": "benchmark_report.md"}

LINKS = (nodes.reference, addnodes.pending_xref, nodes.title)


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


def entry(public: Public) -> list[str]:
    """Return the directive that documents a name."""
    if is_class(public.value):
        members = own_members(public.value)
        return [f".. autoclass:: {public.path}", *([f"   :members: {', '.join(members)}"] if members else []), ""]
    kind, signature = "data", ""
    if inspect.isroutine(public.value):
        if public.value.__module__.startswith("luxtorch") and not hasattr(public.value, "__signature__"):
            return [f".. autofunction:: {public.path}", ""]
        kind, signature = "function", str(inspect.signature(public.value))  # autodoc loses the first argument
    text = [f"   {line}" for line in to_rest(documentation(public))]
    return [f".. py:{kind}:: {public.path}{signature.replace(chr(39), '')}", "", *text, ""]


class Code(SphinxRole):
    """Text in single backquotes: code, and a link where it is the name of something public."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        """Return the code, and if it is a name a reference around it."""
        return [linked(nodes.literal(self.rawtext, self.text, classes=["code"]))], []


class LinkNames(SphinxTransform):
    """The same in Markdown, which has no roles for single backquotes, for names with a dot, such as `lt.Dense`."""

    default_priority = 400

    def apply(self, **kwargs: Any) -> None:
        """Put references around the names of one page."""
        for code in list(self.document.findall(nodes.literal)):
            if "code" not in code["classes"] and "." in code.astext() and not isinstance(code.parent, LINKS):
                code.replace_self(linked(code.deepcopy()))


def linked(code: nodes.literal) -> nodes.Element:
    """Return a piece of code, with a reference around it if it is the name of something public."""
    path = target(code.astext())
    if path is None:
        return code
    return addnodes.pending_xref("", code, refdomain="py", reftype="obj", reftarget=path, refexplicit=True)


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


def sign(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """Show the constructor of a class whose `__new__` takes anything, and functions as defaults by their names."""
    if what == "class" and re.fullmatch(r"\(\*args: \S+, \*\*kwargs: \S+\)", signature or ""):
        found = signature_of(obj.__init__, bound_method=True)
        signature = stringify_signature(found, show_return_annotation=False, unqualified_typehints=True)
    return signature and re.sub(r"<function (\w+)[^>]*>", r"\1", signature), returns


def link_types(app: Sphinx, env: Any, node: addnodes.pending_xref, contnode: nodes.Element) -> nodes.Node | None:
    """Resolve the types in signatures, which name the private file that a class is in."""
    path = UNIQUE.get(node.get("reftarget", "").rsplit(".", 1)[-1])
    if node.get("refdomain") != "py" or path is None or path == node["reftarget"]:
        return None
    domain = env.domains["py"]
    return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", path, node, contnode)


def mend_paths(app: Sphinx, docname: str, source: list[str]) -> None:
    """Say `examples/output/x.png` where an example printed a whole path; of files outside of the site say the name."""
    source[0] = source[0].replace(f"{app.srcdir.parent}/", "")
    for outside, page in INCLUDED.items():
        source[0] = source[0].replace(f"]({outside})", f"]({page})")
    source[0] = re.sub(r"\[[^\]]*\]\(\.\./([\w./]+)\)", r"`\1`", source[0])


class TutorialOrder:
    """Sort the tutorials: those to begin with first, then those that are not named here, the one for clusters last."""

    FIRST = ("basics", "polynomial_fitting", "digits", "own_layer", "ensemble_digits", "neural_ode", "pinn_heat")
    LAST = ("ddp_digits", "tensor_parallel")

    def __init__(self, src_dir: str) -> None:
        pass

    def __call__(self, filename: str) -> tuple[int, int, str]:
        """Return what to sort a file by."""
        name = filename.removesuffix(".py")
        return name in self.LAST, self.FIRST.index(name) if name in self.FIRST else len(self.FIRST), name


def name_file(gallery_conf: dict[str, Any], fname: str) -> None:
    """Let the next example find its folder by `__file__`, which sphinx-gallery does not define."""
    folder = Path(gallery_conf["src_dir"], gallery_conf["examples_dirs"][0])
    builtins.__file__ = str((folder / fname).resolve())


def setup(app: Sphinx) -> dict[str, Any]:
    """Register all of it."""
    app.add_directive("reference", Reference)
    app.add_role("lux", Code())
    app.add_transform(LinkNames)
    app.connect("autodoc-process-docstring", convert)
    app.connect("autodoc-process-signature", sign)
    app.connect("missing-reference", link_types)
    app.connect("source-read", mend_paths)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
