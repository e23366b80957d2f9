"""The guides: every block of Python runs, prints what the page says, and names only what there is."""

from __future__ import annotations

import doctest
import importlib
import re
import sys
import types
from pathlib import Path

import pytest

import luxtorch as lt

ROOT = Path(__file__).parents[2]
# Pages whose blocks another test runs, because there is more to compare.
ELSEWHERE = {"from_torch": "tests/interop/test_guide.py", "performance": "tests/benchmarks/test_performance_page.py"}
NAME = re.compile(r"(?<![\w.])(lt|luxtorch|optim|training|distributed)((?:\.[A-Za-z]\w*)+)")
WIDTH = 88  # as in examples/ruff.toml
NOT_RUN = {"julia", "sh", "text", "{include}", "{toctree}"}


def blocks(text):
    """Return the fenced blocks of a page: the language, the code, and the line that it starts in."""
    return [
        (fence[1].strip(), fence[2], text[: fence.start(2)].count("\n"))
        for fence in re.finditer(r"^```+(\S*)[^\n]*\n(.*?)^```", text, re.M | re.S)
    ]


PAGES = {path.stem: blocks(path.read_text()) for path in sorted((ROOT / "docs").glob("*.md"))}
WITH_CODE = [name for name, found in PAGES.items() if {language for language, *_ in found} - {"{include}", "{toctree}"}]


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Return a function that runs the blocks of a page, one after another, as one module."""
    monkeypatch.chdir(tmp_path)

    def run(found, name):
        module = types.ModuleType(f"guide_{name}")
        monkeypatch.setitem(sys.modules, module.__name__, module)  # where pickle finds the classes of a page
        run_blocks(found, name, vars(module))

    return run


def run_blocks(found, name, scope):
    for language, code, line in found:
        if language == "python":
            exec(compile("\n" * line + code, f"{name}.md", "exec", dont_inherit=True), scope)
        elif language == "pycon":
            test = doctest.DocTestParser().get_doctest(code, scope, name, f"{name}.md", line)
            runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS)
            report: list[str] = []
            runner.run(test, out=report.append, clear_globs=False)
            assert not runner.failures, "".join(report)
            scope.update(test.globs)
        else:
            assert language in NOT_RUN, f"{name}.md, line {line}: what is a block of {language!r}?"


@pytest.mark.parametrize("name", [name for name in WITH_CODE if name not in ELSEWHERE])
def test_every_block_runs(run, name):
    run(PAGES[name], name)


@pytest.mark.parametrize("name", ELSEWHERE)
def test_what_is_run_elsewhere_is(name):
    assert f"{name}.md" in (ROOT / ELSEWHERE[name]).read_text()


@pytest.mark.parametrize("block", [("python", "assert False\n", 0), ("pycon", ">>> 1\n2\n", 0), ("perl", "", 0)])
def test_a_broken_block_is_noticed(run, block):
    with pytest.raises(AssertionError):
        run([block], "page")


@pytest.mark.parametrize("name", WITH_CODE)
def test_code_fits_the_column(name):
    code = [
        (line + i, text)
        for language, block, line in PAGES[name]
        for i, text in enumerate(block.splitlines(), 1)
        if language == "python" or (language == "pycon" and text.startswith((">>>", "...")))
    ]
    assert not [(line, text) for line, text in code if len(text) > WIDTH]


@pytest.mark.parametrize("path", sorted((ROOT / "docs").glob("*.md")), ids=lambda path: path.stem)
def test_every_name_of_luxtorch_exists(path):
    for code in re.findall(r"`([^`\n]+)`", path.read_text()):
        for folder, names in NAME.findall(code):
            found = lt if folder in ("lt", "luxtorch") else importlib.import_module(f"luxtorch.{folder}")
            for name in names[1:].split("."):
                assert hasattr(found, name), f"{path.name}: {folder}{names}"
                found = getattr(found, name)
