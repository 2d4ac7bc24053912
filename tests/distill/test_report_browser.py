"""The report in a real browser: nothing is refused, everything is drawn, nothing sticks out."""

import shutil

import pytest
from distill.toy_run import toy_run

from otdd.distill.report import report

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-quic"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on the path")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=BROWSER, args=list(FLAGS))
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return report(toy_run(tmp_path_factory.mktemp("run")))


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_in_a_browser(browser, page, width, scheme):
    said, asked = [], []
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    tab = context.new_page()
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(page.as_uri())
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [page.as_uri()]
    images = tab.evaluate("[...document.images].map(i => [i.naturalWidth, i.clientWidth])")
    assert len(images) == 2 + 5 * 2 + 2 + 5 + 2  # accuracy, strips, curves, maps, labels and time
    assert all(natural > 0 and drawn > 0 for natural, drawn in images)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.evaluate("document.body.scrollWidth") <= width
    wide = tab.evaluate(
        "[...document.querySelectorAll('main *')].filter(e => !e.closest('.wide') &&"
        " e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 99))"
    )
    assert wide == []
    small = tab.evaluate(
        "[...document.querySelectorAll('p, td, th, figcaption, li')]"
        ".map(e => parseFloat(getComputedStyle(e).fontSize)).filter(size => size < 10)"
    )
    assert small == []
    context.close()
