"""The Trainer of a task, as far as it has one level: evaluation by the base, whole checkpoints, the card."""

from __future__ import annotations

import copy
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_pt_utils import nested_detach

from metaxl_evo.models.adapters import is_adapted
from metaxl_evo.models.bilevel_module import BilevelModule
from metaxl_evo.models.heads import columns_of
from metaxl_evo.training.arguments import MetaTrainingArguments
from metaxl_evo.training.checkpoint import discarding, loading, made_by, require_whole, rotate, saving, seal, unseal
from metaxl_evo.training.evaluation import outputs_of
from metaxl_evo.training.model_card import write_model_card

logger = logging.getLogger(__name__)


class TaskTrainer(Trainer):
    """A Trainer of a BilevelModule: its base is evaluated and saved, and no checkpoint is lost to a failed save.

    Attributes:
        card_sections: Markdown for the model card.
        run_settings: the task's own settings, plain values; a checkpoint made with others is not resumed from.
    """

    model: BilevelModule
    args: MetaTrainingArguments

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        if self.args.label_names is None:
            self.label_names = ["labels"]
        self.card_sections: list[str] = []
        self.card_data: dict[str, Any] = {}
        self.run_settings: dict[str, Any] = {}
        self._said = set[str]()

    # ---- evaluation

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Any, Any, Any]:
        """The base's outputs on the columns that it takes, and a loss where it gives one; the labels as they came."""
        inputs = self._prepare_inputs(inputs)
        held = [inputs.get(name) for name in self.label_names]
        labels = None if not held or any(one is None for one in held) else nested_detach(tuple(held))
        left = sorted(inputs.keys() - columns_of(self.model.plain_base, inputs).keys())
        if left and type(self.model).forward is BilevelModule.forward:
            self._say_once(f"evaluation leaves out {', '.join(left)}, which the base's forward does not take")
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs)
        loss, logits = outputs_of(outputs, ignore_keys, self.model)
        if loss is None and labels is not None:
            self._say_once(
                "the base gives no loss in evaluation: eval_loss is left out, compute_metrics sees its outputs"
            )
        if prediction_loss_only:
            return loss, None, None
        logits = nested_detach(logits)
        single = labels is not None and len(labels) == 1
        return loss, logits[0] if len(logits) == 1 else logits, labels[0] if labels is not None and single else labels

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            logger.warning("%s", text)

    # ---- files

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the Trainer's; a base that peft wraps is written as the merged model, beside its adapter.

        Checkpoints hold the adapter alone.
        """
        if not _internal_call and self.args.should_save and is_adapted(self.model.base):
            folder = Path(output_dir if output_dir is not None else str(self.args.output_dir))
            with saving(folder):
                self.model.save_merged(folder)
        if self.model.is_sharded:  # the Trainer asks for a state of the task, and of sharded checkpoints for none
            self._save(output_dir, self.model.gathered_state())
        else:
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir if output_dir is not None else str(self.args.output_dir))
        with saving(folder):
            if state_dict is None:
                self.model.save_pretrained(folder)
            else:
                self.model.save_pretrained(folder, state_dict)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)
            torch.save(self.args, folder / TRAINING_ARGS_NAME)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """The Trainer's, completed by a manifest, before which no older one is deleted and nothing is pushed."""
        args, folder = self.args, self._checkpoint(trial)
        if args.should_save:
            with saving(folder):
                unseal(folder)
        self.accelerator.wait_for_everyone()  # until then no rank writes
        with discarding(folder):
            self.args = copy.copy(args)
            self.args.save_total_limit, self.args.push_to_hub = None, False
            try:
                with saving(folder):
                    super()._save_checkpoint(model, trial)
            finally:
                self.args = args
            self.accelerator.wait_for_everyone()  # every rank's random state is there
            if args.should_save:
                with saving(folder):
                    torch.save(args, folder / TRAINING_ARGS_NAME)
                    seal(folder, made_by(self.model, args, self.run_settings), args.world_size)
        if args.push_to_hub:
            self._push_from_checkpoint(str(folder))
        self._rotate(folder)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's, which would delete all but the best checkpoint: the last, and `checkpoint-9-of-mine`."""
        limited, self.args = self.args, copy.copy(self.args)
        self.args.save_total_limit = None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args = limited

    def _checkpoint(self, trial: Any) -> Path:
        """The folder of this step."""
        return Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"

    def _rotate(self, newest: Path) -> None:
        if self.args.should_save and newest.is_dir():
            rotate(newest, self.args.save_total_limit, self.state.best_model_checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.model.load_pretrained(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        try:
            require_whole(Path(self.state.best_model_checkpoint))
        except ValueError as error:
            raise ValueError(f"{error}, or end with the last weights (load_best_model_at_end: false)") from error
        self.model.load_pretrained(self.state.best_model_checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        """None: fp16 is refused, and one that stands in a checkpoint is not ours to read."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            with loading(checkpoint):
                super()._load_rng_state(checkpoint)

    def create_model_card(  # type: ignore[override]
        self,
        model_name: str | None = None,
        language: str | None = None,
        tasks: str | None = None,
        tags: str | list[str] | None = None,
        finetuned_from: str | None = None,
        dataset_tags: str | None = None,
        folder: Path | None = None,
        **kwargs: Any,
    ) -> None:
        """A card of what is known: metadata for the Hub, the estimator, `card_sections` (Markdown) and `card_data`.

        Args:
            finetuned_from, dataset_tags: Hub ids; leave out what is not on the Hub.
            folder: where it is written (default: `output_dir`).
            kwargs: the Trainer's further fields, for which this card has no place.
        """
        if self.is_world_process_zero():
            made = f"Trained by metaxl_evo's MetaTrainer, estimator `{self.args.make_estimator() or 'none'}`."
            write_model_card(
                folder or Path(str(self.args.output_dir)),
                [made, *self.card_sections],
                model_name=model_name,
                language=language,
                tasks=tasks,
                tags=tags,
                finetuned_from=finetuned_from,
                dataset_tags=dataset_tags,
                further=self.card_data,
            )

    def finish_push(self) -> None:
        """Wait for the upload of a checkpoint, where one is under way."""
        self._finish_current_push()

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.is_world_process_zero():
            for part in Path(checkpoint_folder).iterdir():
                if part.is_dir():  # the meta network or an adapter; the Trainer copies only the file names it knows
                    shutil.copytree(part, Path(str(self.args.output_dir)) / part.name, dirs_exist_ok=True)
        super()._push_from_checkpoint(checkpoint_folder)
