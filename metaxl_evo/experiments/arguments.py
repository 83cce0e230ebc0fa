"""Settings of a command that makes several runs, and of a study."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from metaxl_evo.messages import unknown

ENGINES = ("local", "ray", "inline")
NAME = re.compile(r"[\w-][\w.-]*")
FILES = (".json", ".md", ".csv", ".png", ".html")
KEYS = ("run", "case", "seed")


@dataclass
class RunsArguments:
    """Which runs a command makes.

    Raises:
        ValueError: one line for the first value that cannot be.
    """

    runs: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "Name -> settings that this run has over all others (null: leave it out); the first is the "
            "baseline (default: one run)."
        },
    )
    cases: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "Name -> settings of a case (a language, a noise rate; null: leave it out), in which every run is "
            "made (default: the task's own, such as its target languages)."
        },
    )
    seeds: list[int] | None = field(
        default=None, metadata={"help": "Repetitions: every run is made with each of these seeds (default: seed)."}
    )
    check: bool = field(default=False, metadata={"help": "Run a few steps, print a verdict, write nothing."})

    def __post_init__(self) -> None:
        seeds = [0] if self.seeds is None else self.seeds
        if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0 or max(seeds) >= 2**32:
            raise ValueError(f"seeds must be different whole numbers of at least 0, below 2**32, not {seeds}")
        self.runs, self.cases = _named("runs", self.runs), _named("cases", self.cases)


def _named(what: str, given: dict[str, Any]) -> dict[str, Any]:
    """Without those that are left out, each a mapping under the name of a folder."""
    held = {name: settings for name, settings in given.items() if settings is not None}
    for name, settings in held.items():
        if not NAME.fullmatch(name):
            raise ValueError(f"{what}: {name!r} names a folder: use letters, digits, dots, - and _")
        if name.endswith(FILES):
            raise ValueError(f"{what}: {name!r} names a folder, beside files of such names: leave its ending out")
        if not isinstance(settings, dict):
            raise ValueError(f"{what}: {name} must be a mapping of settings, as in {{}}, not {settings!r}")
    return held


@dataclass
class StudyArguments(RunsArguments):
    """Methods x cases x seeds of one task, how they are made, and what is asked of them.

    Raises:
        ValueError: one line for the first value that cannot be, with the valid choices.
    """

    task: str = field(
        default="ner",
        metadata={
            "help": "As in metaxl-evo: ner, noisy_labels, rotation, weight_text, mix_text, ..., or file.py:Class."
        },
    )
    score: str | None = field(
        default=None, metadata={"help": "The test score that is compared (default: the task's)."}
    )
    baselines: list[str] | None = field(
        default=None, metadata={"help": "Runs that the others are compared with (default: the first)."}
    )
    margin: float | None = field(
        default=None,
        metadata={
            "help": "A difference whose interval lies within it is read as a tie; in the unit of the table, as 0.5 "
            "points of F1 (default: no tie is read)."
        },
    )
    only: list[str] | None = field(
        default=None,
        metadata={"help": "Make only these: run=NAME, case=NAME, seed=N; several of one are alternatives."},
    )
    engine: str = field(
        default="local",
        metadata={
            "help": "local: each run is a process of its own on this machine; ray: on a Ray cluster; inline: one "
            "after the other in this process."
        },
    )
    jobs: int | None = field(
        default=None,
        metadata={
            "help": "Runs side by side (default: one a GPU; without any, one; as many as fit on a Ray cluster)."
        },
    )
    threads: int | None = field(
        default=None, metadata={"help": "Threads of a run (default: the cores divided by jobs; on Ray, one)."}
    )
    plan: bool = field(
        default=False, metadata={"help": "Write plan.json, of which `metaxl-evo run` makes single runs, and stop."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.engine not in ENGINES:
            raise ValueError(unknown("engine", self.engine, ENGINES))
        for name in ("jobs", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if self.margin is not None and not 0 < self.margin < float("inf"):
            raise ValueError(f"margin must be above 0 and finite, not {self.margin}")
        for one in self.only or ():
            key, equals, name = one.partition("=")
            if key not in KEYS or not equals or not name:
                raise ValueError(f"only: {one!r} must be run=NAME, case=NAME or seed=N")
