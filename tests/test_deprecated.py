"""Names that have moved go on working at their old place, and say where they are now."""

from __future__ import annotations

import pytest

import luxtorch as lt
from luxtorch import inspect, surgery
from luxtorch.core._renamed import moved

MOVED = "capture check_purity debug_mode summary DebugModel Impurity NonFiniteError Observation PurityReport Statistics"


@pytest.mark.parametrize("name", [*MOVED.split(), "Summary", "SummaryRow"])
def test_what_looks_into_models_has_moved_to_inspect(name):
    with pytest.warns(DeprecationWarning, match=rf"luxtorch.surgery.{name} has moved: use luxtorch.inspect.{name}."):
        old = getattr(surgery, name)
    assert old is getattr(inspect, name)


def test_the_warning_is_about_the_line_that_uses_the_old_name():
    with pytest.warns(DeprecationWarning) as warned:
        from luxtorch.surgery import summary
    assert summary is lt.summary and warned[0].filename == __file__


def test_other_names_are_missing_as_ever():
    with pytest.raises(AttributeError, match="module 'here' has no attribute 'nothing'"):
        moved("here", "something", to="there")("nothing")
    assert not hasattr(surgery, "nothing")
