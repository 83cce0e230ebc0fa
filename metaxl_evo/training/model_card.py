"""The model card of a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData


def write_model_card(
    folder: Path,
    sections: Iterable[str],
    *,
    model_name: str | None,
    language: str | None,
    tasks: str | None,
    tags: str | list[str] | None,
    finetuned_from: str | None,
    dataset_tags: str | None,
    further: Mapping[str, Any],
) -> None:
    """Write `README.md` with metadata for the Hub, a title and the sections (Markdown).

    Args:
        finetuned_from, dataset_tags: Hub ids; None for what is not on the Hub.
        further: other fields of `ModelCardData`, such as `eval_results` (the Hub's model-index) and `widget`.
    """
    named = {"model_name": model_name or folder.name, **further} if "eval_results" in further else dict(further)
    metadata = ModelCardData(
        language=language,
        library_name="transformers",
        pipeline_tag=tasks,
        tags=["metaxl-evo", "generated_from_trainer", *([tags] if isinstance(tags, str) else tags or [])],
        base_model=finetuned_from,
        datasets=dataset_tags,
        **named,
    )
    text = "\n\n".join([f"---\n{metadata.to_yaml()}\n---", f"# {model_name or folder.name}", *sections])
    ModelCard(text + "\n").save(folder / "README.md")
