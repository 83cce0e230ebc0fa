"""Which checkpoint a run resumes from, and whether its files are whole: asked before training begins."""

from __future__ import annotations

import json
import logging
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME

from metaxl_evo.training.trainer import META_STATE

logger = logging.getLogger(__name__)

LATEST = ("latest", "true")
NEEDED = (TRAINER_STATE_NAME, OPTIMIZER_NAME, SCHEDULER_NAME, META_STATE)


def find_checkpoint(wanted: str | None, output_dir: str | Path) -> str | None:
    """The checkpoint folder to resume from; None to start anew, which `latest` also does where there is no checkpoint.

    Raises:
        ValueError: naming the file that is missing or damaged, and what to do.
    """
    if wanted is None:
        return None
    if str(wanted).lower() not in LATEST:
        if not Path(wanted).is_dir():
            raise ValueError(
                f"resume_from_checkpoint: {wanted} is not a folder: give a checkpoint-N folder, or `latest`"
            )
        require_whole(Path(wanted))
        return str(wanted)
    return _newest_whole(Path(output_dir))


def _newest_whole(folder: Path) -> str | None:
    """The newest complete checkpoint; newer ones that a crash left incomplete are named in the log and passed over."""
    checkpoints = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    checkpoints.sort(key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    failures: list[ValueError] = []
    for checkpoint in checkpoints:
        try:
            require_whole(checkpoint)
        except ValueError as error:
            logger.warning("%s", error)
            failures.append(error)
        else:
            return str(checkpoint)
    if failures:
        raise failures[0]
    return None


def require_whole(checkpoint: Path) -> None:
    """Look into every file of a checkpoint without loading it.

    Raises:
        ValueError: for a file that is missing, truncated or not what its name says.
    """
    advice = "resume from an earlier checkpoint, or start anew in another output_dir"
    for name in NEEDED:
        if not (checkpoint / name).is_file():
            raise ValueError(f"{checkpoint / name} is missing (a save that was cut off, or save_only_model): {advice}")
    for file in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        try:
            _look_into(file)
        except (OSError, ValueError, SafetensorError, zipfile.BadZipFile) as error:
            raise ValueError(f"{file} is damaged or truncated ({type(error).__name__}): {advice}") from error


def _look_into(file: Path) -> None:
    if file.suffix == ".json":
        json.loads(file.read_text(encoding="utf-8"))
    elif file.suffix == ".safetensors":
        with safe_open(file, framework="pt"):
            pass
    elif file.suffix in (".pt", ".pth"):
        with zipfile.ZipFile(file):  # whose table of contents is at the end
            pass
