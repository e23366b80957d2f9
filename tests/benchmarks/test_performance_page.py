"""The page on performance: its code runs, and its table is where the runner writes it."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import pytest

import luxtorch as lt

PAGE = (Path(__file__).parents[2] / "docs" / "performance.md").read_text()


def test_the_code_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(lt, "jit", functools.partial(lt.jit, backend="replay"))
    names: dict[str, Any] = {"__name__": "page"}
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.M | re.S)
    for block in (block for block in blocks if "set_num_threads" not in block):
        exec(compile(block, "performance.md", "exec"), names)
    assert names["step"].cache_info().hits == 3  # three steps and `lower` are one graph
    assert "aten.addmm" in capsys.readouterr().out


def test_the_table_has_its_place() -> None:
    report = pytest.importorskip("benchmarks.report")  # the wheel has no benchmarks
    assert "| new |" in report.replace_between(PAGE, "| new |")
