"""What a run is made with, and what `results.json` says of it, whatever its task."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from metaxl_evo.messages import one_line
from metaxl_evo.training.arguments import MetaTrainingArguments
from metaxl_evo.training.checkpoint import DATA, as_named
from metaxl_evo.training.durable import whole

logger = logging.getLogger(__name__)

RESULTS = "results.json"
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


def finished_run(file: Path, settings: Mapping[str, Any], data: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The results of a run that is done already.

    Args:
        data: the fingerprints of its data.

    Raises:
        ValueError: where they were made with other settings or data than these.
    """
    results = read_results(file)
    require_same(file, made_of(results["settings"], results.get("data") or {}), made_of(settings, data or {}))
    logger.info("%s is finished: its results are kept", file.parent)
    return results


def made_of(settings: Mapping[str, Any], data: Mapping[str, str]) -> dict[str, Any]:
    """Settings and fingerprints of the data, as one mapping."""
    return {**settings, **{f"{name}{DATA}": fingerprint for name, fingerprint in data.items()}}


def require_same(place: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse what was made of other settings or data, as `made_of` has them.

    Raises:
        ValueError: naming them.
    """
    then = as_named(then, now)
    now = json.loads(json.dumps(now, default=str))
    changed = sorted(key for key in then.keys() | now.keys() if then.get(key) != now.get(key) and key not in OUTSIDE)
    settings = [key for key in changed if not key.endswith(DATA)]  # of which the choice of the data is one
    if changed:
        what = "settings" if settings else "data"
        raise ValueError(
            f"{place} was made with another {', '.join(settings or changed)}: give the {what} of that run, or another "
            "output_dir"
        )


def is_results(file: Path) -> bool:
    """Whether it is what `write_results` left, of one run or above several."""
    try:
        read_results(file)
    except (OSError, ValueError):
        return False
    return True


def read_results(file: Path) -> dict[str, Any]:
    """What `write_results` left: `test` and `run`, and the `settings` that it was made with.

    Raises:
        ValueError: for a file that holds something else.
    """
    with understood(file):
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if not all(isinstance(found[part], dict) for part in ("test", "settings", "run")):
            raise TypeError("no scores, settings or facts")
        if not all(isinstance(found.get(part, {}), dict) for part in ("data", "dev")):
            raise TypeError("no fingerprints, or no dev scores")
    return found


ENDLESS = (StopIteration, RecursionError)


@contextmanager
def understood(file: Path) -> Iterator[None]:
    """Around whatever reads a file that a run has left, which somebody may have edited.

    Raises:
        ValueError: one line, for all that goes wrong.
    """
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, *ENDLESS) as error:
        what = one_line(error) or type(error).__name__
        raise ValueError(f"{file} holds no results ({what}): remove it, and the run goes on") from error


def write_results(folder: Path, results: Mapping[str, Any]) -> None:
    """Write `results.json`: it says that the run is finished."""
    write_json(folder / RESULTS, results)


def write_json(file: Path, values: Mapping[str, Any]) -> None:
    """Write plain values, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole(file) as draft:
        draft.write_text(json.dumps(values, indent=2, default=str) + "\n", encoding="utf-8")


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
