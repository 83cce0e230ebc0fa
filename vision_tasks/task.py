"""What the vision tasks share beside their data: what they refuse, and what their cards say."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from transformers.trainer_utils import IntervalStrategy

from metaxl_evo.experiments.folders import hub_id
from metaxl_evo.experiments.task import Data, Task
from metaxl_evo.training.arguments import MetaTrainingArguments
from vision_tasks.arguments import VisionArguments, VisionTrainingArguments
from vision_tasks.images import SYNTHETIC

Settings = TypeVar("Settings", bound=VisionArguments)
CLASS_ACCURACY, SHOT_ACCURACY = "class_accuracy", "shot_accuracy"  # scores that are mappings
SHOTS = {"many": "above 100", "medium": "20 to 100", "few": "below 20"}  # training images of a class
SHOWN = 10  # classes in a table


class VisionTask(Task[Settings, Data]):
    """A task on images, whose judging rows do not train.

    Attributes:
        chooses: whether evaluations are of other data than the tests, so that they may choose a checkpoint.
    """

    training: type[MetaTrainingArguments] = VisionTrainingArguments
    configs = "vision"
    chooses: bool = False

    def refuse(self, settings: Settings, args: MetaTrainingArguments) -> None:
        if args.load_best_model_at_end and not self.chooses:
            raise ValueError(
                "load_best_model_at_end would choose on the test images: leave it out, the last step counts"
            )
        if args.do_eval and args.eval_strategy == IntervalStrategy.NO:
            raise ValueError("do_eval evaluates nothing by itself: set eval_strategy, or leave it out")
        if args.meta_portion != 1:  # clean images and episodes of other domains judge, and nothing else
            raise ValueError("these tasks cannot join meta rows to train rows: set meta_portion to 1")

    def flat_scores(self, test: Mapping[str, Any]) -> Mapping[str, Any]:
        return {name: value for name, value in test.items() if not isinstance(value, Mapping)}

    def table(self, test: Mapping[str, Any]) -> str:
        """The scores, and of a classifier the classes that it finds least."""
        if CLASS_ACCURACY not in test:
            return super().table(test)
        worst = sorted(test[CLASS_ACCURACY].items(), key=lambda found: found[1])[:SHOWN]
        rows = "\n".join(f"| {name} | {value:.4f} |" for name, value in worst)
        head = f"| class, the worst of {len(test[CLASS_ACCURACY])} first | accuracy |"
        return f"{super().table(test)}{self._shots(test)}\n\n{head}\n|---|---:|\n{rows}"

    def _shots(self, test: Mapping[str, Any]) -> str:
        """Where training images are not equally many of each class."""
        if SHOT_ACCURACY not in test:
            return ""
        rows = [f"| {name} ({SHOTS[name]}) | {value:.4f} |" for name, value in test[SHOT_ACCURACY].items()]
        return "\n\n" + "\n".join(["| classes by training images | accuracy |", "|---|---:|", *rows])

    def card_text(self, settings: Settings) -> str:
        return f"Data `{hub_id(settings.data) or Path(settings.data).name}`."

    def card_metadata(self, settings: Settings) -> dict[str, Any]:
        found = hub_id(settings.data, SYNTHETIC)
        return {"dataset_tags": None if found is None else found.partition(":")[0]}
