"""The report in a real browser: nothing is refused, everything is drawn, nothing sticks out."""

import shutil

import pytest
from distill.finished_run import finished_run
from distill.toy_run import toy_run

from otdd.distill.report import report, report_several

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
def pages(tmp_path_factory):
    """Of one run, and of two; with the number of pictures."""
    root = tmp_path_factory.mktemp("run")
    one = toy_run(root)
    about = {"data": str(root / "photos"), "train": {"epochs": 1, "losses": ["ce"]}}
    finished_run(root / "a run with quite a long name, of one image", ipc=1, seeds=1, **about)
    two = report_several([one, root / "a run with quite a long name, of one image"], root / "both")
    # accuracy, strips, curves, maps, labels and time; accuracies of two losses, strips of two runs
    return (report(one), 2 + 5 * 2 + 2 + 5 + 2), (two, 2 + 5 * 2 * 2)


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("number", [0, 1], ids=["one run", "two runs"])
def test_page_in_a_browser(browser, pages, number, width, scheme):
    page, pictures = pages[number]
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
    assert len(images) == pictures
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
