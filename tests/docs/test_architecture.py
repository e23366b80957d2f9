"""The page about the architecture: its folders are those of the contract in setup.cfg, and its files exist."""

from __future__ import annotations

import configparser
import re
from pathlib import Path

import luxtorch

ROOT = Path(__file__).parents[2]
PACKAGE = Path(luxtorch.__file__).parent
PAGE = (ROOT / "docs" / "architecture.md").read_text()


def test_the_folders_stand_as_in_the_contract():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = setup["importlinter:contract:down"]["layers"].split("\n")
    contract = [{*re.findall(r"\w+", line)} for line in lines if line]
    block = PAGE.split("```text\n")[1].split("```")[0]
    shown = [{*line[:56].split()} for line in block.splitlines()]
    assert shown == contract


def test_the_files_exist():
    files = set(re.findall(r"`([\w/]+\.py)`", PAGE))
    missing = {file for file in files if not (ROOT / file if file.startswith("tests/") else PACKAGE / file).exists()}
    assert files and not missing
