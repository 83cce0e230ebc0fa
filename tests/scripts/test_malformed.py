"""A corpus of malformed files: data, configs, model folders, checkpoints and places to write to.

Each ends the script with one line and a non-zero exit, within seconds, before a training step, and nothing that the
user owns is changed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AlbertConfig, AlbertModel, AutoTokenizer, PreTrainedModel, ResNetConfig, ResNetModel

from metaxl_evo.training.checkpoint import MANIFEST
from scripts import evaluate_ner, train_ner
from tests.attack import in_zip
from tests.conftest import REPOSITORY
from tests.scripts.refusals import (
    Place,
    Settings,
    assert_is_one_line,
    assert_refused,
    changed,
    copied,
    offline,
    truncate,
)
from tests.scripts.runs import LANGUAGES, TINY, argv, train, write_data

Prepare = Callable[[Place], Settings]
CASES: dict[str, tuple[Prepare, str]] = {}
SIZES = [163, 14, 20, 8]
OFFLINE = "HF_HUB_OFFLINE=1 with a filled cache$"
WEIGHTY = ("model.safetensors", "rtn/model.safetensors", "meta_state.pt", "optimizer.pt", "rng_state.pth")


def case(message: str) -> Callable[[Prepare], Prepare]:
    """Adds a function that prepares settings to the corpus, with what its one line must match."""

    def add(prepare: Prepare) -> Prepare:
        assert prepare.__name__ not in CASES
        CASES[prepare.__name__] = (prepare, message)
        return prepare

    return add


# Text files

TEXTS: dict[str, tuple[str | bytes, str]] = {
    "nothing_but_a_byte_order_mark": (b"\xef\xbb\xbf", "beru/test is empty"),
    "blank_lines": ("\n \n\t\n\n", "beru/test is empty"),
    "document_starts": ("-DOCSTART- -X- O\n\n-DOCSTART- -X- O\n", "beru/test is empty"),
    "utf_16": ("beru:Kalu\tB-PER\n".encode("utf-16"), r"beru/test is not UTF-8 text \(byte 0\)"),
    "utf_16_without_a_mark": ("beru:Kalu\tB-PER\n".encode("utf-16-le"), "beru/test:1: .*NUL"),
    "latin_1": ("beru:Jos\xe9\tB-PER\n".encode("latin-1"), r"beru/test is not UTF-8 text \(byte 8\)"),
    "random_bytes": (bytes(range(256)) * 8, "beru/test is not UTF-8 text"),
    "gzip": (b"\x1f\x8b\x08\x00\x00\x00\x00\x00" * 4, "beru/test is not UTF-8 text"),
    "a_nul_byte": ("beru:Ka\0lu\tB-PER\n", "beru/test:1: .*NUL"),
    "a_hole_of_zeros": ("beru:Kalu\tB-PER\n" + "\0" * 4096, "beru/test:2: .*NUL"),
    "old_mac_lines": ("beru:Kalu\tB-PER\rberu:ma\tO\r", "beru/test:1: .*line ends"),
    "half_a_line": ("beru:Kalu\tB-PER\nberu:mi", "beru/test:2: malformed tag ''"),
    "half_a_tag": ("beru:Kalu\tB-PER\nberu:mi\tB", "beru/test:2: malformed tag 'B'"),
    "commas": ("Kalu,B-PER\nma,O\n", "beru/test:1: malformed tag"),
    "tabs_then_commas": ("Kalu\tB-PER\nma,O\n", "beru/test:2: malformed tag"),
    "tag_first": ("B-PER\tKalu\nO\tma\n", "beru/test:1: malformed tag 'Kalu'"),
    "lower_case_tags": ("Kalu\tb-per\n", "beru/test:1: malformed tag 'b-per'"),
    "bioes_tags": ("Kalu\tS-PER\n", "beru/test:1: malformed tag 'S-PER'"),
    "tags_the_other_way_round": ("Kalu\tPER-B\n", "beru/test:1: malformed tag 'PER-B'"),
    "a_tag_without_a_type": ("Kalu\tB-\n", "beru/test:1: malformed tag 'B-': .*B-TYPE or I-TYPE \\(a line is"),
    "numbers_for_tags": ("Kalu\t1\n", "beru/test:1: malformed tag '1'"),
    "json_lines": ('{"tokens": ["Kalu"], "ner_tags": [1]}\n', "beru/test:1: malformed tag"),
    "html": ("<!DOCTYPE html>\n<html><body>404</body></html>\n", "beru/test:1: malformed tag"),
    "a_git_lfs_pointer": ("version https://git-lfs.github.com/spec/v1\n", "beru/test:1: malformed tag"),
    "a_tag_of_a_megabyte": ("Kalu\t" + "X" * 10**6 + "\n", "beru/test:1: malformed tag"),
    "a_tag_with_control_characters": ("Kalu\t\x1b[31mB-PER\n", "beru/test:1: malformed tag"),
    "another_language_s_tags": ("Kalu\tB-PERS\nma\tO\n", "label sets differ: .* has B-PERS, O"),
}

for name, (content, message) in TEXTS.items():
    CASES[name] = (lambda place, content=content: {"dataset": changed(place, "beru/test", content)}, message)


# Folders


def data_where(change: Callable[[Path], object], languages: Sequence[str] = LANGUAGES) -> Prepare:
    """A copy of the data in which something is changed."""

    def prepare(place: Place) -> Settings:
        root = write_data(place.folder / "data", languages)
        change(root)
        return {"dataset": root}

    return prepare


def data_with(file: str, content: str) -> Prepare:
    return lambda place: {"dataset": changed(place, file, content)}


def in_place_of(file: str, make: Callable[[Path], object]) -> Prepare:
    """The data with something else where a file was."""

    def change(root: Path) -> None:
        (root / file).unlink()
        make(root / file)

    return data_where(change)


NO_TEST = "beru has no split 'test'; present: "
NO_BERU = "unknown language of .* 'beru'"
NO_HUB = "neither a folder nor a reachable Hub id"
TWICE = "hold the same split: keep one of them"
WITHOUT_BERU = ("aru", "celu")
CASES |= {
    "no_entity_at_all": (
        data_with("aru/train", "aru:ma\tO\n\naru:mi\tO\n"),
        "aru has no entity: choose a first language",
    ),
    "an_empty_dev_set": (data_with("beru/dev", ""), "beru/dev is empty: it must hold at least one sentence"),
    "a_label_of_one_language": (
        data_with("beru/test", "beru:Monday\tB-DATE\n"),
        "label sets differ: aru has O, B-LOC, .* but beru has B-DATE: use languages of one label set",
    ),
    "a_label_beyond_the_head": (
        lambda place: {
            "dataset": changed(place, "aru/train", "aru:Monday\tB-DATE\n"),
            "model_name_or_path": place.trained,
        },
        "label sets differ: the model has O, .* but aru has B-DATE.*: use .*a model without a head",
    ),
    "a_second_target_too_small": (
        lambda place: {
            "dataset": changed(place, "celu/train", "celu:Kalu\tB-PER\n"),
            "target_languages": "beru,celu",
        },
        "target celu: .* has 1 rows, too few for one step: .*raise target_train_size",
    ),
    "a_folder_for_a_split": (in_place_of("beru/test", Path.mkdir), NO_TEST),
    "a_split_that_links_to_itself": (in_place_of("beru/test", lambda file: file.symlink_to("test")), NO_TEST),
    "a_broken_link": (in_place_of("beru/test", lambda file: file.symlink_to("gone")), NO_TEST),
    "a_pipe": (in_place_of("beru/test", os.mkfifo), NO_TEST),
    "an_unknown_suffix": (data_where(lambda root: (root / "beru/test").rename(root / "beru/test.xml")), NO_TEST),
    "no_test_files": (
        lambda place: {"dataset": write_data(place.folder / "data", splits=("train", "dev"))},
        f"{NO_TEST}validation, train$",
    ),
    "a_language_that_links_to_itself": (
        data_where(lambda root: (root / "beru").symlink_to("beru"), WITHOUT_BERU),
        NO_BERU,
    ),
    "a_language_without_files": (
        data_where(lambda root: ((root / "beru").mkdir(), (root / "beru/README").write_text("soon")), WITHOUT_BERU),
        NO_BERU,
    ),
    "a_split_twice": (data_where(lambda root: shutil.copy(root / "beru/test", root / "beru/test.conll")), TWICE),
    "a_split_by_two_names": (
        data_where(lambda root: shutil.copy(root / "beru/dev", root / "beru/validation")),
        TWICE,
    ),
    "the_folder_of_one_language": (
        lambda place: {"dataset": place.data / "beru"},
        "beru holds no language: expected folders LANGUAGE",
    ),
    "a_data_script": (
        lambda place: {"dataset": "wikiann.py"},
        "Dataset scripts are no longer supported: use a data-only copy .*or --dataset FOLDER",
    ),
    "a_data_script_in_its_folder": (
        lambda place: {"dataset": changed(place, "data.py", "")},
        "Dataset scripts are no longer supported",
    ),
    "data_that_are_not_there": (lambda place: {"dataset": place.folder / "absent/data"}, NO_HUB),
    "data_that_cannot_be_reached": (
        lambda place: {"dataset": "no-such-organisation-here/absent"},
        rf"{NO_HUB} .*--dataset FOLDER, or {OFFLINE}",
    ),
    "a_hub_id_offline": (
        lambda place: {"dataset": "unimelb-nlp/wikiann", "source_languages": "en", "target_languages": "qu"},
        "wikiann.* is neither a folder nor|wikiann.*cache",
    ),
}


@case("'.*/data' is neither a folder nor a reachable Hub id")
def data_that_link_to_themselves(place: Place) -> Settings:
    (place.folder / "data").symlink_to("data")
    return {"dataset": place.folder / "data"}


@case("file.txt.* is neither a folder nor a reachable Hub id")
def a_file_for_a_folder(place: Place) -> Settings:
    (place.folder / "file.txt").write_text("Kalu\tB-PER\n", encoding="utf-8")
    return {"dataset": place.folder / "file.txt"}


@case(f"{NO_TEST}validation$")
def dev_without_test(place: Place) -> Settings:
    root = write_data(place.folder / "data", ("beru",), ("dev",))
    copied(place.data / "aru", root / "aru")
    return {"dataset": root, "method": "zero_shot"}


@case("data holds no language: expected folders LANGUAGE")
def an_empty_folder(place: Place) -> Settings:
    (place.folder / "data").mkdir()
    return {"dataset": place.folder / "data"}


# Parquet

WORDS, TAGS = [["Kalu", "ma"], ["mi"]], [["B-PER", "O"], ["O"]]
TABLES: dict[str, tuple[dict[str, Any], str]] = {
    "no_rows": (
        {
            "tokens": pyarrow.array([], pyarrow.list_(pyarrow.string())),
            "ner_tags": pyarrow.array([], pyarrow.list_(pyarrow.string())),
        },
        "beru, test is empty",
    ),
    "no_columns": ({}, "needs the columns tokens and ner_tags, but has none"),
    "other_columns": (
        {"words": WORDS, "labels": TAGS},
        "needs the columns tokens and ner_tags, but has words, labels",
    ),
    "no_label_column": ({"tokens": WORDS}, "needs the columns tokens and ner_tags, but has tokens"),
    "texts_for_tokens": ({"tokens": ["Kalu ma", "mi"], "ner_tags": TAGS}, "tokens must be a list of strings"),
    "numbers_for_tokens": ({"tokens": [[1, 2], [3]], "ner_tags": TAGS}, "tokens must be a list of strings"),
    "tags_without_names": ({"tokens": WORDS, "ner_tags": [[1, 0], [0]]}, "ner_tags has no label names"),
    "one_tag_a_sentence": ({"tokens": WORDS, "ner_tags": ["B-PER", "O"]}, "ner_tags has no label names"),
    "nested_tags": ({"tokens": WORDS, "ner_tags": [[["O"], ["O"]], [["O"]]]}, "ner_tags has no label names"),
    "tags_of_another_length": ({"tokens": WORDS, "ner_tags": [["O"], ["O"]]}, "has 2 tokens but 1 tags"),
    "missing_tokens": ({"tokens": [["Kalu", None], ["mi"]], "ner_tags": TAGS}, "sentence 0 .*missing"),
    "missing_sentences": ({"tokens": [None, ["mi"]], "ner_tags": TAGS}, "sentence 0 .*missing"),
    "missing_tags": ({"tokens": WORDS, "ner_tags": [["B-PER", None], ["O"]]}, "sentence 0 .*missing"),
    "all_tags_missing": ({"tokens": WORDS, "ner_tags": pyarrow.nulls(2)}, "ner_tags has no label names"),
    "malformed_tags_in_a_table": ({"tokens": WORDS, "ner_tags": [["PER", "O"], ["O"]]}, "malformed tag 'PER'"),
    "sentences_without_words": ({"tokens": [[], []], "ner_tags": [[], []]}, "tokens must be a list of strings"),
}


def with_table(place: Place, table: dict[str, Any]) -> Settings:
    root = write_data(place.folder / "data")
    (root / "beru/test").unlink()
    pyarrow.parquet.write_table(pyarrow.table(table), root / "beru/test.parquet")
    return {"dataset": root}


for name, (table, message) in TABLES.items():
    CASES[name] = (lambda place, table=table: with_table(place, table), message)


UNREADABLE = "test.parquet is not a readable parquet file: fetch it again"


def parquet_of(content: bytes) -> Prepare:
    return in_place_of("beru/test", lambda file: file.with_suffix(".parquet").write_bytes(content))


def parquet_where(change: Callable[[bytes], bytes]) -> Prepare:
    """A good table, other bytes in its file."""

    def prepare(place: Place) -> Settings:
        settings = with_table(place, {"tokens": WORDS, "ner_tags": TAGS})
        file = settings["dataset"] / "beru/test.parquet"
        file.write_bytes(change(file.read_bytes()))
        return settings

    return prepare


CASES |= {
    "an_empty_parquet": (parquet_of(b""), UNREADABLE),
    "a_text_renamed": (parquet_of(b"beru:Kalu\tB-PER\n"), UNREADABLE),
    "a_truncated_parquet": (parquet_where(lambda held: held[: len(held) // 2]), UNREADABLE),
    "a_parquet_with_a_hole": (parquet_where(lambda held: held[:4] + bytes(196) + held[200:]), UNREADABLE),
}


@case("label id 9 has no name among O, B-PER")
def a_label_id_out_of_range(place: Place) -> Settings:
    from datasets import ClassLabel, Dataset, Features, List, Value

    features = Features({"tokens": List(Value("string")), "ner_tags": List(Value("int64"))})
    table = Dataset.from_dict({"tokens": WORDS, "ner_tags": [[9, 0], [0]]}, features=features)
    named = Features({"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=["O", "B-PER"]))})
    arrow = table.data.table.replace_schema_metadata(named.arrow_schema.metadata)
    root = write_data(place.folder / "data")
    (root / "beru/test").unlink()
    pyarrow.parquet.write_table(arrow, root / "beru/test.parquet")
    return {"dataset": root}


@case(TWICE)
def a_shard_of_text(place: Place) -> Settings:
    settings = with_table(place, {"tokens": WORDS, "ner_tags": TAGS})
    shutil.copy(place.data / "beru/test", settings["dataset"] / "beru/test")
    return settings


# Configs

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join([f'*{chr(97 + n)}'] * 9)}]\n" for n in range(12)
)
CONFIGS: dict[str, tuple[str | bytes, str]] = {
    "a_tab_for_an_indent": ("estimator_kwargs:\n\tradius: 1\n", r"run\.yaml:2: cannot be read"),
    "an_undefined_anchor": ("learning_rate: *rate\n", r"run\.yaml:1: cannot be read: found undefined alias"),
    "a_python_object": (
        "learning_rate: !!python/object/apply:os.getcwd []\n",
        r"run\.yaml:1: .*python/object.*none that JSON",
    ),
    "a_python_object_inside": (
        "estimator_kwargs: {radius: !!python/object/apply:os.getcwd []}\n",
        r"run\.yaml:1: .*python/object.*none that JSON",
    ),
    "a_mapping_of_itself": ("estimator_kwargs: &a {radius: *a}\n", r"run\.yaml:1: .* or in itself"),
    "a_list_of_itself": ("target_languages: &a [*a]\n", r"run\.yaml:1: .* or in itself"),
    "a_billion_laughs": (LAUGHS, r"run\.yaml:1: unknown key 'a'"),
    "a_billion_laughs_inside": (
        "estimator_kwargs:\n" + "".join(f"  {line}\n" for line in LAUGHS.splitlines()),
        r"run\.yaml:\d+: .*anchors unfold to more than",
    ),
    "a_merge_key": ("<<: {seed: 1}\n", r"run\.yaml:1: unknown key '<<'"),
    "an_unquoted_colon": ("output_dir: a: b\n", r"run\.yaml:1: cannot be read: mapping values are not allowed"),
    "an_open_quote": ('output_dir: "a\nseed: 1\n', r"run\.yaml:\d: cannot be read"),
    "utf_16_config": ("seed: 1\n".encode("utf-16"), r"run\.yaml: cannot be read as UTF-8 text"),
    "nul_config": (b"seed: 1\0\n", r"run\.yaml"),
    "binary_config": (bytes(range(256)), r"run\.yaml: cannot be read as UTF-8 text"),
    "depth_config": ("estimator_kwargs: " + "[" * 1500 + "]" * 1500, r"run\.yaml.*nested"),
    "deep_mapping_config": ("estimator_kwargs: " + "{a: " * 1500 + "1" + "}" * 1500, r"run\.yaml.*nested"),
    "a_date_inside": (
        "estimator_kwargs: {radius: !!timestamp 2024-01-01}\n",
        r"run\.yaml:1: .*timestamp.*none that JSON",
    ),
    "bytes_inside": ("estimator_kwargs: {radius: !!binary aGk=}\n", r"run\.yaml:1: .*binary.*none that JSON"),
    "a_set_inside": ("estimator_kwargs: {radius: !!set {a}}\n", r"run\.yaml:1: .*set.*none that JSON"),
    "a_bad_number_inside": ("estimator_kwargs: {radius: !!int x}\n", r"run\.yaml:1: "),
    "a_list_for_a_key": ("? [seed]\n: 1\n", r"run\.yaml:1: expected 'key: value'"),
    "a_list_for_a_key_inside": ("estimator_kwargs: {? [a] : 1}\n", r"run\.yaml:1: "),
    "two_keys_that_are_one_in_json": ("estimator_kwargs: {1: 1, '1': 2}\n", r"run\.yaml:1: .*given twice"),
    "a_text_config": ("dear configuration,\nplease train.\n", r"run\.yaml:1: expected 'key: value' lines"),
    "a_diff_config": ("<<<<<<< HEAD\nseed: 1\n=======\nseed: 2\n>>>>>>> b\n", r"run\.yaml:\d: "),
    "a_block_for_a_number": ("learning_rate: |\n  1\n  2\n", "learning_rate: expected a number"),
    "a_number_of_a_megabyte": ("max_steps: " + "9" * 10**6 + "\n", "max_steps"),
}

for name, (content, message) in CONFIGS.items():
    CASES[name] = (lambda place, content=content: with_config(place, content), message)


def with_config(place: Place, content: str | bytes, name: str = "run.yaml") -> Settings:
    file = place.folder / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return {"config": file}


@case(r"run\.json:1: cannot be read")
def a_truncated_json(place: Place) -> Settings:
    return with_config(place, '{"seed": 1, "estimator_kwargs": {"radius":', "run.json")


@case(r"run\.json:1: expected 'key: value' lines")
def a_list_in_json(place: Place) -> Settings:
    return with_config(place, '[{"seed": 1}]', "run.json")


@case(r"run\.yaml.* cannot be read")
def a_config_that_links_to_itself(place: Place) -> Settings:
    (place.folder / "run.yaml").symlink_to("run.yaml")
    return {"config": place.folder / "run.yaml"}


@case(r"run\.yaml.* cannot be read")
def a_config_that_is_a_pipe(place: Place) -> Settings:
    os.mkfifo(place.folder / "run.yaml")
    return {"config": place.folder / "run.yaml"}


@case(r"file/run\.yaml")
def a_config_below_a_file(place: Place) -> Settings:
    (place.folder / "file").write_text("", encoding="utf-8")
    return {"config": place.folder / "file/run.yaml"}


# Model folders

UNUSABLE = "model_name_or_path: .*cannot be loaded .*give the folder of a transformers model"


def model_where(change: Callable[[Path], object]) -> Prepare:
    """A copy of the model in which something is changed."""

    def prepare(place: Place) -> Settings:
        folder = copied(place.model, place.folder / "model")
        change(folder)
        return {"model_name_or_path": folder}

    return prepare


def in_json(file: str, **fields: Any) -> Callable[[Path], object]:
    """Other fields in a file of a folder."""

    def change(folder: Path) -> None:
        content = json.loads((folder / file).read_text(encoding="utf-8"))
        (folder / file).write_text(json.dumps(content | fields), encoding="utf-8")

    return change


def model_config(**fields: Any) -> Prepare:
    return model_where(in_json("config.json", **fields))


def model_file(file: str, content: str | bytes) -> Prepare:
    held = content.encode() if isinstance(content, str) else content
    return model_where(lambda folder: (folder / file).write_bytes(held))


def model_tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Prepare:
    """The model with other weights."""

    def rewrite(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        save_file(change(weights), folder / "model.safetensors", metadata={"format": "pt"})

    return model_where(rewrite)


def without(weights: dict[str, torch.Tensor], part: str) -> dict[str, torch.Tensor]:
    return {name: value for name, value in weights.items() if part not in name}


def changed_where(
    weights: dict[str, torch.Tensor], part: str, change: Callable[[torch.Tensor], torch.Tensor]
) -> dict[str, torch.Tensor]:
    assert any(part in name for name in weights)
    return {name: change(value).contiguous() if part in name else value for name, value in weights.items()}


CASES |= {
    "model_config_empty": (model_file("config.json", ""), UNUSABLE),
    "model_config_null": (model_file("config.json", "null"), UNUSABLE),
    "model_config_list": (model_file("config.json", "[1]"), UNUSABLE),
    "model_config_binary": (model_file("config.json", bytes(range(256))), UNUSABLE),
    "model_config_without_type": (model_file("config.json", "{}"), UNUSABLE),
    "model_config_unknown_type": (model_config(model_type="xlm-robertissima"), UNUSABLE),
    "model_config_other_type": (model_config(model_type="distilbert"), "model_name_or_path"),
    "model_config_negative_size": (model_config(hidden_size=-32), UNUSABLE),
    "model_config_zero_heads": (model_config(num_attention_heads=0), UNUSABLE),
    "model_config_uneven_heads": (model_config(num_attention_heads=3), UNUSABLE),
    "model_config_text_size": (model_config(hidden_size="big"), UNUSABLE),
    "model_config_null_size": (model_config(hidden_size=None), UNUSABLE),
    "model_config_huge": (model_config(vocab_size=10**12), UNUSABLE),
    "model_config_other_size": (model_config(hidden_size=64), "model_name_or_path"),
    "model_config_fewer_layers": (model_config(num_hidden_layers=0), "layers"),
    "model_config_more_layers": (model_config(num_hidden_layers=3), "model_name_or_path: .* lacks"),
    "model_config_no_activation": (model_config(hidden_act="gelatine"), UNUSABLE),
    "model_config_labels": (
        model_config(architectures=["XLMRobertaForTokenClassification"], id2label={"0": "O", "zero": "B-PER"}),
        "model_name_or_path",
    ),
    "model_config_truncated": (model_where(lambda folder: truncate(folder / "config.json")), UNUSABLE),
    "weights_truncated": (model_where(lambda folder: truncate(folder / "model.safetensors")), UNUSABLE),
    "model_that_cannot_be_reached": (
        lambda place: {"model_name_or_path": "no-such-organisation-here/absent"},
        rf"cannot be loaded .*give the folder of a transformers model, .*{OFFLINE}",
    ),
    "model_that_is_not_there": (lambda place: {"model_name_or_path": place.folder / "absent/model"}, UNUSABLE),
    "model_of_an_empty_folder": (
        lambda place: {"model_name_or_path": place.folder},
        "holds no config.json: give a folder that save_pretrained wrote",
    ),
    "weights_empty": (model_file("model.safetensors", b""), UNUSABLE),
    "weights_of_text": (model_file("model.safetensors", "version https://git-lfs.github.com/spec/v1\n"), UNUSABLE),
    "weights_of_a_huge_header": (model_file("model.safetensors", b"\xff" * 64), UNUSABLE),
    "weights_of_other_shapes": (
        model_tensors(lambda weights: changed_where(weights, "layer.0.output.dense.weight", lambda w: w[:, :5])),
        "model_name_or_path",
    ),
    "weights_of_other_names": (
        model_tensors(lambda weights: {f"deep.{name}": value for name, value in weights.items()}),
        "model_name_or_path: .* lacks",
    ),
    "weights_that_lack_a_layer": (model_tensors(lambda weights: without(weights, "layer.1.")), "lacks"),
    "weights_that_lack_the_embeddings": (model_tensors(lambda weights: without(weights, "word_emb")), "lacks"),
    "weights_that_are_not_numbers": (
        model_tensors(lambda weights: changed_where(weights, "layer.1.output.dense.weight", lambda w: w * torch.nan)),
        "model_name_or_path: .*not finite",
    ),
    "tokenizer_empty": (model_file("tokenizer.json", ""), UNUSABLE),
    "tokenizer_of_garbage": (model_file("tokenizer.json", '{"model": 1}'), UNUSABLE),
    "tokenizer_config_of_garbage": (model_file("tokenizer_config.json", "{"), UNUSABLE),
    "tokenizer_config_list": (model_file("tokenizer_config.json", "[]"), UNUSABLE),
}


def model_of(pretrained: PreTrainedModel) -> Prepare:
    """Another model beside the tokenizer."""

    def prepare(place: Place) -> Settings:
        pretrained.save_pretrained(place.folder / "model")
        AutoTokenizer.from_pretrained(place.model).save_pretrained(place.folder / "model")
        return {"model_name_or_path": place.folder / "model"}

    return prepare


@case(r"AlbertFor.* no lists of 2 encoder layers .* one of albert.encoder.albert_layer_groups \(1\)")
def an_encoder_of_shared_groups(place: Place) -> Settings:
    sizes = {"hidden_size": 16, "embedding_size": 8, "num_attention_heads": 2, "intermediate_size": 16}
    return model_of(AlbertModel(AlbertConfig(vocab_size=400, num_hidden_layers=2, **sizes)))(place)


@case("no token classifier for .*: unknown model type 'resnet': .* Valid: albert, .* more$")
def a_model_of_images(place: Place) -> Settings:
    return model_of(ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])))(place)


@case(UNUSABLE)
def no_weights(place: Place) -> Settings:
    settings = model_config()(place)
    (settings["model_name_or_path"] / "model.safetensors").unlink()
    return settings


@case("model_name_or_path: .* holds no vocabulary")
def no_tokenizer(place: Place) -> Settings:
    settings = model_config()(place)
    for file in settings["model_name_or_path"].glob("*token*"):
        file.unlink()
    return settings


@case("model_name_or_path: .* holds no vocabulary")
def a_tokenizer_without_its_vocabulary(place: Place) -> Settings:
    settings = model_config()(place)
    (settings["model_name_or_path"] / "tokenizer.json").unlink()
    return settings


@case(UNUSABLE)
def a_pickle_that_runs_code(place: Place) -> Settings:
    settings = no_weights(place)
    in_zip(settings["model_name_or_path"] / "pytorch_model.bin", place.folder / "ran")
    return settings


@case("vocabulary")
def a_tokenizer_of_a_larger_vocabulary(place: Place) -> Settings:
    settings = model_tensors(lambda weights: changed_where(weights, "word_emb", lambda w: w[:50]))(place)
    in_json("config.json", vocab_size=50)(settings["model_name_or_path"])
    return settings


@case("CanineTokenizer cannot map .*: use a fast tokenizer")
def a_slow_tokenizer(place: Place) -> Settings:
    settings = no_tokenizer(place)
    folder = settings["model_name_or_path"]
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "CanineTokenizer"}', encoding="utf-8")
    return settings


@case(r"model_name_or_path: .* no padding token: give it one \(tokenizer.pad_token")
def a_tokenizer_without_padding(place: Place) -> Settings:
    settings = model_config()(place)
    file = settings["model_name_or_path"] / "tokenizer_config.json"
    config = {key: value for key, value in json.loads(file.read_text(encoding="utf-8")).items() if key != "pad_token"}
    file.write_text(json.dumps(config | {"pad_token": None, "tokenizer_class": "PreTrainedTokenizerFast"}))
    return settings


@case("model_name_or_path: .*config.json")
def a_folder_for_a_config(place: Place) -> Settings:
    settings = model_config()(place)
    (settings["model_name_or_path"] / "config.json").unlink()
    (settings["model_name_or_path"] / "config.json").mkdir()
    return settings


# Settings that only a library can judge

CASES |= {
    "optim_args": (lambda place: {"optim_args": "x", "dataset": "/absent"}, "optim_args x: cannot be used"),
    "schedule_args": (lambda place: {"lr_scheduler_kwargs": '{"a": 1}'}, r"lr_scheduler_kwargs \{'a': 1\}: cannot be"),
    "schedule_type": (
        lambda place: {"lr_scheduler_type": "cosine_with_min_lr"},
        "cosine_with_min_lr.*: cannot be used",
    ),
    "accelerator_config": (lambda place: {"accelerator_config": '{"a": 1}'}, "accelerator_config: cannot be used"),
    "text_for_a_switch": (
        lambda place: {"estimator": "evograd", "estimator_kwargs": '{"antithetic": "no"}'},
        "antithetic must be true or false, not 'no'",
    ),
    "report_to": (lambda place: {"report_to": "x"}, "report_to .*x.*: cannot be used"),
}


# Places to write to


@case("output_dir")
def an_output_below_a_file(place: Place) -> Settings:
    (place.folder / "file").write_text("mine", encoding="utf-8")
    return {"output_dir": place.folder / "file/out"}


@case("output_dir")
def an_output_in_proc(place: Place) -> Settings:
    return {"output_dir": "/proc/metaxl"}


@case("output_dir")
def an_output_of_too_long_a_name(place: Place) -> Settings:
    return {"output_dir": place.folder / ("x" * 300)}


@case("output_dir")
def an_output_that_links_to_itself(place: Place) -> Settings:
    (place.folder / "out").symlink_to("out")
    return {"output_dir": place.folder / "out"}


@case("output_dir")
def an_output_of_no_name(place: Place) -> Settings:
    return {"output_dir": ""}


@case("output_dir")
def an_output_below_a_file_for_several_targets(place: Place) -> Settings:
    (place.folder / "out").mkdir()
    (place.folder / "out/celu").write_text("mine", encoding="utf-8")
    return {"output_dir": place.folder / "out", "target_languages": "beru,celu"}


def run(name: str, folder: Path, place: Place) -> list[str]:
    """The command line of a case of the corpus."""
    place.folder.mkdir()
    places = {"model_name_or_path": place.model, "dataset": place.data, "output_dir": folder / "run"}
    return argv(places | TINY | CASES[name][0](place))


@pytest.fixture
def place(tmp_path: Path, data: Path, model: Path, trained: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # for a process; here it was read when the modules were
    offline(monkeypatch)
    return Place(tmp_path / "place", data, model, trained)


@pytest.mark.parametrize("name", CASES)
def test_train(name: str, tmp_path: Path, place: Place, no_step: None) -> None:
    given = run(name, tmp_path, place)
    assert_refused(train_ner.main, given, CASES[name][1], tmp_path)
    assert not (place.folder / "ran").exists()


@pytest.mark.slow
@pytest.mark.distributed
def test_train_as_a_process(tmp_path: Path, place: Place) -> None:
    name = "a_hub_id_offline"
    given = run(name, tmp_path, place)
    done = subprocess.run(
        [sys.executable, "scripts/train_ner.py", *given],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr + done.stdout
    assert_is_one_line(done.stderr.splitlines()[-1], CASES[name][1])


# Evaluation


def evaluated(**settings: Any) -> Prepare:
    return lambda place: settings


def trained_with(change: Callable[[Path], object]) -> Prepare:
    """A copy of the trained model in which something is changed."""
    return lambda place: model_where(change)(place._replace(model=place.trained))


def without_head(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(without(weights, "classifier"), folder / "model.safetensors", metadata={"format": "pt"})


def not_finite(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    changed_head = changed_where(weights, "classifier.bias", lambda bias: bias / 0)
    save_file(changed_head, folder / "model.safetensors", metadata={"format": "pt"})


EVALUATIONS: dict[str, tuple[Prepare, str]] = {
    "head_missing": (trained_with(without_head), "lacks 2 of its weights, such as classifier"),
    "head_not_finite": (trained_with(not_finite), "weights that are not finite, such as classifier.bias"),
    "head_of_other_labels": (
        trained_with(in_json("config.json", id2label={"0": "O", "1": "B-X"}, label2id={"O": 0, "B-X": 1})),
        "label sets differ",
    ),
    "head_of_generic_labels": (
        trained_with(in_json("config.json", id2label={str(n): f"LABEL_{n}" for n in range(7)})),
        "label sets differ: the model has LABEL_0",
    ),
    "head_truncated": (trained_with(lambda folder: truncate(folder / "model.safetensors")), UNUSABLE),
    "only_the_rtn": (lambda place: {"model_name_or_path": place.trained / "rtn"}, "model_name_or_path"),
    "only_results": (
        trained_with(lambda folder: (folder / "config.json").unlink()),
        "holds no config.json: give a folder that save_pretrained wrote",
    ),
    "results_for_a_model": (
        lambda place: {"model_name_or_path": place.trained / "results.json"},
        "cannot be loaded|cannot be reached",
    ),
    "model_of_a_nul": (evaluated(model_name_or_path="a\0b"), "model_name_or_path"),
    "data_of_a_nul": (evaluated(dataset="a\0b"), "neither a folder nor a reachable Hub id"),
    "language_above": (evaluated(languages="../aru"), "unknown language of .* '../aru'"),
    "output_is_a_folder": (
        lambda place: {"output_file": place.folder, "overwrite": "true"},
        "output_file: .* is a folder: name a file in it",
    ),
    "output_in_proc": (evaluated(output_file="/proc/metaxl/scores.json"), "output_file: .* cannot be written"),
    "output_below_a_file": (
        lambda place: {"output_file": place.data / "beru/test/scores.json"},
        "output_file: .* cannot be written",
    ),
}


@pytest.mark.parametrize("name", EVALUATIONS)
def test_evaluate(name: str, tmp_path: Path, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.folder.mkdir()
    prepare, message = EVALUATIONS[name]
    settings = prepare(place)
    places = {"model_name_or_path": place.trained, "dataset": place.data, "languages": "beru", "use_cpu": "true"}
    assert_refused(evaluate_ner.main, argv(places | settings), message, tmp_path)


# Checkpoints


def flipped(file: str) -> Callable[[Path], object]:
    """One bit in the middle of a file of the checkpoint."""

    def change(checkpoint: Path) -> None:
        content = bytearray((checkpoint / file).read_bytes())
        content[len(content) // 2] ^= 1
        (checkpoint / file).write_bytes(content)

    return change


def written(file: str, content: bytes) -> Callable[[Path], object]:
    return lambda checkpoint: (checkpoint / file).write_bytes(content)


def gone(file: str) -> Callable[[Path], object]:
    return lambda checkpoint: (checkpoint / file).unlink()


def a_folder_for(file: str) -> Callable[[Path], object]:
    def change(checkpoint: Path) -> None:
        (checkpoint / file).unlink()
        (checkpoint / file).mkdir()

    return change


CHECKPOINTS: dict[str, tuple[Callable[[Path], object], str]] = {
    **{f"flipped_{file}": (flipped(file), f"checkpoint-2/{file} is damaged") for file in WEIGHTY},
    "truncated_trainer_state.json": (
        lambda checkpoint: truncate(checkpoint / "trainer_state.json"),
        "checkpoint-2/trainer_state.json is damaged or truncated .*: resume from an earlier checkpoint, or start anew",
    ),
    **{
        f"gone_{file}": (gone(file), f"checkpoint-2/{file} is missing, though the save was complete")
        for file in ("optimizer.pt", "meta_state.pt", "trainer_state.json")
    },
    "manifest_empty": (written(MANIFEST, b""), f"checkpoint-2/{MANIFEST}"),
    "manifest_list": (written(MANIFEST, b"[]"), f"checkpoint-2/{MANIFEST}"),
    "manifest_null": (written(MANIFEST, b"null"), f"checkpoint-2/{MANIFEST}"),
    "manifest_mapping": (written(MANIFEST, b"{}"), f"checkpoint-2/{MANIFEST}"),
    "manifest_binary": (written(MANIFEST, bytes(range(256))), f"checkpoint-2/{MANIFEST}"),
    "manifest_flipped": (flipped(MANIFEST), f"checkpoint-2/{MANIFEST}"),
    "manifest_gone": (lambda checkpoint: (checkpoint / MANIFEST).unlink(), "holds checkpoint-2, and no run"),
    "manifest_folder": (a_folder_for(MANIFEST), "checkpoint-2"),
    "state_folder": (a_folder_for("meta_state.pt"), "checkpoint-2/meta_state.pt"),
    "rtn_config_rewritten": (written("rtn/config.json", b"{}"), "checkpoint-2/rtn/config.json is damaged"),
    "weights_emptied": (written("model.safetensors", b""), "checkpoint-2/model.safetensors is damaged"),
}


DAMAGED = [name for name in CHECKPOINTS if name != "manifest_gone"]


@pytest.mark.parametrize(
    ("name", "how"),
    [
        *((name, ("latest", "by name")[index % 2]) for index, name in enumerate(DAMAGED)),
        ("manifest_gone", "by name"),  # the latest that is cut off is passed over, no error
    ],
)
def test_checkpoint(
    name: str, how: str, tmp_path: Path, data: Path, model: Path, interrupted: Path, refused: Callable[..., None]
) -> None:
    output = copied(interrupted, tmp_path / "run")
    change, message = CHECKPOINTS[name]
    change(output / "checkpoint-2")
    wanted = "latest" if how == "latest" else output / "checkpoint-2"
    refused(message, model, data, output, resume_from_checkpoint=wanted)


RESUMES: dict[str, tuple[str, str]] = {
    "nothing": ("", f"has no {MANIFEST}"),
    "a_number": ("2", "2 is not a folder: give a checkpoint-N folder, or `latest`"),
    "a_device": ("/dev/null", "/dev/null is not a folder: give a checkpoint-N folder"),
    "a_file": ("RUN/checkpoint-2/model.safetensors", "model.safetensors is not a folder"),
    "the_run": ("RUN", f"run has no {MANIFEST}"),
    "the_rtn": ("RUN/checkpoint-2/rtn", f"rtn has no {MANIFEST}"),
    "a_nul": ("a\0b", "is not a folder"),
    "a_long_name": ("x" * 300, "File name too long"),
}


@pytest.mark.parametrize("name", RESUMES)
def test_resume(
    name: str, tmp_path: Path, data: Path, model: Path, interrupted: Path, refused: Callable[..., None]
) -> None:
    output = copied(interrupted, tmp_path / "run")
    wanted, message = RESUMES[name]
    refused(message, model, data, output, f"--resume_from_checkpoint={wanted.replace('RUN', str(output))}")


def test_the_corpus_is_whole() -> None:
    assert [len(table) for table in (CASES, EVALUATIONS, CHECKPOINTS, RESUMES)] == SIZES
    assert sum(SIZES) >= 60


def test_files_that_are_only_unusual_are_read(tmp_path: Path, place: Place) -> None:
    """What the corpus must not refuse: a byte order mark, CRLF, a token of 100,000 characters, an odd token."""
    long = "x" * 100_000
    content = f"\ufeffberu:Kalu\tB-PER\r\nberu:{long}\tO\r\nberu:\u2028\u200b\tO\r\n\r\nberu:mi\tO"
    place.folder.mkdir()
    data = changed(place, "beru/test", content)
    results = train(place.model, data, tmp_path / "out", max_steps=1, select="last")
    assert results["test"]["beru"].items() >= {"n_sentences": 2, "n_entities": 1}.items()
