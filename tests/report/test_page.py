"""The page as people meet it: in a real browser, from a file, without a network, on a desk and on a telephone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, ViewportSize, expect

from personalize_core import steps
from tests import browser as browsers
from tests.report import workspace

pytestmark = browsers.needed
SIZES: dict[str, ViewportSize] = {"telephone": {"width": 390, "height": 844}, "desk": {"width": 1280, "height": 900}}


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    store = workspace.make(tmp_path_factory.mktemp("page") / "workspace")
    workspace.analysed(store, "textual_inversion", "rex")
    steps.compare(store)
    return steps.report(store).path


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with browsers.running() as running:
        yield running


@pytest.fixture(params=[(size, scheme) for size in SIZES for scheme in ("light", "dark")], ids="-".join)
def page(request, browser: Browser, path: Path) -> Iterator[Page]:
    """In which nothing may fail, complain or ask for anything outside its own file."""
    size, scheme = request.param
    context = browser.new_context(offline=True, viewport=SIZES[size], color_scheme=scheme, has_touch=size != "desk")
    for watched in browsers.watched(context):
        page = watched.new_page()
        page.goto(path.as_uri())
        yield page


def unfolded(page: Page) -> None:
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")


def test_nothing_is_wider_than_the_screen_folded_or_not(page):
    for unfold in (False, True):
        if unfold:
            unfolded(page)
        wide, screen = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert wide <= screen
        assert page.evaluate("document.body.scrollHeight") > 500


def test_every_section_is_named_on_the_screen_without_scrolling_for_it(page):
    ends = page.evaluate("[...document.querySelectorAll('nav a')].map((one) => one.getBoundingClientRect().right)")
    assert len(ends) >= 7 and max(ends) <= page.viewport_size["width"]


@pytest.mark.parametrize("page", [("desk", "light"), ("desk", "dark")], indirect=True, ids="-".join)
def test_scores_and_costs_are_not_cut_on_a_desk_and_no_row_is_as_tall_as_a_paragraph(page):
    hidden = "[...document.querySelectorAll('#scores > .scroll')].map((one) => one.scrollWidth - one.clientWidth)"
    assert page.evaluate(hidden) == [0, 0]
    unfolded(page)
    lines = "(one) => one.clientHeight / parseFloat(getComputedStyle(one).lineHeight)"
    rows = f"[...document.querySelectorAll('table:not(.images) td, table:not(.images) th')].map({lines})"
    assert max(page.evaluate(rows)) < 7


def test_a_name_with_underscores_is_broken_behind_them_alone(page):
    unfolded(page)
    name = page.locator("#table-every_measure th", has_text="clip_t_scaled").first
    assert name.text_content() == "clip_t_scaled" and name.locator("wbr").count() == 2


def test_every_image_is_there_before_anybody_scrolls_for_it(page):
    """Else print and screenshots have holes."""
    page.wait_for_load_state("load")
    assert page.evaluate("[...document.querySelectorAll('main img')].every((one) => one.complete && one.naturalWidth)")
    assert page.locator("main img").count() >= 2 * (3 + 3 * 8)


def test_a_image_is_enlarged_by_a_click_and_escape_closes_it(page):
    expect(page.locator("#large")).not_to_be_visible()
    small = page.locator("#grid-rex tbody tr").nth(1).locator("button").first
    before = small.locator("img").bounding_box()
    small.click()
    large = page.locator("#large-image")
    expect(large).to_be_visible()
    assert large.get_attribute("src") == small.locator("img").get_attribute("src")
    after = large.bounding_box()
    assert before and after and after["width"] > 2 * before["width"]
    assert page.locator("#large-references img").count() == 3, "the concept images stand beside it"
    caption = page.locator("#large-caption")
    assert "DreamBooth: a photo of a dog, noise 1" in caption.inner_text()
    page.keyboard.press("ArrowDown")
    assert "Textual Inversion: a photo of a dog, noise 1" in caption.inner_text(), "the same noise"
    page.keyboard.press("ArrowRight")
    assert "Textual Inversion: a photo of a dog, noise 2" in caption.inner_text()
    page.get_by_role("button", name="Up", exact=True).click()
    assert "DreamBooth: a photo of a dog, noise 2" in caption.inner_text()
    wide, screen = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert wide <= screen
    page.keyboard.press("Escape")
    expect(page.locator("#large")).not_to_be_visible()
    page.wait_for_function("document.activeElement.dataset.caption?.includes('noise 2')")  # the hands follow the eyes


def test_the_keyboard_alone_opens_a_image_and_closes_it(page):
    page.locator("#grid-cup .references button").first.focus()
    page.keyboard.press("Enter")
    expect(page.locator("#large-image")).to_be_visible()
    assert "cup, concept image 1" in page.locator("#large-caption").inner_text()
    page.keyboard.press("ArrowRight")
    assert "cup, concept image 2" in page.locator("#large-caption").inner_text()
    page.keyboard.press("ArrowDown")
    assert "cup, concept image 2" in page.locator("#large-caption").inner_text(), "there is nothing below"
    page.get_by_role("button", name="Close", exact=True).click()
    expect(page.locator("#large")).not_to_be_visible()


def test_the_plane_is_plotted_for_the_screen_that_it_is_on(page):
    wide = page.viewport_size["width"] > 640
    assert page.locator("figure.wide").is_visible() == wide
    assert page.locator("figure.narrow").is_visible() != wide
    if not wide:
        key = page.locator(".key li")
        assert [one.split()[0] for one in key.all_inner_texts()] == ["base", "DreamBooth", "Textual"]


def test_text_stands_out_from_its_ground_and_so_do_the_names_in_a_figure(page):
    """WCAG 2.2, 1.4.3: a contrast of at least 4.5 to 1."""
    names = ["page", "card", "ink", "quiet", "accent", *(f"series-{i}" for i in range(10))]
    script = f"{names}.map((name) => getComputedStyle(document.documentElement).getPropertyValue('--' + name).trim())"
    colours = dict(zip(names, page.evaluate(script), strict=True))
    for ground in ("page", "card"):
        for text in ("ink", "quiet", "accent"):
            assert browsers.contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
    for line in names[5:]:
        assert browsers.contrast(colours[line], colours["card"]) >= 4.5, line


def test_whoever_does_not_see_is_told_what_stands_there(page):
    unfolded(page)
    assert page.evaluate("[...document.querySelectorAll('main img')].every((one) => one.alt.length > 5)")
    assert page.evaluate("[...document.querySelectorAll('svg')].every((one) => one.getAttribute('aria-label'))")
    assert page.evaluate("document.querySelectorAll('h1').length") == 1
    nameless = (
        "[...document.querySelectorAll('button')].filter((one) => !(one.ariaLabel || one.querySelector('img[alt]')))"
    )
    assert page.evaluate(f"{nameless}.length") == 0
    expect(page.get_by_role("heading", name="Identity against text")).to_be_visible()


def test_a_link_to_a_method_unfolds_it_and_print_unfolds_all_on_white(page, path):
    page.goto(f"{path.as_uri()}#method-dreambooth")
    expect(page.locator("#method-dreambooth h4").first).to_be_visible()
    assert page.locator("#method-textual_inversion h4").first.is_visible() is False
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("#method-textual_inversion h4").first.is_visible()
    assert page.locator("nav").is_visible() is False
    ground = "getComputedStyle(document.documentElement).getPropertyValue('--card').trim()"
    assert page.evaluate(ground) == "#ffffff"
