"""What a model card says of a run: scores, settings, citations."""

from __future__ import annotations

from typing import Any

from metaxl_evo.estimators import Estimator
from metaxl_evo.ner.arguments import NerArguments
from metaxl_evo.ner.metrics import scores_table

METAXL = "Xia et al., MetaXL: Meta Representation Transformation for Low-resource Cross-lingual Learning, NAACL 2021"


def card_sections(results: dict[str, Any], ner: NerArguments, estimator: Estimator | None) -> list[str]:
    """Markdown sections for the card of one model."""
    test = {language: row for language, row in results["test"].items() if language != "average"}
    settings = "\n".join(f"| `{key}` | `{value}` |" for key, value in results["settings"].items())
    sources = ", ".join(ner.source_languages) if ner.recipe.source else "none"
    cited = [METAXL] if estimator is None else [METAXL, estimator.citation]
    adapted = " Its LoRA adapter is merged into it, and in `adapter/` by itself." if ner.use_peft else ""
    return [
        f"## Cross-lingual NER\n\nMethod `{ner.method}`, source {sources}, data `{ner.dataset}`.\n\n"
        "The model here is a plain token classifier; "
        "the representation transformation network of the training is in `rtn/` and is not needed for prediction."
        + adapted,
        f"## Test scores\n\nEntity F1 by seqeval{' (strict IOB2)' if ner.strict else ''}, percent.\n\n"
        + scores_table(test),
        f"## Settings\n\n| field | value |\n|---|---|\n{settings}",
        "## Citation\n\n" + "\n".join(f"- {line}" for line in cited),
    ]
