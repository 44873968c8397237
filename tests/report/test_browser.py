"""Reports in a real browser, opened from the disk: no error, no request, charts, sorting, filters, a phone, the dark."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from balcap.report.page import write_report
from balcap.report.run import Run
from balcap.report.study import Arm, Claim, Study
from balcap.report.study_page import write_study
from tests.report_runs import write_run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
ODD = (
    "<script>throw 1</script>",
    "</script>",
    "a\u202eb",
    "<img src=x onerror=alert(1)>",
    "\x1b[31m",
    '"><b>',
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    offline = (
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--disable-component-update",
    )
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=list(offline))
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("reports")
    seeds = [write_run(folder / f"seed-{seed}", seed=seed, images=40) for seed in range(3)]
    failures = write_run(folder / "failures", failed=0.4, texts=ODD)
    runs = {"one": seeds[:1], "seeds": seeds, "failures": [failures]}
    return {
        name: write_report([Run.read(run) for run in of], folder / f"{name}.html")
        for name, of in runs.items()
    }


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Any]:
    """Opens a report from the disk; afterwards nothing may have gone wrong, and nothing may have been asked for."""
    wrong: list[str] = []
    pages: list[Page] = []

    def show(path: Path, scheme: Any = "light", phone: bool = False) -> Page:
        page = browser.new_page(
            viewport={"width": 390 if phone else 1200, "height": 900},
            color_scheme=scheme,
            is_mobile=phone,
            has_touch=phone,
        )
        pages.append(page)
        page.on("console", lambda message: wrong.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: wrong.append(dialog.message))
        page.on("request", lambda request: asked(request.url, path))
        page.goto(path.as_uri())
        return page

    def asked(url: str, path: Path) -> None:
        if url.partition("#")[0] != path.as_uri() and not url.startswith("data:"):
            wrong.append(f"asked for {url}")

    yield show
    for page in pages:
        page.close()
    assert wrong == []


def visible_cards(page: Page) -> list[dict[str, Any]]:
    return page.eval_on_selector_all(
        "#cards > .card",
        "cards => cards.filter(c => !c.hidden).map(c => ({...c.dataset, text: c.textContent}))",
    )


def draw_everything(page: Page) -> None:
    """Charts are drawn when they come into view."""
    for plot in page.locator(".plot").all():
        plot.scroll_into_view_if_needed()
        page.wait_for_selector(f".plot.js-plotly-plot[data-figure={plot.get_attribute('data-figure')}]")


@pytest.mark.parametrize("name", ["one", "seeds", "failures"])
def test_everything_is_drawn(open_page: Any, reports: dict[str, Path], name: str) -> None:
    page = open_page(reports[name])
    draw_everything(page)
    assert page.locator(".js-plotly-plot").count() == page.locator(".plot").count() > 15
    assert page.locator("#cards > .card:visible").count() == 12
    image = page.locator("#cards img").first
    image.scroll_into_view_if_needed()
    assert image.evaluate("async image => { await image.decode(); return image.naturalWidth; }") == 96


def test_the_report_that_a_fit_leaves(
    open_page: Any, fit_arguments: Callable[..., list[str]], cli: Callable[[list[str]], None], tmp_path: Path
) -> None:
    cli(fit_arguments(**{"trainer.max_steps": 2, "report.enabled": True}))
    page = open_page(tmp_path / "run/report.html")
    draw_everything(page)
    assert page.locator("#cards > .card:visible").count() == 4  # the held-out images, each with its picture
    assert page.locator("#cards > .card[data-kind=held-out] img").count() == 4
    assert "b-CapScore of held-out captions" in page.inner_text("header")


def test_sorting(open_page: Any, reports: dict[str, Path]) -> None:
    page = open_page(reports["one"])
    gains = sorted(float(card["gain"]) for card in all_cards(page, "held-out"))
    assert [float(card["gain"]) for card in visible_cards(page)] == gains[::-1][:12]
    page.select_option("select[name=sort]", "loss")
    assert [float(card["gain"]) for card in visible_cards(page)] == gains[:12]
    page.select_option("select[name=sort]", "tokens")
    tokens = sorted((int(card["tokens"]) for card in all_cards(page, "held-out")), reverse=True)
    assert [int(card["tokens"]) for card in visible_cards(page)] == tokens[:12]
    page.select_option("select[name=kind]", "group")  # sorted by disagreement
    spreads = sorted((float(card["spread"]) for card in all_cards(page, "group")), reverse=True)
    assert [float(card["spread"]) for card in visible_cards(page)] == spreads[:12]


def test_filters(open_page: Any, reports: dict[str, Path]) -> None:
    page = open_page(reports["failures"])
    everything = all_cards(page, "held-out")
    for flag in ("masked", "no", "unjudged"):
        page.check(f"input[name={flag}]")
        shown, expected = visible_cards(page), [c for c in everything if flag in c["flags"].split()]
        assert 0 < len(expected) < len(everything)
        assert {card["text"] for card in shown} <= {card["text"] for card in expected}
        assert page.inner_text("#count") == f"{len(expected)} of {len(everything)}"
        page.uncheck(f"input[name={flag}]")
    page.fill("input[name=text]", "coco/1/0004 DOG")
    assert [card["text"] for card in visible_cards(page)] == [
        c["text"] for c in everything if "coco/1/0004" in c["text"] and "dog" in c["text"].lower()
    ]
    page.fill("input[name=text]", "")
    page.click("#more")
    assert len(visible_cards(page)) == min(24, len(everything))


def all_cards(page: Page, kind: str) -> list[dict[str, Any]]:
    return page.eval_on_selector_all(
        f"#cards > .card[data-kind={kind}]", "cards => cards.map(c => ({...c.dataset, text: c.textContent}))"
    )


def test_texts_are_text(open_page: Any, reports: dict[str, Path]) -> None:
    page = open_page(reports["failures"])
    assert page.locator("#cards script, #cards b:text-is('bold'), #cards img[src='x']").count() == 0
    assert "<img src=x onerror=alert(1)>" in page.text_content("#cards")
    assert "a⟨U+202E⟩b" in page.text_content("#cards")


@pytest.mark.parametrize("name", ["one", "seeds"])
def test_on_a_phone_nothing_is_wider_than_the_screen(
    open_page: Any, reports: dict[str, Path], name: str
) -> None:
    page = open_page(reports[name], phone=True)
    draw_everything(page)
    assert page.evaluate("document.scrollingElement.scrollWidth") == 390


@pytest.mark.parametrize(("phone", "drag"), [(False, "zoom"), (True, False)], ids=["pointer", "touch"])
def test_the_tool_bar_of_a_chart_is_for_a_pointer(
    open_page: Any, reports: dict[str, Path], phone: bool, drag: object
) -> None:
    page = open_page(reports["one"], phone=phone)
    draw_everything(page)
    assert page.evaluate("document.querySelector('.js-plotly-plot').layout.dragmode") == drag
    bars = page.locator(".modebar-group")
    assert (bars.count() == 0) is phone
    if not phone:  # shown while the pointer is over the chart
        last = page.locator(".js-plotly-plot").last
        for x, opacity in ((10, "1"), (-10, "0")):
            box = last.bounding_box()
            page.mouse.move(box["x"] + x, box["y"] + 10)
            expect(last.locator(".modebar-group").first).to_have_css("opacity", opacity)


def test_light_and_dark(open_page: Any, reports: dict[str, Path]) -> None:
    page = open_page(reports["one"], scheme="dark")
    page.wait_for_selector(".js-plotly-plot")
    chart = "document.querySelector('.js-plotly-plot').layout.font.color"
    colours = f"[getComputedStyle(document.body).backgroundColor, {chart}]"
    dark = page.evaluate(colours)
    page.click("#theme")
    light = page.evaluate(colours)
    assert dark[0] != light[0]
    assert dark[1] != light[1]
    page.click("#theme")
    assert page.evaluate(colours) == dark


def test_the_page_of_a_study(open_page: Any, reports: dict[str, Path], tmp_path: Path) -> None:
    seeds = [Run.read(reports["one"].parent / f"seed-{seed}") for seed in range(3)]
    arms = [
        Arm("one", "One", dict(enumerate(seeds))),
        Arm("two", ODD[0], dict(enumerate([*seeds[1:], seeds[0]]))),
    ]
    claims = [Claim(ODD[3], "two", "val/recall")]
    study = Study("A question", arms, "one", claims, axes=("val/precision", "val/recall"))
    page = open_page(write_study(study, tmp_path)[3])
    draw_everything(page)
    assert page.locator(".js-plotly-plot").count() == len(study.measures) + 1
    assert page.locator("tbody th", has_text=ODD[0]).count() == 2
