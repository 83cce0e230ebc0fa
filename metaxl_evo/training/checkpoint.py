"""Which checkpoint a run resumes from, and whether its files are whole: asked before training begins."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from metaxl_evo.training.trainer import META_STATE

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
        found: str | None = str(wanted)
    else:
        found = get_last_checkpoint(str(output_dir)) if Path(output_dir).is_dir() else None
    if found is not None:
        require_whole(Path(found))
    return found


def require_whole(checkpoint: Path) -> None:
    """Look into every file of a checkpoint without loading it.

    Raises:
        ValueError: for a file that is missing, truncated or not what its name says.
    """
    advice = "resume from an earlier checkpoint, or start anew in another output_dir"
    for name in NEEDED:
        if not (checkpoint / name).is_file():
            raise ValueError(f"{checkpoint / name} is missing (save_only_model leaves such files out): {advice}")
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
