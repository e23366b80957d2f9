"""The example in the README prints what the README says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


def test_example_prints_what_the_readme_says(capsys: pytest.CaptureFixture[str]) -> None:
    found = re.search(r"```python\n(.*?)```\n\n```text\n(.*?)```", README.read_text(), re.DOTALL)
    assert found, "the README has no example with its output"
    exec(compile(found[1], README.name, "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out == found[2]
