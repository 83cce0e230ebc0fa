"""What the vision tasks share beside their data: what they refuse, and what their cards say."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from metaxl_evo.experiments.folders import hub_id
from metaxl_evo.experiments.task import Data, Task
from metaxl_evo.training.arguments import MetaTrainingArguments
from vision_tasks.arguments import VisionArguments, VisionTrainingArguments
from vision_tasks.images import SYNTHETIC

Settings = TypeVar("Settings", bound=VisionArguments)


class VisionTask(Task[Settings, Data]):
    """A task on images, whose judging rows do not train.

    Attributes:
        chooses: whether evaluations are of other data than the tests, so that they may choose a checkpoint.
    """

    training = VisionTrainingArguments
    chooses: bool = False

    def refuse(self, settings: Settings, args: MetaTrainingArguments) -> None:
        if args.load_best_model_at_end and not self.chooses:
            raise ValueError(
                "load_best_model_at_end would choose on the test images: leave it out, the last step counts"
            )
        if args.meta_portion != 1:  # clean images and episodes of other domains judge, and nothing else
            raise ValueError("these tasks cannot join meta rows to train rows: set meta_portion to 1")

    def card_text(self, settings: Settings) -> str:
        return f"Data `{hub_id(settings.data) or Path(settings.data).name}`."

    def card_metadata(self, settings: Settings) -> dict[str, Any]:
        return {"dataset_tags": hub_id(settings.data, SYNTHETIC)}
