"""A run's life, whatever its task: what was trained is kept first, and `results.json` says that it is finished."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers import set_seed

from metaxl_evo.bilevel import tree
from metaxl_evo.experiments.curves import PICTURE, draw_curves, drawing, outline, write_curves
from metaxl_evo.experiments.folders import (
    RESULTS,
    checkpoint_settings,
    finished_run,
    made_of,
    understood,
    write_results,
)
from metaxl_evo.experiments.plan import Run
from metaxl_evo.experiments.progress import Progress
from metaxl_evo.experiments.run_folder import Beginning, Mark, alone, note_published, refuse_other, refuse_run
from metaxl_evo.experiments.scores import write_outcomes
from metaxl_evo.experiments.task import Data, Settings, Task
from metaxl_evo.messages import one_line
from metaxl_evo.training.checkpoint import MANIFEST, checkpoints_in, remove_incomplete, rotate
from metaxl_evo.training.durable import staged
from metaxl_evo.training.logs import is_watched
from metaxl_evo.training.preemption import Interrupted
from metaxl_evo.training.trainer import MetaTrainer

logger = logging.getLogger(__name__)


def prepare(task: Task[Settings, Data], run: Run[Settings]) -> tuple[Data, dict[str, str], MetaTrainer]:
    """The data, their fingerprints, and the trainer of a run.

    Raises:
        ValueError: for whatever cannot work, before any training.
    """
    set_seed(run.args.seed)
    data = task.load(run.settings, run.args)
    marks = dict(task.fingerprints(data))  # before anybody can change them
    with _telling_of_the_hub("leave it out"):
        args = copy.copy(task.fit_arguments(run.settings, run.args, data))
        args.disable_tqdm = args.disable_tqdm or not is_watched()
        return data, marks, task.build_trainer(run.settings, args, data)


def try_out(task: Task[Any, Any], run: Run[Any]) -> None:
    """Prepare a run and leave nothing behind: the folder that its trainer makes is made when it is trained.

    Raises:
        ValueError: for whatever cannot work, before any training.
    """
    with _no_empty_folder(run):
        _, marks, trainer = prepare(task, run)
        _refuse_other(task, run, trainer, marks)


def _refuse_other(task: Task[Any, Any], run: Run[Any], trainer: MetaTrainer, marks: Mapping[str, str]) -> None:
    if run.args.should_save:
        refuse_other(run.folder, run.all_settings(trainer.args), marks, task.own_files)


@contextmanager
def _no_empty_folder(run: Run[Any]) -> Iterator[None]:
    """Folders that are made for a run inside, and stay empty, are gone afterwards."""
    folders = [run.folder, *run.folder.parents] if run.args.should_save else []
    made = [folder for folder in folders if not folder.exists()]
    try:
        yield
    finally:
        for folder in made:
            with suppress(OSError):  # never made, or filled
                folder.rmdir()


def keep_finished(task: Task[Any, Any], run: Run[Any]) -> dict[str, Any] | None:
    """The results of a run that is done already; None where something of it is still to do.

    Raises:
        ValueError: where it was made with other settings or data.
    """
    results = _finished(task, run)
    return None if _is_to_be_published(run) else results


def _finished(task: Task[Any, Any], run: Run[Any]) -> dict[str, Any] | None:
    file = run.folder / RESULTS
    if not file.exists():
        return None
    set_seed(run.args.seed)
    data = task.load(run.settings, run.args)
    marks = task.fingerprints(data)
    args = task.fit_arguments(run.settings, run.args, data)
    results = finished_run(file, run.all_settings(args), marks)
    with understood(file):
        task.flat_scores(results["test"]).items(), task.join_cases({run.case: results})
    return results


def make_run(task: Task[Settings, Data], run: Run[Settings]) -> dict[str, Any]:
    """Train, test, save and publish one run, as far as that is not done; returns what `results.json` holds.

    In this order: mark, model, scores with their examples, all that stands beside them, `results.json`, upload.

    Raises:
        ValueError: for whatever cannot work, or where another process makes this run.
        Interrupted: told to stop by a signal; there is no `results.json`, and resuming goes on.
    """
    resuming, first = run.args.resume_from_checkpoint is not None, run.args.process_index == 0
    if first:
        refuse_run(run.folder, resuming, task.own_files)
    with _no_empty_folder(run), alone(run.folder) if first else nullcontext():  # it holds it for all of a launch
        results = _finished(task, run) if resuming else None  # by another process, meanwhile
        if results is None:
            results = _train(task, run)
        if _is_to_be_published(run):
            _publish(run)
    return results


def _train(task: Task[Settings, Data], run: Run[Settings]) -> dict[str, Any]:
    """All of a run but its upload; `results.json`, which says that it is finished, comes last."""
    data, marks, trainer = prepare(task, run)
    settings = run.all_settings(trainer.args)
    trainer.run_settings = checkpoint_settings(made_of(settings, marks))
    _refuse_other(task, run, trainer, marks)
    if run.args.should_save:
        trainer.add_callback(Beginning(run.folder, Mark(settings, marks)))
    start = tree.clone(trainer.model.meta_parameters())
    trainer.add_callback(Progress(run.folder))
    with _keeping(trainer, run.folder):
        begun = time.perf_counter()
        trainer.train(resume_from_checkpoint=run.args.resume_from_checkpoint)
        facts = {"steps": trainer.state.global_step, "train_seconds": time.perf_counter() - begun}
        if run.args.should_save:
            remove_incomplete(run.folder)
        _save_model(trainer, run.folder)
        results: dict[str, Any] = {"test": task.score(trainer, run.settings, data)}
        dev = task.dev_score(trainer, run.settings, data)
        results |= {} if dev is None else {"dev": dev}
        results |= {"settings": settings, "data": marks}
        results["run"] = facts | _facts(trainer) | task.describe(trainer, run.settings, data, start)
        if run.args.push_to_hub:
            trainer.finish_push()  # of a checkpoint, before what it reads is replaced
        if run.args.should_save:
            _leave(task, run, trainer, data, results)
            write_results(run.folder, results)
            _rotate(trainer)
    return results


def _rotate(trainer: MetaTrainer) -> None:
    """The last checkpoint is needed until there are results; of one alone that is kept, the best stays."""
    best = trainer.state.best_model_checkpoint
    if trainer.args.load_best_model_at_end and best is not None:
        rotate(Path(best), trainer.args.save_total_limit, best)


@contextmanager
def _keeping(trainer: MetaTrainer, folder: Path) -> Iterator[None]:
    """Around a training and what follows it: told to stop behind the last step, it is kept, if no checkpoint has it.

    Not by several processes, which are told at different places and could not wait for each other, nor where the best
    weights have taken the place of the last: then a line says what will be made anew.
    """
    try:
        yield
    except Interrupted:
        args, last = trainer.args, folder / f"checkpoint-{trainer.state.global_step}"
        ended = 0 < trainer.state.max_steps <= trainer.state.global_step
        kept = any((place / name).exists() for place, name in ((folder, RESULTS), (last, MANIFEST)))
        if ended and not kept and (args.world_size > 1 or args.load_best_model_at_end):
            newest = next((one.name for one in checkpoints_in(folder) if (one / MANIFEST).exists()), "the start")
            if args.should_log:
                logger.warning("no checkpoint keeps the last step: what is resumed goes on from %s", newest)
        elif ended and not kept:
            trainer.keep_step()
        raise


def _save_model(trainer: MetaTrainer, folder: Path) -> None:
    """Here alone: the Trainer would upload it at once, without scores, and lose them where the Hub is away."""
    args, trainer.args = trainer.args, copy.copy(trainer.args)
    trainer.args.push_to_hub = False
    try:
        with staged(folder) if args.should_save else nullcontext(folder) as place:
            trainer.save_model(str(place))
    finally:
        trainer.args = args


def _facts(trainer: MetaTrainer) -> dict[str, Any]:
    best = trainer.state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    return {
        "processes": trainer.args.world_size,
        "skipped_meta_steps": trainer.skipped_meta_steps,
        "base_parameters": tree.size(trainer.model.base_parameters()),
        "meta_parameters": tree.size(trainer.model.meta_parameters()),
        "best_checkpoint": best,
        "meta_history": outline(trainer.state.log_history),
    }


def _leave(
    task: Task[Settings, Data],
    run: Run[Settings],
    trainer: MetaTrainer,
    data: Data,
    results: Mapping[str, Any],
) -> None:
    """All that stands beside the model and the results."""
    trainer.card_data = task.card_data(run.settings, data, results)
    trainer.card_sections = list(task.card_sections(results, run.settings, trainer.estimator))
    title = (run.args.hub_model_id or run.folder.name).rpartition("/")[2]
    with staged(run.folder) as folder:
        task.write_files(folder, trainer, run.settings, data)
        write_outcomes(folder, task.flat_scores(results["test"]))
        write_curves(folder, trainer.state.log_history)
        if find_spec("matplotlib"):
            with drawing():
                draw_curves(folder)
                task.plot(folder, results)
        if (folder / PICTURE).is_file():
            trainer.card_sections.append(f"## Learning curves\n\n![losses, scores and meta parameters]({PICTURE})")
        trainer.create_model_card(**{"model_name": title, **task.card_metadata(run.settings)}, folder=folder)


def _is_to_be_published(run: Run[Any]) -> bool:
    mark, wanted = Mark.read(run.folder), run.args.hub_model_id
    there = None if mark is None else mark.published
    elsewhere = wanted is not None and there is not None and there.split("/")[-1] != wanted.split("/")[-1]
    return run.args.push_to_hub and run.args.should_save and (there is None or elsewhere)


def _publish(run: Run[Any]) -> None:
    """Upload the folder of a finished run, and note that it is there.

    Not by the trainer, which saves its model again before: here that may be one that has not been trained.
    """
    args = run.args
    with _telling_of_the_hub("the run is finished, and resume_from_checkpoint: latest uploads it", OSError):
        api = HfApi(token=args.hub_token)
        name = args.hub_model_id or run.folder.absolute().name
        repository = api.create_repo(name, private=args.hub_private_repo, exist_ok=True).repo_id
        api.upload_folder(
            repo_id=repository,
            folder_path=run.folder,
            commit_message="End of training",
            ignore_patterns=["_*", "checkpoint-*"],
            revision=args.hub_revision,
        )
    note_published(run.folder, repository)


@contextmanager
def _telling_of_the_hub(advice: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turns an HTTP library's error, whatever its class, and those of these kinds into one line."""
    try:
        yield
    except Exception as error:
        of_http = type(error).__module__.split(".")[0] in ("httpx", "httpx2", "requests")
        if not of_http and not isinstance(error, kinds):
            raise
        raise ValueError(f"push_to_hub: the Hub cannot be reached ({one_line(error)}): {advice}") from error
