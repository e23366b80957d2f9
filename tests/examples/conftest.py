"""Running a copy of an example, with smaller numbers if there is no time."""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def run_example(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Return a function that runs an example elsewhere, and returns what it ends with.

    Capital names at the top of an example are its settings: `run_example("maml_sinusoid", STEPS=30)` changes one.
    """

    def run(name: str, *, picture: bool = True, **settings: Any) -> dict[str, Any]:
        source = (EXAMPLES / f"{name}.py").read_text()
        for setting, value in settings.items():
            line = re.search(rf"^((?:[A-Z]+, )*)({setting})((?:, [A-Z]+)*) = .*$", source, re.MULTILINE)
            assert line, f"{name} has no setting {setting}"
            source = source.replace(line[0], f"{line[0]}\n{setting} = {value!r}", 1)
        copy = tmp_path / f"{name}.py"
        copy.write_text(source)
        result = runpy.run_path(str(copy))
        if picture:
            assert (tmp_path / "output" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        return result

    return run
