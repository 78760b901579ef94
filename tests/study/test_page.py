"""The page as raters meet it: in a real browser, from a file, without a network, by keyboard and by touch."""

from __future__ import annotations

import base64
import io
import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, Page, expect

from personalize_core.study import page as pages
from personalize_core.study.answers import read
from personalize_core.study.design import Key, Request
from personalize_core.study.results import evaluate
from personalize_core.workspace.store import Store
from tests import browser as browsers
from tests.browser import PATIENCE, watched
from tests.study import workspace as small

pytestmark = browsers.needed
PHONE = {"viewport": {"width": 360, "height": 740}, "is_mobile": True, "has_touch": True}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with browsers.running() as running:
        yield running


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return small.make(tmp_path_factory.mktemp("workspace"))


@pytest.fixture(scope="module")
def written(store: Store, tmp_path_factory: pytest.TempPathFactory) -> pages.Written:
    """Two questions, two comparisons, eight answers."""
    request = Request(variants=list(small.VARIANTS), per_rater=8)
    return pages.write(store, request, tmp_path_factory.mktemp("studies") / "papers")


@pytest.fixture(scope="module")
def forced(store: Store, tmp_path_factory: pytest.TempPathFactory) -> pages.Written:
    """AttnDreamBooth's one question."""
    request = Request(variants=list(small.VARIANTS[:2]), questions=["both"], per_rater=4)
    return pages.write(store, request, tmp_path_factory.mktemp("studies") / "forced")


@pytest.fixture
def rater(browser: Browser) -> Iterator[BrowserContext]:
    """A desktop computer without a network."""
    context = browser.new_context(offline=True, viewport={"width": 1280, "height": 800})
    yield from watched(context)


@pytest.fixture
def telephone(browser: Browser) -> Iterator[BrowserContext]:
    yield from watched(browser.new_context(offline=True, **PHONE))


def opened(context: BrowserContext, written: pages.Written) -> Page:
    page = context.new_page()
    page.goto(written.page.as_uri())
    return page


def shown(page: Page, at: int) -> None:
    """Wait until question `at` (from 0) may be answered: both images stand there, and not only just now."""
    expect(page.locator("#place")).to_have_text(f"{at + 1} of {page.evaluate('plan.length')}", timeout=PATIENCE)
    until = time.monotonic() + PATIENCE / 1000
    while not page.evaluate("ready && performance.now() - shownAt > TOO_SOON"):  # wait_for_function needs eval
        assert time.monotonic() < until
        page.wait_for_timeout(50)


def downloaded(page: Page) -> dict:
    with page.expect_download() as waiting:
        page.get_by_role("button", name="Download answers").click()
    path = waiting.value.path()
    assert waiting.value.suggested_filename.startswith("answers_")
    return json.loads(Path(path).read_text())


def counted(values: dict, written: pages.Written, folder: Path):
    path = folder / "answers.json"
    path.write_text(json.dumps(values))
    key = Key.read(written.key_file)
    table, files = read([path], key)
    return table, evaluate(key, table, files, draws=200)


def pixels(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).convert("RGB"))


def test_a_whole_study_by_keyboard(rater, written, tmp_path):
    page = opened(rater, written)
    assert "8 questions" in page.locator("#start").inner_text()
    page.get_by_label("Your name or initials").fill("Ana")
    page.keyboard.press("Enter")
    presses = ["ArrowLeft", "ArrowRight", "ArrowDown", "ArrowLeft"] * 2
    first_variant_chosen, key = [], written.key
    for at, press in enumerate(presses):
        if at in (0, 4):
            expect(page.locator("#introduction")).to_be_visible(timeout=PATIENCE)
            page.keyboard.press("Tab")
            page.keyboard.press("Enter")
        shown(page, at)
        # what lies before the rater is what the key says, pixel for pixel
        row = page.evaluate("plan[state.answers.length]")
        for side in ("left", "right"):
            image = key.images[row[side]]
            cell = key.cells[image.cell]
            place = key.concepts[cell.concept].name, cell.prompt_index, cell.image_index
            source = page.locator(f"#{side} img").get_attribute("src")
            assert source and np.array_equal(pixels(source), small.pixels_of(image.variant, *place))
        question = written.key.questions[row["kind"]]
        assert page.locator("#text").is_visible() == (question == "text")
        assert page.locator("#concept_images img").count() == (0 if question == "text" else 3)
        chosen = {"ArrowLeft": row["left"], "ArrowRight": row["right"]}.get(press)
        first_variant_chosen.append(chosen if chosen is None else key.images[chosen].variant == small.VARIANTS[0])
        page.keyboard.press(press)
    expect(page.get_by_role("heading", name="Thank you")).to_be_visible(timeout=PATIENCE)

    values = downloaded(page)
    assert values["name"] == "Ana" and len(values["answers"]) == 8
    assert all(0.2 < answer["seconds"] < 60 for answer in values["answers"])
    table, results = counted(values, written, tmp_path)
    preferred = {"first": True, "second": False, "not sure": None}
    assert [preferred[value] for value in table["preferred"]] == first_variant_chosen
    assert results.table["n"].sum() == 6 and results.table["not_sure"].sum() == 2
    assert not results.by_people, "a browser that a program drives is no person"


def test_a_whole_study_by_touch_on_a_telephone_with_a_reload_in_the_middle(telephone, forced, tmp_path):
    page = opened(telephone, forced)
    page.get_by_role("button", name="Begin").tap()
    page.get_by_role("button", name="Continue").tap()
    for at in range(4):
        if at == 2:
            before = page.evaluate("plan")
            page.reload()
            assert "2 of 4 are answered" in page.locator("#start").inner_text()
            page.get_by_role("button", name="Go on").tap()
            assert page.evaluate("plan") == before
        shown(page, at)
        assert not page.get_by_role("button", name="Not sure").is_visible(), "a forced choice"
        page.keyboard.press("ArrowDown")
        shown(page, at)
        inside = page.evaluate(
            "[...document.querySelectorAll('.pair button, #concept_images img, #text')].every((e) => {"
            "const b = e.getBoundingClientRect(); return b.left >= 0 && b.right <= innerWidth && b.width > 40 &&"
            "b.bottom <= innerHeight && b.top >= 0})"
        )
        assert inside, "everything that a choice needs stands on one screen"
        page.get_by_role("button", name=["Left image", "Right image"][at % 2]).tap()
    expect(page.get_by_role("heading", name="Thank you")).to_be_visible(timeout=PATIENCE)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    values = downloaded(page)
    assert [answer["answer"] for answer in values["answers"]] == ["left", "right"] * 2
    assert json.loads(page.get_by_label("Your answers, as text").input_value())["answers"] == values["answers"]
    table, _ = counted(values, forced, tmp_path)
    assert table["question"].to_list() == ["both"] * 4


def test_every_plan_is_balanced_and_shows_no_pair_twice(rater, written):
    page = opened(rater, written)
    key, places, firsts = written.key, Counter(), Counter()
    cells, each = len(key.cells), key.each
    for number in range(200):
        plan = page.evaluate("(rater) => planFor(rater)", f"rater {number}")
        assert plan == page.evaluate("(rater) => planFor(rater)", f"rater {number}")
        assert len(plan) == key.questions_per_rater
        assert len({row["pair"] for row in plan}) == len(plan)
        assert len({row["pair"] % cells for row in plan}) == len(plan), "nor one cell, while there are enough"
        for kind in range(2):
            of_kind = [at for at, row in enumerate(plan) if row["kind"] == kind]
            assert of_kind[-1] - of_kind[0] == len(of_kind) - 1, "one question after the other"
            for comparison in range(2):
                rows = [row for row in plan if row["kind"] == kind and row["pair"] // cells == comparison]
                on_left = [key.pairs()[row["pair"]][0] == row["left"] for row in rows]
                assert len(rows) == each and sum(on_left) == each / 2
        assert abs(sum(key.cells[row["cell"]].concept for row in plan) - len(plan) / 2) <= 1
        places.update(row["pair"] for row in plan)
        firsts[plan[0]["kind"], plan[0]["pair"] // cells] += 1
    # over raters: 200 x 8 answers over 48 pairs, 33.3 expected of each; 0 to 5.5 standard deviations away
    assert len(places) == 2 * cells and 33.3 - 30 < min(places.values()) and max(places.values()) < 33.3 + 30
    assert len(firsts) == 4 and min(firsts.values()) > 25, "which question and comparison comes first is random"


def test_a_second_tap_meant_for_the_image_before_and_a_held_key_are_no_answers(rater, written):
    page = opened(rater, written)
    page.get_by_role("button", name="Begin").click()
    page.get_by_role("button", name="Continue").click()
    shown(page, 0)
    page.get_by_role("button", name="Left image").dblclick()
    shown(page, 1)
    page.keyboard.down("ArrowLeft")
    shown(page, 2)
    page.keyboard.down("ArrowLeft")  # pressed still: a repeat
    page.keyboard.press("Control+ArrowLeft")
    shown(page, 2)
    assert page.evaluate("state.answers.length") == 2


def test_one_back_takes_an_answer_back_and_what_is_kept_follows(rater, written):
    page = opened(rater, written)
    page.get_by_role("button", name="Begin").click()
    page.get_by_role("button", name="Continue").click()
    for at in range(2):
        shown(page, at)
        page.keyboard.press("ArrowLeft")
    shown(page, 2)
    page.keyboard.press("Backspace")
    shown(page, 1)
    page.keyboard.press("ArrowRight")
    shown(page, 2)
    page.reload()
    page.get_by_role("button", name="Go on").click()
    page.get_by_role("button", name="Stop here").click()
    assert "2 of 8" in page.locator("#summary").inner_text()
    assert [answer["answer"] for answer in downloaded(page)["answers"]] == ["left", "right"]
    page.get_by_role("button", name="Go on answering").click()
    shown(page, 2)


def test_the_next_person_gets_a_plan_of_their_own_and_nothing_is_lost(rater, written):
    page = opened(rater, written)
    page.get_by_role("button", name="Begin").click()
    page.get_by_role("button", name="Continue").click()
    shown(page, 0)
    page.keyboard.press("ArrowLeft")
    page.get_by_role("button", name="Stop here").click()
    first = downloaded(page)
    page.get_by_role("button", name="Next person").click()
    page.get_by_role("button", name="Begin").click()
    assert page.evaluate("state.rater") != first["rater"] and page.evaluate("state.answers.length") == 0
    page.reload()
    page.get_by_text("Answers of others").click()
    with page.expect_download() as waiting:
        page.get_by_role("button", name="Download: without a name, 1 answers").click()
    again = json.loads(Path(waiting.value.path()).read_text())
    assert again["rater"] == first["rater"] and again["answers"] == first["answers"]


def test_a_browser_that_keeps_nothing_says_so_and_still_hands_in(rater, written):
    page = rater.new_page()
    page.add_init_script("Object.defineProperty(window, 'localStorage', {get() {throw new Error('no')}})")
    page.goto(written.page.as_uri())
    page.get_by_role("button", name="Begin").click()
    assert "keeps nothing" in page.get_by_role("alert").inner_text()
    page.get_by_role("button", name="Continue").click()
    shown(page, 0)
    page.keyboard.press("ArrowRight")
    page.get_by_role("button", name="Stop here").click()
    assert len(downloaded(page)["answers"]) == 1


def test_what_is_kept_in_the_browser_and_damaged_is_not_taken_for_answers(rater, written):
    page = opened(rater, written)
    page.evaluate('keep(NOW, \'abc\'); keep(keyOf(\'abc\'), \'{"rater": "abc", "answers": [{"pair": -1}]}\')')
    page.reload()
    assert page.evaluate("state.answers.length") == 0 and page.evaluate("state.rater") != "abc"


def test_everything_is_named_for_those_who_do_not_see_the_layout(rater, written):
    page = opened(rater, written)
    page.get_by_role("button", name="Begin").click()
    page.get_by_role("button", name="Continue").click()
    shown(page, 0)
    for name in ("Left image", "Right image", "Not sure", "Stop here"):
        assert page.get_by_role("button", name=name).is_visible()
    row = page.evaluate("plan[0]")
    said = page.locator("[aria-live]").inner_text()
    assert said.startswith("Question 1 of 8.") and page.get_by_role("heading", level=1).inner_text() in said
    if written.key.questions[row["kind"]] == "text":
        assert written.key.cells[row["cell"]].text in said
    page.get_by_role("button", name="Left image").focus()
    page.keyboard.press("Enter")
    shown(page, 1)
    assert page.evaluate("document.activeElement.id") == "left", "the hands stay where they were"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground_in_both_colour_schemes(browser, written, scheme):
    """WCAG 2.2, 1.4.3: a contrast of at least 4.5 to 1."""
    context = browser.new_context(color_scheme=scheme)
    page = opened(context, written)
    colours = page.evaluate(
        "Object.fromEntries(['page', 'card', 'ink', 'quiet', 'accent', 'on-accent'].map((name) => "
        "[name, getComputedStyle(document.documentElement).getPropertyValue('--' + name).trim()]))"
    )
    context.close()

    for ink, ground in [
        ("ink", "page"),
        ("ink", "card"),
        ("quiet", "page"),
        ("quiet", "card"),
        ("on-accent", "accent"),
    ]:
        assert browsers.contrast(colours[ink], colours[ground]) >= 4.5, (scheme, ink, ground)
