"""What a release says of itself agrees: pyproject.toml, CHANGELOG.md, CITATION.cff, the tag and the metadata."""

from __future__ import annotations

import datetime
import os
import re
from importlib.metadata import metadata
from pathlib import Path

import pytest

import luxtorch as lt

ROOT = Path(__file__).parents[1]
HEADING = re.compile(r"^## \[(.*?)\](?: - (.*))?$", re.M)
RELEASES = [found for found in HEADING.findall((ROOT / "CHANGELOG.md").read_text()) if found[0] != "Unreleased"]


def field(text: str, name: str, separator: str) -> str:
    found = re.search(rf'^{name}{separator}"?(.*?)"?$', text, re.M)
    assert found, name
    return found[1]


def test_the_newest_release_is_this_version():
    newest, date = RELEASES[0]
    assert newest == lt.__version__ == field((ROOT / "pyproject.toml").read_text(), "version", " = ")
    citation = (ROOT / "CITATION.cff").read_text()
    assert (field(citation, "version", ": "), field(citation, "date-released", ": ")) == (newest, date)


def test_releases_come_in_order():
    numbers = [tuple(map(int, version.split("."))) for version, _ in RELEASES]
    dates = [datetime.date.fromisoformat(date) for _, date in RELEASES]
    assert numbers == sorted(numbers, reverse=True) and len(set(numbers)) == len(numbers) > 1
    assert dates == sorted(dates, reverse=True)


@pytest.mark.skipif("TAG" not in os.environ, reason="no tag is being released")
def test_the_tag_is_this_version():
    assert os.environ["TAG"] == f"v{lt.__version__}"


def test_the_metadata_says_what_is_supported_and_where_to_look():
    about = metadata("luxtorch")
    pythons = {line.rsplit(" ", 1)[1] for line in about.get_all("Classifier") or () if "Python :: 3." in line}
    assert about["Requires-Python"] == ">=" + min(pythons, key=lambda version: int(version.split(".")[1]))
    assert {line.split(",")[0] for line in about.get_all("Project-URL") or ()} >= {"Source", "Issues", "Changelog"}


@pytest.mark.skipif(not (ROOT / "Makefile").exists(), reason="the wheel is tested elsewhere")
def test_the_bounds_are_what_the_matrix_tests():
    matrix = field((ROOT / "Makefile").read_text(), "MATRIX", r" \?= ").split()
    (python, torch), (newest, _) = (one.split(":") for one in (matrix[0], matrix[-1]))
    about = metadata("luxtorch")
    assert about["Requires-Python"] == f">={python}"
    assert f"torch>={torch}" in (about.get_all("Requires-Dist") or ())
    assert f"Programming Language :: Python :: {newest}" in (about.get_all("Classifier") or ())
