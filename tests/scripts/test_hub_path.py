"""The paper's config with its own ids, from a Hub cache on disk, offline."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open
from transformers import XLMRobertaForMaskedLM

from metaxl_evo.ner.pretrained import load_classifier
from metaxl_evo.ner.synthetic import SyntheticFamily
from metaxl_evo.ner.synthetic_tagger import make_synthetic_tagger
from tests.attack import WRAPS
from tests.hub_cache import NAMES, REPOSITORY, Sentence, prepare_dataset_cache, prepare_model_cache, run_in_home
from tests.scripts.runs import FAMILY

MODEL = "FacebookAI/xlm-roberta-base"
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


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face home with a tiny XLM-R in half precision, as pretrained, and two configurations of WikiAnn."""
    home = tmp_path_factory.mktemp("home")
    tagger, tokenizer = make_synthetic_tagger(FAMILY, hidden_size=32, heads=2, vocab_size=400)
    pretrained = XLMRobertaForMaskedLM(tagger.config).half()
    snapshot = prepare_model_cache(home, MODEL, pretrained, tokenizer)
    config = json.loads((snapshot / "config.json").read_text(encoding="utf-8"))
    assert (config["architectures"], config["dtype"]) == (["XLMRobertaForMaskedLM"], "float16")
    for language, of_family in (("en", "aru"), ("qu", "beru")):
        prepare_dataset_cache(home, [language], sentences(FAMILY, of_family))
    return home


def run(script: str, home: Path, *options: str, **settings: object) -> subprocess.CompletedProcess[str]:
    given = [token for key, value in settings.items() for token in (f"--{key}", str(value))]
    command = [sys.executable, str(REPOSITORY / "scripts" / script), *options, *given]
    return run_in_home(command, home, OMP_NUM_THREADS="1")


def test_the_papers_config_from_the_hub_cache(home: Path, tmp_path: Path) -> None:
    config = str(REPOSITORY / "configs/ner/metaxl_evograd_paper.yaml")
    before = sorted(path for path in home.rglob("*") if ".lock" not in path.name)
    out = tmp_path / "out"
    finished = run("train_ner.py", home, "--config", config, output_dir=out, **SMALLER)
    assert finished.returncode == 0, finished.stderr
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert results["settings"]["model_name_or_path"] == MODEL
    assert results["settings"]["dataset"] == "unimelb-nlp/wikiann"
    assert results["test"]["qu"]["n_sentences"] == 30
    assert results["run"]["steps"] == 2 * 2  # two epochs of 20 sentences in batches of 12
    assert results["run"]["rtn_relative_change"] > 0
    assert f"{100 * results['test']['average']['f1']:.2f}" in finished.stdout
    trained = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert [trained["id2label"][str(number)] for number in range(7)] == NAMES
    for file in ("model.safetensors", "rtn/model.safetensors"):
        with safe_open(out / file, framework="pt") as saved:
            assert {saved.get_slice(name).get_dtype() for name in saved.keys()} == {"F32"}  # noqa: SIM118
    assert sorted(path for path in home.rglob("*") if ".lock" not in path.name) == before
    settings = {"model_name_or_path": out, "dataset": "unimelb-nlp/wikiann", "languages": "qu", "use_cpu": "true"}
    finished = run("evaluate_ner.py", home, max_length=64, output_file=out / "again.json", **settings)
    assert finished.returncode == 0, finished.stderr
    assert json.loads((out / "again.json").read_text(encoding="utf-8"))["test"] == results["test"]


def test_what_is_not_in_the_cache_is_said_in_one_line(home: Path, tmp_path: Path) -> None:
    config = str(REPOSITORY / "configs/ner/metaxl_one_step.yaml")
    finished = run(
        "train_ner.py", home, "--config", config, output_dir=tmp_path / "out", **SMALLER | {"rtn_layers": 9}
    )
    assert finished.returncode == 1
    assert finished.stderr.splitlines()[-1].startswith("error: rtn_layers: 9 is not a layer")
    finished = run("train_ner.py", tmp_path, "--config", config, output_dir=tmp_path / "out", **SMALLER)
    assert finished.returncode == 1
    last = finished.stderr.splitlines()[-1]
    assert last.startswith(f"error: model_name_or_path: '{MODEL}' cannot be loaded")
    assert last.endswith("HF_HUB_OFFLINE=1 with a filled cache")
    assert not (tmp_path / "out").exists()


def test_no_code_is_run_from_the_weights_of_the_hub(home: Path, tmp_path: Path) -> None:
    """A snapshot whose only weights are a pickle with code, in both of torch's formats, and what a script says."""
    attacked, mark = tmp_path / "home", tmp_path / "attacked"
    shutil.copytree(home, attacked)
    (weights,) = attacked.rglob("model.safetensors")
    weights.unlink()
    for wrap in WRAPS:
        wrap(weights.with_name("pytorch_model.bin"), mark)
        with pytest.raises(ValueError, match=r"pytorch_model.bin holds more than tensors\): give the folder"):
            load_classifier(str(weights.parent), NAMES)
        assert not mark.exists()
    config = str(REPOSITORY / "configs/ner/metaxl_one_step.yaml")
    finished = run("train_ner.py", attacked, "--config", config, output_dir=tmp_path / "out", **SMALLER)
    assert finished.returncode == 1
    last = finished.stderr.splitlines()[-1]
    assert last.startswith(f"error: model_name_or_path: '{MODEL}' cannot be loaded")
    assert "its pytorch_model.bin holds more than tensors" in last
    assert not mark.exists()
    assert not (tmp_path / "out").exists()
