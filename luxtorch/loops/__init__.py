"""Loops, branches and maps that compile to one operator each, under every transform."""

from ._scan import scan as scan
