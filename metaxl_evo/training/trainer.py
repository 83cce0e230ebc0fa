"""MetaTrainer: the Hugging Face Trainer with a second level."""

from __future__ import annotations

import inspect
import logging
import math
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from torch import Tensor
from transformers import Trainer, TrainerCallback, get_scheduler

from metaxl_evo.bilevel import tree
from metaxl_evo.bilevel.passes import mix_seed
from metaxl_evo.bilevel.problem import Hypergradient, StepMade, hypergradient
from metaxl_evo.bilevel.update import SGD, UpdateRule, UpdateState, from_optimizer, optimizer_rule
from metaxl_evo.estimators import Estimator
from metaxl_evo.models.bilevel_module import TOTALS, Batch, BilevelModule
from metaxl_evo.training.arguments import MetaTrainingArguments, optimizer_class
from metaxl_evo.training.meta_rows import MetaRows

logger = logging.getLogger(__name__)

META_STATE = "meta_state.pt"


class MetaTrainer(Trainer):
    """Trains a BilevelModule: the base by the Trainer's own loop, the meta network by hypergradients.

    One meta step per optimizer step (or every `meta_every`), over the whole accumulation window. With
    `meta_order="after_step"` it follows the base step and differentiates that very step; with `lookahead` it precedes
    it.

    Args:
        model: the task.
        args: both levels' arguments.
        meta_dataset: the rows that judge; a share of them (`1 - meta_portion`) joins the train rows. May be left out
            where `args.estimator` is `none`.
        kwargs: as for `transformers.Trainer`.

    Raises:
        ValueError: before anything runs, for a launch, an optimiser or an estimator that cannot work together.
    """

    model: BilevelModule
    args: MetaTrainingArguments

    def __init__(
        self,
        model: BilevelModule,
        args: MetaTrainingArguments,
        *,
        meta_dataset: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        **kwargs: Any,
    ):
        self.estimator: Estimator | None = args.make_estimator()
        _refuse_launch(args, self.estimator)
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError(f"{type(model).__name__} has its own losses: leave out compute_loss_func")
        if self.estimator is not None:
            if meta_dataset is None or args.meta_portion == 0:
                raise ValueError(
                    f"estimator {args.estimator!r} needs meta rows: give meta_dataset and a meta_portion above 0, "
                    "or set estimator: none"
                )
            if args.meta_portion < 1 and type(model).join is BilevelModule.join:
                raise ValueError(f"{type(model).__name__} cannot join meta rows to train rows: set meta_portion to 1")
            self.estimator.check(model.problem(SGD(0.0)), model.base_parameters(), model.meta_parameters())
        super().__init__(model=model, args=args, callbacks=[*(callbacks or []), _MetaSteps(self)], **kwargs)
        self.loss_is_scaled_for_ga = True  # the module divides by the totals of the window
        if args.label_names is None:
            self.label_names = ["labels"]
        self.meta_dataset = meta_dataset
        self.meta_rows = self._make_meta_rows()
        self.meta_optimizer: torch.optim.Optimizer | None = None
        self.meta_scheduler: torch.optim.lr_scheduler.LRScheduler | None = None
        self.card_sections: list[str] = []
        self._window: tuple[list[Batch], list[Batch]] = ([], [])
        self._window_is_new = False
        self._previous: tree.Tree | None = None
        self._grad_norm: float | None = None
        self._meta_learning_rate: Any = args.meta_learning_rate
        self._skipped_in_a_row = 0
        self.skipped_meta_steps = 0
        self._metrics: dict[str, list[float]] = defaultdict(list)

    # ---- the two levels' optimisers

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The base optimiser over the base parameters, and the meta optimiser over the meta parameters."""
        if self.optimizer is None and self.args.optimizer_class is not None:
            parameters = list(self.model.base_parameters().values())
            self.optimizer = optimizer_class(self.args.optimizer_class, "optimizer_class")(
                parameters, **_optimizer_settings(self.args)
            )
        optimizer = super().create_optimizer(model) if model is not None else super().create_optimizer()
        if self.estimator is not None:
            if self.estimator.needs_update_rule:
                optimizer_rule(_plain(optimizer))
            self.meta_optimizer = self._make_meta_optimizer()
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The schedules of both learning rates, in base steps."""
        if self.meta_optimizer is not None:
            warmup = self.args.meta_warmup_steps
            self.meta_scheduler = get_scheduler(
                self.args.meta_lr_scheduler_type,
                optimizer=self.meta_optimizer,
                num_warmup_steps=int(warmup if warmup >= 1 else math.ceil(warmup * num_training_steps)),
                num_training_steps=num_training_steps,
            )
        return super().create_scheduler(num_training_steps, optimizer)

    def _make_meta_optimizer(self) -> torch.optim.Optimizer:
        args, cls = self.args, optimizer_class(self.args.meta_optim, "meta_optim")
        settings: dict[str, Any] = {"lr": args.meta_learning_rate, "weight_decay": args.meta_weight_decay}
        if "eps" in _accepted(cls):
            settings["eps"] = args.meta_adam_epsilon
        return cls(list(self.model.meta_parameters().values()), **settings)

    # ---- the window of one optimizer step

    def get_train_dataloader(self) -> Any:
        self.meta_rows = self._make_meta_rows()
        return super().get_train_dataloader()

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """The micro-batches of one optimizer step with their meta rows, and the totals that their losses divide by."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        judged: list[Batch] = []
        if self.meta_rows is not None:
            for index, batch in enumerate(batches):
                train_rows, meta_rows = next(self.meta_rows)
                if train_rows:
                    batches[index] = self.model.join(batch, self._collate(train_rows))
                if meta_rows:
                    judged.append(self._collate(meta_rows))
        for window in (batches, judged):
            self._set_totals(window)
        self._window, self._window_is_new = (batches, judged), True
        return batches, items

    def _make_meta_rows(self) -> MetaRows | None:
        if self.meta_dataset is None:
            return None
        args = self.args
        return MetaRows(
            self.meta_dataset,
            args.per_device_meta_batch_size * args.world_size,
            portion=args.meta_portion,
            seed=mix_seed(_meta_seed(args), 0),
            rank=args.process_index,
            world_size=args.world_size,
        )

    def _collate(self, rows: list[Any]) -> Batch:
        return self._prepare_inputs(self.data_collator(rows))

    def _set_totals(self, window: list[Batch]) -> None:
        """Sum the counts over the window and the ranks and hand them to every micro-batch."""
        if not window:
            return
        counts = [self.model.counts(batch) for batch in window]
        totals = torch.tensor([sum(count[key] for count in counts) for key in counts[0]], device=self.args.device)
        if self.accelerator.num_processes > 1:
            totals = self.accelerator.reduce(totals, reduction="sum")
        for batch in window:
            batch[TOTALS] = dict(zip(counts[0], totals.unbind(), strict=True))

    # ---- the base step

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """The base step of one micro-batch, behind the meta step where the order is `lookahead`."""
        if self._window_is_new and self.args.meta_order == "lookahead" and self._meta_step_is_due():
            model.train()
            self._look_ahead()
        self._window_is_new = False
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The inner loss in training (times the ranks, whose gradients DDP averages), the base model's own
        otherwise."""
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if return_outputs or not model.training:
            return found
        return found * self.accelerator.num_processes

    def _clip_grad_norm(self, model: Any) -> Any:
        norm = super()._clip_grad_norm(model)
        self._grad_norm = None if norm is None else float(norm)
        return norm

    # ---- the meta step

    def _meta_step_is_due(self) -> bool:
        """Whether this optimizer step has a meta step: every `meta_every`-th, and not at a learning rate of zero."""
        if self.estimator is None or self.state.global_step % self.args.meta_every:
            return False
        return any(group["lr"] != 0 for group in _plain(self.optimizer).param_groups)

    def _look_ahead(self) -> None:
        assert self.estimator is not None
        rule, state = self._update_rule(self.estimator)
        self._meta_step(rule, self.model.base_parameters(), update_state=state)

    def _keep_previous(self) -> None:
        """Before the base step: keep the weights, where the estimator differentiates the step from them."""
        assert self.estimator is not None
        if self.estimator.evaluated_at == "previous":
            self._previous = tree.clone(self.model.base_parameters())

    def _after_step(self) -> None:
        """After the base step: the hypergradient of that step."""
        assert self.estimator is not None
        now = tree.detach(self.model.base_parameters())
        rule, state = self._update_rule(self.estimator)
        if self._previous is None:
            self._meta_step(rule, now)
            return
        made = StepMade(now, self._gradients_before_clipping(), state)
        previous, self._previous = self._previous, None
        self._meta_step(rule, previous, made=made)

    def _meta_step(self, rule: UpdateRule, w: tree.Tree, **step: Any) -> None:
        assert self.estimator is not None
        result = self._hypergradient(self.estimator, rule, w, **step)
        if tree.all_finite(result.grads):
            self._apply(result)
        else:
            self._skip(result)

    def estimate(self, estimator: Estimator) -> Hypergradient:
        """The hypergradient, by any estimator, of a step to come from here over the last window; nothing is changed.

        Raises:
            ValueError: where the estimator cannot serve this task or optimiser.
        """
        rule, state = self._update_rule(estimator)
        return self._hypergradient(estimator, rule, self.model.base_parameters(), update_state=state)

    def _hypergradient(self, estimator: Estimator, rule: UpdateRule, w: tree.Tree, **step: Any) -> Hypergradient:
        """Over the current window; its noise depends on the seed and the number of the step alone."""
        train_window, meta_window = self._window
        return hypergradient(
            self.model.problem(rule, dropout=self.args.meta_dropout),
            estimator,
            w,
            self.model.meta_parameters(),
            train_window,
            meta_window,
            generator=torch.Generator().manual_seed(mix_seed(_meta_seed(self.args), 1, self.state.global_step)),
            **step,
        )

    def _apply(self, result: Hypergradient) -> None:
        assert self.meta_optimizer is not None
        self._skipped_in_a_row = 0
        norm = tree.norm(result.grads)
        limit = self.args.meta_max_grad_norm
        factor = 1.0 if limit is None else min(1.0, limit / (norm + 1e-6))
        parameters = self.model.meta_parameters()
        for name, parameter in parameters.items():
            parameter.grad = result.grads[name].to(parameter.dtype) * factor
        self.meta_optimizer.step()
        for parameter in parameters.values():
            parameter.grad = None
        for key, value in {
            "meta_loss": float(result.outer_loss),
            "meta_grad_norm": norm,
            **result.diagnostics,
        }.items():
            self._metrics[key if key.startswith("meta_") else f"meta_{key}"].append(value)

    def _skip(self, result: Hypergradient) -> None:
        """Count a non-finite hypergradient; stop the run after too many in a row."""
        self.skipped_meta_steps += 1
        self._skipped_in_a_row += 1
        logger.warning("step %d: the hypergradient is not finite, no meta update", self.state.global_step)
        if self._skipped_in_a_row >= self.args.max_skipped_meta_steps:
            raise FloatingPointError(
                f"{self._skipped_in_a_row} hypergradients in a row were not finite (outer loss "
                f"{float(result.outer_loss):.3g}): "
                "lower learning_rate or meta_learning_rate, set meta_max_grad_norm, or raise max_skipped_meta_steps"
            )

    def _update_rule(self, estimator: Estimator) -> tuple[UpdateRule, UpdateState]:
        """The inner update as the optimiser makes it now; a placeholder where the estimator does without."""
        if not estimator.needs_update_rule:
            return SGD(0.0), {"step": 0, "momentum_buffer": {}}
        names = {parameter: name for name, parameter in self.model.base_parameters().items()}
        limit = self.args.max_grad_norm or None
        return from_optimizer(_plain(self.optimizer), names, max_grad_norm=limit)

    def _gradients_before_clipping(self) -> tree.Tree:
        limit, norm = self.args.max_grad_norm, self._grad_norm
        factor = 1.0
        if limit and norm is not None and norm + 1e-6 > limit:
            factor = (norm + 1e-6) / limit
        return {
            name: torch.zeros_like(p) if p.grad is None else p.grad.detach() * factor
            for name, p in self.model.base_parameters().items()
        }

    # ---- logs, checkpoints, model card

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log with the meta level's means since the last time."""
        if "loss" in logs and self.meta_optimizer is not None:
            logs |= {key: sum(values) / len(values) for key, values in self._metrics.items()}
            logs["meta_learning_rate"] = self._meta_learning_rate
            if self.skipped_meta_steps:
                logs["skipped_meta_steps"] = self.skipped_meta_steps
            self._metrics.clear()
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = output_dir if output_dir is not None else self.args.output_dir
        self.model.save_pretrained(folder)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        torch.save(self.args, Path(folder) / "training_args.bin")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.model.load_pretrained(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self.model.load_pretrained(self.state.best_model_checkpoint)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            torch.save(self._meta_state(), Path(output_dir) / META_STATE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        file = Path(checkpoint) / META_STATE
        try:
            saved = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # a truncated file raises one of several kinds
            raise ValueError(
                f"{file} cannot be read ({type(error).__name__}): resume from an earlier checkpoint"
            ) from error
        for name, holder in self._stateful().items():
            if name not in saved:
                raise ValueError(f"{file} has no {name}: it was written by a run without one, start a new run instead")
            holder.load_state_dict(saved[name])
        self.skipped_meta_steps, self._skipped_in_a_row = saved["skipped"]

    def _stateful(self) -> dict[str, Any]:
        held = {"optimizer": self.meta_optimizer, "scheduler": self.meta_scheduler, "rows": self.meta_rows}
        return {name: holder for name, holder in held.items() if holder is not None}

    def _meta_state(self) -> dict[str, Any]:
        states = {name: holder.state_dict() for name, holder in self._stateful().items()}
        return {**states, "skipped": [self.skipped_meta_steps, self._skipped_in_a_row]}

    def create_model_card(  # type: ignore[override]
        self,
        model_name: str | None = None,
        language: str | None = None,
        tasks: str | None = None,
        tags: str | list[str] | None = None,
        finetuned_from: str | None = None,
        dataset_tags: str | None = None,
        **kwargs: Any,
    ) -> None:
        """A card of what is known: metadata for the Hub, the estimator, and `card_sections` (Markdown).

        Args:
            finetuned_from, dataset_tags: Hub ids; leave out what is not on the Hub.
            kwargs: the Trainer's further fields, for which this card has no place.
        """
        if not self.is_world_process_zero():
            return
        metadata = ModelCardData(
            language=language,
            library_name="transformers",
            pipeline_tag=tasks,
            tags=["metaxl-evo", "generated_from_trainer", *([tags] if isinstance(tags, str) else tags or [])],
            base_model=finetuned_from,
            datasets=dataset_tags,
        )
        title = f"# {model_name or Path(self.args.output_dir).name}"
        made = f"Trained by metaxl_evo's MetaTrainer, estimator `{self.estimator or 'none'}`."
        text = "\n\n".join([f"---\n{metadata.to_yaml()}\n---", title, made, *self.card_sections])
        ModelCard(text + "\n").save(Path(self.args.output_dir) / "README.md")

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.is_world_process_zero():
            self.model.save_meta(self.args.output_dir)  # the Trainer copies only the file names it knows
        super()._push_from_checkpoint(checkpoint_folder)


class _MetaSteps(TrainerCallback):
    """Calls the trainer's meta level around `optimizer.step()`, which no method of the Trainer surrounds."""

    def __init__(self, trainer: MetaTrainer):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.meta_order == "after_step" and self.trainer._meta_step_is_due():
            self.trainer._keep_previous()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.meta_order == "after_step" and self.trainer._meta_step_is_due():
            self.trainer._after_step()
        if self.trainer.meta_scheduler is not None:
            self.trainer._meta_learning_rate = self.trainer.meta_scheduler.get_last_lr()[
                0
            ]  # of this step, for the log
            with (
                warnings.catch_warnings()
            ):  # torch warns where the first meta steps are skipped, at a zero learning rate
                warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")
                self.trainer.meta_scheduler.step()


def _refuse_launch(args: MetaTrainingArguments, estimator: Estimator | None) -> None:
    """Refuse what would be silently wrong, with the way out."""
    refused = {
        "fsdp": (bool(args.fsdp), "parameters are sharded; train with DDP or on one device"),
        "deepspeed": (bool(args.deepspeed), "its engine owns the backward; train with DDP or on one device"),
        "fp16": (args.fp16, "its scaler is shared between optimisers; use bf16 or float32"),
        "DataParallel": (
            args.n_gpu > 1,
            "replicas lose the hooks; start with accelerate launch, or set CUDA_VISIBLE_DEVICES",
        ),
    }
    for what, (asked, reason) in refused.items():
        if asked:
            raise ValueError(f"MetaTrainer does not run with {what}: {reason}")
    if estimator is None:
        return
    if args.world_size > 1:
        raise ValueError(
            f"meta steps on {args.world_size} processes are not supported yet: launch one process "
            "(--num_processes 1), or use gradient_accumulation_steps for larger batches"
        )
    for field in ("activation_checkpointing", "gradient_checkpointing", "torch_compile"):
        if getattr(args, field, False) and (estimator.second_order or estimator.needs_forward_ad):
            raise ValueError(
                f"estimator {args.estimator!r} ({estimator}) differentiates twice, which {field} does not allow: "
                "set the engine to finite_difference or use evograd"
            )


def _plain(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimiser behind accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def _meta_seed(args: MetaTrainingArguments) -> int:
    return args.seed if args.meta_seed is None else args.meta_seed


def _accepted(cls: type[torch.optim.Optimizer]) -> Any:
    return inspect.signature(cls).parameters


def _optimizer_settings(args: MetaTrainingArguments) -> dict[str, Any]:
    """Keyword arguments of a torch.optim class from the Trainer's fields; only those that it takes."""
    assert args.optimizer_class is not None
    settings = {
        "lr": args.learning_rate,
        "weight_decay": args.weight_decay,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
    }
    accepted = _accepted(optimizer_class(args.optimizer_class, "optimizer_class"))
    return {name: value for name, value in settings.items() if name in accepted}
