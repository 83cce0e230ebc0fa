"""The page of a study as a browser shows it, without a network."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from metaxl_evo.experiments.comparison import Comparison
from metaxl_evo.experiments.records import Record
from metaxl_evo.experiments.report import write_report

webdriver = pytest.importorskip("selenium.webdriver")
pytest.importorskip("plotly")
NO_NETWORK = "--host-resolver-rules=MAP * ~NOTFOUND"
ERROR = "stopped </script><script>document.title = 1</script>"
EVIL = "<b>x</b>&"
F1 = {"plain": 0.8, EVIL: 0.0, "meta": 0.12}  # on average 90, 5 and 17: of texts 17 would be the first


def study(folder: Path) -> Comparison:
    """Three methods, two cases, two seeds; one run failed."""
    records = []
    for run, f1 in F1.items():
        for case, seed in [(case, seed) for case in ("de", "sw") for seed in (0, 1)]:
            own = folder / f"runs/{list(F1).index(run)} 100%#" / case / str(seed)
            own.mkdir(parents=True)
            history = [{"step": step, "loss": 1 / step} for step in (1, 2, 3)]
            moved = [{"step": step, "meta_moved": step / 10} for step in (1, 2, 3)]
            if run == EVIL and case == "de":
                moved += [{"step": step, "eval <b>": step / 10} for step in (1, 3)]
            records.append(Record(run, case, seed, own, scores={"f1": f1 + seed / 10}, history=[*history, *moved]))
    records[0] = Record("plain", "de", 0, records[0].folder, error=ERROR)
    return Comparison(records, "f1", {"f1": "%"}, ["plain"], title="A <i>study</i>")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A browser at the page."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("needs chromium and chromedriver")
    folder = tmp_path_factory.mktemp("study")
    write_report(study(folder), folder / "report")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", NO_NETWORK):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    try:
        browser.get((folder / "report/report.html").as_uri())
        yield browser
    finally:
        browser.quit()


def texts(page: Any, selector: str) -> list[str]:
    """Of the elements, in their order."""
    return [one.text for one in page.find_elements("css selector", selector)]


def test_nothing_is_amiss_and_nothing_is_loaded(page: Any) -> None:
    assert [one for one in page.get_log("browser") if one["level"] == "SEVERE"] == []
    assert page.execute_script("return performance.getEntriesByType('resource').length") == 0


def test_names_and_errors_are_shown_as_they_are(page: Any) -> None:
    assert page.title == "A <i>study</i>"
    assert texts(page, "h1") == ["A <i>study</i>"]
    assert texts(page, ".failed dd") == [ERROR]
    assert EVIL in texts(page, ".scores td")
    assert EVIL in texts(page, "[data-chart='learning curves'] .legendtext")
    assert EVIL in texts(page, "[data-chart=scores] .ytick text")


def test_a_click_on_a_header_sorts_by_number(page: Any) -> None:
    (header,) = (one for one in page.find_elements("css selector", ".scores th button") if one.text == "average")
    column = ".scores tbody td:first-child"
    assert texts(page, column) == ["plain", EVIL, "meta"]
    header.click()
    assert texts(page, column) == [EVIL, "meta", "plain"]
    header.click()
    assert texts(page, column) == ["plain", "meta", EVIL]


def test_what_is_missing_is_sorted_last_in_either_direction(page: Any) -> None:
    header = page.find_element("css selector", ".runs th:nth-child(4) button")
    for _ in range(2):
        header.click()
        assert texts(page, ".runs tbody td:last-child") == ["finished"] * 11 + ["failed"]


def test_figures_are_drawn_and_another_column_is_chosen(page: Any) -> None:
    from selenium.webdriver.support.select import Select

    def drawn(chart: str, what: str) -> int:
        return len(page.find_elements("css selector", f"[data-chart='{chart}'] {what}"))

    assert drawn("scores", ".point") == 11 + 5 + 3 * 3  # runs, averages of seeds, means by run and panel
    assert texts(page, "[data-chart=scores] .annotation-text") == ["de", "sw", "average"]
    assert drawn("learning curves", ".scatterlayer .js-line") == 11
    assert drawn("meta parameters", ".scatterlayer .js-line") == 11
    curves = page.find_element("css selector", "[data-chart='learning curves']")
    choice = Select(curves.find_element("css selector", "select"))
    assert [option.text for option in choice.options] == ["loss", "eval <b>"]
    choice.select_by_visible_text("eval <b>")
    assert drawn("learning curves", ".scatterlayer .js-line") == 2
    assert "eval <b>" in texts(page, "[data-chart='learning curves'] .ytitle")


def test_a_dot_says_which_run_it_is(page: Any) -> None:
    dot = page.find_element("css selector", "[data-chart=scores] .point")
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", dot)
    webdriver.ActionChains(page).move_to_element(dot).perform()
    hover = page.find_element("css selector", "[data-chart=scores] .hovertext").text
    assert all(part in hover for part in ("run=plain", "case=de", "seed=1", "=90"))


def test_links_lead_to_the_runs(page: Any) -> None:
    links = [one.get_attribute("href") for one in page.find_elements("css selector", "a")]
    folders = [Path(unquote(urlsplit(link).path)) for link in links]
    assert len(set(folders)) == 12
    assert all(folder.is_dir() for folder in folders)
