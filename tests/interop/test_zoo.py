"""Architectures of other libraries keep the laws as layers; the table of it stands in docs/drop_in.md.

They are checked where the libraries are installed: the extra `interop-test`, or `make test-interop`.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest

from . import zoo_laws
from .zoo import ZOO
from .zoo_laws import LAWS

pytestmark = pytest.mark.filterwarnings("ignore")  # what these libraries say is their affair
PAGE = Path(__file__).parents[2] / "docs" / "drop_in.md"


@pytest.fixture
def subject(name):
    case = ZOO[name]
    pytest.importorskip(case.package, exc_type=ImportError)
    return zoo_laws.subject_of(case)


@pytest.mark.slow
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("name", ZOO)
def test_laws(subject, name, law):
    if law in ZOO[name].limits:
        pytest.skip(f"torch: {ZOO[name].limits[law]}")
    LAWS[law][0](subject)


@pytest.mark.slow
@pytest.mark.parametrize("name, law", [(name, law) for name, case in ZOO.items() for law in case.limits])
def test_limits_are_those_of_torch(subject, name, law):
    with pytest.raises(Exception):  # noqa: B017  # torch says each in words of its own
        LAWS[law][1](subject)


def page():
    """Return the table: for each architecture which laws are checked."""
    marks = defaultdict(dict)
    for case in ZOO.values():
        for reason in case.limits.values():
            marks.setdefault(reason, len(marks) + 1)
    yield "| architecture | " + " | ".join(LAWS) + " |"
    yield "| --- |" + " :---: |" * len(LAWS)
    for name, case in ZOO.items():
        cells = (str(marks[case.limits[law]]) if law in case.limits else "✓" for law in LAWS)
        yield f"| {name} | " + " | ".join(cells) + " |"
    yield "\nWhat torch itself cannot do there:\n"
    yield from (f"{number}. {reason}." for reason, number in marks.items())


def test_the_table_is_the_one_in_the_documentation():
    text = "\n".join(page())
    print(text)
    if not PAGE.exists() or text not in PAGE.read_text():
        pytest.fail(f"Paste this into docs/{PAGE.name}:\n{text}")
