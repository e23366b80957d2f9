"""A browser visits every page of the site that `make docs` has built: `make visit`.

Without a site, or without Chromium, there is nothing to visit, and the tests are skipped; `make visit` fails then.
"""

from __future__ import annotations

import functools
import os
import shutil
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urldefrag

import pytest

SITE = Path(__file__).parents[2] / "build" / "docs"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# Chromium as root has no sandbox; the rest keeps it from calling home.
OPTIONS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update")
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
PAGES = sorted(path.relative_to(SITE).as_posix() for path in SITE.rglob("*.html"))
# Pages that nothing has to lead to.
BY_THEMSELVES = {"genindex.html", "search.html", "py-modindex.html", "tutorials/sg_execution_times.html"}

pytestmark = pytest.mark.slow


def missing(what: str) -> None:
    """Fail if a visit was asked for, and skip otherwise."""
    if os.environ.get("VISIT"):
        pytest.fail(what)
    pytest.skip(what)


@pytest.fixture(scope="module")
def address():
    """Serve the site, and return where."""
    if not PAGES:
        missing("There is no site: run `make docs` first.")

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=SITE))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser():
    """Return a Chromium."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("Playwright is not installed: pip install 'luxtorch[docs]'.")
    found = next(filter(None, map(shutil.which, (os.environ.get("CHROMIUM", ""), *BROWSERS))), None)
    if found is None:
        missing("There is no Chromium: install the package `chromium`, or name one by CHROMIUM=...")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=OPTIONS)
        yield browser
        browser.close()


def failed(page, request):
    """Note a request without an answer, unless it was the window that did not wait for it."""
    if request.failure != "net::ERR_ABORTED":
        page.wrong.append(f"{request.failure}: {request.url}")


@pytest.fixture
def visit(browser, address):
    """Return a function that opens pages in one window, and collects what goes wrong there."""
    contexts = []

    def open_window(size, **options):
        context = browser.new_context(viewport=size, **options)
        contexts.append(context)
        page = context.new_page()
        page.wrong = []
        page.on(
            "console",
            lambda line: line.type in ("error", "warning") and page.wrong.append(f"{line.text} {line.location}"),
        )
        page.on("pageerror", lambda error: page.wrong.append(str(error)))
        page.on("requestfailed", lambda request: failed(page, request))
        page.on("response", lambda answer: answer.status >= 400 and page.wrong.append(f"{answer.status}: {answer.url}"))
        page.on(
            "request",
            lambda request: (
                request.url.startswith((address, "data:", "blob:"))
                or page.wrong.append(f"leaves the site: {request.url}")
            ),
        )
        return page

    yield open_window
    for context in contexts:
        context.close()


def test_every_page_is_whole(visit, address):
    window, links, places = visit(DESKTOP), {}, {}
    for name in PAGES:
        window.goto(f"{address}/{name}", wait_until="load")
        broken = window.evaluate(
            "async () => { const all = [...document.images]; for (const i of all) i.loading = 'eager';"
            " await Promise.all(all.map(i => i.decode().catch(() => 0)));"
            " return all.filter(i => !i.naturalWidth).map(i => i.src) }"
        )
        assert not broken, f"{name} has broken pictures: {broken}"
        assert window.locator("h1").count() or name == "search.html", f"{name} has no heading"
        found = window.evaluate("[...document.links].map(a => a.href)")
        links[name] = {link for link in found if link.startswith(address)}
        places[f"{address}/{name}"] = {
            "",
            *window.evaluate("[...document.querySelectorAll('[id],[name]')].map(e => e.id || e.getAttribute('name'))"),
        }
    dead = []
    for name, found in links.items():
        for link in found:
            target, place = urldefrag(link)
            if not (SITE / target.removeprefix(f"{address}/")).is_file() or place not in places.get(target, {place}):
                dead.append((name, link))
    assert not dead
    assert not window.wrong
    reached, waiting = set(), ["index.html"]
    while waiting:
        name = waiting.pop()
        reached.add(name)
        targets = {urldefrag(link)[0].removeprefix(f"{address}/") for link in links[name]}
        waiting += [target for target in targets if target in links and target not in reached and target not in waiting]
    assert set(PAGES) - reached <= BY_THEMSELVES, "nothing leads there"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_page_is_wider_than_a_phone(visit, address, scheme):
    window, wide = visit(PHONE, color_scheme=scheme, is_mobile=True, has_touch=True), []
    for name in PAGES:
        window.goto(f"{address}/{name}", wait_until="load")
        width = window.evaluate("document.scrollingElement.scrollWidth")
        if width > PHONE["width"]:
            wide.append((name, width))
    assert not wide
    assert not window.wrong


def test_the_way_by_clicks(visit, address):
    window = visit(DESKTOP)
    window.goto(f"{address}/index.html")
    for text, heading in (
        ("Tutorials", "Tutorials"),
        ("PyTorch and luxtorch for the uninitiated", "PyTorch and luxtorch for the uninitiated"),
        ("Guides", "Guides"),
        ("Randomness", "Randomness"),
        ("luxtorch", "luxtorch"),
    ):
        window.locator(".sidebar-drawer").get_by_role("link", name=text, exact=True).first.click()
        window.wait_for_load_state()
        assert window.locator("h1").first.inner_text().rstrip("#¶ ").startswith(heading)
    window.locator("a.next-page").click()
    window.wait_for_load_state()
    assert window.locator("h1").first.inner_text().startswith("Tutorials")
    assert not window.wrong


def test_the_menu_of_a_phone(visit, address):
    window = visit(PHONE, is_mobile=True, has_touch=True)
    window.goto(f"{address}/index.html")
    link = window.locator(".sidebar-drawer").get_by_role("link", name="Guides", exact=True).first
    assert not link.is_visible() or window.evaluate("e => e.getBoundingClientRect().right <= 0", link.element_handle())
    window.locator("label.nav-overlay-icon").first.click()
    link.click()
    window.wait_for_load_state()
    assert window.locator("h1").first.inner_text().startswith("Guides")
    assert not window.wrong


def test_the_switch_to_the_dark(visit, address):
    window = visit(DESKTOP, color_scheme="light")
    window.goto(f"{address}/index.html")

    def brightness():
        color = window.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(map(int, color.removeprefix("rgb(").removesuffix(")").split(",")[:3]))

    before = brightness()
    for _ in range(3):  # it goes round: automatic, light, dark
        window.locator("button.theme-toggle:visible").first.click()
        if window.evaluate("document.body.dataset.theme") == "dark":
            break
    assert before > 600 and brightness() < 200
    assert not window.wrong


def test_a_search_for_dropout(visit, address):
    window = visit(DESKTOP)
    window.goto(f"{address}/index.html")
    box = window.locator("input.sidebar-search")
    box.fill("dropout")
    box.press("Enter")
    window.wait_for_url("**/search.html?q=dropout*")
    results = window.locator("#search-results ul.search li a")
    results.first.wait_for()
    window.wait_for_function("document.querySelectorAll('#search-results ul.search li a').length > 5")
    assert any("Dropout" in text for text in results.all_inner_texts())
    results.first.click()
    window.wait_for_load_state()
    assert "dropout" in window.locator("article").inner_text().lower()
    assert not window.wrong
