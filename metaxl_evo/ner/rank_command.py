"""A cheap first look at source languages: how near each is to a few sentences of the target, which need no labels."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from metaxl_evo.messages import one_line, unknown
from metaxl_evo.ner.columns import text_lines
from metaxl_evo.ner.data import label_corpus, read_corpus, sample
from metaxl_evo.ner.encoding import PadRight, encode
from metaxl_evo.ner.labels import ner_features
from metaxl_evo.ner.layout import LayoutArguments
from metaxl_evo.ner.pretrained import load_classifier, longest_input, trained_labels
from metaxl_evo.ner.spacing import as_in_text
from metaxl_evo.ner.synthetic import LABELS
from metaxl_evo.training.checkpoint import require_writable

BY = ("hidden", "overlap")
BATCH = 32  # sentences


@dataclass(kw_only=True)
class RankArguments(LayoutArguments):
    """Which sources are compared with which sentences, in the states of which model.

    Raises:
        ValueError: one line for the first value that cannot be.
    """

    model_name_or_path: str = field(
        default="FacebookAI/xlm-roberta-base", metadata={"help": "Hub id or folder of the model, or `synthetic`."}
    )
    dataset: str = field(
        metadata={"help": "Hub id (a configuration a language), a folder LANG/SPLIT, or `synthetic`."}
    )
    source_languages: list[str] = field(metadata={"help": "The candidates, two or more."})
    target_language: str | None = field(default=None, metadata={"help": "The target, if the data have it."})
    text_file: str | None = field(default=None, metadata={"help": "Else its sentences, one a line."})
    sentences: int = field(default=25, metadata={"help": "Of the target that are read."})
    source_sentences: int = field(default=200, metadata={"help": "Of each source that are read, at most."})
    sample_seed: int = field(default=42, metadata={"help": "Seed of the choice of sentences."})
    max_length: int = field(default=128, metadata={"help": "Sub-tokens of a sentence at most."})
    by: str = field(default="hidden", metadata={"help": f"What the sources are sorted by: {' or '.join(BY)}."})
    output_file: str | None = field(default=None, metadata={"help": "JSON file for the numbers."})
    overwrite: bool = field(default=False, metadata={"help": "Replace output_file."})
    use_cpu: bool = field(default=False, metadata={"help": "Use the CPU even where there is a GPU."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code that the model brings along (auto_map); read it first."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.by not in BY:
            raise ValueError(unknown("by", self.by, BY))
        for name, least in (("sentences", 1), ("source_sentences", 1), ("max_length", 8)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if len(set(self.source_languages)) < max(2, len(self.source_languages)):
            raise ValueError("source_languages: name two or more to compare, each once")
        if (self.target_language is None) == (self.text_file is None):
            raise ValueError("give the target once: target_language (of the data) or text_file (a sentence a line)")
        if self.target_language in self.source_languages:
            raise ValueError(f"{self.target_language} is both a source and the target: name it once")
        places = [Path(one).resolve() for one in (self.output_file, self.text_file) if one is not None]
        if len(places) > len(set(places)):
            raise ValueError("output_file: it is text_file, which would be lost: choose another")
        if self.output_file is not None and Path(self.output_file).exists() and not self.overwrite:
            raise ValueError(f"output_file: {self.output_file} exists: choose another, or set overwrite: true")


def rank_sources(settings: RankArguments) -> dict[str, Any]:
    """Sources by how near they are to the target's sentences; prints a table, writes JSON where asked.

    `hidden` is the cosine between source and target of the mean over sentences of a model's mean last states: such
    centroids tell families of languages (Libovicky et al., On the Language Neutrality of Pre-trained Multilingual
    Representations, Findings of EMNLP 2020). `overlap` is the share of the target's different sub-tokens that the
    source's sentences have (after Dai et al., Using Similarity Measures to Select Pretraining Data for NER, NAACL
    2019; LangRank, Lin et al., ACL 2019, has it, too). Neither reads a label: wrong ones are not seen.

    Returns:
        `{"sources": {LANGUAGE: {"hidden", "overlap", "sentences"}}, "target_sentences", "by"}`, the nearest first.

    Raises:
        ValueError: for data or a model that cannot be read.
    """
    if settings.output_file is not None:
        require_writable(Path(settings.output_file).parent, "output_file")
    words = {name: _source(settings, name) for name in settings.source_languages}
    target = _target(settings)
    states, pieces = _read(settings, {**words, "": target})
    there = set(pieces[""])
    rows = {
        name: {
            "hidden": float(torch.cosine_similarity(states[name], states[""], dim=0)),
            "overlap": len(there & set(pieces[name])) / len(there),
            "sentences": len(words[name]),
        }
        for name in words
    }
    ordered = dict(sorted(rows.items(), key=lambda one: -one[1][settings.by]))
    found = {"sources": ordered, "target_sentences": len(target), "by": settings.by}
    print("\n".join(["| source | hidden | overlap | sentences |", "|---|---:|---:|---:|"]))
    for name, row in ordered.items():
        print(f"| {name} | {row['hidden']:.4f} | {row['overlap']:.3f} | {row['sentences']} |")
    if settings.output_file is not None:
        Path(settings.output_file).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found


def _source(settings: RankArguments, language: str, size: int | None = None) -> list[list[str]]:
    layout = settings.layout()
    corpus = read_corpus(settings.dataset, [language], ["train"], layout)
    rows = label_corpus(corpus, layout)[language]["train"]
    wanted = min(settings.source_sentences if size is None else size, len(rows))
    words: list[list[str]] = sample(rows, wanted, settings.sample_seed)["tokens"][:]
    return words


def _target(settings: RankArguments) -> list[list[str]]:
    if settings.target_language is not None:
        return _source(settings, settings.target_language, settings.sentences)
    try:
        lines = [line.split() for line in text_lines(Path(settings.text_file or "")) if line.strip()]
    except OSError as error:
        raise ValueError(f"text_file: {settings.text_file} cannot be read ({one_line(error)}): name a text") from error
    if not lines:
        raise ValueError(f"text_file: {settings.text_file} is empty: it must hold at least one sentence")
    return lines[: settings.sentences]


def _read(
    settings: RankArguments, words: Mapping[str, list[list[str]]]
) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """Of each language the centroid (H,) of its sentences, and its sub-tokens."""
    model, trusted = settings.model_name_or_path, settings.trust_remote_code
    names = trained_labels(model, trust_remote_code=trusted) or list(LABELS)
    base, tokenizer = load_classifier(model, names, trust_remote_code=trusted)
    tokenizer = as_in_text(tokenizer, [one for part in words.values() for one in part[:100]], base.config)
    device = "cuda" if torch.cuda.is_available() and not settings.use_cpu else "cpu"
    encoder: Any = base.base_model
    encoder.eval().to(device)
    length, collate = min(settings.max_length, longest_input(base)), PadRight(tokenizer.pad_token_id)
    states, pieces = dict[str, Tensor](), dict[str, list[int]]()
    for name, part in words.items():
        blank = {"tokens": part, "ner_tags": [[0] * len(one) for one in part]}
        rows: Any = encode(Dataset.from_dict(blank, features=ner_features(names)), tokenizer, length).to_list()
        pieces[name] = [piece for row in rows for piece in row["input_ids"]]
        sums = []
        for start in range(0, len(rows), BATCH):
            batch = {key: value.to(device) for key, value in collate(rows[start : start + BATCH]).items()}
            batch.pop("labels")
            with torch.no_grad():
                hidden = encoder(**batch).last_hidden_state.double()  # (B, T, H)
            mask = batch["attention_mask"].unsqueeze(-1)
            sums.append(((hidden * mask).sum(1) / mask.sum(1)).cpu())
        states[name] = torch.cat(sums).mean(0)
    return states, pieces
