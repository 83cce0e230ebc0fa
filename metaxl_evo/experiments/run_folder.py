"""The life of a run's folder: what it is, by its files, and what may be done in it (docs/run_folders.md)."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from enum import StrEnum
from itertools import product
from pathlib import Path
from socket import gethostname
from typing import Any

from accelerate.state import PartialState
from filelock import FileLock, Timeout
from transformers import TrainerCallback

from metaxl_evo.experiments.curves import CURVES, PICTURE
from metaxl_evo.experiments.folders import (
    RESULTS,
    checkpoint_settings,
    is_results,
    made_of,
    read_results,
    require_same,
    write_json,
)
from metaxl_evo.experiments.progress import PROGRESS
from metaxl_evo.experiments.scores import OUTCOMES
from metaxl_evo.messages import one_line
from metaxl_evo.training.checkpoint import MANIFEST, require_writable
from metaxl_evo.training.durable import DRAFTS
from metaxl_evo.training.history import HISTORY
from metaxl_evo.training.history import PICTURE as META_PICTURE

MARK, LOCK, HOLDER = "_run.json", "_lock", "_holder"  # which an upload leaves out
PASSING = {LOCK: "", HOLDER: r"process \d+ on .*|", PROGRESS: r"[\d.e-]*"}  # there while a run is made; what is in it
MODEL = ("config.json", "model.safetensors")
GLANCE = 0.3  # seconds: who only looks whether a folder is held lets go at once
ASIDE = (HISTORY, META_PICTURE, DRAFTS)  # of these nothing is lost, whatever run goes on
OWN_FILES = (RESULTS, *MODEL, "README.md", "training_args.bin", CURVES, PICTURE, OUTCOMES, *ASIDE)


class State(StrEnum):
    """What a folder is.

    `EMPTY` holds nothing of a run's names, `FOREIGN` something that no run of ours has left, `RUNNING` is held by a
    process; `INTERRUPTED` was begun, `FINISHED` has results, which `PUBLISHED` has uploaded.
    """

    EMPTY = "empty"
    FOREIGN = "foreign"
    RUNNING = "running"
    INTERRUPTED = "interrupted"
    FINISHED = "finished"
    PUBLISHED = "published"


def state_of(folder: Path, own_files: Iterable[str] = ()) -> State:
    """What the folder of one run is.

    Args:
        own_files: names that a run of this task writes beyond those of any run.
    """
    if _is_held(folder):
        return State.RUNNING
    if not _is_ours(folder):
        return State.FOREIGN if signs_in(folder, own_files) else State.EMPTY
    if not (folder / RESULTS).exists():
        return State.INTERRUPTED
    mark = Mark.read(folder)
    return State.PUBLISHED if mark is not None and mark.published is not None else State.FINISHED


def signs_in(folder: Path, own_files: Iterable[str] = ()) -> list[str]:
    """The files there, and one level below, that have the names of what a run writes."""
    names = [*OWN_FILES, *own_files, *([] if Mark.read(folder) else [MARK])]
    places = [folder, *(path for path in folder.glob("*") if path.is_dir() and path != folder / DRAFTS)]
    signs = (sign for place in places for sign in (*(place / name for name in names), *place.glob("checkpoint-*")))
    return [*_strangers(folder), *(str(sign.relative_to(folder)) for sign in signs if sign.exists())]


def _strangers(folder: Path) -> list[str]:
    """Files with the names of those that are there while a run is made, and that none has written."""
    return [name for name, form in PASSING.items() if not _has_form(folder / name, form)]


def _has_form(file: Path, form: str) -> bool:
    try:
        return re.fullmatch(form, file.read_text(encoding="utf-8")) is not None
    except (FileNotFoundError, NotADirectoryError):  # nor can there be one
        return True
    except (OSError, ValueError):  # a folder, or no text
        return False


def _is_ours(folder: Path) -> bool:
    """Whether a run was begun there; those of earlier versions left no mark, but sealed checkpoints and results."""
    return _has_checkpoint(folder) or Mark.read(folder) is not None or is_results(folder / RESULTS)


def _has_checkpoint(folder: Path) -> bool:
    return any((one / MANIFEST).exists() for one in folder.glob("checkpoint-*"))


# What may be done


def refuse_run(folder: Path, resuming: bool, own_files: Iterable[str] = ()) -> None:
    """Nothing of the user's, nor of another run, is overwritten by a run in this folder.

    Raises:
        ValueError: where the folder is foreign, above other runs, or holds a run that is made or not to be resumed.
    """
    found = _found(folder, own_files)
    refuse_held(folder)
    if not _is_single(folder) and (below := next(_runs_below(folder), None)):
        where = below.relative_to(folder)
        raise ValueError(f"{folder} holds several runs ({where}): choose another output_dir for a single one")
    if state_of(folder, own_files) is State.FOREIGN:
        raise _foreign(folder, found)
    if found and not resuming:
        raise _another(folder, found)


def refuse_held(folder: Path) -> None:
    """A run that is being made is left alone; of several processes the first one looks, which is to hold the folder.

    Raises:
        ValueError: naming the process that makes it.
    """
    if PartialState().is_main_process and _is_held(folder):
        raise _held(folder)


def refuse_inputs(folder: Path, places: Mapping[str, Any]) -> None:
    """Refuse a folder that is read from and would be written to.

    Args:
        places: setting -> what it names, which may be this folder.

    Raises:
        ValueError: naming the setting.
    """
    for name, text in places.items():
        with suppress(OSError, TypeError):  # nothing that is there
            if folder.samefile(Path(text).expanduser()):
                raise ValueError(
                    f"output_dir is {name} ({text}), which would be overwritten: choose another output_dir"
                )


def refuse_above(folder: Path, resuming: bool, own_files: Iterable[str] = ()) -> None:
    """The same for what stands above several runs, whose own folders `refuse_run` looks at.

    Raises:
        ValueError: where the folder holds files of the user's, a single run, or runs that are not to be resumed.
    """
    found = _found(folder, own_files)
    if _is_single(folder):
        raise ValueError(f"{folder} holds a single run: choose another output_dir for several")
    in_the_way = [sign for sign in found if "/" not in sign or not resuming]
    ours = is_results(folder / RESULTS) or (RESULTS not in found and any(_runs_below(folder)))
    if in_the_way and not ours:
        raise _foreign(folder, in_the_way)
    if found and not resuming:
        raise _another(folder, found)


def _is_single(folder: Path) -> bool:
    """Whether a single run was begun there: results that stand above several have the same form."""
    model = is_results(folder / RESULTS) and any((folder / name).exists() for name in MODEL)
    return model or _has_checkpoint(folder) or Mark.read(folder) is not None


def _runs_below(folder: Path) -> Iterator[Path]:
    """The runs in RUN/CASE/SEED, or less deep."""
    for depth, name in product((1, 2, 3), (MARK, RESULTS)):
        yield from (file.parent for file in folder.glob("*/" * depth + name) if _is_ours(file.parent))


def _found(folder: Path, own_files: Iterable[str]) -> list[str]:
    try:
        exists = folder.exists()
    except OSError as error:  # a name that is too long
        raise ValueError(f"output_dir cannot be made ({one_line(error)}): choose another") from error
    if exists and not folder.is_dir():
        raise ValueError(f"{folder} is a file: choose another output_dir")
    return signs_in(folder, own_files)


def _foreign(folder: Path, found: list[str]) -> ValueError:
    return ValueError(f"{folder} holds {found[0]}, and no run to resume: choose another output_dir")


def _another(folder: Path, found: list[str]) -> ValueError:
    return ValueError(
        f"{folder} holds another run ({found[0]}): choose another output_dir, or set resume_from_checkpoint: latest"
    )


# What a run writes first, and last


@dataclass(frozen=True)
class Mark:
    """What a run writes before anything else into a folder, which is its own from then on.

    Attributes:
        settings: what it is made with, plain values.
        data: the fingerprints of its data.
        published: the repository that holds all of it.
    """

    settings: Mapping[str, Any]
    data: Mapping[str, str]
    published: str | None = None

    @classmethod
    def read(cls, folder: Path) -> Mark | None:
        """None where there is none that a run has written."""
        try:
            found = json.loads((folder / MARK).read_text(encoding="utf-8"))
            mark = cls(**found)
        except (OSError, ValueError, TypeError, RecursionError):
            return None
        of_kind = isinstance(mark.settings, dict) and isinstance(mark.data, dict)
        return mark if of_kind and isinstance(mark.published, str | None) else None

    def write(self, folder: Path) -> None:
        write_json(folder / MARK, asdict(self))


def refuse_other(
    folder: Path, settings: Mapping[str, Any], data: Mapping[str, str], own_files: Iterable[str] = ()
) -> None:
    """Refuse to go on with what was begun with other settings or data, where something would be lost.

    Raises:
        ValueError: naming them.
    """
    mark = Mark.read(folder)
    if mark is not None and set(signs_in(folder, own_files)) - {*ASIDE}:
        then, now = (checkpoint_settings(made_of(*one)) for one in ((mark.settings, mark.data), (settings, data)))
        require_same(folder, then, now)


class Beginning(TrainerCallback):
    """Marks a folder as that of a run where its training begins: no refusal is to come, and nothing is saved yet."""

    def __init__(self, folder: Path, mark: Mark):
        self._folder, self._mark = folder, mark

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._mark.write(self._folder)


def note_published(folder: Path, repository: str) -> None:
    """Write down where all of a finished run is."""
    results = read_results(folder / RESULTS)
    Mark(results["settings"], results.get("data", {}), repository).write(folder)


# Who makes it


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Two processes do not make the same run: the lock ends with the process that holds it.

    Raises:
        ValueError: naming the process that holds it; for a folder that cannot be written, or with files of the user's.
    """
    require_writable(folder)
    if strangers := _strangers(folder):
        raise _foreign(folder, strangers)
    lock = FileLock(folder / LOCK, timeout=GLANCE)
    try:
        lock.acquire()
    except Timeout as error:
        raise _held(folder) from error
    try:
        with suppress(OSError):  # a full disk; what cannot be done without will say so
            (folder / HOLDER).write_text(f"process {os.getpid()} on {gethostname()}", encoding="utf-8")
        yield
    finally:
        for name in reversed(PASSING):  # while it is held: after the release they may be another's
            (folder / name).unlink(missing_ok=True)
        lock.release()


def _is_held(folder: Path) -> bool:
    try:
        there = (folder / LOCK).exists() and not _strangers(folder)
    except OSError:  # a name that is too long, which the look at the folder tells
        return False
    if not there:
        return False
    lock = FileLock(folder / LOCK, timeout=GLANCE)
    try:
        with lock:
            return False
    except Timeout:
        return True


def _held(folder: Path) -> ValueError:
    holder = ""
    with suppress(OSError):  # just being written
        holder = (folder / HOLDER).read_text(encoding="utf-8")
    return ValueError(f"{folder}: {holder or 'another process'} makes this run: wait for it, or end it")
