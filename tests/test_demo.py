"""The demo: two taggers side by side in a browser without a network; what it refuses."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from seqeval.metrics.sequence_labeling import get_entities

from metaxl_evo.demo import main
from metaxl_evo.ner.synthetic import SyntheticFamily
from metaxl_evo.ner.synthetic_tagger import make_synthetic_tagger
from scripts.predict_ner import main as predict

SENTENCE = "Doru vakemi  Tila , noge <b>x</b> sirabomelu Kana ."


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two taggers whose random weights make many entities, and not the same ones."""
    made = [tmp_path_factory.mktemp("demo") / name for name in ("one", "other")]
    for seed, folder in enumerate(made):
        base, tokenizer = make_synthetic_tagger(SyntheticFamily(), seed=seed)
        base.classifier.weight.data *= 20
        base.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return made


def expected(folder: Path, tmp_path: Path) -> list[list[str]]:
    """Words, type and mean confidence of each entity, by `predict_ner`, which reads words one by one."""
    text = tmp_path / "text"
    text.write_text(SENTENCE + "\n", encoding="utf-8")
    output = ["--output_file", str(tmp_path / f"{folder.name}.conll"), "--use_cpu", "true"]
    found = predict(["--model_name_or_path", str(folder), "--text_file", str(text), *output])
    words, (labels,), (scores,) = SENTENCE.split(), found.labels, found.confidences
    spans = [(kind, slice(first, last + 1)) for kind, first, last in get_entities(labels)]
    mean = [sum(filter(None, scores[span])) / len(scores[span]) for _, span in spans]
    return [[" ".join(words[span]), kind, f"{one:.3f}"] for (kind, span), one in zip(spans, mean, strict=True)]


@pytest.fixture(scope="module")
def address(folders: list[Path]) -> Iterator[str]:
    """Of the page, served by a command of its own."""
    pytest.importorskip("gradio", reason="needs the extra demo: pip install gradio")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "metaxl_evo.demo", *map(str, folders), "--port", str(port)]
    served = subprocess.Popen(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, stderr=subprocess.PIPE, text=True)
    try:
        yield answering(f"http://127.0.0.1:{port}/", served)
    finally:
        served.terminate()
        served.communicate()


def answering(address: str, served: subprocess.Popen[str]) -> str:
    for _ in range(400):
        assert served.poll() is None, served.communicate()[1]
        try:
            urlopen(address).close()
            return address
        except OSError:
            time.sleep(0.5)
    raise TimeoutError(address)


@pytest.fixture(scope="module")
def page(address: str) -> Iterator[Any]:
    """A browser at the page, which finds no other machine."""
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    nowhere = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1400,1000", nowhere):
        options.add_argument(argument)
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    try:
        browser.implicitly_wait(90)
        browser.get(address)
        yield browser
    finally:
        browser.quit()


@pytest.mark.slow
def test_a_sentence_is_tagged_by_both_runs(page: Any, folders: list[Path], tmp_path: Path) -> None:
    page.find_element("css selector", "textarea").send_keys(SENTENCE)
    next(one for one in page.find_elements("css selector", "button") if one.text == "Tag").click()
    found = [expected(folder, tmp_path) for folder in folders]
    assert found[0] != found[1]
    page.find_element("css selector", "[data-testid=cell-0-0]")  # when it has come, all has
    cells = [one.text for one in page.find_elements("css selector", "[role=gridcell]")]
    assert cells == [cell for entities in found for row in entities for cell in row]
    marked = page.find_elements("css selector", ".token.highlighted")
    assert [one.text for one in marked] == [words for entities in found for words, _, _ in entities]
    kinds = [kind for entities in found for _, kind, _ in entities]
    colours = {(kind, one.value_of_css_property("background-color")) for kind, one in zip(kinds, marked, strict=True)}
    assert len(colours) == len(set(kinds)) == len({colour for _, colour in colours})
    assert all(str(folder) in page.page_source for folder in folders)
    loaded = page.execute_script("return performance.getEntriesByType('resource').map(one => one.name)")
    assert [name for name in loaded if not name.startswith("http://127.0.0.1:")] == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "demo: name the folder of a trained tagger, or of two"),
        (["a", "b", "c"], "demo: name the folder"),
        (["a", "--port", "0"], "port must be between 1 and 65535, not 0"),
        (["a", "--share", "true"], "share"),
    ],
)
def test_what_cannot_be_shown_is_refused(argv: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        main(argv)
