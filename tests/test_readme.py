"""The examples in the README print what the README says."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import pytest

import luxtorch as lt

README = Path(__file__).parents[1] / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", README.read_text(), re.DOTALL)


def test_examples_print_what_the_readme_says(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lt, "jit", functools.partial(lt.jit, backend="replay"))  # a compiler would take its time
    names: dict[str, Any] = {"__name__": "__main__"}
    assert len(EXAMPLES) == 2
    for code, output in EXAMPLES:
        exec(compile(code, README.name, "exec"), names)
        assert capsys.readouterr().out == output


def test_lines_fit_the_column() -> None:
    assert not [line for code, _ in EXAMPLES for line in code.splitlines() if len(line) > 88]
