"""A run's life, whatever its task: what was trained is kept first, and `results.json` says that it is finished."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from transformers import set_seed

from metaxl_evo.bilevel import tree
from metaxl_evo.experiments.curves import write_curves
from metaxl_evo.experiments.folders import RESULTS, checkpoint_settings, finished_run, write_results
from metaxl_evo.experiments.plan import Run
from metaxl_evo.experiments.progress import PROGRESS, Progress
from metaxl_evo.experiments.scores import write_outcomes
from metaxl_evo.experiments.task import Data, Settings, Task
from metaxl_evo.messages import one_line
from metaxl_evo.training.checkpoint import MANIFEST
from metaxl_evo.training.preemption import Interrupted
from metaxl_evo.training.trainer import MetaTrainer

LOCK = "_lock"  # which an upload leaves out


def prepare(task: Task[Settings, Data], run: Run[Settings]) -> tuple[Data, MetaTrainer]:
    """The data and the trainer of a run.

    Raises:
        ValueError: for whatever cannot work, before any training.
    """
    set_seed(run.args.seed)
    data = task.load(run.settings, run.args)
    with _telling_of_the_hub():
        return data, task.build_trainer(run.settings, task.fit_arguments(run.settings, run.args, data), data)


def try_out(task: Task[Any, Any], run: Run[Any]) -> None:
    """Prepare a run and leave nothing behind: the folder that its trainer makes is made when it is trained.

    Raises:
        ValueError: for whatever cannot work, before any training.
    """
    folders = [run.folder, *run.folder.parents] if run.args.should_save else []
    made = [folder for folder in folders if not folder.exists()]
    try:
        prepare(task, run)
    finally:
        for folder in made:
            with suppress(OSError):  # never made
                folder.rmdir()


def keep_finished(task: Task[Any, Any], run: Run[Any]) -> dict[str, Any] | None:
    """The results of a run that is done already; None where it is not.

    Raises:
        ValueError: where it was made with other settings.
    """
    file = run.folder / RESULTS
    if not file.exists():
        return None
    args = task.fit_arguments(run.settings, run.args, task.load(run.settings, run.args))
    return finished_run(file, run.all_settings(args))


def make_run(task: Task[Settings, Data], run: Run[Settings]) -> dict[str, Any]:
    """Train, test and save one run, unless it resumes a finished one; returns what `results.json` holds.

    In this order: model, scores with their examples, history, card, `results.json`, pictures, upload.

    Raises:
        ValueError: for whatever cannot work, or where another process makes this run.
        Interrupted: told to stop by a signal; there is no `results.json`, and resuming goes on.
    """
    with _alone(run), ExitStack() as behind_training:
        resuming = run.args.resume_from_checkpoint is not None
        if resuming and (kept := keep_finished(task, run)) is not None:  # by another process, meanwhile
            return kept
        data, trainer = prepare(task, run)
        settings = run.all_settings(trainer.args)
        trainer.run_settings = checkpoint_settings(settings)
        start = tree.clone(trainer.model.meta_parameters())
        trainer.add_callback(Progress(run.folder))
        begun = time.perf_counter()
        trainer.train(resume_from_checkpoint=run.args.resume_from_checkpoint)
        behind_training.enter_context(_keeping(trainer, run.folder))
        facts = {"steps": trainer.state.global_step, "train_seconds": time.perf_counter() - begun}
        _save_model(trainer)
        results: dict[str, Any] = {"test": task.score(trainer, run.settings, data)}
        dev = task.dev_score(trainer, run.settings, data)
        results |= {} if dev is None else {"dev": dev}
        results["settings"] = settings
        results["run"] = facts | _facts(trainer) | task.describe(trainer, run.settings, data, start)
        if run.args.should_save:
            task.write_files(run.folder, trainer, run.settings, data)
        trainer.card_data = task.card_data(run.settings, data, results)
        _leave(task, run, trainer, results)
    return results


@contextmanager
def _keeping(trainer: MetaTrainer, folder: Path) -> Iterator[None]:
    """Around what follows a training: where that is told to stop, a training that no checkpoint ends is kept in one.

    Not by several processes, which are told at different places and could not wait for each other.
    """
    try:
        yield
    except Interrupted:
        args, last = trainer.args, folder / f"checkpoint-{trainer.state.global_step}"
        finished = any((place / name).exists() for place, name in ((folder, RESULTS), (last, MANIFEST)))
        if args.world_size == 1 and not args.load_best_model_at_end and not finished:
            trainer.keep_step()
        raise


def _save_model(trainer: MetaTrainer) -> None:
    """Here alone: the Trainer would upload it at once, without scores, and lose them where the Hub is away."""
    args, trainer.args = trainer.args, copy.copy(trainer.args)
    trainer.args.push_to_hub = False
    try:
        trainer.save_model()
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
    }


def _leave(task: Task[Settings, Any], run: Run[Settings], trainer: MetaTrainer, results: Mapping[str, Any]) -> None:
    """All that stands beside the model; the upload comes last, and brings it along."""
    trainer.card_sections = list(task.card_sections(results, run.settings, trainer.estimator))
    title = (run.args.hub_model_id or run.folder.name).rpartition("/")[2]
    card = {"model_name": title, **task.card_metadata(run.settings)}
    if run.args.should_save:
        write_outcomes(run.folder, task.flat_scores(results["test"]))
        write_curves(run.folder, trainer.state.log_history)
        trainer.create_model_card(**card)
        write_results(run.folder, results)
        if find_spec("matplotlib"):
            task.plot(run.folder, results)
    if run.args.push_to_hub:
        trainer.push_to_hub(**card)


@contextmanager
def _alone(run: Run[Any]) -> Iterator[None]:
    """Two processes do not make the same run: the lock ends with the process that holds it."""
    if run.args.process_index:  # the first of a launch holds it for all
        yield
        return
    Path(run.folder).mkdir(parents=True, exist_ok=True)
    lock = FileLock(run.folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(f"{run.folder}: another process makes this run: wait for it, or end it") from error
    try:
        yield
    finally:
        for name in (LOCK, PROGRESS):  # while it is held: after the release it may be another's
            (run.folder / name).unlink(missing_ok=True)
        lock.release()


@contextmanager
def _telling_of_the_hub() -> Iterator[None]:
    """Turns an HTTP library's error at the making of a repository, whatever its class, into one line."""
    try:
        yield
    except Exception as error:
        if type(error).__module__.split(".")[0] not in ("httpx", "httpx2", "requests"):
            raise
        raise ValueError(f"push_to_hub: the Hub cannot be reached ({one_line(error)}): leave it out") from error
