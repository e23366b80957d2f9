"""Names of single elements."""

from __future__ import annotations

import pytest
import torch

from luxtorch.components import ComponentVector, label_to_index, labels
from luxtorch.core import KeyNameError


def test_labels(cv):
    names = labels(cv)
    assert names == labels(cv.axes)
    assert names[:3] == ["layer_1.weight[0, 0]", "layer_1.weight[0, 1]", "layer_1.weight[1, 0]"]
    assert names[8:10] == ["layer_1.bias[2]", "layer_2.inner.weight[0]"]
    assert names[-1] == "scale"
    assert labels(torch.stack([cv, cv])) == names


@pytest.mark.parametrize(
    ("label", "index"),
    [
        ("layer_1", slice(0, 9)),
        ("layer_1.weight", slice(0, 6)),
        ("relu", slice(9, 9)),
        ("scale", slice(12, 13)),
        ("layer_1.weight[2, 1]", 5),
        ("layer_1.weight[2,1]", 5),
        ("layer_2.inner.weight[0]", 9),
    ],
)
def test_label_to_index(cv, label, index):
    assert label_to_index(cv, label) == label_to_index(cv.axes, label) == index


@pytest.mark.parametrize(
    ("label", "problem"),
    [
        ("layer_1.wight", "Did you mean 'layer_1.weight'"),
        ("layer_1.wight[0, 0]", "Did you mean 'layer_1.weight'"),
        ("layer_1.weight[3, 0]", r"There is no element(.|\n)*shape is \(3, 2\)(.|\n)*\[3, 0\]"),
        ("layer_1.weight[0]", "There is no element"),
        ("layer_1[0]", "There is no element"),
        ("scale[0]", "There is no element"),
        ("scale[]", "There is no component"),
    ],
)
def test_labels_of_nothing(cv, label, problem):
    with pytest.raises(KeyNameError, match=problem):
        label_to_index(cv, label)


def test_a_component_with_brackets_in_its_name():
    cv = ComponentVector({"a[0]": torch.zeros(2), "b": torch.zeros(1)})
    assert label_to_index(cv, "a[0]") == slice(0, 2)
    assert label_to_index(cv, "a[0][1]") == 1
