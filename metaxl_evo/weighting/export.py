"""A learned mixture as the settings of the library that trains with it in the end."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from metaxl_evo.messages import unknown
from metaxl_evo.training.parser import parse_arguments
from metaxl_evo.weighting.mixture import read_shares
from metaxl_evo.weighting.sources import READERS, read_file

DIGITS = 6


@dataclass
class ExportArguments:
    """For which library, and where its data are.

    Raises:
        ValueError: for a library whose settings are not known here.
    """

    to: str = field(metadata={"help": "trl, axolotl or llamafactory."})
    data: str | None = field(
        default=None, metadata={"help": "The folder with a file a domain (default: that of the run)."}
    )

    def __post_init__(self) -> None:
        if self.to not in WRITERS:
            raise ValueError(unknown("to", self.to, WRITERS))


def export(argv: Sequence[str]) -> int:
    """Print the mixture of a run, a folder or its `mixture.csv`, as YAML."""
    if not argv or argv[0].startswith("-"):
        raise ValueError("export-mixture: name the run first, as in metaxl-evo export-mixture RUN --to trl")
    (settings,) = parse_arguments((ExportArguments,), argv[1:])
    print(exported(argv[0], settings), end="")
    return 0


def exported(run: str, settings: ExportArguments) -> str:
    """The YAML, with what has to be known of it in a comment.

    Raises:
        ValueError: one line for a run without a mixture, or a domain without a file.
    """
    shares = rounded(read_shares(run))
    comment, content = WRITERS[settings.to](shares, lambda: _files(run, settings, shares))
    return f"# {comment}\n{yaml.safe_dump(content, sort_keys=False, width=10**6, allow_unicode=True)}"


def rounded(shares: Mapping[str, float]) -> dict[str, float]:
    """Shares of six digits that still sum to 1: what is left goes to the largest."""
    found = {name: max(round(share, DIGITS), 10**-DIGITS) for name, share in shares.items()}
    largest = max(found, key=lambda name: found[name])
    found[largest] = round(1 - sum(share for name, share in found.items() if name != largest), DIGITS)
    return found


def _files(run: str, settings: ExportArguments, shares: Mapping[str, float]) -> dict[str, Path]:
    """Domain -> its file."""
    folder = Path(settings.data or _data_of(run)).expanduser()
    if not folder.is_dir():
        raise ValueError(f"data: {folder} is no folder with a file a domain: give one that has them")
    found = {file.stem: file.resolve() for file in sorted(folder.iterdir()) if file.suffix in READERS}
    for name in shares:
        if name not in found:
            raise ValueError(
                f"data: {folder} has no file of the domain {name}: write its texts there, or give a folder"
            )
    return {name: found[name] for name in shares}


def _data_of(run: str) -> str:
    place = Path(run).expanduser()
    file = (place if place.is_dir() else place.parent) / "results.json"
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["settings"]["data"])
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"data: {file} does not say where the data are: give --data FOLDER") from error


Files = Callable[[], dict[str, Path]]


def _trl(shares: Mapping[str, float], files: Files) -> tuple[str, dict[str, Any]]:
    held = [
        {"path": READERS[file.suffix][0], "data_files": str(file), "fraction": shares[name]}
        for name, file in files().items()
    ]
    return "trl: the first rows of each file, none twice; releases whose DatasetConfig has `fraction`", {
        "datasets": held
    }


def _axolotl(shares: Mapping[str, float], files: Files) -> tuple[str, dict[str, Any]]:
    """As many of the first rows of each file as make the shares without taking one twice."""
    found = files()
    rows = {name: len(read_file(file)) for name, file in found.items()}
    whole = min(rows[name] / shares[name] for name in rows)
    held = [
        {
            "path": str(file),
            "ds_type": READERS[file.suffix][0],
            "type": "completion",
            "split": f"train[:{max(1, round(whole * shares[name]))}]",
        }
        for name, file in found.items()
    ]
    return "axolotl: the first rows of each file, none twice; type is yours to choose", {"datasets": held}


def _llamafactory(shares: Mapping[str, float], files: Files) -> tuple[str, dict[str, Any]]:
    """Probabilities of names, which the user's dataset_info.json leads to files."""
    for name in shares:
        if "," in name:
            raise ValueError(f"domain {name!r}: LLaMA-Factory parts its names at commas: rename it")
    content = {
        "dataset": ",".join(shares),
        "mix_strategy": "interleave_under",
        "interleave_probs": ",".join(f"{share:.{DIGITS}f}" for share in shares.values()),
    }
    return "LLaMA-Factory: drawn by these probabilities; name the data sets in its dataset_info.json", content


WRITERS: dict[str, Callable[[Mapping[str, float], Files], tuple[str, dict[str, Any]]]] = {
    "trl": _trl,
    "axolotl": _axolotl,
    "llamafactory": _llamafactory,
}
