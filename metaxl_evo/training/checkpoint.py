"""Checkpoints: complete when their manifest stands, resumed by the run that they are of, lost to no failed save."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_pt_utils import safe_globals
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from metaxl_evo.bilevel.tree import Tree
from metaxl_evo.estimators import Estimator
from metaxl_evo.messages import first_line
from metaxl_evo.models.bilevel_module import BilevelModule
from metaxl_evo.training.arguments import NO_ESTIMATOR, MetaTrainingArguments
from metaxl_evo.training.durable import draft_of, whole

logger = logging.getLogger(__name__)

MANIFEST, META_STATE = "manifest.json", "meta_state.pt"
META_SHARE = "meta_state_{}.pt"  # of each process, what an estimator remembers of its own rows
LATEST = ("latest", "true")
NEEDED = (TRAINER_STATE_NAME, OPTIMIZER_NAME, SCHEDULER_NAME, META_STATE)
FORMER_DEFAULTS = {  # which runs of earlier versions left unsaid
    "meta_portion": 0.5,
    "label_scheme": "iob2",
    "ignore_mismatched_sizes": False,
    "trust_remote_code": False,
    "train_split": "train",
    "test_split": "test",
    "model_name_or_path": None,
    "validation_size": None,
    "validation_split": None,
    "imbalance_factor": None,
    "meta_precision": "float32",
    "meta_last": None,
    "meta_learning_rates": None,
    "max_grad_value": None,
}
LATER_FIELDS = {"differences": "central"}  # of estimators, left unsaid at these values as in earlier manifests
DATA = " data"  # behind the name of a part of the data, whose fingerprint this is
ADVICE = "resume from an earlier checkpoint, or start anew in another output_dir"


# Before training: which one


def find_checkpoint(wanted: str | bool | None, output_dir: str | Path) -> str | None:
    """The checkpoint folder to resume from, every file of it verified; None to start anew.

    Args:
        wanted: a checkpoint folder; `latest` for the newest complete one of `output_dir`, anew where there is none;
            True for the newest, which must exist; None or False to start anew.

    Raises:
        ValueError: naming the file that is missing or damaged, and what to do.
    """
    if wanted is None or wanted is False:
        return None
    if str(wanted).lower() not in LATEST:
        checkpoint = Path(str(wanted))
        if not checkpoint.is_dir():
            raise ValueError(
                f"resume_from_checkpoint: {wanted} is not a folder: give a checkpoint-N folder, or `latest`"
            )
        _require_resumable(checkpoint)
        return str(checkpoint)
    found = _newest_resumable(Path(output_dir))
    if found is None and wanted is True:
        raise ValueError(f"{output_dir} holds no complete checkpoint: leave resume_from_checkpoint out to start anew")
    if found is None:
        logger.warning("%s holds no complete checkpoint: the run starts at step 0", output_dir)
    return found


def _newest_resumable(folder: Path) -> str | None:
    """The newest complete checkpoint; those whose save was cut off, or that are damaged, are named and passed over."""
    damaged: list[ValueError] = []
    level = logging.INFO
    for checkpoint in checkpoints_in(folder):
        try:
            _require_resumable(checkpoint)
        except ValueError as error:
            level = logging.WARNING
            logger.log(level, "%s", error)
            if (checkpoint / MANIFEST).exists():
                damaged.append(error)
        else:
            logger.log(level, "the run goes on from %s", checkpoint)
            return str(checkpoint)
    if damaged:  # a save that was cut off leaves nothing to lose, these did
        raise damaged[0]
    return None


def _require_resumable(checkpoint: Path) -> None:
    require_whole(checkpoint)
    for name in NEEDED:
        if not (checkpoint / name).is_file():
            raise ValueError(f"{checkpoint / name} is missing (save_only_model writes none): {ADVICE}")


def require_whole(checkpoint: Path) -> dict[str, Any]:
    """Verify every file that the manifest lists; returns the manifest.

    Raises:
        ValueError: for a save that was cut off, or a file that is missing or not what was written.
    """
    manifest = _read_manifest(checkpoint)
    for name, written in manifest["files"].items():
        file = checkpoint / name
        if not file.is_file():
            raise ValueError(f"{file} is missing, though the save was complete: {ADVICE}")
        if file.stat().st_size != written["size"]:
            raise _damaged(file, f"{file.stat().st_size} bytes where {written['size']} were written")
        if _sha256(file) != written["sha256"]:
            raise _damaged(file, f"its SHA-256 is not that of {MANIFEST}")
    return manifest


def require_same(checkpoint: str | Path, made_by: Mapping[str, Any], processes: int) -> None:
    """Refuse the checkpoint of another run; another number of processes is a warning, since all but the bits go on.

    Args:
        made_by: `made_by` of the run that resumes.

    Raises:
        ValueError: saying what differs.
    """
    manifest = _read_manifest(Path(checkpoint))
    then = as_named(manifest["made_by"], made_by)
    differences = [
        f"{what} ({_short(then.get(what))} there, {_short(made_by.get(what))} here)"
        for what in dict.fromkeys([*made_by, *then])
        if then.get(what) != made_by.get(what)
    ]
    if differences:
        raise ValueError(
            f"{checkpoint} was made with another {', '.join(differences)}: give the settings of that run, or start "
            "anew in another output_dir"
        )
    if manifest["processes"] != processes:
        logger.warning(
            "%s is of a run on %d process(es), this one has %d: it goes on, but not bit by bit as it would have",
            *(checkpoint, manifest["processes"], processes),
        )


def made_by(
    model: BilevelModule, args: MetaTrainingArguments, run_settings: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What makes a run the one that a checkpoint belongs to, as plain JSON values; `run_settings` are the task's."""
    estimator = args.make_estimator()
    labels = getattr(getattr(model.base, "config", None), "id2label", None) or {}
    settings: dict[str, Any] = json.loads(json.dumps(dict(run_settings or {}), default=str))
    return settings | {
        "estimator": NO_ESTIMATOR if estimator is None else _described(estimator),
        "meta_optim": None if estimator is None else args.meta_optim,
        "meta_optim_kwargs": None if estimator is None else args.meta_optim_kwargs or None,
        "optimiser": args.optimizer_class or str(getattr(args.optim, "value", args.optim)),
        "optimizer_kwargs": args.optimizer_kwargs or None,
        "episode_length": args.episode_length,
        "episode_reset": args.episode_reset,
        "task": type(model).__name__,
        "base model": type(model.base).__name__.removeprefix("FSDP"),  # of `fully_shard`
        "labels": [labels[number] for number in sorted(labels)],
        "base parameters": _shapes(model.base_parameters()),
        "meta parameters": _shapes(model.meta_parameters()),
    }


def _described(estimator: Estimator) -> str:
    text = repr(estimator)
    for name, value in LATER_FIELDS.items():
        text = text.replace(f", {name}={value!r}", "")
    return text


def as_named(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of an earlier run, with those that `now` names and that one left at a default of its time."""
    former = {key: value for key, value in FORMER_DEFAULTS.items() if key in now}
    if not any(key.endswith(DATA) for key in then):  # its data were not written down
        former |= {key: value for key, value in now.items() if key.endswith(DATA)}
    return former | dict(then)


def require_writable(folder: str | Path, setting: str = "output_dir") -> None:
    """Refuse a folder, made where there is none, in which no file can be written.

    Raises:
        ValueError: with the setting that asks for it and the reason.
    """
    for place in (Path(folder), *Path(folder).parents):
        if place.is_symlink() and not place.exists():
            raise ValueError(f"{setting}: {place} is a link to {place.readlink()}, which is not there: choose another")
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"a byte, for a disk that is full")
    except OSError as error:
        raise ValueError(f"{setting}: {folder} cannot be written ({first_line(error)}): choose another one") from error


# Saving


class SaveFailed(OSError):
    """A save that failed; the message says what is intact."""


@contextmanager
def saving(folder: str | Path) -> Iterator[None]:
    """Around the writing of a folder.

    Raises:
        SaveFailed: one line for what the operating system or the writers of torch, safetensors and tokenizers raised.
    """
    folder = Path(folder)
    try:
        yield
    except SaveFailed:
        raise
    except Exception as error:
        if not isinstance(error, OSError | RuntimeError | SafetensorError) and type(error) is not Exception:
            raise  # tokenizers has no class of its own
        others = [one for one in (*checkpoints_in(folder), *checkpoints_in(folder.parent)) if one != folder]
        intact = next((one for one in others if (one / MANIFEST).is_file()), None)
        kept = "there is no earlier checkpoint" if intact is None else f"{intact} is intact"
        free = shutil.disk_usage(next(one for one in (folder, *folder.absolute().parents) if one.exists())).free >> 20
        reason = f"{first_line(error)}; {free} MiB are free" if free else "the disk is full"  # writers word it oddly
        raise SaveFailed(
            f"{folder} could not be written ({reason}): {kept}; mend that, then set resume_from_checkpoint: latest"
        ) from error


@contextmanager
def discarding(checkpoint: Path) -> Iterator[None]:
    """Around the making of a checkpoint: where it fails, what was written of it makes room."""
    try:
        yield
    except SaveFailed:
        shutil.rmtree(checkpoint, ignore_errors=True)
        raise


def unseal(checkpoint: Path) -> None:
    """Before a folder is written over: it is not complete any more."""
    (checkpoint / MANIFEST).unlink(missing_ok=True)


def seal(checkpoint: Path, made_by: Mapping[str, Any], processes: int) -> None:
    """Complete a checkpoint: the manifest of all its files, which are on the disk before it is."""
    unseal(checkpoint)
    left = draft_of(checkpoint / MANIFEST)  # maybe, by a save that was cut off in it
    files = {
        file.relative_to(checkpoint).as_posix(): {"size": file.stat().st_size, "sha256": _sha256(file, sync=True)}
        for file in sorted(path for path in checkpoint.rglob("*") if path.is_file() and path != left)
    }
    content = {"made_by": dict(made_by), "processes": processes, "files": files}
    with whole(checkpoint / MANIFEST) as draft:  # its name too is on the disk before an older checkpoint goes
        draft.write_text(json.dumps(content | {"sha256": _sha256_of(content)}, indent=2), encoding="utf-8")


def rotate(newest: Path, limit: int | None, best: str | None) -> None:
    """Delete checkpoints beyond `limit`, incomplete ones before old ones, never the newest nor the best."""
    if not limit or limit < 0:
        return
    kept = {newest, Path(best or newest)}
    others = [one for one in checkpoints_in(newest.parent) if one not in kept]
    others.sort(key=lambda one: (one / MANIFEST).is_file(), reverse=True)
    for old in others[max(limit - len(kept), 0) :]:
        with suppress(OSError):
            unseal(old)  # first, lest a half deleted one passes for complete
        shutil.rmtree(old, ignore_errors=True)


def remove_incomplete(folder: Path) -> None:
    """Delete what a killed save, or a killed deletion, has left of checkpoints."""
    for checkpoint in checkpoints_in(folder):
        if not (checkpoint / MANIFEST).exists():
            shutil.rmtree(checkpoint, ignore_errors=True)


# Loading


@contextmanager
def loading(checkpoint: str | Path) -> Iterator[None]:
    """Around the loading of a checkpoint's states, of which none may be code.

    Raises:
        ValueError: one line that names the file that cannot be read, or says why the states do not fit.
    """
    try:
        yield
    except Exception as error:
        for file in sorted(Path(checkpoint).glob("*.pt*")):
            read_tensors(file)
        raise ValueError(f"{checkpoint} does not fit this run ({first_line(error)}): {ADVICE}") from error


def read_tensors(file: Path) -> Any:
    """What a file of tensors and plain values holds, on the CPU; no code of a pickle is run.

    Raises:
        ValueError: for a file that is damaged, or holds anything else.
    """
    try:
        with safe_globals():  # the containers of numpy's random state
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch each have their own kind
        raise ValueError(
            f"{file} cannot be read, or holds more than tensors and plain values ({type(error).__name__}): {ADVICE}"
        ) from error


# The manifest


def _read_manifest(checkpoint: Path) -> dict[str, Any]:
    file = checkpoint / MANIFEST
    if not file.is_file():
        raise ValueError(f"{checkpoint} has no {MANIFEST} (a save that was cut off): {ADVICE}")
    try:
        manifest: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        digest = manifest.pop("sha256")
        if not _has_form(manifest):
            raise TypeError("another form")
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(file, type(error).__name__) from error
    if digest != _sha256_of(manifest):
        raise _damaged(file, "its own SHA-256 is another")
    return manifest


def _has_form(manifest: Mapping[str, Any]) -> bool:
    """Whether the fields are there: one that was signed by hand may lack any."""
    files = manifest["files"].values()
    sized = all(isinstance(one["size"], int) and isinstance(one["sha256"], str) for one in files)
    return sized and isinstance(manifest["made_by"], dict) and isinstance(manifest["processes"], int)


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoint folders there, the newest first."""
    named = {path: path.name.rpartition("-")[2] for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")}
    found = {path: int(number) for path, number in named.items() if number.isascii() and number.isdigit()}
    return sorted(found, key=lambda path: found[path], reverse=True)


def _sha256(file: Path, *, sync: bool = False) -> str:
    with file.open("rb") as opened:
        if sync:
            os.fsync(opened.fileno())
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _sha256_of(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _shapes(leaves: Tree) -> str:
    """`3 tensors of 17 numbers (1a2b3c4d)`; the digest is of their names and shapes."""
    shapes = {name: list(leaf.shape) for name, leaf in leaves.items()}
    size = sum(leaf.numel() for leaf in leaves.values())
    return f"{len(leaves)} tensors of {size} numbers ({_sha256_of(shapes)[:8]})"


def _damaged(file: Path, how: str) -> ValueError:
    return ValueError(f"{file} is damaged or truncated ({how}): {ADVICE}")


def _short(value: Any) -> str:
    if isinstance(value, list):
        value = f"{len(value)}: {', '.join(map(str, value))}"
    return text if len(text := str(value)) <= 300 else f"{text[:297]}..."
