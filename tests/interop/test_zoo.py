"""Architectures of other libraries keep the laws as layers; the table of it stands in docs/drop_in.md.

They are checked where the libraries are installed: the extra `interop-test`, or `make test-interop`.
"""

from __future__ import annotations

import pytest

from . import zoo_laws
from .zoo import FAULTS, ZOO
from .zoo_laws import LAWS

pytestmark = pytest.mark.filterwarnings("ignore")  # what these libraries say is their affair


@pytest.fixture
def subject(name):
    case = ZOO[name]
    pytest.importorskip(case.package, exc_type=ImportError)
    return zoo_laws.subject_of(case)


@pytest.mark.slow
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("name", ZOO)
def test_laws(request, subject, name, law):
    if (name, law) in FAULTS:
        request.applymarker(pytest.mark.xfail(reason=FAULTS[name, law], strict=True))
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
    marks = {}
    for case in ZOO.values():
        for reason in case.limits.values():
            marks.setdefault(reason, len(marks) + 1)
    yield "| architecture | " + " | ".join(LAWS) + " |"
    yield "| --- |" + " :---: |" * len(LAWS)
    for name, case in ZOO.items():
        own = {law: str(marks[reason]) for law, reason in case.limits.items()}
        cells = ("✗" if (name, law) in FAULTS else own.get(law, "✓") for law in LAWS)
        yield f"| {name} | " + " | ".join(cells) + " |"
    yield "\nWhat torch itself cannot do there:\n"
    yield from (f"{number}. {reason}." for reason, number in marks.items())
    yield "\nWhat torch can do there and luxtorch cannot yet:\n"
    yield from (f"- {name}, {law}: {reason}." for (name, law), reason in FAULTS.items())


def test_the_table_is_the_one_in_the_documentation(in_docs):
    in_docs("drop_in.md", "\n".join(page()))
