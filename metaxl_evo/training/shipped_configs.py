"""The settings files that come with the package: the folder `configs/`, whose files are named without a path."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from metaxl_evo.messages import unknown
from metaxl_evo.training.cli import SettingsError

SUFFIXES = (".yaml", ".yml", ".json")
PACKAGE = Path(__file__).parents[1]
ROOT = "configs"


def configs_folder() -> Path:
    """Within the package where it was installed, beside it in a checkout."""
    installed = PACKAGE / ROOT
    return installed if installed.is_dir() else PACKAGE.parent / ROOT


def find_config(named: str, room: str | None = None) -> Path:
    """The settings file of a path, or of a name: `metaxl_one_step`, `ner/metaxl_one_step`, `configs/ner/...yaml`.

    Args:
        room: the folder of `configs/` that is looked into first.

    Raises:
        SettingsError: for a name that none, or more than one, has.
    """
    given = Path(named).expanduser()
    inside = configs_folder() / Path(*given.parts[given.parts[:1] == (ROOT,) :])
    if given.is_file() or (given.suffix in SUFFIXES and not inside.exists()):
        return given  # where it is not there, read_config says so
    if given.suffix in SUFFIXES:
        return inside
    names = {f"{file.parent.name}/{file.stem}": file for file in shipped()}
    fitting = [name for name in names if name == named] or [name for name in names if name == f"{room}/{named}"]
    fitting = fitting or [name for name in names if name.partition("/")[2] == named]
    if len(fitting) > 1:
        raise SettingsError(f"--config {named}: say which: {', '.join(fitting)}")
    if not fitting:
        raise SettingsError(f"--config {named}: {unknown('settings file', named, names)}, or a path")
    return names[fitting[0]]


def shipped(room: str = "*") -> list[Path]:
    """Every settings file, or those of one folder, but for the profiles of `accelerate launch`."""
    return sorted(file for file in configs_folder().glob(f"{room}/*.yaml") if file.parent.name != "accelerate")


def described() -> Iterator[str]:
    """A line a settings file: its name, and how its comment begins."""
    for file in shipped():
        first = file.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
        yield f"{file.parent.name}/{file.stem:<28} {first}"


def launch_profile(named: str) -> Path:
    """A profile of `accelerate launch`, by path or name.

    Raises:
        SettingsError: where there is none.
    """
    if Path(named).is_file():
        return Path(named)
    profiles = {file.stem: file for file in configs_folder().glob("accelerate/*.yaml")}
    if named not in profiles:
        raise SettingsError(f"{unknown('accelerate_config', named, sorted(profiles))}, or a file")
    return profiles[named]
