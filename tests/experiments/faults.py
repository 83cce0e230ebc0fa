"""A tiny run in a forked process, which dies or finds the disk full at a file operation of one's choice.

Forks of pytest's own process may wait for its threads; these are forks of one that has imported and made a run.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from metaxl_evo.experiments import curves
from metaxl_evo.experiments.arguments import RunsArguments
from metaxl_evo.experiments.command import run_here
from metaxl_evo.experiments.scores import Rate
from metaxl_evo.experiments.task import Task
from metaxl_evo.messages import one_line
from metaxl_evo.training import history
from metaxl_evo.training.arguments import MetaTrainingArguments
from metaxl_evo.training.durable import whole
from metaxl_evo.training.trainer import MetaTrainer
from tests.experiments.gated_task import Regression, Weights
from tests.processes import FORKSERVER

KILLED = 99
CREATES = ("open", "os.mkdir", "write", "half")  # for which a full disk has no room
NAMED = ("os.rename", "os.remove", "os.rmdir")
Rows = list[dict[str, Tensor]]


@dataclass
class Settings:
    data: str = ""


class LineTask(Task[Settings, dict[str, Rows]]):
    """Two groups of points, one of them wrong, whose weights are learned; dropout draws at every step."""

    settings = Settings
    units = {"error": ""}  # noqa: RUF012
    greater_is_better = False
    own_files = ("meta",)

    def load(self, settings: Settings, args: MetaTrainingArguments) -> dict[str, Rows]:
        slope = json.loads(Path(settings.data).read_text(encoding="utf-8"))
        draw = torch.Generator().manual_seed(args.seed)
        x, group = torch.randn(24, 3, generator=draw), torch.arange(24) % 2
        rows = [
            {"x": one, "y": slope * one.sum() * (1 - 2 * of), "group": of} for one, of in zip(x, group, strict=True)
        ]
        return {"train": rows[:16], "test": rows[16:]}

    def build_trainer(self, settings: Settings, args: MetaTrainingArguments, data: dict[str, Rows]) -> MetaTrainer:
        clean = [row for row in data["train"] if row["group"] == 0]
        torch.manual_seed(args.seed)
        module = Regression(nn.Sequential(nn.Dropout(0.2), nn.Linear(3, 1)), Weights())
        return MetaTrainer(module, args, train_dataset=data["train"], meta_dataset=clean)

    def score(self, trainer: MetaTrainer, settings: Settings, data: dict[str, Rows]) -> dict[str, Any]:
        batch = {key: torch.stack([row[key] for row in data["test"]]) for key in ("x", "y")}
        with torch.no_grad():
            return {"error": Rate.mean(trainer.model.eval().squares(batch))}  # type: ignore[operator]


class Fault(NamedTuple):
    """What happens at a file operation: `kill`, or from it on `full`."""

    kind: str
    at: int


class Disk:
    """Counts the file operations below a folder, and makes one of them fail.

    Writers that are not Python's (torch's, that of safetensors) are two: before the first byte, and half-way.
    """

    def __init__(self, folder: Path, fault: Fault | None):
        self.folder, self.fault = os.path.realpath(folder), fault
        self.operations: list[str] = []
        sys.addaudithook(self._heard)
        os.fsync = lambda fd: self._next("fsync")
        torch.save = self._watched(torch.save, 1)
        safetensors.torch.serialize_file = self._watched(safetensors.torch.serialize_file, 1)

    def _heard(self, event: str, args: Any) -> None:
        if event in NAMED or event == "os.mkdir" or (event == "open" and self._writes(args)):
            relative = event != "open" and args[-1] != -1  # to the folder that shutil is removing
            if relative or self._is_below(args[0]):
                self._next(event)

    @staticmethod
    def _writes(args: Any) -> bool:
        return isinstance(args[0], str | bytes | os.PathLike) and bool(
            args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        )

    def _is_below(self, path: Any) -> bool:
        return os.path.realpath(os.fsdecode(path)).startswith(self.folder)

    def _watched(self, write: Callable[..., Any], place: int) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            self._next("write")
            found = write(*args, **kwargs)
            if self._is_next("half"):
                os.truncate(args[place], os.path.getsize(args[place]) // 2)
            self._next("half")
            return found

        return watched

    def _is_next(self, kind: str) -> bool:
        if self.fault is None:
            return False
        past = len(self.operations) + 1 - self.fault.at
        return past == 0 if self.fault.kind == "kill" else past >= 0 and kind in CREATES

    def _next(self, kind: str) -> None:
        hit = self._is_next(kind)
        self.operations.append(kind)
        if hit and self.fault is not None:
            if self.fault.kind == "kill":
                os._exit(KILLED)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def train(folder: Path, data: Path, rate: float, resume: bool) -> None:
    """Four steps with two checkpoints, of which the last is kept."""
    args = MetaTrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        max_steps=4,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=1,
        logging_steps=1,
        learning_rate=rate,
        resume_from_checkpoint="latest" if resume else None,
        per_device_train_batch_size=4,
        per_device_meta_batch_size=4,
        meta_portion=1.0,
        disable_tqdm=True,
        report_to="none",
        dataloader_pin_memory=False,
    )
    run_here(LineTask(), RunsArguments(), Settings(str(data)), args)


@contextmanager
def quick_pictures() -> Iterator[None]:
    """matplotlib takes half a second."""

    def plot(rows: Any, file: Path) -> None:
        with whole(file) as draft:
            draft.write_bytes(b"a picture")

    with pytest.MonkeyPatch.context() as patch:
        for module in (curves, history):
            patch.setattr(module, "plot_history", plot)
        yield


class Ended(NamedTuple):
    """How a run ended: with an error of one line, or without; its file operations, in order."""

    error: str
    operations: list[str]


class Nursery:
    """A process that has made a run, and whose forks make others."""

    def __init__(self, folder: Path, data: Path):
        self._pipe, theirs = FORKSERVER.Pipe()
        self._process = FORKSERVER.Process(target=_serve, args=(folder, data, theirs))
        self._process.start()
        theirs.close()

    def run(
        self, folder: Path, data: Path, rate: float = 0.1, *, resume: bool, fault: Fault | None = None
    ) -> Ended | None:
        """How a run ended; None where it was killed."""
        self._pipe.send((folder, data, rate, resume, fault))
        assert self._pipe.poll(120)
        found: Ended | None = self._pipe.recv()
        return found

    def close(self) -> None:
        self._pipe.close()
        self._process.join()


def _serve(folder: Path, data: Path, pipe: Connection) -> None:
    torch.set_num_threads(1)
    with quick_pictures():
        train(folder, data, 0.1, resume=False)
    gc.collect()
    gc.freeze()  # accelerate collects garbage where a training begins; a fork would copy all that was imported
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        pipe.send(_forked(*job))


def _forked(folder: Path, data: Path, rate: float, resume: bool, fault: Fault | None) -> Ended | None:
    ear, mouth = os.pipe()
    child = os.fork()
    if not child:
        _run(folder, data, rate, resume, fault, mouth)
    os.close(mouth)
    with os.fdopen(ear, encoding="utf-8") as heard:
        text = heard.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == (0 if text else KILLED), code
    return Ended(*json.loads(text)) if text else None


def _run(folder: Path, data: Path, rate: float, resume: bool, fault: Fault | None, mouth: int) -> NoReturn:
    code = 1  # of an error that no script would make a line of
    try:
        disk, error = Disk(folder, fault), ""
        with quick_pictures():
            try:
                train(folder, data, rate, resume)
            except (ValueError, OSError) as raised:
                error = one_line(raised)
        os.write(mouth, json.dumps([error, disk.operations]).encode())
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)
