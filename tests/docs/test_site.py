"""The site: it builds without a warning, leads nowhere that is not there, and a broken example stops it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from public_names import everything

for package in ("sphinx", "sphinx_gallery", "myst_parser", "furo"):
    pytest.importorskip(package)

ROOT = Path(__file__).parents[2]
QUICK = r"/(basics|polynomial_fitting)\.py$"
WIDTH = "width=device-width"

pytestmark = pytest.mark.slow


def build(folder, *options):
    """Build the site of the folder `docs` in a folder, as `make docs` does; return the process."""
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-W", "--keep-going", *options, "docs", "site"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


class Page(HTMLParser):
    """What a page links to, what it loads, and the places in it that can be linked to."""

    def __init__(self, text):
        super().__init__()
        self.links, self.loads, self.places, self.meta = [], [], {""}, []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.places |= {attrs[key] for key in ("id", "name") if attrs.get(key)}
        if tag == "a" and "href" in attrs:
            self.links.append(attrs["href"])
        if tag in ("img", "script", "source", "iframe") and attrs.get("src"):
            self.loads.append(attrs["src"])
        if tag == "img":
            assert attrs.get("alt") is not None, f"a picture without words: {attrs['src']}"
        if tag == "link" and attrs.get("rel") in ("stylesheet", "icon", "preload", "shortcut icon"):
            self.loads.append(attrs["href"])
        if tag == "meta":
            self.meta.append(attrs.get("content") or "")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Return a folder with the site, for which two of the examples were run."""
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(ROOT / "docs", folder / "docs", ignore=shutil.ignore_patterns("tutorials", "__pycache__"))
    shutil.copytree(ROOT / "examples", folder / "examples", ignore=shutil.ignore_patterns("output", "__pycache__"))
    shutil.copy(ROOT / "README.md", folder)  # the home page shows a part of it
    (folder / "benchmarks").mkdir()
    for path in (*(ROOT / "benchmarks").glob("*.md"), *(ROOT / "benchmarks").glob("*.png")):
        shutil.copy(path, folder / "benchmarks")
    run = build(folder, "-D", f"sphinx_gallery_conf.filename_pattern={QUICK}")
    assert run.returncode == 0, run.stderr[-3000:]
    return folder / "site"


@pytest.fixture(scope="module")
def pages(site):
    return {path: Page(path.read_text()) for path in site.rglob("*.html")}


def test_there_is_a_page_for_everything(site):
    names = {path.stem for path in (ROOT / "docs").glob("*.md")}
    names |= {f"tutorials/{path.stem}" for path in (ROOT / "examples").glob("*.py")}
    names |= {f"api/{path.stem}" for path in (ROOT / "docs" / "api").glob("*.rst")}
    assert [name for name in sorted(names) if not (site / f"{name}.html").exists()] == []


def test_no_link_is_dead(pages):
    dead = []
    for path, page in pages.items():
        for link in page.links:
            url = urlsplit(link)
            target = (path.parent / unquote(url.path)).resolve() if url.path else path
            if url.scheme:
                assert url.scheme in ("http", "https"), link
            elif not target.exists() or (target in pages and unquote(url.fragment) not in pages[target].places):
                dead.append((path.name, link))
    assert dead == []


def test_everything_that_is_loaded_is_there_and_not_elsewhere(site, pages):
    for path, page in pages.items():
        for source in page.loads:
            assert not urlsplit(source).netloc, f"{path.name} loads {source}"
            assert (path.parent / unquote(urlsplit(source).path)).exists(), f"{path.name} lacks {source}"
    for style in site.rglob("*.css"):
        assert "url(http" not in style.read_text() and "@import" not in style.read_text(), style.name


def test_examples_were_run_and_drew(site):
    page = (site / "tutorials" / "basics.html").read_text()
    assert "22 of 22 figures agree" in page
    for name in ("basics", "polynomial_fitting"):
        assert (site / "_images" / f"sphx_glr_{name}_001.png").read_bytes().startswith(b"\x89PNG")


def test_no_page_tells_where_it_was_built(site):
    for path in site.rglob("*.html"):
        assert str(site.parent) not in path.read_text() and str(ROOT) not in path.read_text(), path.name


def test_pages_are_made_for_phones_and_for_the_dark(pages):
    for path, page in pages.items():
        assert any(WIDTH in content for content in page.meta), path.name
        assert "light dark" in page.meta, path.name


def test_the_search_knows_dropout(site):
    index = (site / "searchindex.js").read_text()
    assert '"dropout":' in index or "dropout:" in index


def test_every_public_name_has_an_entry(site):
    inventory = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    found = {line.split(" ")[0] for line in zlib.decompress(inventory).decode().splitlines()}
    assert set(everything()) <= found


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("print('a good one')", None),
        ("raise ValueError('one that is broken')", "one that is broken"),
        ("import sys\n\nsys.exit('figures are off')", "figures are off"),
    ],
)
def test_a_broken_example_stops_the_build(tmp_path, code, says):
    run = build_one(tmp_path, "one", code)
    if says is None:
        assert run.returncode == 0, run.stderr
        assert "a good one" in (tmp_path / "site" / "tutorials" / "one.html").read_text()
    else:
        assert run.returncode != 0
        assert says in run.stderr


@pytest.mark.skipif(find_spec("peft") is not None, reason="nothing is missing")
def test_an_example_whose_packages_are_missing_is_shown_only(tmp_path):
    run = build_one(tmp_path, "finetune_transformer", "import peft")
    assert run.returncode == 0, run.stderr
    assert "peft" in (tmp_path / "site" / "tutorials" / "finetune_transformer.html").read_text()


def build_one(tmp_path, name, code):
    """Build a site of one example."""
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "GALLERY_HEADER.rst").write_text("Tutorials\n=========\n")
    (tmp_path / "examples" / f"{name}.py").write_text(f'"""One\n===\n\nAn example.\n"""\n\n{code}\n')
    (tmp_path / "docs").mkdir()
    for name in ("conf.py", "_ext", "_static"):
        copy = shutil.copytree if (ROOT / "docs" / name).is_dir() else shutil.copy
        copy(ROOT / "docs" / name, tmp_path / "docs" / name)
    (tmp_path / "docs" / "index.md").write_text("# Site\n\n```{toctree}\ntutorials/index\n```\n")
    return build(tmp_path)
