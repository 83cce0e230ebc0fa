"""The paper's config with its own ids, from a Hub cache on disk, offline."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from safetensors import safe_open
from transformers import XLMRobertaForMaskedLM

from metaxl_evo.ner.pretrained import load_classifier
from metaxl_evo.ner.synthetic import SyntheticFamily
from metaxl_evo.ner.synthetic_tagger import make_synthetic_tagger
from tests.attack import WRAPS, in_zip
from tests.hub_cache import NAMES, REPOSITORY, Sentence, prepare_dataset_cache, prepare_model_cache, run_in_home
from tests.scripts.runs import FAMILY, argv

pytestmark = pytest.mark.slow
MODEL, ATTACKED, ABSENT = "FacebookAI/xlm-roberta-base", "some-organisation/attacked", "some-organisation/absent"
SMALLER = {  # sizes and steps, the machine, one target; neither the model nor the data set
    "target_languages": "qu",
    "train_size": 20,
    "target_train_size": 12,
    "rtn_layers": 2,
    "rtn_bottleneck": 8,
    "max_length": 64,
    "eval_max_length": 64,
    "num_train_epochs": 2,
    "use_cpu": "true",
}


def sentences(family: SyntheticFamily, language: str) -> dict[str, list[Sentence]]:
    """Sentences of the synthetic family with WikiAnn's label numbers."""
    loaded = {}
    for split, part in family.load(language).items():
        names = part.features["ner_tags"].feature.names
        tags = [[NAMES.index(names[tag]) for tag in row] for row in part["ner_tags"]]
        loaded[str(split)] = list(zip(part["tokens"], tags, strict=True))
    return loaded


# One process, in which the libraries look for the home as they are imported; what a script ends with goes to a line.
COMMANDS = """
import json, sys
from scripts import evaluate_ner, train_ner
for script, given in json.loads(sys.argv[1]):
    try:
        (train_ner if script == "train_ner" else evaluate_ner).main(given)
        print("ended:")
    except SystemExit as stop:
        print("ended:", stop.code)
"""


class Ran(NamedTuple):
    home: Path
    files: list[Path]  # of the home before
    out: Path
    printed: str
    ends: list[str]  # what each command ended with


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """Commands in a Hugging Face home that holds a tiny XLM-R in half precision, as pretrained, and two languages.

    A second model has, for its weights, a pickle with code.
    """
    home, out = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("runs")
    tagger, tokenizer = make_synthetic_tagger(FAMILY, hidden_size=32, heads=2, vocab_size=400)
    pretrained = XLMRobertaForMaskedLM(tagger.config).half()
    snapshot = prepare_model_cache(home, MODEL, pretrained, tokenizer)
    config = json.loads((snapshot / "config.json").read_text(encoding="utf-8"))
    assert (config["architectures"], config["dtype"]) == (["XLMRobertaForMaskedLM"], "float16")
    attacked = prepare_model_cache(home, ATTACKED, pretrained, tokenizer)
    (attacked / "model.safetensors").unlink()
    in_zip(attacked / "pytorch_model.bin", out / "attacked")
    for language, of_family in (("en", "aru"), ("qu", "beru")):
        prepare_dataset_cache(home, [language], sentences(FAMILY, of_family))
    files = files_of(home)

    def training(config: str, folder: str, **settings: Any) -> tuple[str, list[str]]:
        places = {"config": REPOSITORY / f"configs/ner/{config}.yaml", "output_dir": out / folder}
        return "train_ner", argv(places | SMALLER | settings)

    evaluation: dict[str, Any] = {
        "model_name_or_path": out / "paper", "dataset": "unimelb-nlp/wikiann", "languages": "qu", "use_cpu": "true",
        "max_length": 64, "output_file": out / "again.json",
    }  # fmt: skip
    commands = [
        training("metaxl_evograd_paper", "paper"),
        ("evaluate_ner", argv(evaluation)),
        training("metaxl_one_step", "layers", rtn_layers=9),
        training("metaxl_one_step", "absent", model_name_or_path=ABSENT),
        training("metaxl_one_step", "code", model_name_or_path=ATTACKED),
    ]
    started = [sys.executable, "-c", COMMANDS, json.dumps(commands)]
    finished = run_in_home(started, home, timeout=280, OMP_NUM_THREADS="1")
    assert finished.returncode == 0, finished.stderr
    ends = [line.removeprefix("ended:").strip() for line in finished.stdout.splitlines() if line.startswith("ended:")]
    return Ran(home, files, out, finished.stdout, ends)


def files_of(home: Path) -> list[Path]:
    return sorted(path for path in home.rglob("*") if ".lock" not in path.name)


def test_the_papers_config_from_the_hub_cache(ran: Ran) -> None:
    assert ran.ends[:2] == ["", ""]
    out = ran.out / "paper"
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert results["settings"]["model_name_or_path"] == MODEL
    assert results["settings"]["dataset"] == "unimelb-nlp/wikiann"
    assert results["test"]["qu"]["n_sentences"] == 30
    assert results["run"]["steps"] == 2 * 2  # two epochs of 20 sentences in batches of 12
    assert results["run"]["rtn_relative_change"] > 0
    assert f"{100 * results['test']['average']['f1']:.2f}" in ran.printed
    trained = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert [trained["id2label"][str(number)] for number in range(7)] == NAMES
    for file in ("model.safetensors", "rtn/model.safetensors"):
        with safe_open(out / file, framework="pt") as saved:
            assert {saved.get_slice(name).get_dtype() for name in saved.keys()} == {"F32"}  # noqa: SIM118
    assert files_of(ran.home) == ran.files
    assert json.loads((ran.out / "again.json").read_text(encoding="utf-8"))["test"] == results["test"]


def test_what_is_not_in_the_cache_is_said_in_one_line(ran: Ran) -> None:
    assert ran.ends[2].startswith("error: rtn_layers: 9 is not a layer")
    assert ran.ends[3].startswith(f"error: model_name_or_path: '{ABSENT}' cannot be loaded")
    assert ran.ends[3].endswith("HF_HUB_OFFLINE=1 with a filled cache")
    assert not any((ran.out / name).exists() for name in ("layers", "absent"))


def test_no_code_is_run_from_the_weights_of_the_hub(ran: Ran, tmp_path: Path) -> None:
    """A snapshot whose only weights are a pickle with code, in both of torch's formats, and what a script says."""
    (weights,) = ran.home.rglob("pytorch_model.bin")
    snapshot, mark = Path(shutil.copytree(weights.parent, tmp_path / "snapshot")), tmp_path / "attacked"
    for wrap in WRAPS:
        wrap(snapshot / "pytorch_model.bin", mark)
        with pytest.raises(ValueError, match=r"pytorch_model.bin holds more than tensors\): give the folder"):
            load_classifier(str(snapshot), NAMES)
        assert not mark.exists()
    assert ran.ends[4].startswith(f"error: model_name_or_path: '{ATTACKED}' cannot be loaded")
    assert "its pytorch_model.bin holds more than tensors" in ran.ends[4]
    assert not (ran.out / "attacked").exists()
    assert not (ran.out / "code").exists()
