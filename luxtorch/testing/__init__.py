"""Checks for authors of layers: `check_layer` and `check_derivatives`."""

from ._laws import check_layer as check_layer
from ._orders import check_derivatives as check_derivatives
from ._subject import LawError as LawError
