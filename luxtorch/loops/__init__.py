"""Loops and implicit functions that every transform takes."""

from ._associative import associative_scan as associative_scan
