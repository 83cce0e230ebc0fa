"""The folder of a run, whatever its task: its settings, its results, and that nothing of the user's is lost."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from metaxl_evo.experiments.curves import CURVES, PICTURE
from metaxl_evo.experiments.scores import OUTCOMES
from metaxl_evo.messages import one_line
from metaxl_evo.training.arguments import MetaTrainingArguments
from metaxl_evo.training.checkpoint import as_named
from metaxl_evo.training.history import HISTORY

logger = logging.getLogger(__name__)

RESULTS = "results.json"
OWN_FILES = (
    *(RESULTS, "config.json", "model.safetensors", "README.md", "training_args.bin"),
    *(HISTORY, CURVES, PICTURE, OUTCOMES),
)
ALWAYS_NAMED = (
    "estimator",
    "estimator_kwargs",
    "learning_rate",
    "meta_learning_rate",
    "meta_portion",
    "seed",
    "meta_seed",
)
OUTSIDE = (  # settings that do not change the results
    *("output_dir", "resume_from_checkpoint", "check", "disable_tqdm", "report_to", "run_name", "project"),
    *(
        "logging_steps",
        "logging_strategy",
        "logging_first_step",
        "log_level",
        "meta_history",
        "use_cpu",
        "dataloader_pin_memory",
    ),
    *("push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo", "hub_token", "save_total_limit"),
)
EXTENDED = (  # settings with which a run that was cut off may go on, longer, or on other machines
    *("max_steps", "num_train_epochs", "eval_strategy", "eval_steps", "save_strategy", "save_steps"),
    *("per_device_train_batch_size", "per_device_eval_batch_size", "per_device_meta_batch_size"),
    *("gradient_accumulation_steps", "dataloader_num_workers"),
)


def refuse_another_run(folder: Path, resuming: bool, own_files: Iterable[str] = ()) -> None:
    """Nothing of the user's is overwritten.

    Args:
        own_files: names that a run of this task writes beyond those of any run.

    Raises:
        ValueError: where the folder holds files of the names that a run writes and this run does not resume it.
    """
    try:
        exists = folder.exists()
    except OSError as error:  # a name that is too long
        raise ValueError(f"output_dir cannot be made ({one_line(error)}): choose another") from error
    if exists and not folder.is_dir():
        raise ValueError(f"{folder} is a file: choose another output_dir")
    places = [folder, *(path for path in folder.glob("*") if path.is_dir())]  # a run of several targets has subfolders
    names = (*OWN_FILES, *own_files)
    signs = [sign for place in places for sign in (*(place / name for name in names), *place.glob("checkpoint-*"))]
    found = [str(sign.relative_to(folder)) for sign in signs if sign.exists()]
    if found and not resuming:
        raise ValueError(
            f"{folder} holds another run ({found[0]}): choose another output_dir, or set "
            "resume_from_checkpoint: latest"
        )


def finished_run(file: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The results of a run that is done already.

    Raises:
        ValueError: where they were made with other settings than these.
    """
    results = read_results(file)
    then = as_named(results["settings"], settings)
    now = json.loads(json.dumps(settings, default=str))
    changed = sorted(key for key in then.keys() | now.keys() if then.get(key) != now.get(key) and key not in OUTSIDE)
    if changed:
        raise ValueError(
            f"{file} was made with another {', '.join(changed)}: give the settings of that run, or another output_dir"
        )
    logger.info("%s is finished: its results are kept", file.parent)
    return results


def read_results(file: Path) -> dict[str, Any]:
    """What `write_results` left: `test` and `run`, and the `settings` that it was made with.

    Raises:
        ValueError: for a file that holds something else.
    """
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if not all(isinstance(found[part], dict) for part in ("test", "settings", "run")):
            raise TypeError("no scores, settings or facts")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} holds no results ({one_line(error)}): remove it, and the run goes on") from error
    return found


def write_results(folder: Path, results: Mapping[str, Any]) -> None:
    """Write `results.json`: it says that the run is finished."""
    write_json(folder / RESULTS, results)


def write_json(file: Path, values: Mapping[str, Any]) -> None:
    """Write plain values, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f"{file.name}.tmp")
    draft.write_text(json.dumps(values, indent=2, default=str) + "\n", encoding="utf-8")
    draft.replace(file)


def training_settings(args: MetaTrainingArguments) -> dict[str, Any]:
    """What a run is trained with: the estimator, and the training arguments off their defaults."""
    here = {"use_configured_state": True}  # fresh arguments would start the launch anew, as one process
    defaults = MetaTrainingArguments(output_dir=args.output_dir, accelerator_config=here).to_dict()
    found = {key: value for key, value in args.to_dict().items() if not key.startswith("_")}
    return {key: value for key, value in found.items() if value != defaults.get(key) or key in ALWAYS_NAMED}


def checkpoint_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a run's settings without which a checkpoint is not of this run."""
    return {key: value for key, value in settings.items() if key not in (*OUTSIDE, *EXTENDED)}


def hub_id(name: str, *made_here: str) -> str | None:
    """`name` where a card can link to it: not a folder or file, not one of the names of what is generated here."""
    return None if Path(name).expanduser().exists() or name in made_here else name
