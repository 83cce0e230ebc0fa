"""Parts of speech: treebank files as they come, words scored by themselves, one run from data to saved tagger."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, List, Value
from sklearn.metrics import accuracy_score, f1_score

from metaxl_evo.ner.arguments import PosArguments
from metaxl_evo.ner.data import load_ner_dataset
from metaxl_evo.ner.schemes import POS_TAGS
from metaxl_evo.ner.scorers import WordScorer
from metaxl_evo.ner.sources import read_table
from scripts import evaluate_ner, train_pos
from tests.ner.test_data import tags_of, write

LAYOUT = PosArguments().layout()
TREEBANK = """# sent_id = 1
# text = Vámonos al mar.
1-2\tVámonos\t_\t_\t_\t_\t_\t_\t_\t_
1\tVamos\tir\tVERB\tVERB\tMood=Imp\t0\troot\t_\t_
2\tnos\tnosotros\tPRON\tPRON\t_\t1\tobj\t_\t_
3-4\tal\t_\t_\t_\t_\t_\t_\t_\t_
3\ta\ta\tADP\tADP\t_\t5\tcase\t_\t_
4\tel\tel\tDET\tDET\t_\t5\tdet\t_\t_
5\tmar\tmar\tNOUN\tNOUN\t_\t1\tobl\t_\t_
5.1\tX\tX\tX\tX\t_\t1\tobl\t_\t_
6\t.\t.\tPUNCT\tPUNCT\t_\t1\tpunct\t_\t_

"""


def test_a_treebank_is_read_by_its_syntactic_words(tmp_path: Path) -> None:
    """Lines of several words in one and of words that are not written are left out; a treebank's own tags too."""
    write(tmp_path, "es", train__conllu=TREEBANK)
    data = load_ner_dataset(str(tmp_path), ["es"], splits=["train"], layout=LAYOUT)["es"]["train"]
    assert data["tokens"][:] == [["Vamos", "nos", "a", "el", "mar", "."]]
    assert tags_of(data) == [["VERB", "PRON", "ADP", "DET", "NOUN", "PUNCT"]]
    assert data.features["ner_tags"].feature.names == list(POS_TAGS)


def test_a_table_of_the_hub_is_read_by_its_column_upos() -> None:
    names = ["NOUN", "_", "VERB"]
    features = Features({"tokens": List(Value("string")), "upos": List(ClassLabel(names=names))})
    table = Dataset.from_dict({"tokens": [["del", "de", "mar"]], "upos": [[1, 2, 0]]}, features=features)
    assert read_table(table, "here", LAYOUT) == ([["del", "de", "mar"]], [["_", "VERB", "NOUN"]], names)


@pytest.mark.parametrize(
    ("tag", "says"),
    [("NN", "malformed tag 'NN': a tag is one of ADJ"), ("B-PER", "malformed tag 'B-PER': a tag is one of ADJ")],
)
def test_other_tags_are_refused(tmp_path: Path, tag: str, says: str) -> None:
    write(tmp_path, train=f"mar\tNOUN\nsol\t{tag}\n")
    with pytest.raises(ValueError, match=says):
        load_ner_dataset(str(tmp_path), ["xx"], splits=["train"], layout=LAYOUT)


def test_entities_are_not_read_from_parts_of_speech(tmp_path: Path) -> None:
    write(tmp_path, train="mar\tNOUN\nsol\tNOUN\n")
    with pytest.raises(ValueError, match="it is a part of speech: use metaxl-evo pos"):
        load_ner_dataset(str(tmp_path), ["xx"], splits=["train"])


def test_scores_are_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    true = [list(rng.choice(POS_TAGS[:6], 1 + number % 9)) for number in range(40)]
    found = [[tag if rng.random() < 0.7 else str(rng.choice(POS_TAGS[:8])) for tag in row] for row in true]
    flat = [[tag for row in rows for tag in row] for rows in (true, found)]
    scores = WordScorer().scores(true, found)
    assert scores["accuracy"] == pytest.approx(accuracy_score(*flat))
    assert scores["macro_f1"] == pytest.approx(f1_score(*flat, average="macro", zero_division=0))
    assert scores["per_type"]["ADV"]["n_words"] == Counter(flat[0])["ADV"]
    found[3][0] = WordScorer.unread  # as where a sentence was cut off: wrong, and no tag of its own
    assert "-" not in WordScorer().scores(true, found)["per_type"]


def test_a_run_and_its_evaluation_say_the_same(tmp_path: Path) -> None:
    """From drawn languages to a saved tagger, whose labels of words are counted by scikit-learn on its own."""
    argv = ["--model_name_or_path", "synthetic", "--source_languages", "aru", "--target_languages", "beru"]
    argv += ["--train_size", "60", "--eval_size", "40", "--max_steps", "6", "--per_device_train_batch_size", "4"]
    argv += ["--select", "last", "--learning_rate", "1e-3", "--save_strategy", "no", "--use_cpu", "true"]
    results = train_pos.main([*argv, "--output_dir", str(tmp_path / "run")])
    judged, file = results["test"]["beru"], tmp_path / "predictions.conll"
    argv = ["--dataset", "synthetic", "--languages", "beru", "--eval_size", "40", "--use_cpu", "true"]
    again = evaluate_ner.main(["--model_name_or_path", str(tmp_path / "run"), *argv, "--predictions", str(file)])
    assert again["test"]["beru"] == judged
    rows = [line.split("\t") for line in file.read_text(encoding="utf-8").splitlines() if "\t" in line]
    true, found = [row[1] for row in rows], [row[2] for row in rows]
    assert judged["accuracy"] == pytest.approx(accuracy_score(true, found))
    assert judged["macro_f1"] == pytest.approx(f1_score(true, found, average="macro", zero_division=0))
    assert set(true) <= set(POS_TAGS)
    saved = json.loads((tmp_path / "run/config.json").read_text(encoding="utf-8"))
    assert list(saved["label2id"]) == list(POS_TAGS)


def test_the_files_of_masakhapos(shared: Path) -> None:
    root = shared / "data/pos"
    data = load_ner_dataset(str(root), ["en", "sw"], splits=["test"], layout=LAYOUT)
    for language, splits in data.items():
        lines = (root / language / "test").read_text(encoding="utf-8").split("\n")
        tags = [line.split("\t")[1] for line in lines if line]
        assert [tag for row in tags_of(splits["test"]) for tag in row] == tags
    assert len(data["sw"]["test"]) == 553
